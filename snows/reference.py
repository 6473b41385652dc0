"""Each op in plain PyTorch: the specification that every kernel is tested against."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def nm_mask(scores: Tensor, n: int, m: int) -> Tensor:
    """Keep the `n` highest of every `m` consecutive scores of a row; the lower index wins a tie.

    Args:
        scores: (rows, columns), floating point, without NaN; a last group of fewer than `m` columns keeps
            its `n` highest too.
        n: entries kept in each group.
        m: entries in a group.

    Returns:
        (rows, columns), bool.
    """
    rows, columns = scores.shape
    pad = -columns % m
    if pad:
        scores = torch.nn.functional.pad(scores, (0, pad), value=-torch.inf)
    order = scores.view(rows, (columns + pad) // m, m).argsort(dim=-1, descending=True, stable=True)
    mask = torch.zeros_like(order, dtype=torch.bool)
    mask.scatter_(-1, order[..., :n], True)
    return mask.view(rows, columns + pad)[:, :columns].clone()


def code_bits(n: int, m: int) -> int:
    """Bits of one group's code: n positions of ceil(log2 m) bits where that is no more than a bit an entry, else m bits."""
    return min(n * (m - 1).bit_length(), m)


def to_bits(stream: Tensor, count: int) -> Tensor:
    """The first `count` bits of a stream of bytes, the least significant bit of each byte first: (count,), uint8."""
    shifts = torch.arange(8, dtype=torch.uint8, device=stream.device)
    return ((stream[:, None] >> shifts) & 1).flatten()[:count]


def kept(codes: Tensor, rows: int, columns: int, n: int, m: int) -> Tensor:
    """Which entries of the row view are stored.

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
        return to_bits(codes, rows * columns).view(rows, columns).bool()
    groups, bits = -(-columns // m), code_bits(n, m)
    stream = to_bits(codes, rows * groups * bits)
    if n * (m - 1).bit_length() > m:
        return stream.view(rows, groups * m).bool()
    width = bits // n
    places = 2 ** torch.arange(width, device=codes.device)
    positions = (stream.view(rows, groups, n, width) * places).sum(-1)
    return torch.zeros(rows, groups, m, dtype=torch.bool, device=codes.device).scatter(-1, positions, True).view(rows, groups * m)


def unpack(values: Tensor, codes: Tensor, shape: list[int], n: int, m: int) -> Tensor:
    """Put the stored values back at their places, +0.0 elsewhere.

    Args:
        values: the stored entries in order of the row view: (rows, groups * n), or (stored,) for unstructured.
        codes: uint8, their positions; see `snows.packing`.
        shape: the weight's, (out, in) or (out, in, kernel height, kernel width).
        n: entries stored in each group, 0 for unstructured.
        m: entries in a group, 0 for unstructured.

    Returns:
        The weight, `shape`, contiguous.
    """
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
    """The stored weights in the order a device's kernels read them; empty where there is no kernel.

    A permutation of `values` with the positions spelled out. What it looks like is the kernel's own business, so it is
    made from the packed weight wherever that arrives, and never saved.
    """
    return values.new_empty(0, dtype=torch.int32)


def sparse_linear(
    input: Tensor, values: Tensor, codes: Tensor, bias: Tensor | None, shape: list[int], n: int, m: int,
    activation: str = "none", order: Tensor | None = None,
) -> Tensor:
    """Multiply by a packed weight, add the bias, apply the activation.

    Args:
        input: (..., in).
        values: see `unpack`, as `codes`, `n` and `m`.
        codes: uint8.
        bias: (out,) or None.
        shape: the weight's, (out, in).
        n: entries stored in each group.
        m: entries in a group.
        activation: "none", "relu" or "gelu".
        order: the weight in the order of a kernel, which the reference does not read.

    Returns:
        (..., out), contiguous.
    """
    return activate(F.linear(input, unpack(values, codes, shape, n, m), bias), activation).contiguous()


def sparse_conv2d(
    input: Tensor, values: Tensor, codes: Tensor, bias: Tensor | None, shape: list[int], n: int, m: int,
    stride: list[int], padding: list[int], dilation: list[int], activation: str = "none", order: Tensor | None = None,
) -> Tensor:
    """Convolve with a packed weight, add the bias, apply the activation.

    Args:
        input: (images, in, height, width).
        values: see `unpack`, as `codes`, `n` and `m`.
        codes: uint8.
        bias: (out,) or None.
        shape: the weight's, (out, in, kernel height, kernel width).
        n: entries stored in each group.
        m: entries in a group.
        stride: vertical, horizontal; likewise `padding` (zeros on both sides) and `dilation`.
        padding: see `stride`.
        dilation: see `stride`.
        activation: "none", "relu" or "gelu".
        order: the weight in the order of a kernel, which the reference does not read.

    Returns:
        (images, out, output height, output width), contiguous.
    """
    weight = unpack(values, codes, shape, n, m)
    return activate(F.conv2d(input.contiguous(), weight, bias, stride, padding, dilation), activation).contiguous()
