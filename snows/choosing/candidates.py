"""Whole networks with packed layers, raced against the dense one: the fastest stays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from snows.choosing.measuring import Race, Stopwatch
from snows.choosing.packing import SCATTERS, Packing, Terms, nbytes
from snows.layers import SparseConv2d
from snows.networks.attention import OpenAttention, close_attention
from snows.networks.batches import difference, outputs
from snows.networks.edits import Edit, Open
from snows.networks.layers import copied
from snows.networks.subject import Subject
from snows.results.deployment import DeployedLayer

# A layer is packed if it is so many times as fast alone. The second is tried if the first makes a slower
# network.
MARGINS = 1.0, 1.3
AS_FAST = 1.02  # a packed network that takes so much longer is within what times scatter, and smaller


@dataclass(frozen=True)
class Candidate:
    """Hold a network that could be the result.

    Attributes:
        network: with packed layers.
        edits: that made it.
        rows: what is said of each layer with zeros.
    """

    network: nn.Module
    edits: list[Edit]
    rows: list[DeployedLayer]

    @property
    def is_dense(self) -> bool:
        """Whether no layer is packed."""
        return all(row.reason for row in self.rows)


@dataclass(frozen=True)
class Choice:
    """Hold the network that was chosen, and by which times.

    Attributes:
        candidate: the network.
        model_ms, network_ms: median times of the model as it came, and of the network.
        notes: sentences that a reader should see.
    """

    candidate: Candidate
    model_ms: float
    network_ms: float
    notes: list[str] = field(default_factory=list)


def fastest(
    subject: Subject, objective: Literal["speed", "size"], stopwatch: Stopwatch, progress: bool
) -> Choice:
    """Pack by one margin after the other until the network as a whole is not slower for it.

    Args:
        subject: the network.
        objective: "speed" takes the fastest, "size" packs whatever gets smaller.
        stopwatch: that layers and networks are timed with.
        progress: show a progress bar.
    """
    packing = Packing(stopwatch)
    dense, folded = subject.dense()
    for margin in MARGINS:
        candidates = _candidates(subject, packing, Terms(objective, margin), progress)
        wanted = outputs(dense, subject.batch)
        moved = [difference(wanted, outputs(x.network, subject.batch)) for x in candidates]
        candidates = [x for x, error in zip(candidates, moved, strict=True) if error <= _tolerance(wanted)]
        if not candidates:
            changed = (
                f"Packed layers changed the outputs by {min(moved):.1e} of the largest, so all stay dense."
            )
            return _kept_dense(subject, dense, folded, stopwatch, changed)
        networks = [(dense, subject.batch), *((x.network, subject.batch) for x in candidates)]
        runs = [partial(outputs, *pair) for pair in ((subject.model, subject.given), *networks)]
        race = stopwatch.network(runs, _cannot_tell)
        model_ms, dense_ms, *taken = race.medians
        ms, best = min(zip(taken, candidates, strict=True), key=lambda x: x[0])
        notes = _scatter(packing, race, margin) if objective == "speed" else []
        if objective == "size" or ms <= AS_FAST * dense_ms or best.is_dense:
            return Choice(best, model_ms, ms, notes)
    slower = (
        f"Layer by layer the packed ones were faster, the network as a whole was not ({ms:.2f} ms, "
        f"{dense_ms:.2f} ms with dense layers), so all stay dense."
    )
    rows = [replace(x, reason=x.reason or "the network as a whole was faster without it") for x in best.rows]
    return Choice(Candidate(dense, folded, rows), model_ms, dense_ms, [slower, *notes])


def _kept_dense(
    subject: Subject, dense: nn.Module, folded: list[Edit], stopwatch: Stopwatch, note: str
) -> Choice:
    """Keep the network with dense layers, because packed ones would not compute the same."""
    pairs = (subject.model, subject.given), (dense, subject.batch)
    model_ms, dense_ms = stopwatch.network([partial(outputs, *pair) for pair in pairs]).medians
    why = "the network would not compute the same"
    rows = [
        DeployedLayer(name, tuple(layer.weight.shape), dense_bytes=nbytes(layer), reason=why)
        for name, (layer, _) in subject.layers().items()
    ]
    return Choice(Candidate(dense, folded, rows), model_ms, dense_ms, [note])


def _tolerance(tensors: list[Tensor]) -> float:
    """Say how far packed layers may move outputs, relative to the largest: they add in other orders."""
    return max([1e-4, *(16 * torch.finfo(x.dtype).eps for x in tensors)])


def _candidates(subject: Subject, packing: Packing, terms: Terms, progress: bool) -> Sequence[Candidate]:
    """Pack the network; on a CPU, with images enough, also with the images innermost in memory."""
    first = _packed(subject, packing, terms, progress)
    convolves = any(isinstance(m, SparseConv2d) for m in first.network.modules())
    if terms.objective == "speed" and subject.given.samples() % 16 == 0 and convolves and subject.on_cpu:
        return first, _packed(subject, packing, replace(terms, innermost=True), progress)
    return (first,)


def _packed(subject: Subject, packing: Packing, terms: Terms, progress: bool) -> Candidate:
    """Pack a copy's layers where that is better by the terms."""
    net, edits, rows = copied(subject.network), list(subject.edits), []
    todo = subject.layers().items()
    console = Console(stderr=True)
    for name, (layer, use) in track(todo, "deploying", console=console, transient=True, disable=not progress):
        chosen, row = packing.choose(name, layer, use, subject.activation(name), terms)
        rows.append(row)
        if chosen is not None:
            edit, packed = chosen
            edit.put(net, packed)
            net = net if name else packed  # a network that is one layer
            edits.append(edit)
    close_attention(net)
    return Candidate(net, [edit for edit in edits if not _was_closed(net, edit)], rows)


def _was_closed(net: nn.Module, edit: Edit) -> bool:
    """Say whether an attention was opened in vain: none of its projections is packed."""
    return isinstance(edit, Open) and not isinstance(net.get_submodule(edit.module), OpenAttention)


def _cannot_tell(race: Race) -> bool:
    """Say whether times cannot tell a packed network from the dense one, the second run of the race."""
    return any(race.scatters(1, i) for i in range(2, len(race.rounds[0])))


def _scatter(packing: Packing, race: Race, margin: float) -> list[str]:
    """Say where times mean little."""
    notes = packing.scatter(margin)
    if _cannot_tell(race):
        notes.append(
            f"The times of the whole network {SCATTERS}, so that its ratio means little; run deploy again on "
            "a quieter machine."
        )
    return notes
