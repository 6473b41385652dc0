"""Taint: what some outputs of a layer, or some entries of a tensor, reach in the layers after it.

NaN is the label. Some outputs of a layer become NaN right after its call; a layer met later notes which of
its inputs hold NaN, and answers with what it gave in a clean pass. So taint goes from a layer to its readers
and no further, and whatever lies between, such as reshapes, concatenations, attention or residuals, carries
it by itself. A convolution or product that is not a layer's own spreads it, as its result says.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves, tree_map

from snows.networks.attention import plain_forward
from snows.networks.batches import Batch, output_tensors
from snows.networks.functions import LOOKS, arguments
from snows.networks.layers import prunable
from snows.networks.stream import Schedule, Stream
from snows.networks.ties import OUTPUT, Axis, Nodes, inputs_of, named, outputs_of
from snows.networks.trace import Trace
from snows.networks.watching import Call, Finished, Watch


class Tainting:
    """Send taint through a network, from one layer or tensor at a time.

    Attributes:
        trace: of a clean pass of one sample.
        nodes: the outputs and inputs of every layer that runs, in order of execution.
        groups: by layer that runs, in order, the groups of its convolution.
        calls: by layer, which of the trace's events its first call is.
        size: how many nodes the layers and the output are; what is added later is never reached.
        passes: how many passes were run.

    Args:
        net: in evaluation mode, with open attention.
        batch: whose first sample is used.

    Raises:
        ValueError: the network cannot run the batch.
    """

    def __init__(self, net: nn.Module, batch: Batch) -> None:
        self.net = net
        self.batch = batch.split(1)[0].to(next(net.parameters()).device)
        self._buffers = [(x, x.clone(), x._version) for x in net.buffers()]
        self.trace = Trace.of(net, self.batch.map(torch.clone))
        self._restore()
        self.trace.outputs = []
        self.nodes, self.passes = Nodes(), 0
        self.groups: dict[str, int] = {}
        self.calls: dict[str, int] = {}
        for i, event in enumerate(self.trace.events):
            if event.layer and event.layer not in self.calls:
                self.calls[event.layer] = i
                weight: Any = net.get_submodule(event.layer).weight
                inputs = self.trace.layers[event.layer].calls[0][0][_channel(event.function)]
                self.groups[event.layer] = inputs // weight.shape[1]
                self.nodes.add(outputs_of(event.layer), weight.shape[0])
                self.nodes.add(inputs_of(event.layer), inputs)
        self.size = self.nodes.total
        clean = _Clean(net)
        self._run(clean)
        self.clean = clean.outputs
        self._schedule = Schedule(net, self.trace)
        self._stream, self._at = Stream(self._schedule, self.batch), -1

    def from_layer(self, layer: str) -> Source:
        """Prepare to taint outputs of a layer."""
        self._advance(layer)
        return Source(self, len(self.nodes.numbers[outputs_of(layer)]), layer, ())

    def from_tensors(self, axes: Sequence[Axis], sign: int = 1) -> Source:
        """Prepare to taint entries of parameters or buffers, the same of each.

        Args:
            axes: equally long, of tensors that the network reads for the first time in the same call.
            sign: by which outputs of layers are multiplied, 1 or -1.
        """
        first = self._readers(self.trace.tensors[axes[0][0]])[0]
        before = [layer for layer, call in self.calls.items() if call <= first]
        self._advance(before[-1] if before else "")
        name, dim = axes[0]
        return Source(self, _tensor(self.net, name).shape[dim], "", axes, sign)

    def tensor(self, name: str) -> Tensor:
        """Return a parameter or buffer."""
        return _tensor(self.net, name)

    def other_tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Give every floating-point parameter and buffer that is read, but is no layer's, and its readers.

        Readers are numbers of the trace's events.
        """
        numbers = self.trace.tensors
        layers = (*self.groups, *(other for _, other in self.shared()))
        seen = {numbers.get(named(layer, key)) for layer in layers for key in ("weight", "bias")}
        for name, number in numbers.items():
            readers = self._readers(number)
            if number not in seen and readers and self.tensor(name).is_floating_point():
                seen.add(number)
                yield name, readers

    def read_outside(self, layer: str) -> bool:
        """Say whether something else than a layer's own calls reads its weight or bias."""
        numbers = [self.trace.tensors.get(named(layer, key)) for key in ("weight", "bias")]
        events = [self.trace.events[i] for x in numbers if x is not None for i in self._readers(x)]
        return any(event.layer != layer for event in events)

    def shared(self) -> Iterator[tuple[str, str]]:
        """Give every layer that runs, with each other layer that has the same weight."""
        numbers = self.trace.tensors
        for layer in self.groups:
            for other in prunable(self.net):
                if other != layer and numbers.get(outputs_of(other)[0]) == numbers[outputs_of(layer)[0]]:
                    yield layer, other

    def _readers(self, value: int) -> tuple[int, ...]:
        return tuple(self.trace.reading.get(value, ()))

    def _advance(self, layer: str) -> None:
        at = self.calls.get(layer, -1)
        if at < self._at or not layer:
            self._stream = Stream(self._schedule, self.batch)
        self._at = at
        if layer:
            self._stream.advance(layer)

    def _run(self, watch: Watch) -> Any:
        """Run the network, whose modules may answer from memory; a pass that was ended returns nothing."""
        try:
            with torch.no_grad(), plain_forward(), sdpa_kernel(SDPBackend.MATH), watch, suppress(Finished):
                return self.batch.map(torch.clone).through(self.net)
        finally:
            self._restore()

    def _restore(self) -> None:
        """Undo what a pass wrote into buffers, as running means of NaN."""
        for i, (x, data, version) in enumerate(self._buffers):
            if x._version != version:
                x.copy_(data)
                self._buffers[i] = (x, data, x._version)


class Source:
    """Taint entries of one layer's outputs or of tensors, and see what they reach.

    Attributes:
        size: how many entries there are.
        everything: the nodes that all of them reach, bool.
    """

    def __init__(
        self, tainting: Tainting, size: int, layer: str, axes: Sequence[Axis], sign: int = 1
    ) -> None:
        self._tainting, self._layer, self._axes, self._sign = tainting, layer, axes, sign
        self._stream, self._last, self._searching = tainting._stream, "", True
        self.size = size
        self.everything = self.reach(torch.arange(size))
        self._searching = False

    def reach(self, entries: Tensor) -> Tensor:
        """Taint some entries, and return which nodes they reach, bool.

        A network that cannot run with NaN counts as one whose output is reached.
        """
        of = self._tainting
        of.passes += 1
        watch = _Taint(of, self._layer, entries, self._sign, self._last, self._searching)
        with self._stream.answering(copies=self._searching), _tainted(of.net, self._axes, entries):
            try:
                found = output_tensors(of._run(watch))
            except Exception:  # whatever a network's own checks raise
                found = [torch.full((1,), torch.nan)]
        if any(_dirty(x) for x in found):
            watch.reached[OUTPUT], watch.last = True, ""
        if self._searching:
            self._last = watch.last
        return watch.reached


@contextmanager
def _tainted(net: nn.Module, axes: Sequence[Axis], entries: Tensor) -> Iterator[None]:
    """Hold NaN in entries of tensors."""
    tensors = [_tensor(net, name) for name, _ in axes]
    saved = [x.data for x in tensors]
    for x, (_, dim) in zip(tensors, axes, strict=True):
        x.data = x.data.index_fill(dim, entries.to(x.device), torch.nan)
    try:
        yield
    finally:
        for x, data in zip(tensors, saved, strict=True):
            x.data = data


def _tensor(net: nn.Module, name: str) -> Tensor:
    parent, _, key = name.rpartition(".")
    tensor: Tensor = getattr(net.get_submodule(parent), key)
    return tensor


def _channel(function: Any) -> int:
    """Say which dimension of a layer's input and output holds channels or features, from the end."""
    return -1 if function is F.linear else -3


def _dirty(x: Any) -> bool:
    """Say whether a tensor holds NaN; a sum is read once, where `isnan` would write as much again."""
    return isinstance(x, Tensor) and x.is_floating_point() and bool(x.sum().isnan())


class _Clean(Watch):
    """Remember what each call of a layer gives, by the operation's name."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__(net)
        self.outputs: dict[str, tuple[torch.Size, Tensor]] = {}

    def layer(self, name: str, call: Call, args: Any, kwargs: Any) -> Any:
        output = call.function(*args, **kwargs)
        self.outputs[self.frame.operation(call.function)] = (call.x.shape, output.clone())
        return output

    def other(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func not in LOOKS:
            self.frame.operation(func)
        return func(*args, **kwargs)


class _Taint(Watch):
    """Run a pass in which some outputs of a layer are NaN, and note what the layers after it see.

    Attributes:
        reached: bool, by node.
        last: the last operation that read NaN, where that is searched for; else the one to end after.
    """

    def __init__(
        self, tainting: Tainting, layer: str, rows: Tensor, sign: int, last: str, searching: bool
    ) -> None:
        super().__init__(tainting.net)
        self.nodes, self.clean = tainting.nodes.numbers, tainting.clean
        self.source, self.rows, self.sign = layer, rows, sign
        self.last, self.searching = last, searching
        self.sourced = bool(layer)
        self.reached = torch.zeros(tainting.size, dtype=torch.bool)

    def layer(self, name: str, call: Call, args: Any, kwargs: Any) -> Any:
        operation, channel = self.frame.operation(call.function), _channel(call.function)
        bias = (arguments(call.function, args, kwargs) or {}).get("bias")
        tainted = self.note(inputs_of(name), call.x, channel)
        tainted |= bias is not None and self.note(outputs_of(name), bias, -1)
        shape, output = self.clean.get(operation, (None, None))
        if output is None or shape != call.x.shape:  # taint changed the way through the network
            output = call.function(*_cleaned(args), **_cleaned(kwargs))
        else:
            output = output * self.sign  # a copy: it may be changed in place
        if self.sourced and name == self.source:
            output.index_fill_(channel, self.rows.to(output.device), torch.nan)
        self.ended(operation, tainted)
        return output

    def note(self, axis: Axis, x: Tensor, channel: int) -> bool:
        """Note which entries of an axis hold NaN, and say whether any does."""
        channel %= x.ndim
        others = [i for i in range(x.ndim) if i != channel]
        seen = (x.sum(others) if others else x).isnan().cpu()
        numbers = self.nodes[axis]
        self.reached[numbers.start : numbers.stop] |= seen
        return bool(seen.any())

    def other(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func in LOOKS:
            return func(*args, **kwargs)
        operation = self.frame.operation(func)
        tainted = self.searching and any(map(_dirty, tree_leaves((args, kwargs))))
        output = func(*args, **kwargs)
        self.ended(operation, tainted)
        return output

    def ended(self, operation: str, tainted: bool) -> None:
        """End the pass after the last operation that reads taint, or learn which one that is."""
        if self.searching:
            self.last = operation if tainted else self.last
        elif operation == self.last:
            raise Finished


def _cleaned(arguments: Any) -> Any:
    return tree_map(
        lambda x: x.nan_to_num() if isinstance(x, Tensor) and x.is_floating_point() else x, arguments
    )
