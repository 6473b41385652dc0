"""The rows that a layer multiplies its weight with, and their second moments, in the row view."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial, reduce
from itertools import combinations
from operator import iadd
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight

from snows.networks.watching import Call
from snows.sparsity import rows

CHUNK = 2**21  # numbers unfolded at a time
WIDE = 2**13  # inputs of a layer whose second moments are made at a time


class _Windows(NamedTuple):
    """Say where a convolution reads an image.

    Sizes are (height, width), the zeros around the image as ``F.pad`` takes them.
    """

    kernel: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    padding: tuple[int, int, int, int]
    groups: int

    @classmethod
    def of(cls, call: Call) -> _Windows:
        stride, dilation, kernel = (
            _pair(x) for x in (call.settings.get("stride", 1), call.settings.get("dilation", 1), call.kernel)
        )
        return cls(
            kernel,
            stride,
            dilation,
            _padding(call.settings.get("padding", 0), kernel, dilation),
            call.settings.get("groups", 1),
        )

    def views(self, images: Tensor) -> Iterator[Tensor]:
        """Give each window, some images at a time.

        Their shape is (groups, images, height, width, kernel height, kernel width, channels).
        """
        layout = (
            torch.channels_last if self.groups == 1 else torch.contiguous_format
        )  # what a window takes from an image lies close together
        each = images[0].numel() * self.kernel[0] * self.kernel[1] // (self.stride[0] * self.stride[1])
        for x in images.split(max(1, CHUNK // max(1, each))):
            x = F.pad(x, self.padding).contiguous(memory_format=layout)
            b, c, h, w = x.stride()
            channels = x.shape[1] // self.groups
            out = [
                (x.shape[2 + i] - self.dilation[i] * (self.kernel[i] - 1) - 1) // self.stride[i] + 1
                for i in range(2)
            ]
            yield x.as_strided(
                (self.groups, x.shape[0], *out, *self.kernel, channels),
                (
                    channels * c,
                    b,
                    h * self.stride[0],
                    w * self.stride[1],
                    h * self.dilation[0],
                    w * self.dilation[1],
                    c,
                ),
            )


def patches(call: Call) -> Iterator[Tensor]:
    """Give the rows that a layer multiplies its weight with, some images at a time.

    Yields:
        (groups, positions, in): for a Linear one row a token; for a convolution one an output position, with
        zeros where it is padded, input channel fastest.
    """
    if call.function is F.linear:
        yield call.x.flatten(0, -2).unsqueeze(0)
        return
    for view in _Windows.of(call).views(call.x):
        yield view.reshape(len(view), view.shape[1:4].numel(), view.shape[4:].numel())


def gram(call: Call) -> Tensor:
    """Sum ``x xᵀ`` over the rows x of `patches`: (groups, in, in), float64.

    In a convolution of stride 1 the block for lines i and j of the kernel multiplies lines of the image that
    are j - i apart,
    nearly the same ones for all i: what they share is multiplied once. A kernel's width is unfolded, its
    height is not.
    """
    if call.function is F.linear or (windows := _Windows.of(call)).stride[0] > 1 or windows.kernel[0] == 1:
        return reduce(iadd, map(_square, patches(call)))
    height, dilation = windows.kernel[0], windows.dilation[0]
    total: Tensor | None = None
    for view in windows._replace(kernel=(1, windows.kernel[1])).views(call.x):
        lines = view.transpose(1, 2).reshape(
            len(view), view.shape[2], view.shape[1] * view.shape[3], view.shape[4:].numel()
        )
        groups, tall, _, size = lines.shape
        if total is None:
            total = lines.new_zeros(height, height, groups, size, size, dtype=torch.float64)
        span = tall - dilation * (height - 1)  # lines that one line of the kernel moves over
        for apart in range(height):
            last = dilation * (height - 1 - apart)
            low, high = (
                (last, span) if last < span else (last + span,) * 2
            )  # what they share: nothing, in a low image
            product = partial(_product, lines, lines[:, apart * dilation :])
            shared = product(low, high)
            for i in range(height - apart):
                start, stop = i * dilation, i * dilation + span
                total[i, i + apart] += shared + product(start, min(low, stop)) + product(high, stop)
    assert total is not None
    for i, j in combinations(range(height), 2):
        total[j, i] = total[i, j].mT
    return total.permute(2, 0, 3, 1, 4).reshape(groups, height * size, height * size)


def _square(x: Tensor) -> Tensor:
    """Return ``x xᵀ`` summed over the rows of x, (groups, in, in), float64; of a wide layer in pieces."""
    if x.shape[2] <= WIDE:
        return (x.mT @ x).double()
    total = x.new_empty(x.shape[0], x.shape[2], x.shape[2], dtype=torch.float64)
    for start in range(0, x.shape[2], WIDE):
        part = slice(start, start + WIDE)
        total[:, part] = x[:, :, part].mT @ x
    return total


def _product(lines: Tensor, others: Tensor, start: int, stop: int) -> Tensor | int:
    """Sum over some lines of the one's times the other's: (groups, columns, columns)."""
    if start >= stop:
        return 0
    one, other = (x[:, start:stop].flatten(1, 2) for x in (lines, others))
    return one.mT @ other


def cross(call: Call, y: Tensor) -> Tensor:
    """Sum ``y xᵀ`` over the rows x of `patches`: (groups, out / groups, in).

    Args:
        call: a layer's.
        y: as the layer's output: (..., out) for a Linear, (images, out, height, width) for a convolution.
    """
    if call.function is F.linear:
        return (y.flatten(0, -2).T @ call.x.flatten(0, -2)).unsqueeze(0)
    kernel, stride, dilation, padding, groups = _Windows.of(call)
    x = F.pad(call.x, padding)
    shape = (y.shape[1], x.shape[1] // groups, *kernel)
    return rows(conv2d_weight(x, shape, y, stride, 0, dilation, groups)).view(
        groups, y.shape[1] // groups, -1
    )


def output(call: Call, weight: Tensor) -> Tensor:
    """Apply the layer with this weight and no bias to the call's input."""
    return call.function(call.x, weight, **call.settings)


def positions(call: Call) -> int:
    """Count the rows that `patches` gives: images times tokens or output positions."""
    if call.function is F.linear:
        return call.shape[:-1].numel()
    view = next(_Windows.of(call).views(torch.empty(1, *call.shape[1:], device="meta")))
    return call.shape[0] * view.shape[1:4].numel()


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[-1])


def _padding(padding: Any, kernel: tuple[int, int], dilation: tuple[int, int]) -> tuple[int, int, int, int]:
    if padding == "valid":
        return 0, 0, 0, 0
    if padding == "same":
        total = [dilation[i] * (kernel[i] - 1) for i in range(2)]
        return total[1] // 2, total[1] - total[1] // 2, total[0] // 2, total[0] - total[0] // 2
    vertical, horizontal = _pair(padding)
    return horizontal, horizontal, vertical, vertical
