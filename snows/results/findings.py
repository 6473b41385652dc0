"""The claims of a file beside what was found, and all that the file alone tells."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

from rich.table import Table
from torch import Tensor

from snows.results.certificate import KEY, SEAL, Certificate, seal
from snows.results.claims import Judged, Timed, WeightClaim
from snows.results.contents import Contents, obeys, pattern_of, zeros_of
from snows.results.formats import edits_in
from snows.results.storage import read_file
from snows.results.tables import add_row, render

THOUSAND = 1000  # of so many images, or of fewer, one may be told apart on another machine
DIVERGENCE = 0.01  # of its size
ROUNDING = 1e-7  # of a divergence
MACS = "MACs of one sample, zeros among them"
HOLDS, FAILS = "holds", "does not hold"


@dataclass(frozen=True)
class Finding:
    """Hold one claim beside what was found.

    Attributes:
        of: what the claim is about.
        claim: what the certificate says.
        found: what was measured; empty where nothing was.
        verdict: "holds", "does not hold", or why it was not checked.
    """

    of: str
    claim: str
    found: str
    verdict: str


@dataclass(frozen=True)
class Verification:
    """Hold what became of all claims of a file.

    Attributes:
        certificate: of the file.
        findings: a line for each claim.
    """

    certificate: Certificate
    findings: list[Finding] = field(default_factory=list)

    @property
    def holds(self) -> bool:
        """Whether no claim about the file was found not to hold; one that was not checked counts as held."""
        return not any(x.verdict == FAILS for x in self.findings)

    def table(self) -> Table:
        """Make the table of claims."""
        table = Table(pad_edge=False)
        for heading in ("", "claim", "finding", "verdict"):
            table.add_column(heading, overflow="fold")
        for x in self.findings:
            add_row(table, x.of, x.claim, x.found, x.verdict)
        return table

    def summary(self) -> str:
        """Say in a sentence what came of it."""
        held, failed = (sum(x.verdict == verdict for x in self.findings) for verdict in (HOLDS, FAILS))
        left = sum(x.verdict.startswith(unchecked("")) for x in self.findings)
        differ = len(self.findings) - held - failed - left
        times = f", times that differ: {differ}" if differ else ""
        return (
            f"{held} claims hold, {failed} do not, {left} not checked{times}; written by snows "
            f"{self.certificate.snows} with torch {self.certificate.torch}"
        )

    def __str__(self) -> str:
        return "\n".join([render(self.table(), width=160), self.summary()])


@dataclass(frozen=True)
class Claims:
    """Hold a file's tensors, what its metadata says, and its certificate."""

    path: Path
    contents: Contents
    metadata: Mapping[str, str]
    certificate: Certificate

    @classmethod
    def read(cls, path: Path) -> Claims:
        """Read a file.

        Raises:
            ValueError: it has no certificate, or its metadata cannot be read.
        """
        tensors, metadata = read_file(path, KEY, "verify")
        if KEY not in metadata:
            raise ValueError(
                f"verify: {path} has no certificate; it was written by an older snows or by another program, "
                "so that there is nothing to verify"
            )
        certificate = Certificate.read(path, metadata[KEY])
        edits = edits_in(path, metadata["snows"]) if "snows" in metadata else []
        return cls(path, Contents(tensors, edits, frozenset(certificate.others)), metadata, certificate)

    def findings(self) -> Iterator[Finding]:
        """Check what the file alone tells."""
        claims, contents = self.certificate, self.contents
        found = seal(contents.tensors, self.metadata, self.metadata[KEY])
        yield same("digest of certificate and tensors", self.metadata.get(SEAL, ""), found)
        weights, broken = contents.weights()
        for claim in claims.layers:
            if claim.name in broken:
                yield Finding(claim.name, _of_weight(claim), broken[claim.name], FAILS)
            else:
                yield self._weight(claim, weights.get(claim.name))
        yield same("zeros", claims.zeros, sum(map(zeros_of, weights.values())))
        yield same("bytes of all tensors", claims.bytes, contents.nbytes)
        yield same("parameters", claims.parameters, contents.parameters)
        count, problems = contents.misfits()
        if count:
            sizes = f"{count} sizes of tensors as the kept indices say"
            yield Finding("kept indices", sizes, "; ".join(problems) or sizes, FAILS if problems else HOLDS)

    def _weight(self, claim: WeightClaim, weight: Tensor | None) -> Finding:
        if weight is None:
            return Finding(claim.name, _of_weight(claim), "there is no such weight", FAILS)
        pattern = claim.pattern if obeys(weight, claim.pattern) else claim.pattern and pattern_of(weight)
        kept = self.contents.kept().get(claim.name, "")
        found = WeightClaim(claim.name, tuple(weight.shape), zeros_of(weight), pattern, kept)
        return Finding(claim.name, _of_weight(claim), _of_weight(found), HOLDS if found == claim else FAILS)

    def unchecked(self, why: str) -> Iterator[Finding]:
        """List the claims that need a network, or images."""
        for of, claim in (
            ("dense network: architecture", self.certificate.architecture[:12]),
            ("dense network: tensors", self.certificate.dense[:12]),
            (MACS, f"{self.certificate.macs:,}" if self.certificate.macs else ""),
        ):
            if claim:
                yield Finding(of, claim, "", unchecked(why))
        yield from chain(self.data(), self.unjudged(why), self.untimed(why))

    def data(self) -> Iterator[Finding]:
        """List what is claimed of the calibration data."""
        if self.certificate.data:
            why = "which images it was pruned with cannot be told from the file"
            yield Finding("calibration data", self.certificate.data[:12], "", unchecked(why))

    def unjudged(self, why: str) -> Iterator[Finding]:
        """List what is claimed on images."""
        for judged in self.certificate.judged:
            for of, claim, _ in scores_of(judged, judged):
                yield Finding(f"{of}, {images_of(judged)}", claim, "", unchecked(why))

    def untimed(self, why: str) -> Iterator[Finding]:
        """List the times that are claimed."""
        for timed in self.certificate.timed:
            yield Finding(f"milliseconds, {place_of(timed)}", f"{timed.milliseconds:.4g}", "", unchecked(why))


def scores_of(claim: Judged, found: Judged) -> Iterator[tuple[str, str, tuple[str, bool]]]:
    """Compare scores that are claimed: what they are, the claim, the finding and whether it is near."""
    one = 100 * math.ceil(claim.images / THOUSAND) / max(claim.images, 1) + 1e-9
    for of, name in (
        ("top-1", "top1"),
        ("top-5", "top5"),
        ("top-1 of the dense network", "dense_top1"),
        ("agreement", "agreement"),
    ):
        a, b = getattr(claim, name), getattr(found, name)
        if a == a:
            yield of, f"{a:.2f} %", (f"{b:.2f} %" if b == b else "", abs(a - b) <= one)
    a, b = claim.divergence, found.divergence
    if a == a:
        yield (
            "divergence",
            f"{a:.5g}",
            (f"{b:.5g}" if b == b else "", abs(a - b) <= DIVERGENCE * a + ROUNDING),
        )


def same(of: str, claim: int | str, found: int | str) -> Finding:
    """Compare what has to be the same; of digests the first digits are shown."""
    first, second = (f"{x:,}" if isinstance(x, int) else x[:12] for x in (claim, found))
    return Finding(of, first, second, HOLDS if claim == found else FAILS)


def unchecked(why: str) -> str:
    """Say why a claim was not checked."""
    return f"not checked: {why}"


def _of_weight(claim: WeightClaim) -> str:
    shape = "x".join(map(str, claim.shape))
    zeros = f"{claim.zeros:,} zeros" if claim.zeros else ""
    kept = f"kept indices {claim.kept}" if claim.kept else ""
    return ", ".join(x for x in (shape, claim.pattern, zeros, kept) if x)


def images_of(claim: Judged) -> str:
    """Say which images were judged on."""
    return f"{claim.images:,} images of {claim.data}"


def place_of(claim: Timed) -> str:
    """Say where a time was measured."""
    return f"{claim.images} images at a time on {claim.where}, {claim.runtime}"
