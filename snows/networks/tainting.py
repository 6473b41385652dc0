"""Units of a network by tainting: what is NaN in a layer's output shows which inputs of which layers read it.

A *source* is a layer's outputs, or a tensor that is no layer's weight. Some of its entries are set to NaN in a
pass of one sample; every layer met later notes which of its input channels hold NaN, and goes on with zeros
there, so that taint goes from a source to its readers and no further. Grouped convolutions, and all functions
between, hand it on as they do. No operation has a rule here, and no architecture a name.

Entries are told apart by codes of equally many ones: pass b marks the entries whose bit b is set. A column
that saw as many passes as a code has ones is reached by the one entry of that code. Others are reached by
several entries, which are found as runs of entries that reach the same.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map

from snows.networks.attention import plain_forward
from snows.networks.batches import Batch, first_line, output_tensors
from snows.networks.channels import Group
from snows.networks.functions import LOOKS, known
from snows.networks.layers import Layer, groups_of, prunable
from snows.networks.stream import Schedule, Stream
from snows.networks.trace import Trace
from snows.networks.uniting import Node, Units
from snows.networks.watching import Call, Finished, Watch


@dataclass(frozen=True)
class Source:
    """Describe what is tainted.

    Attributes:
        layer: whose outputs it is; empty for tensors.
        tensors: parameters and buffers by name, with the dimension that its entries are along.
        size: how many entries it has.
        begin: the layer that a pass starts at; empty to start from the front.
        last: name of the operation after which nothing can be tainted any more; empty to run to the end.
    """

    layer: str
    tensors: tuple[tuple[str, int], ...]
    size: int
    begin: str
    last: str

    def node(self, entry: int) -> Iterator[Node]:
        """List what one entry is."""
        if self.layer:
            yield "row", self.layer, 0, entry
        for name, dim in self.tensors:
            yield "entry", name, dim, entry


@dataclass
class Tainting:
    """Taint the sources of a network one after the other, and unite what belongs together.

    Attributes:
        net: in evaluation mode, with open attention.
        batch: of one sample.
    """

    net: nn.Module
    batch: Batch
    units: Units = field(default_factory=Units)

    def __post_init__(self) -> None:
        self.trace = Trace.of(self.net, self.batch)
        self.stream = Stream(Schedule(self.net, self.trace), self.batch)
        self.layers: dict[str, Layer] = {x: prunable(self.net)[x] for x in self.trace.start}
        self.columns: dict[str, slice] = {}
        end = 0
        for name, layer in self.layers.items():
            count = layer.weight[0].numel() // math.prod(layer.weight.shape[2:]) * groups_of(layer)
            self.columns[name] = slice(end, end + count)
            end += count
        self.size = end + 1  # the last is the network's output
        self.begun = ""

    def all(self) -> Units:
        """Taint everything."""
        for name, layer in self.layers.items():
            groups = groups_of(layer)
            if groups > 1:
                outputs, inputs = len(layer.weight) // groups, layer.weight.shape[1]
                for group in range(groups):
                    rows = [("row", name, 0, group * outputs + i) for i in range(outputs)]
                    self.units.join([*rows, *(("column", name, 0, group * inputs + i) for i in range(inputs))])
        for source in self._sources():
            self._follow(source)
        return self.units

    # ---------------------------------------------------------------- sources

    def _sources(self) -> Iterator[Source]:
        """List layers and tensors, in the order in which the network comes to them."""
        first: dict[str, int] = {}
        for i, event in enumerate(self.trace.events):
            first.setdefault(event.module, i)
        found = [(first.get(name, 0), Source(name, (), len(x.weight), name, self._last(name))) for name, x in self.layers.items()]
        own = {id(x) for m in prunable(self.net).values() for x in (m.weight, m.bias) if x is not None}
        for name, module in self.net.named_modules():
            tensors = [(key, x) for key, x in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
                       if id(x) not in own and x.is_floating_point() and not isinstance(module, Layer)]
            begin, last = self._begin(first.get(name)), self._last(name) if name in first else ""
            together: dict[Any, list[tuple[str, int]]] = {}
            leaf = not list(module.children())
            for key, x in tensors:
                for dim, size in enumerate(x.shape):
                    if size > 1:
                        which = size if leaf and x.ndim == 1 else (key, dim)
                        together.setdefault(which, []).append((f"{name}.{key}" if name else key, dim))
            for entries in together.values():
                tensor, dim = entries[0]
                size = dict((f"{name}.{key}" if name else key, x) for key, x in tensors)[tensor].shape[dim]
                found.append((first.get(name, 0), Source("", tuple(entries), size, begin, last)))
        yield from (source for _, source in sorted(found, key=lambda x: x[0]))

    def _begin(self, event: int | None) -> str:
        """Return the last layer that is called before an event."""
        if event is None:
            return ""
        called = [x.module for x in self.trace.events[:event] if x.flops and x.module in self.trace.start]
        order = list(self.trace.start)
        return max(called, key=order.index, default="")

    def _last(self, module: str) -> str:
        """Return the last operation that what a module computes can reach without another layer between."""
        tainted: set[int] = set()
        makers: dict[int, str] = {}
        last = ""
        for event in self.trace.events:
            own = event.module == module
            if own or tainted.intersection(event.reads):
                last = event.name
                inplace = set(event.makes).intersection(event.reads)
                if not event.makes or any(makers.get(x) not in _FRESH for x in inplace if x in makers):
                    return ""  # something else may be changed that shares its memory
                if own or not event.flops or self._is_grouped(event.module):
                    tainted.update(event.makes)
            for value in event.makes:
                makers.setdefault(value, getattr(event.function, "__name__", ""))
        return "" if tainted & self.trace.returned else last

    def _is_grouped(self, module: str) -> bool:
        return module not in self.layers or groups_of(self.layers[module]) > 1

    # ---------------------------------------------------------------- one source

    def _follow(self, source: Source) -> None:
        """Find out which columns each entry of a source reaches, and unite them."""
        everything = torch.arange(source.size)
        try:
            first, whole = self._reached(source, everything[:1]), self._reached(source, everything)
            nodes = [list(source.node(i)) for i in range(source.size)]
            if source.size > 1 and torch.equal(first, whole):
                if source.layer or not source.size:
                    self.units.join([x for entry in nodes for x in entry])
                    self.units.join([nodes[0][0], *self._nodes(whole)])
                    self._blame(source, whole, nodes)
                return
            self._decode(source, whole, nodes)
        except _UnfollowedError as error:
            self.units.join([x for i in range(source.size) for x in source.node(i)])
            self.units.reasons.setdefault(next(source.node(0)), f"its units cannot be followed ({error})")

    def _blame(self, source: Source, whole: Tensor, nodes: list[list[Node]]) -> None:
        readers = [name for name, where in self.columns.items() if whole[where].any()]
        if readers:
            why = f"every unit reaches all that {readers[0]} reads"
            self.units.reasons.setdefault(nodes[0][0], why)
        if whole[-1]:
            self.units.reasons.setdefault(nodes[0][0], "every unit reaches the network's whole output")

    def _decode(self, source: Source, whole: Tensor, nodes: list[list[Node]]) -> None:
        """Tell entries apart by codes, and those that share a column by runs."""
        bits = next(m for m in range(1, 64) if math.comb(m, m // 2) >= source.size)
        ones = bits // 2
        codes = torch.zeros(source.size, bits, dtype=torch.bool)
        for i, code in enumerate(itertools.islice(itertools.combinations(range(bits), ones), source.size)):
            codes[i, list(code)] = True
        numbers = {tuple(code): i for i, code in enumerate(codes.tolist())}
        seen = torch.stack([self._reached(source, codes[:, b].nonzero().flatten()) for b in range(bits)], 1) \
            if source.size > 1 else whole[:, None]
        single = seen.sum(1) == ones if source.size > 1 else whole
        for column in single[:-1].nonzero().flatten().tolist():
            entry = numbers[tuple(seen[column].tolist())] if source.size > 1 else 0
            self.units.join([nodes[entry][0], self._node(column)])
        for entry in nodes:
            self.units.join(entry)
        shared = whole & ~single
        shared[-1] = False
        runs = list(self._runs(source, shared)) if shared.any() else []
        for begin, end, reached in runs:
            for i in range(begin + 1, end):
                self.units.join([nodes[begin][0], nodes[i][0]])
            self.units.join([nodes[begin][0], *self._nodes(reached)])
        if whole[-1]:
            for i in range(source.size):
                self.units.reasons.setdefault(nodes[i][0], "its units reach the network's output")

    def _runs(self, source: Source, shared: Tensor) -> Iterator[tuple[int, int, Tensor]]:
        """Divide a source's entries into runs that reach the same shared columns, or some of a unit's.

        Args:
            source: what is tainted.
            shared: columns that several entries reach.
        """
        begin, period, size = 0, 0, source.size

        def reached(start: int, end: int) -> Tensor:
            return self._reached(source, torch.arange(start, min(end, size))) & shared

        while begin < size:
            if period:
                run = reached(begin, begin + period)
                columns = run.nonzero().flatten().tolist()
                if len({self.units.find(self._node(x)) for x in columns}) <= 1 or torch.equal(
                    reached(begin, begin + 1), run
                ):
                    yield begin, min(begin + period, size), run
                    begin += period
                    continue
            one = reached(begin, begin + 1)
            low, high = 1, size - begin  # the first so many reach no more than one does
            while low < high:
                middle = (low + high + 1) // 2
                low, high = (middle, high) if not (reached(begin, begin + middle) & ~one).any() else (low, middle - 1)
            yield begin, begin + low, one
            begin, period = begin + low, low

    def _node(self, column: int) -> Node:
        name, where = next((name, x) for name, x in self.columns.items() if x.start <= column < x.stop)
        return "column", name, 0, column - where.start

    def _nodes(self, reached: Tensor) -> list[Node]:
        return [
            ("column", name, 0, i)
            for name, where in self.columns.items()
            for i in reached[where].nonzero().flatten().tolist()
        ]

    # ---------------------------------------------------------------- one pass

    def _reached(self, source: Source, entries: Tensor) -> Tensor:
        """Return which columns entries of a source reach, and last whether they reach the output."""
        if source.begin and self.begun != source.begin:
            self.stream.advance(source.begin)
            self.begun = source.begin
        late = source.begin and not self.stream.schedule.whole
        watch = _Pass(self, source, entries)
        with (
            torch.no_grad(),
            plain_forward(),
            sdpa_kernel(SDPBackend.MATH),
            self._marked(source, entries),
            self.stream.answering(copies=True) if late else nullcontext(),
            watch,
            suppress(Finished),
        ):
            try:
                output = self.batch.map(torch.clone).through(self.net)
            except Finished:
                raise
            except Exception as error:
                raise _UnfollowedError(first_line(error)) from error
            watch.reached[-1] = any(bool(x.isnan().any()) for x in output_tensors(output))
        return watch.reached

    @contextmanager
    def _marked(self, source: Source, entries: Tensor) -> Iterator[None]:
        """Set entries of tensors to NaN for a while."""
        found = []
        for name, dim in source.tensors:
            module, _, key = name.rpartition(".")
            x: Any = getattr(self.net.get_submodule(module), key)
            index = entries.to(x.device)
            found.append((x, dim, index, x.detach().index_select(dim, index)))
            x.detach().index_fill_(dim, index, torch.nan)
        try:
            yield
        finally:
            for x, dim, index, old in found:
                x.detach().index_copy_(dim, index, old)


# whose results share no memory with what they read
_FRESH = {"conv2d", "linear", "batch_norm", "add", "__add__", "relu", "mul", "__mul__", "layer_norm", "group_norm", "cat"}


class _UnfollowedError(Exception):
    """Says that the network does not run with NaN."""


class _Pass(Watch):
    """Taint a source, and note which columns of which layers are reached."""

    def __init__(self, tainting: Tainting, source: Source, entries: Tensor) -> None:
        super().__init__(tainting.net)
        self.tainting, self.source, self.entries = tainting, source, entries
        self.reached = torch.zeros(tainting.size, dtype=torch.bool)

    def layer(self, name: str, call: Call, args: Any, kwargs: Any) -> Any:
        channel = known(call.function).channel
        assert channel is not None
        taint = call.x.isnan()
        if taint.any():
            lines = taint.movedim(channel, 0).flatten(1).any(1).cpu()
            self.reached[self.tainting.columns[name]] |= lines
            if call.settings.get("groups", 1) == 1:
                clean = call.x.masked_fill(taint, 0)
                args, kwargs = tree_map(lambda x: clean if x is call.x else x, (args, kwargs))
        return self.named(call.function, args, kwargs, self.entries if name == self.source.layer else None, channel)

    def other(self, func: Any, args: Any, kwargs: Any) -> Any:
        return func(*args, **kwargs) if func in LOOKS else self.named(func, args, kwargs, None, 0)

    def named(self, func: Any, args: Any, kwargs: Any, marked: Tensor | None, channel: int) -> Any:
        """Call a function, taint what it returns, and stop after the last that can see it."""
        name = self.frame.operation(func)
        output = func(*args, **kwargs)
        if marked is not None:
            output = output.index_fill(channel % output.ndim, marked.to(output.device), torch.nan)
        if name == self.source.last:
            raise Finished
        return output


def tainted(net: nn.Module, batch: Batch) -> list[Group]:
    """Find the groups of a network, as far as taint tells; whether units can be cut is not proved.

    Args:
        net: in evaluation mode, with open attention.
        batch: of which one sample is used, on the network's device.
    """
    tainting = Tainting(net, batch.split(1)[0])
    units = tainting.all()
    return units.groups(tainting.layers, prunable(net))
