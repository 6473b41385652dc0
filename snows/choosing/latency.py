"""Milliseconds as a cost of a network: how long its layers take at any widths.

With u and v what is left of a layer's inputs and outputs, its time is ``a + b u + c v + d u v``, the four
coefficients at least 0 and fitted to times that were measured at a few widths. What the whole network takes
beyond its layers, in activations and normalisations, is shared out by the sizes of the layers' outputs. Times
of layers say how widths compare; how long a network takes is always measured on the whole of it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from snows.choosing.costs import Costs, Factor, Term, parts, rank_width, table
from snows.choosing.measuring import Stopwatch
from snows.networks.batches import Batch
from snows.networks.channels import Group
from snows.networks.layers import Layer, groups_of, prunable
from snows.networks.trace import Trace

SHARES = (0.25, 0.5, 1.0)  # of a layer's inputs and outputs, at which it is timed
LEAST = 0.1  # of the network's time, what is not its layers': where they take more alone, they are scaled


class Shape(NamedTuple):
    """Describe a layer as far as its time depends on it.

    Attributes:
        inputs, outputs: features or channels.
        x: shape of its input; the entry of the features does not count.
        dim: that entry.
        last: whether the features are innermost in memory.
        kernel: height and width; empty for a linear layer.
        settings: stride, padding, dilation and groups of a convolution, each a tuple or a number.
    """

    inputs: int
    outputs: int
    x: tuple[int, ...]
    dim: int
    last: bool
    kernel: tuple[int, ...] = ()
    settings: tuple[tuple[str, object], ...] = ()

    @property
    def groups(self) -> int:
        """The groups of a convolution; 1 for a linear layer."""
        groups = dict(self.settings).get("groups", 1)
        assert isinstance(groups, int)
        return groups

    def call(self, u: float, v: float, like: Tensor) -> Callable[[], Tensor]:
        """Make a call of such a layer with shares of its inputs and outputs, or of its groups."""
        settings, groups = dict(self.settings), self.groups
        if groups > 1:  # a narrower one has fewer groups
            settings["groups"] = part(groups, v)
            inputs, outputs = (n // groups * part(groups, v) for n in (self.inputs, self.outputs))
            weight = like.new_zeros(outputs, self.inputs // groups, *self.kernel)
        else:
            inputs, outputs = part(self.inputs, u), part(self.outputs, v)
            weight = like.new_zeros(outputs, inputs, *self.kernel)
        size = list(self.x)
        size[self.dim] = inputs
        x = like.new_zeros(size)
        if not self.kernel:
            return lambda: F.linear(x, weight)
        if self.last and x.ndim == 4:
            x, weight = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight))
        return lambda: F.conv2d(x, weight, None, **settings)  # type: ignore[call-overload]


def part(size: int, share: float) -> int:
    """Return a share of a size, at least 1."""
    return max(1, round(share * size))


class Fit(NamedTuple):
    """Hold the coefficients of a layer's time, in milliseconds."""

    constant: float
    inputs: float
    outputs: float
    both: float

    def at(self, u: float, v: float) -> float:
        """Return the milliseconds at shares of the inputs and outputs."""
        return self.constant + self.inputs * u + self.outputs * v + self.both * u * v


def fitted(points: Sequence[tuple[float, float]], times: Sequence[float]) -> Fit:
    """Fit coefficients of at least 0, each time's error relative to it.

    Args:
        points: shares of inputs and outputs.
        times: milliseconds at each.
    """
    columns = torch.tensor([[1.0, u, v, u * v] for u, v in points], dtype=torch.float64)
    target = torch.tensor(times, dtype=torch.float64)
    columns, ones = columns / target[:, None], torch.ones_like(target)
    best, least = torch.zeros(4, dtype=torch.float64), math.inf
    for size in range(1, 5):
        for chosen in itertools.combinations(range(4), size):
            own = columns[:, chosen]
            found: Tensor = torch.linalg.lstsq(own, ones[:, None], driver="gelsd").solution[:, 0]
            error = float((own @ found - ones).square().sum())
            if bool((found >= 0).all()) and error < least - 1e-12:
                best, least = torch.zeros(4, dtype=torch.float64), error
                best[list(chosen)] = found
    return Fit(*best.tolist())


class Times:
    """Time layers at a few widths; equal ones once.

    Args:
        like: a tensor of the network's dtype and device.
        stopwatch: that times calls in turns.
    """

    def __init__(self, like: Tensor, stopwatch: Stopwatch) -> None:
        self.like, self.stopwatch = like, stopwatch
        self.found: dict[Shape, Fit] = {}

    def of(self, shape: Shape) -> Fit:
        """Return the coefficients of a layer's time."""
        if shape not in self.found:
            wanted = list(itertools.product((1.0,) if shape.groups > 1 else SHARES, SHARES))
            calls = [shape.call(u, v, self.like) for u, v in wanted]
            whole = shape.groups if shape.groups > 1 else shape.outputs
            points = [(part(shape.inputs, u) / shape.inputs, part(whole, v) / whole) for u, v in wanted]
            with torch.no_grad():
                self.found[shape] = fitted(points, self.stopwatch.race(calls).medians)
        return self.found[shape]


def shapes(net: nn.Module, batch: Batch) -> dict[str, list[tuple[Shape, int]]]:
    """List by layer the shapes of its calls, with the number of entries that each returns."""
    trace, layers = Trace.of(net, batch), prunable(net)
    sizes = {name: [math.prod(e.shape) for e in trace.events if e.layer == name] for name in layers}
    return {
        name: [
            (_shape(layers[name], *call, use.settings), size)
            for call, size in zip(use.calls, sizes[name], strict=True)
        ]
        for name, use in trace.layers.items()
        if name in layers and len(use.calls) == len(sizes[name])
    }


def _shape(layer: Layer, x: torch.Size, stride: tuple[int, ...], settings: Mapping[str, object]) -> Shape:
    outputs, inputs = len(layer.weight), layer.weight.shape[1] * groups_of(layer)
    if isinstance(layer, nn.Linear):
        return Shape(inputs, outputs, tuple(x), len(x) - 1, True)
    dim = len(x) - 3
    kernel = tuple(layer.weight.shape[2:])
    hashable = tuple((key, tuple(x) if isinstance(x, list) else x) for key, x in settings.items())
    return Shape(inputs, outputs, tuple(x), dim, stride[dim] == 1, kernel, hashable)


def latency(
    net: nn.Module,
    batch: Batch,
    whole: float,
    groups: Sequence[Group],
    ranks: Mapping[str, int],
    stopwatch: Stopwatch,
) -> Costs:
    """Say what a network takes at any widths, in milliseconds.

    Args:
        net: in evaluation mode, with open attention.
        batch: that the milliseconds are of, on the network's device.
        whole: milliseconds that the network takes.
        groups: with units that can be taken out.
        ranks: by name of a layer that may become two thin ones, its full rank.
        stopwatch: that times layers.
    """
    times = Times(next(net.parameters()), stopwatch)
    found = shapes(net, batch)
    alone = sum(times.of(shape).at(1, 1) for calls in found.values() for shape, _ in calls)
    scale = min(1.0, (1 - LEAST) * whole / alone) if alone else 1.0
    entries = sum(size for calls in found.values() for _, size in calls)
    shares, terms = parts(net, groups), list[Term]()
    for name, calls in found.items():
        dims = shares.get(id(net.get_submodule(name).weight), {})
        v, u = (
            {group.name: table(group.units, share) for group, share in dims.get(dim, ())} for dim in (0, 1)
        )
        for shape, size in calls:
            terms += _layer(name, shape, times, u, v, ranks.get(name), scale)
            rest = (whole - scale * alone) * size / entries
            terms.append(Term(name, latency=rest, factors=(v,)))
    full = {group.name: group.units for group in groups} | {rank_width(x): r for x, r in ranks.items()}
    return Costs(terms, full)


def _layer(
    name: str, shape: Shape, times: Times, u: Factor, v: Factor, full: int | None, scale: float
) -> Iterator[Term]:
    """Describe one call of a layer, of one layer or of two thin ones."""
    fit = times.of(shape)
    if shape.groups > 1:
        u = {}  # its inputs go with its outputs
    if full is None:
        yield from _terms(name, fit, u, v, scale)
        return
    rank = torch.arange(full + 1, dtype=torch.float64) / shape.outputs
    rank[full] = 0
    dense = (torch.arange(full + 1) == full).double()
    width = rank_width(name)
    yield from _terms(name, fit, u, v, scale, {width: dense})
    yield from _terms(name, fit, u, {width: rank}, scale, {width: 1 - dense})
    yield from _terms(name, times.of(_second(shape)), {width: rank}, v, scale, {width: 1 - dense})


def _second(shape: Shape) -> Shape:
    """Return the shape of a layer that follows another: as many inputs as outputs, and no kernel."""
    x = list(shape.x)
    x[shape.dim] = shape.outputs
    if not shape.kernel:
        return shape._replace(inputs=shape.outputs, x=tuple(x))
    probe = torch.empty(1, device="meta").expand(*shape.x)
    weight = torch.empty(shape.outputs, shape.inputs, *shape.kernel, device="meta")
    output = F.conv2d(probe, weight, None, **dict(shape.settings))  # type: ignore[call-overload]
    return Shape(shape.outputs, shape.outputs, tuple(output.shape), shape.dim, shape.last, (1, 1))


def _terms(
    name: str, fit: Fit, u: Factor, v: Factor, scale: float, always: Factor | None = None
) -> Iterator[Term]:
    first = () if always is None else (always,)
    for coefficient, factors in zip(fit, ((), (u,), (v,), (u, v)), strict=True):
        if coefficient:
            yield Term(name, latency=scale * coefficient, factors=(*first, *(x for x in factors if x)))
