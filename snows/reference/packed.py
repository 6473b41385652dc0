"""Packed layers: the weight unpacked, and the dense product with it.

The products unpack by the op, so that where only unpacking has a kernel they run on it.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from snows.reference.masks import unpack_bits


def code_bits(n: int, m: int) -> int:
    """Count the bits of one group's code.

    n positions of ceil(log2 m) bits where that is no more than a bit an entry, else m bits.
    """
    return min(n * (m - 1).bit_length(), m)


def kept(codes: Tensor, rows: int, columns: int, n: int, m: int) -> Tensor:
    """Say which entries of the row view are stored.

    Args:
        codes: uint8, the packed positions; see `snows.packing`.
        rows: rows of the row view.
        columns: columns of the row view.
        n: entries stored in each group, 0 for unstructured.
        m: entries in a group, 0 for unstructured.

    Returns:
        (rows, columns rounded up to whole groups), bool.
    """
    if m == 0:
        return unpack_bits(codes, (rows, columns))
    groups, bits = -(-columns // m), code_bits(n, m)
    stream = unpack_bits(codes, (rows * groups * bits,))
    if n * (m - 1).bit_length() > m:
        return stream.view(rows, groups * m)
    width = bits // n
    places = 2 ** torch.arange(width, device=codes.device)
    positions = (stream.view(rows, groups, n, width) * places).sum(-1)
    return (
        torch.zeros(rows, groups, m, dtype=torch.bool, device=codes.device)
        .scatter(-1, positions, True)
        .view(rows, groups * m)
    )


def unpack(values: Tensor, codes: Tensor, shape: list[int], n: int, m: int) -> Tensor:
    """See `ops.unpack`."""
    out, channels, *kernel = shape
    columns = math.prod(shape[1:])
    mask = kept(codes, out, columns, n, m)
    matrix = torch.zeros(mask.shape, dtype=values.dtype, device=values.device).masked_scatter(mask, values)
    return matrix[:, :columns].reshape(out, *kernel, channels).movedim(-1, 1).contiguous()


def activate(output: Tensor, activation: str) -> Tensor:
    """Apply "relu" or "gelu" (the exact one, by erf); "none" changes nothing."""
    if activation == "relu":
        return output.relu()
    return F.gelu(output) if activation == "gelu" else output


def kernel_order(values: Tensor, codes: Tensor, shape: list[int], n: int, m: int) -> Tensor:
    """Return nothing: the reference has no order of its own. See `ops.kernel_order`."""
    return values.new_empty(0, dtype=torch.int32)


def sparse_linear(
    input: Tensor,
    values: Tensor,
    codes: Tensor,
    bias: Tensor | None,
    shape: list[int],
    n: int,
    m: int,
    activation: str = "none",
    order: Tensor | None = None,
) -> Tensor:
    """See `ops.sparse_linear`; `order` is not read."""
    return activate(
        F.linear(input, torch.ops.snows.unpack(values, codes, shape, n, m), bias), activation
    ).contiguous()


def images_innermost(x: Tensor) -> bool:
    """Say whether images lie innermost in memory.

    That is an (images, channels, height, width) tensor laid out as (channels, height, width, images), with 8
    images or a multiple of it.
    """
    return (
        x.ndim == 4
        and not x.is_contiguous()
        and x.stride(0) == 1
        and x.permute(1, 2, 3, 0).is_contiguous()
        and x.shape[0] % 8 == 0
    )


def innermost_images(x: Tensor) -> Tensor:
    """Lay the images out innermost in memory."""
    return x.flatten(1).t().contiguous().view(*x.shape[1:], x.shape[0]).permute(3, 0, 1, 2)


def sparse_conv2d(
    input: Tensor,
    values: Tensor,
    codes: Tensor,
    bias: Tensor | None,
    shape: list[int],
    n: int,
    m: int,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    activation: str = "none",
    order: Tensor | None = None,
) -> Tensor:
    """See `ops.sparse_conv2d`; `order` is not read."""
    weight = torch.ops.snows.unpack(values, codes, shape, n, m)
    if images_innermost(input):
        return innermost_images(
            activate(F.conv2d(input, weight, bias, stride, padding, dilation), activation)
        )
    last = input.is_contiguous(memory_format=torch.channels_last) and not input.is_contiguous()
    layout = torch.channels_last if last else torch.contiguous_format
    output = F.conv2d(input.contiguous(memory_format=layout), weight, bias, stride, padding, dilation)
    return activate(output, activation).contiguous(memory_format=layout)
