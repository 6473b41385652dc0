"""Milliseconds as a cost of a network: how long its layers take at any widths, and with zeros.

What the whole network takes beyond its layers, in activations and normalisations, is shared out by the sizes
of the layers' outputs. Times of layers say how widths compare; how long a network takes is always measured on
the whole of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from snows.choosing.costs import Costs, Factor, Term, full_widths, parts, table
from snows.choosing.options import Ladder, treatment
from snows.choosing.options import table as of_options
from snows.choosing.times import Fit, Shape, Times
from snows.networks.batches import Batch
from snows.networks.channels import Group
from snows.networks.layers import Layer, groups_of, prunable
from snows.networks.trace import Trace

LEAST = 0.1  # of the network's time, what is not its layers': where they take more alone, they are scaled


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
    ladders: Mapping[str, Ladder],
    times: Times,
    packed: float = 1.0,
) -> Costs:
    """Say what a network takes at any widths, in milliseconds.

    Args:
        net: in evaluation mode, with open attention.
        batch: that the milliseconds are of, on the network's device.
        whole: milliseconds that the network takes.
        groups: with units that can be taken out.
        ladders: by name of a layer, how it may be treated.
        times: of layers.
        packed: of what packed weights save in a layer alone, the part that they save in a network.
    """
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
            sides = ({} if shape.groups > 1 else u), v  # the inputs of groups go with their outputs
            if name in ladders:
                terms += _treated(name, shape, times, sides, ladders[name], scale, packed)
            else:
                terms += _terms(name, times.of(shape), *sides, scale)
            rest = (whole - scale * alone) * size / entries
            terms.append(Term(name, latency=rest, factors=(v,)))
    return Costs(terms, full_widths(groups, ladders))


def _treated(
    name: str,
    shape: Shape,
    times: Times,
    sides: tuple[Factor, Factor],
    ladder: Ladder,
    scale: float,
    packed: float,
) -> Iterator[Term]:
    """Describe one call of a layer: of a dense one, of packed ones, or of two thin ones."""
    (u, v), width, fit = sides, treatment(name), times.of(shape)
    dense = of_options(ladder, lambda x: 0 if x.rank else 1 if x.pattern is None else 1 - packed)
    yield from _terms(name, fit, u, v, scale, {width: dense})
    for pattern in dict.fromkeys(x.pattern for x in ladder if x.pattern is not None):
        own = packed * of_options(ladder, lambda x, own=pattern: float(x.pattern == own))  # type: ignore[misc]
        yield from _terms(name, times.of(shape, pattern), u, v, scale, {width: own})
    if any(x.rank for x in ladder):
        thin = of_options(ladder, lambda x: float(x.rank > 0))
        rank = of_options(ladder, lambda x: x.rank / shape.outputs)
        yield from _terms(name, fit, u, {width: rank}, scale, {width: thin})
        yield from _terms(name, times.of(second(shape)), {width: rank}, v, scale, {width: thin})


def second(shape: Shape) -> Shape:
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
