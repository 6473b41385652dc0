"""Whether a network does what its file claims: each claim measured again, from the file where it can be."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from snows.choosing.compiling import RUNTIMES, UnavailableError, ready
from snows.choosing.measuring import Race, Stopwatch
from snows.choosing.runtimes import example_of
from snows.evaluation import Scores, Seen, compare
from snows.networks.batches import Batch
from snows.networks.layers import copied
from snows.results import files
from snows.results.claims import Judged, Timed
from snows.results.contents import Contents, others_in
from snows.results.findings import (
    FAILS,
    HOLDS,
    MACS,
    Claims,
    Finding,
    Verification,
    images_of,
    place_of,
    same,
    scores_of,
    unchecked,
)
from snows.results.machine import Machine
from snows.results.origin import Origin, macs
from snows.sources.checkpoints import load_weights

SCATTER = 0.15  # of the milliseconds, that they may be off
DIFFERS = "differs, as times may"


def verify(
    path: Path | str,
    model: nn.Module | None = None,
    batches: Iterable[Any] | None = None,
    *,
    reference: nn.Module | None = None,
    stopwatch: Stopwatch = Stopwatch(),
) -> Verification:
    """Measure again what a file's certificate claims.

    Args:
        path: of a safetensors file that `prune`, `deploy` or `save` wrote.
        model: the dense network, on the device that is measured; without it only what the file itself tells
            is checked.
        batches: the images that accuracy and divergence are claimed on, as `evaluate` takes them.
        reference: the dense network, where `model` has the architecture alone.
        stopwatch: that times the network.

    Raises:
        ValueError: there is no such file, it has no certificate or one that cannot be read, or it is of
            another architecture than the model.
    """
    file = Claims.read(Path(path))
    found = list(file.findings())
    if model is None:
        return Verification(file.certificate, [*found, *file.unchecked("no model was given")])
    try:
        network = _network(file, model)
    except ValueError as error:
        if not any(x.verdict == FAILS for x in found):
            raise
        return Verification(file.certificate, [*found, *file.unchecked(str(error))])
    dense = model if reference is None else reference
    found += [*_origin(file, dense), *_counted(file, network)]
    if batches is None:
        why = "no images were given"
        found += [*file.unjudged(why), *file.untimed(why)]
    else:
        seen = Seen(batches)
        found += [*_judged(file, dense, network, seen), *_timed(file, network, seen, stopwatch)]
    return Verification(file.certificate, found)


def _network(file: Claims, model: nn.Module) -> nn.Module:
    """Load the file into a copy of a network.

    Raises:
        ValueError: it does not fit.
    """
    if "snows" in file.metadata:
        return files.load(file.path, model)
    network = copied(model).eval()
    load_weights(network, file.path)
    return network


def _origin(file: Claims, dense: nn.Module) -> Iterator[Finding]:
    """Compare the dense network with the one that the file was made from."""
    found, claims = Origin.of(dense), file.certificate
    if claims.architecture:
        yield same("dense network: architecture", claims.architecture, found.architecture)
    if claims.dense:
        yield same("dense network: tensors", claims.dense, found.tensors)
    yield from file.data()


def _counted(file: Claims, network: nn.Module) -> Iterator[Finding]:
    """Count the network's parameters and multiplications again."""
    tensors, edits, _ = file.contents
    own = Contents(tensors, edits, others_in(network, tensors))
    yield same("parameters of the network", file.certificate.parameters, own.parameters)
    if claim := file.certificate.macs:
        found = macs(network, file.certificate.sample)
        if found:
            yield same(MACS, claim, found)
        else:
            why = unchecked("they cannot be counted for the inputs that the certificate names")
            yield Finding(MACS, f"{claim:,}", "", why)


def _judged(file: Claims, dense: nn.Module, network: nn.Module, seen: Seen) -> Iterator[Finding]:
    """Judge the network again, if the images are those of the claim."""
    if not file.certificate.judged:
        return
    scores = compare(dense, network, seen)
    for claim in file.certificate.judged:
        found = judgement(claim.data, seen, *scores)
        for of, text, (value, close) in scores_of(claim, found):
            verdict = HOLDS if close else FAILS
            if claim.digest != found.digest:
                verdict = unchecked(f"these are other images, {found.images} of them")
            yield Finding(f"{of}, {images_of(claim)}", text, value, verdict)


def _timed(file: Claims, network: nn.Module, seen: Seen, stopwatch: Stopwatch) -> Iterator[Finding]:
    """Time the network again where machine, threads and device are those that are claimed."""
    device = next((x.device for x in (*network.parameters(), *network.buffers())), torch.device("cpu"))
    for claim in file.certificate.timed:
        here = Timed.on(Machine.here(device.type), claim.milliseconds, claim.images, claim.runtime)
        of, text = f"milliseconds, {place_of(claim)}", f"{claim.milliseconds:.4g}"
        if here != claim:
            yield Finding(of, text, "", unchecked(f"another machine: {place_of(here)}"))
            continue
        race = _race(network, seen.first(), claim, stopwatch)
        if race is None:
            yield Finding(of, text, "", unchecked("the network does not run so here"))
            continue
        low, median, high = race.quartiles(0)
        verdict = DIFFERS
        if abs(claim.milliseconds / median - 1) <= SCATTER:
            verdict = HOLDS
        elif low <= claim.milliseconds <= high:
            verdict = unchecked(f"half of the times here lie between {low:.4g} and {high:.4g}")
        yield Finding(of, text, f"{median:.4g}", verdict)


def judgement(data: str, seen: Seen, dense: Scores, network: Scores) -> Judged:
    """Put together what was found on images.

    Args:
        data: where they come from.
        seen: the images.
        dense: scores of the dense network.
        network: scores of the network that is judged.
    """
    return Judged(
        data=data,
        images=network.images,
        digest=seen.digest(),
        top1=network.top1,
        top5=network.top5,
        dense_top1=dense.top1,
        agreement=network.agreement,
        divergence=network.divergence,
    )


def _race(network: nn.Module, batch: Any, claim: Timed, stopwatch: Stopwatch) -> Race | None:
    """Time a network as a claim says; None where it does not run so here."""
    dtype = next(x.dtype for x in network.state_dict().values() if x.is_floating_point())
    example = example_of(Batch.of(batch), claim.images, torch.device(claim.device))
    example = example.map(lambda x: x.to(dtype) if x.is_floating_point() else x)
    runtime = next((x for x in RUNTIMES if x == claim.runtime), None)
    if runtime is None:
        return None
    try:
        net = ready(network, example, runtime)
    except UnavailableError:
        return None
    with torch.no_grad():
        return stopwatch.network([partial(example.through, net)])
