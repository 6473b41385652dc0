"""How long layers take: timed at a few widths, and fitted.

With u and v what is left of a layer's inputs and outputs, its time is ``a + b u + c v + d u v``, the four
coefficients at least 0 and fitted to times that were measured at a few widths, of dense weights or of packed
ones with zeros.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from snows import together
from snows.choosing.measuring import Stopwatch
from snows.choosing.options import Zeros
from snows.layers import SparseConv2d, SparseLinear
from snows.layers.conv2d import INNERMOST
from snows.ops.precision import as_given
from snows.packing import pack
from snows.reference import innermost_images
from snows.sparsity import NM

SHARES = (0.25, 0.5, 1.0)  # of a layer's inputs and outputs, at which it is timed
ENDS = (0.5, 1.0)  # the same of a packed layer


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

    def call(self, u: float, v: float, like: Tensor, pattern: Zeros | None = None) -> Callable[[], Tensor]:
        """Make a call of such a layer with shares of its inputs and outputs, or of its groups.

        Args:
            u: share of the inputs.
            v: share of the outputs, or of the groups.
            like: gives dtype and device.
            pattern: of a packed weight; None for a dense one.
        """
        settings, groups = dict(self.settings), self.groups
        if groups > 1:  # a narrower one has fewer groups
            settings["groups"] = part(groups, v)
            inputs, outputs = (n // groups * part(groups, v) for n in (self.inputs, self.outputs))
            weight = like.new_zeros(outputs, self.inputs // groups, *self.kernel)
        else:
            inputs, outputs = self.narrow(u, pattern), part(self.outputs, v)
            weight = like.new_zeros(outputs, inputs, *self.kernel)
        size = list(self.x)
        size[self.dim] = inputs
        x = like.new_zeros(size)
        if self.kernel and self.last and x.ndim == 4:
            x, weight = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight))
        if pattern is not None:
            return _packed_call(weight, x, pattern, settings)
        if not self.kernel:
            return lambda: F.linear(x, weight)
        return lambda: F.conv2d(x, weight, None, **settings)  # type: ignore[call-overload]

    def narrow(self, u: float, pattern: Zeros | None) -> int:
        """Return a share of the inputs; a multiple of the groups of a pattern."""
        step = pattern.m if isinstance(pattern, NM) else 1
        return step * part(self.inputs // step, u)


def _packed_call(weight: Tensor, x: Tensor, pattern: Zeros, settings: dict[str, Any]) -> Callable[[], Tensor]:
    weight = torch.rand_like(weight)
    mask = pattern.mask(weight)
    stored = pack(weight * mask, mask, pattern)
    if weight.ndim == 2:
        linear = SparseLinear(stored, None)
        return lambda: linear(x)
    own = {key: x for key, x in settings.items() if key != "groups"}
    conv = SparseConv2d(stored, None, **own)
    if x.is_cpu and x.ndim == 4 and len(x) % INNERMOST == 0:
        conv.innermost, x = True, innermost_images(x)
    return lambda: conv(x)


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


@dataclass
class Times:
    """Hold how long layers take, each kind timed once.

    Attributes:
        like: a tensor of the network's dtype and device; None where nothing can be timed.
        stopwatch: that times calls in turns.
        found: by shape and pattern.
    """

    like: Tensor | None
    stopwatch: Stopwatch
    found: dict[tuple[Shape, Zeros | None], Fit] = field(default_factory=dict)

    def of(self, shape: Shape, pattern: Zeros | None = None) -> Fit:
        """Return the coefficients of a layer's time.

        Raises:
            ValueError: it was not timed where the times come from.
        """
        key = shape, pattern
        if key not in self.found:
            if self.like is None:
                raise ValueError(
                    f"times: expected those of a layer of {shape.inputs} inputs and {shape.outputs} outputs"
                    f"{f' in {pattern}' if pattern else ''} on an input of {shape.x}, got a table without "
                    "it; measure this model with these images"
                )
            self.found[key] = together.first(partial(self._timed, shape, pattern, self.like))
        return self.found[key]

    @as_given()
    def _timed(self, shape: Shape, pattern: Zeros | None, like: Tensor) -> Fit:
        own = SHARES if pattern is None else ENDS
        wanted = list(itertools.product((1.0,) if shape.groups > 1 else own, own))
        calls = [shape.call(u, v, like, pattern) for u, v in wanted]
        whole = shape.groups if shape.groups > 1 else shape.outputs
        points = [(shape.narrow(u, pattern) / shape.inputs, part(whole, v) / whole) for u, v in wanted]
        with torch.no_grad():
            return fitted(points, self.stopwatch.race(calls).told().medians)
