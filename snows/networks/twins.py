"""The dense network and its working copy, with the calibration batches on their way through both."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from snows import together
from snows.networks.attention import plain_forward
from snows.networks.batches import Batch, output_of, output_tensors
from snows.networks.checks import check_model, check_numbers, check_outputs, other_kinds, read_batches
from snows.networks.copies import as_it_came, hold_back, working_copy
from snows.networks.edits import Edit
from snows.networks.layers import prunable
from snows.networks.masks import give_mask
from snows.networks.pairing import paired, unpaired
from snows.networks.reduction import Reduction
from snows.networks.sites import Pair, Site, numbered
from snows.networks.store import Store
from snows.networks.stream import Schedule, Stream, keeps_state, route
from snows.networks.trace import Trace
from snows.sparsity import MaskedWeight

PROBE = 64  # samples that the network's output sensitivity is measured on


class Twins:
    """Hold the dense network and its working copy, checked and traced, and the batches in both.

    Attributes:
        dense, sparse: the networks, with open attention and without parametrisations of
            `torch.nn.utils.prune`.
        trace: of the working copy on the first batch.
        calls: how often each layer is called, at most, on a batch.
        order: the layers that run, in order.
        batches: the calibration batches, on the host.
        held: the samples to judge by; None where there are too few.
        masks: of the layers that were pruned, by name.
        edits: that were made on the working copy.
        parts: that each batch is divided into, so that fewer samples can be taken.
        store: has what the streams remember.
        reduction: what it has left of the dense network's features.
        carried: masks of `torch.nn.utils.prune` that the model came with.
        notes: sentences that a reader should see.

    Args:
        model: in evaluation mode; left as it was.
        batches: as `prune` takes them; read once.

    Raises:
        ValueError: the model or a batch cannot be pruned or run; the sentence says which, and what to do.
    """

    def __init__(self, model: nn.Module, batches: Iterable[Any]) -> None:
        check_model("prune", model)
        check_numbers(model)
        self.model = model
        self.batches = read_batches(model, batches)
        self.dense, _ = working_copy(model)
        self.sparse, self.carried = working_copy(model)
        self.device = next(self.sparse.parameters()).device
        self.masks: dict[str, Tensor] = {}
        self.notes: list[str] = []
        self.edits: list[Edit] = []
        self.parts = 1
        self.store = Store()
        self.reduction = Reduction()
        self._channels_last(self._first())
        self._trace()
        self.order, self.calls = self._routes()
        self._check_late_starts()
        if others := [f"{name} ({kind})" for name, kind in other_kinds(self.sparse).items()]:
            self.notes.append(
                f"Linear and Conv2d layers alone are pruned; as they came stay {', '.join(others[:4])}"
                f"{' and more' if len(others) > 4 else ''}."
            )

    def _first(self) -> Batch:
        """Return a copy of the first batch, or of this process's part of it, on the device."""
        return self.batches[0].part().to(self.device).map(torch.clone)

    def _trace(self) -> None:
        """Trace both networks, pair their operations, and put all batches at their beginning."""
        first = self._first()
        versions = [x._version for x in first.tensors()]
        traces = Trace.of(self.dense, first), Trace.of(self.sparse, first)
        self.trace = traces[1]
        if versions != [x._version for x in first.tensors()]:
            raise ValueError(
                "prune: expected a model that leaves its input alone, but it changes it in place; let its "
                "forward work on a copy (x = x.clone()), or the images would change from pass to pass"
            )
        self._check_passes(first)
        self.paired = paired(*traces)
        if (others := unpaired(*traces)) and not self.edits:
            self.notes.append(
                f"{len(others)} operations are not called equally often in both networks, and not matched: "
                f"{', '.join(others[:3])}{' and more' if len(others) > 3 else ''}."
            )
        changed: set[tuple[str, int]] = set()  # one set: what is learnt on one network holds for its twin
        self.schedules = (
            Schedule(self.dense, traces[0], changed, store=self.store),
            Schedule(self.sparse, traces[1], changed, store=self.store),
        )
        self.begin_again()

    def begin_again(self) -> None:
        """Put all batches at the beginning of both networks, for another walk."""
        training, held = self._divided()
        self.held = held
        parts = [x.part() for x in (*training, *([held] if held is not None else []))]
        self._streams = [Pair(*(Stream(schedule, x) for schedule in self.schedules)) for x in parts]
        self._held = len(training) if held is not None else 0

    def _divided(self) -> tuple[list[Batch], Batch | None]:
        """Return the batches to fit to, divided as asked, and the samples to judge by.

        The first parts of all batches come first, so that a few of them are of all batches.
        """
        training, held = hold_back(self.batches)
        if self.parts == 1:
            return training, held
        divided = [x.split(math.ceil(x.samples() / self.parts)) for x in training]
        parts = [x[i] for i in range(self.parts) for x in divided if i < len(x)]
        return parts, held if held is None else held.split(parts[0].samples())[0]

    def pieces(self) -> list[Batch]:
        """Return the batches to fit to, divided as asked."""
        return self._divided()[0]

    def apply(self, edits: Sequence[Edit], left: Mapping[str, Tensor], sources: Mapping[str, str]) -> None:
        """Change the working copy, and find out what it has left of the dense network's features.

        Args:
            edits: in order.
            left: by layer of the dense network that they cut, which of its outputs they leave: int64.
            sources: by layer of the changed network, the dense network's layer in whose place it stands,
                where that has another name.
        """
        for edit in edits:
            edit.apply(self.sparse)
        self.edits += edits
        self.reduction = Reduction.of(self.dense, left, self._first().split(1)[0], sources)
        whole = self.schedules[1].whole
        self._trace()
        for schedule in self.schedules:
            schedule.whole = whole
        self.order = list(self.trace.start)
        self.calls = Counter({name: self.calls[self.reduction.source(name)] for name in self.order})

    # ---------------------------------------------------------------- checks

    def _channels_last(self, first: Batch) -> None:
        """Lay convolutions out channels-last, unless the network cannot run that way.

        On a CPU they are up to three times faster.
        """
        try:
            for net in (self.sparse, self.dense):
                net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            with torch.no_grad():
                first.through(self.sparse)
        except Exception:  # a view that needs the other layout; what else it may be, the trace says
            for net in (self.sparse, self.dense):
                net.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]

    def _check_passes(self, first: Batch) -> None:
        if self.trace.autocast:
            raise ValueError(
                "prune: expected a model that computes in its weights' precision, but "
                f"{self.trace.autocast} runs under torch.autocast inside the model's forward; remove that, "
                "and use autocast around the pruned network"
            )
        with torch.no_grad(), plain_forward():
            second = output_tensors(output_of(self.sparse, first))
        check_outputs(output_tensors(self.trace.outputs), second)
        self.trace.outputs = []

    def _routes(self) -> tuple[list[str], Counter[str]]:
        """Learn which layers each batch calls; where that differs, every pass runs from the front."""
        order, calls, routes = list(self.trace.start), Counter[str](), []
        for batch in (x.part() for x in self.batches):
            try:
                found = route(self.dense, batch.to(self.device))
            except Exception:
                output_of(self.dense, batch.to(self.device))  # raises a sentence
                raise
            if found not in routes:
                routes.append(found)
                calls |= Counter(found)
                for before, name in zip(
                    ["", *found], found, strict=False
                ):  # a layer new to the order comes after the one before it
                    if name not in order:
                        order.insert(order.index(before) + 1 if before else 0, name)
        if together.size() > 1 and not together.everywhere(routes == together.first(lambda: routes[:1])):
            raise ValueError(
                "prune: expected a network that calls the same layers for all samples, to share them among "
                f"{together.size()} processes, got one that does not; run one process"
            )
        if len(routes) > 1:
            self._from_the_front("Batches take different ways through the network")
        return order, calls

    def _check_late_starts(self) -> None:
        """Let every pass run from the front where modules keep state that the network reads later."""
        schedule = self.schedules[1]
        one, *_ = self.batches[0].split(1)
        *_, other = self.batches[-1].split(1)
        if not schedule.whole and not together.everywhere(not keeps_state(schedule, one, other)):
            self._from_the_front("Modules keep state from one call to the next, which the network reads")

    def _from_the_front(self, reason: str) -> None:
        for schedule in self.schedules:
            schedule.whole = True
        self.notes.append(f"{reason}, so that every pass began at the network's input; this takes longer.")

    # ---------------------------------------------------------------- the walk

    @property
    def probe(self) -> Batch:
        """A few dozen samples of the largest batch, on the device."""
        training, held = self._divided()
        batches = [*training, held] if held is not None else training
        return max(batches, key=Batch.samples).split(PROBE)[0].to(self.device)

    def at(self, name: str, most: int | None = None) -> Site:
        """Take batches up to a layer, in both networks.

        Args:
            name: of the layer.
            most: of the batches to fit to that reach it; by default all.

        Raises:
            ValueError: the layer's inputs are not finite.
        """
        reached: list[tuple[int, Pair]] = []
        finite = True
        source = self.reduction.source(name)
        for i, (dense, sparse) in numbered(self._streams, self._held, most):
            if i != self._held and sum(j != self._held or not self._held for j, _ in reached) == most:
                continue
            call, other = sparse.advance(name), dense.advance(source)
            if call is None or other is None:
                continue
            finite &= bool(call.x.sum().isfinite())  # one pass; isfinite().all() takes twenty times as long
            reached.append((i, Pair(dense, sparse)))
        if not together.everywhere(finite):
            raise ValueError(f"{name}: its inputs are not finite; check the weights before it and the images")
        reached.sort(key=lambda x: x[0])
        layer: Any = self.sparse.get_submodule(name)
        training = [pair for i, pair in reached if i != self._held or self._held == 0]
        held = next((pair for i, pair in reached if i == self._held), training[0] if training else None)
        target: Any = self.dense.get_submodule(source).weight
        left = self.reduction.outputs.get(source)
        return Site(name, layer, layer.weight.detach().clone(), source, target.detach(), left, training, held)

    def write(self, name: str, masked: MaskedWeight, keep: bool = True) -> None:
        """Put a fitted weight in its layer of the working copy, and its mask beside it.

        Args:
            name: of the layer.
            masked: weight and mask.
            keep: the mask too; else the layer keeps the one that it has, if any.
        """
        layer: Any = self.sparse.get_submodule(name)
        with torch.no_grad():
            layer.weight.copy_(masked.weight)
        if keep:
            self.masks[name] = masked.mask.to(self.device)
            give_mask(layer, self.masks[name])

    def mask_unchosen(self, chosen: Iterable[str]) -> dict[str, int]:
        """Mask the layers that came with a mask of `torch.nn.utils.prune` and are not chosen.

        Returns:
            By layer, how many weights its mask keeps.
        """
        layers, names, kept = prunable(self.sparse), set(chosen), {}
        for entry in self.carried:
            if entry.is_weight and entry.layer in layers and entry.layer not in names:
                with torch.no_grad():
                    layers[entry.layer].weight.mul_(entry.mask)
                kept[entry.layer] = int(entry.mask.sum())
        return kept

    def closed(self) -> nn.Module:
        """Return the working copy as a network like the model.

        Attention is closed, memory formats and parametrisations are as they were.
        """
        return as_it_came(self.sparse, self.model, self.carried, self.masks)
