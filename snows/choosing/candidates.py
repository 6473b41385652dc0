"""Whole networks with packed layers, raced against the dense one: the fastest stays."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from snows.choosing.compiling import Runtime, UnavailableError, ready
from snows.choosing.measuring import Race, Stopwatch
from snows.choosing.packing import SCATTERS, Packing, Terms
from snows.layers.conv2d import INNERMOST
from snows.networks.attention import OpenAttention, close_attention
from snows.networks.batches import Batch, difference, outputs
from snows.networks.edits import Edit, Open
from snows.networks.layers import copied
from snows.networks.subject import Subject
from snows.results.deployment import DeployedLayer, DeployedRuntime

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
class Winner:
    """Hold the network that was chosen, where, and by which times.

    Attributes:
        candidate: the network.
        runtime: in which it was the fastest.
        model_ms, network_ms: median times of the model as it came, and of the network, in that runtime.
        raced: the times in every runtime.
        run: a call of the network in that runtime.
        notes: sentences that a reader should see.
    """

    candidate: Candidate
    runtime: Runtime
    model_ms: float
    network_ms: float
    raced: list[DeployedRuntime]
    run: Callable[[], object]
    notes: list[str] = field(default_factory=list)


def fastest(
    subject: Subject,
    objective: Literal["speed", "size"],
    runtimes: Sequence[Runtime],
    stopwatch: Stopwatch,
    progress: bool,
) -> Winner:
    """Choose between dense and packed networks in each runtime, and of what was chosen the fastest.

    Args:
        subject: the network.
        objective: "speed" takes the fastest, "size" packs whatever gets smaller.
        runtimes: to race in. One of several in which this network cannot be run is left out with a note.
        stopwatch: that layers and networks are timed with.
        progress: show a progress bar.

    Raises:
        ValueError: the network cannot be run in the only runtime.
    """
    entrants = Entrants(subject, objective, stopwatch, progress)
    choices, notes = list[Winner](), list[str]()
    for runtime in runtimes:
        try:
            choices.append(_chosen(entrants, runtime))
        except UnavailableError as error:
            if len(runtimes) == 1:
                raise ValueError(f'deploy: {error}; ask for runtime="eager"') from error
            notes.append(f"There was no race in runtime {runtime}: {error}.")
    best = choices[0]
    if len(choices) > 1:  # in turns, because what a machine is slowed down by changes
        ms = stopwatch.network([x.run for x in choices], partial(_cannot_tell, first=0)).medians
        best = choices[ms.index(min(ms))]
        took = " and ".join(f"{t:.2f} ms in runtime {x.runtime}" for t, x in zip(ms, choices, strict=True))
        notes.append(f"Timed in turns, what was chosen took {took}.")
    raced = [row for choice in choices for row in choice.raced]
    return replace(best, raced=raced, notes=[*best.notes, *notes])


def _chosen(entrants: Entrants, runtime: Runtime) -> Winner:
    """Pack by one margin after the other until the network as a whole is not slower for it."""
    subject, size, packed_ms = entrants.subject, entrants.objective == "size", math.nan
    fixed = [_call(subject.model, subject.given, runtime), _call(entrants.dense, subject.batch, runtime)]
    for margin in MARGINS:
        packed, rows, notes = entrants.packed(margin)
        runs = [_call(x.network, subject.batch, runtime) for x in packed]
        unsure = partial(_cannot_tell, first=1 if packed else 0)
        race = entrants.stopwatch.network([*fixed, *runs], unsure)
        model_ms, dense_ms, *taken = race.medians
        notes = notes if size else [*notes, *_scatter(entrants.packing, unsure(race), margin)]
        if not packed:
            break
        packed_ms, best, run = min(zip(taken, packed, runs, strict=True), key=lambda x: x[0])
        if size or packed_ms <= AS_FAST * dense_ms:
            row = DeployedRuntime(runtime, dense_ms, packed_ms, "packed")
            return Winner(best, runtime, model_ms, packed_ms, [row], run, notes)
        why = "the network as a whole was faster without it"
        rows = [replace(x, reason=x.reason or why) for x in best.rows]
    else:
        slower = (
            "Layer by layer the packed ones were faster, the network as a whole was not "
            f"({packed_ms:.2f} ms, {dense_ms:.2f} ms with dense layers), so all stay dense."
        )
        notes = [slower, *notes]
    dense = Candidate(entrants.dense, entrants.folded, rows)
    row = DeployedRuntime(runtime, dense_ms, packed_ms, "dense")
    return Winner(dense, runtime, model_ms, dense_ms, [row], fixed[1], notes)


def _call(net: nn.Module, batch: Batch, runtime: Runtime) -> Callable[[], object]:
    """Make a network ready in a runtime; return a call of it on a copy of a batch, for inference."""
    if runtime == "eager":
        return partial(outputs, net, batch)
    made = ready(net, batch.map(torch.clone), runtime)

    def call() -> None:
        with torch.no_grad():  # a program that was compiled so would be compiled again for inference mode
            batch.map(torch.clone).through(made)

    return call


class Entrants:
    """Make the networks that race, each once whatever the runtimes.

    Attributes:
        dense: the network with dense layers, its normalisations folded.
        folded: the edits that made it.
        packing: chooses layer by layer.
    """

    def __init__(
        self, subject: Subject, objective: Literal["speed", "size"], stopwatch: Stopwatch, progress: bool
    ) -> None:
        self.subject, self.objective, self.stopwatch, self.progress = subject, objective, stopwatch, progress
        self.dense, self.folded = subject.dense()
        self.packing = Packing(stopwatch)
        self._made: dict[float, tuple[list[Candidate], list[DeployedLayer], list[str]]] = {}

    def packed(self, margin: float) -> tuple[list[Candidate], list[DeployedLayer], list[str]]:
        """Return the networks with layers that are packed by a margin, and compute the same.

        Where there is none, also what is said of each layer, and notes.
        """
        if margin not in self._made:
            self._made[margin] = self._pack(margin)
        return self._made[margin]

    def _pack(self, margin: float) -> tuple[list[Candidate], list[DeployedLayer], list[str]]:
        if not self.subject.layers():
            return [], [], []
        made = _candidates(self.subject, self.packing, Terms(self.objective, margin), self.progress)
        packed = [x for x in made if not x.is_dense]
        if not packed:
            return [], made[0].rows, []
        wanted = outputs(self.dense, self.subject.batch)
        moved = [self._moved(wanted, x) for x in packed]
        same = [x for x, error in zip(packed, moved, strict=True) if error <= _tolerance(wanted)]
        why = "the network would not compute the same"
        note = f"Packed layers changed the outputs by {min(moved):.1e} of the largest, so all stay dense."
        rows = [replace(x, reason=x.reason or why) for x in packed[0].rows]
        return same, rows, [] if same else [note]

    def _moved(self, wanted: list[Tensor], candidate: Candidate) -> float:
        """Return how far a candidate moves the outputs; infinitely where it cannot run."""
        try:
            return difference(wanted, outputs(candidate.network, self.subject.batch))
        except ValueError:  # its forward takes views, say, that images innermost do not allow
            return float("inf")


def _tolerance(tensors: list[Tensor]) -> float:
    """Say how far packed layers may move outputs, relative to the largest: they add in other orders."""
    return max([1e-4, *(16 * torch.finfo(x.dtype).eps for x in tensors)])


def _candidates(subject: Subject, packing: Packing, terms: Terms, progress: bool) -> Sequence[Candidate]:
    """Pack the network; on a CPU, with images enough, also with the images innermost in memory."""
    first = _packed(subject, packing, terms, progress)
    convolves = any(isinstance(layer, nn.Conv2d) for layer, _ in subject.layers().values())
    enough = subject.on_cpu and subject.given.samples() % INNERMOST == 0
    if terms.objective == "speed" and convolves and enough:
        return first, _packed(subject, packing, replace(terms, innermost=True), progress)
    return (first,)


def _packed(subject: Subject, packing: Packing, terms: Terms, progress: bool) -> Candidate:
    """Pack a copy's layers where that is better by the terms."""
    net, edits, rows = copied(subject.network), list(subject.edits), []
    zeros, todo = subject.layers(), subject.layers(convolutions=terms.innermost).items()
    console = Console(stderr=True)
    for name, (layer, use) in track(todo, "deploying", console=console, transient=True, disable=not progress):
        chosen, row = packing.choose(name, layer, use, subject.activation(name), terms)
        if name in zeros:
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


def _cannot_tell(race: Race, first: int = 1) -> bool:
    """Say whether times cannot tell a later network from the first, in most races the second run: dense."""
    return any(race.scatters(first, i) for i in range(first + 1, len(race.rounds[0])))


def _scatter(packing: Packing, unsure: bool, margin: float) -> list[str]:
    """Say where times mean little: of layers, and of whole networks if these cannot be told apart."""
    notes = packing.scatter(margin)
    if unsure:
        notes.append(
            f"The times of the whole network {SCATTERS}, so that its ratio means little; measure again on "
            "a quieter machine."
        )
    return notes
