"""The certificate of a file: what it claims of the network in it, and the digest that finds an edited one.

It is one JSON text in the metadata of a safetensors file, beside the edits; its digest is over that text, the
edits and all tensors. What is not known is not in the text, and neither is the time of day, so that the same
run gives the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import snows
from snows.networks.edits import Edit
from snows.results.claims import Judged, Timed, WeightClaim
from snows.results.contents import Contents, others_in, pattern_of, zeros_of
from snows.results.origin import Input, Origin, macs
from snows.results.records import read
from snows.results.storage import digest, read_file, write_tensors

VERSION = 1
KEY, SEAL = "certificate", "certificate_sha256"


@dataclass(frozen=True)
class Certificate:
    """Hold what a file claims.

    Attributes:
        layers: a line for each weight with zeros, or that was larger.
        zeros: in all weights.
        bytes: of all tensors in the file.
        parameters: of the network, a packed weight's with its zeros.
        snows, torch: versions that wrote it.
        version: of the certificate's format.
        others: tensors in the file that are no parameters, or that are a parameter's second name.
        architecture, dense, data, sample: what the network was pruned from, see `Origin`.
        macs: multiplications of one sample, those with zeros too.
        judged: on images.
        timed: on machines.
    """

    rows: ClassVar[dict[str, type]] = {
        "layers": WeightClaim,
        "judged": Judged,
        "timed": Timed,
        "sample": Input,
    }
    layers: list[WeightClaim]
    zeros: int
    bytes: int
    parameters: int
    snows: str
    torch: str
    version: int = VERSION
    others: list[str] = field(default_factory=list)
    architecture: str = ""
    dense: str = ""
    data: str = ""
    sample: list[Input] = field(default_factory=list)
    macs: int = 0
    judged: list[Judged] = field(default_factory=list)
    timed: list[Timed] = field(default_factory=list)

    @classmethod
    def of(
        cls, net: nn.Module, given: Contents, patterns: Mapping[str, str], timed: Iterable[Timed] = ()
    ) -> Certificate:
        """Measure what a file will claim.

        Args:
            net: the network.
            given: what the file will hold.
            patterns: that weights are known to follow, by name.
            timed: what was measured.
        """
        origin, kept, claims = Origin.beside(net), given.kept(), []
        weights, _ = given.weights()
        smaller = {*kept, *given.factors}
        for name, weight in weights.items():
            zeros = zeros_of(weight)
            if zeros or name in smaller:
                pattern = pattern_of(weight, patterns.get(name, ""))
                claims.append(WeightClaim(name, tuple(weight.shape), zeros, pattern, kept.get(name, "")))
        return cls(
            layers=claims,
            zeros=sum(map(zeros_of, weights.values())),
            bytes=given.nbytes,
            parameters=given.parameters,
            snows=snows.__version__,
            torch=torch.__version__,
            others=list(given.others),
            architecture=origin.architecture,
            dense=origin.tensors,
            data=origin.data,
            sample=origin.sample,
            macs=macs(net, origin.sample),
            timed=list(timed),
        )

    @property
    def origin(self) -> Origin:
        """What the network was pruned from."""
        return Origin(self.architecture, self.dense, self.data, self.sample)

    def text(self) -> str:
        """Write it as JSON, without what is not known."""
        return json.dumps({"version": self.version, **_known(self)}, sort_keys=True)

    @classmethod
    def read(cls, path: Path, text: str) -> Certificate:
        """Read what `text` wrote.

        Args:
            path: of the file, for the error.
            text: the JSON.

        Raises:
            ValueError: it is damaged, or of a newer format.
        """
        try:
            content = json.loads(text)
            version = content.get("version") if isinstance(content, dict) else None
            if type(version) is int and version > VERSION:
                raise ValueError(f"it has format {version}, this snows reads up to {VERSION}")
            return read(cls, cls.rows, text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"verify: the certificate of {path} cannot be read ({error})") from error


def _known(row: Any) -> dict[str, Any]:
    """Return the fields of a dataclass that say something."""
    found = {}
    for x in fields(row):
        value, usual = getattr(row, x.name), x.default
        if isinstance(value, list):
            value = [_known(y) if hasattr(y, "__dataclass_fields__") else y for y in value]
            usual = MISSING if x.default_factory is MISSING else []
        if value != value or (usual is not MISSING and value == usual):
            continue
        found[x.name] = value
    return found


# ---------------------------------------------------------------- in a file


def write_certified(
    path: Path,
    net: nn.Module,
    tensors: Mapping[str, Tensor],
    edits: Sequence[Edit],
    metadata: Mapping[str, str],
    patterns: Mapping[str, str] | None = None,
    timed: Iterable[Timed] = (),
    asked: str = "out",
) -> None:
    """Write a network's tensors as safetensors, with a certificate.

    Args:
        path: of the file.
        net: the network.
        tensors: its state.
        edits: that the file brings.
        metadata: that describes them.
        patterns: that weights are known to follow, by name.
        timed: what was measured.
        asked: the argument that named the path, or the function; the error begins with it.

    Raises:
        ValueError: the file cannot be written.
    """
    given = Contents(tensors, edits, others_in(net, tensors))
    text = Certificate.of(net, given, patterns or {}, timed).text()
    write_tensors(path, tensors, {**metadata, **_sealed(tensors, metadata, text)}, asked)


def seal(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], text: str) -> str:
    """Return the digest of a certificate's text, the edits beside it and all tensors."""
    return digest(dict(sorted(tensors.items())), metadata.get("snows", ""), text)


def _sealed(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], text: str) -> dict[str, str]:
    # other libraries want to be told that the tensors are PyTorch's wherever there is metadata
    return {"format": "pt", KEY: text, SEAL: seal(tensors, metadata, text)}


def amend(path: Path, **known: Any) -> None:
    """Add to the certificate of a file, which is written whole or not at all.

    Args:
        path: of the file.
        known: fields of `Certificate`.

    Raises:
        ValueError: the file has no certificate, or was edited; or it cannot be written.
    """
    tensors, metadata = read_file(path, KEY, "verify")
    if KEY not in metadata or seal(tensors, metadata, metadata[KEY]) != metadata.get(SEAL):
        raise ValueError(
            f"expected {path} to have the certificate that it was written with, got none or a changed file; "
            "nothing was added to it"
        )
    text = replace(Certificate.read(path, metadata[KEY]), **known).text()
    write_tensors(path, tensors, {**metadata, **_sealed(tensors, metadata, text)})


def origin_in(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Origin:
    """Read what a file says of where its network came from; empty if it says nothing, or was changed."""
    if KEY not in metadata or seal(tensors, metadata, metadata[KEY]) != metadata.get(SEAL):
        return Origin()
    try:
        return Certificate.read(path, metadata[KEY]).origin
    except ValueError:  # of a newer format
        return Origin()


def origin_at(path: Path) -> Origin:
    """Read what any file of weights says of where its network came from."""
    try:
        return origin_in(path, *read_file(path, KEY, "load"))
    except ValueError:  # a pickled checkpoint, say
        return Origin()
