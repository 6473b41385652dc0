"""LayerNorm, its adjoint, tangent and second derivative (Ba et al. 2016): one program a row, in registers.

Numbers moved per element: layer_norm 2, layer_norm_grad 3, layer_norm_curve 4; weights are read once per row,
from the cache. The formulas are the reference's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDEST = 2**13  # numbers of a row that a program holds


@triton.jit
def _row(x, start, column, inside):
    return tl.load(x + start + column, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def layer_norm_kernel(
    x, weight, bias, out, mean, rstd, n, eps, WEIGHT: tl.constexpr, BIAS: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < n
    at = _row(x, row * n, column, inside)
    m = tl.sum(at) / n
    centred = tl.where(inside, at - m, 0.0)
    r = 1 / tl.sqrt(tl.sum(centred * centred) / n + eps)
    y = centred * r
    if WEIGHT:
        y *= _row(weight, 0, column, inside)
    if BIAS:
        y += _row(bias, 0, column, inside)
    tl.store(out + row * n + column, y.to(out.dtype.element_ty), mask=inside)
    tl.store(mean + row, m)
    tl.store(rstd + row, r)


@triton.jit
def layer_norm_grad_kernel(
    g, x, mean, rstd, before, after, out, n, BEFORE: tl.constexpr, AFTER: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < n
    h = _row(g, row * n, column, inside)
    if BEFORE:
        h *= _row(before, 0, column, inside)
    r = tl.load(rstd + row).to(tl.float32)
    normal = tl.where(
        inside, (_row(x, row * n, column, inside) - tl.load(mean + row).to(tl.float32)) * r, 0.0
    )
    y = r * (h - tl.sum(h) / n - normal * (tl.sum(h * normal) / n))
    if AFTER:
        y *= _row(after, 0, column, inside)
    tl.store(out + row * n + column, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def layer_norm_curve_kernel(
    g, v, x, mean, rstd, before, after, out, n, BEFORE: tl.constexpr, AFTER: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < n
    h, u = _row(g, row * n, column, inside), _row(v, row * n, column, inside)
    if BEFORE:
        h *= _row(before, 0, column, inside)
    if AFTER:
        u *= _row(after, 0, column, inside)
    h, u = tl.where(inside, h - tl.sum(h) / n, 0.0), tl.where(inside, u - tl.sum(u) / n, 0.0)
    r = tl.load(rstd + row).to(tl.float32)
    normal = tl.where(
        inside, (_row(x, row * n, column, inside) - tl.load(mean + row).to(tl.float32)) * r, 0.0
    )
    a, b, c = tl.sum(h * normal) / n, tl.sum(u * normal) / n, tl.sum(h * u) / n
    y = -r * r * (b * h + a * u + (c - 3 * a * b) * normal)
    tl.store(out + row * n + column, y.to(out.dtype.element_ty), mask=inside)


def takes(x: Tensor, *others: Any) -> bool:
    shape = next(a for a in others if isinstance(a, list | tuple))
    return x.dtype in DTYPES and 0 < math.prod(shape) <= WIDEST


def _sizes(x: Tensor, shape: Sequence[int]) -> tuple[int, int, dict[str, int]]:
    """Count rows, their length, and lay a program out: eight numbers a thread, two loads of 16 bytes."""
    n = math.prod(shape)
    block = max(128, triton.next_power_of_2(n))
    return x.numel() // n, n, {"BLOCK": block, "num_warps": min(16, max(1, block // 256))}


def layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, shape: Sequence[int], eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    x = x.contiguous()
    rows, n, layout = _sizes(x, shape)
    out = torch.empty_like(x)
    mean = x.new_empty((*x.shape[: x.ndim - len(shape)], *(1,) * len(shape)), dtype=torch.float32)
    rstd = torch.empty_like(mean)
    if rows:
        w, b = (x if y is None else y.contiguous() for y in (weight, bias))
        layer_norm_kernel[(rows,)](
            x, w, b, out, mean, rstd, n, eps, WEIGHT=weight is not None, BIAS=bias is not None, **layout
        )
    return out, mean, rstd


def layer_norm_grad(
    g: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    before: Tensor | None,
    after: Tensor | None,
    shape: Sequence[int],
) -> Tensor:
    return _launch(layer_norm_grad_kernel, [g], x, mean, rstd, before, after, shape)


def layer_norm_curve(
    g: Tensor,
    v: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    before: Tensor | None,
    after: Tensor | None,
    shape: Sequence[int],
) -> Tensor:
    return _launch(layer_norm_curve_kernel, [g, v], x, mean, rstd, before, after, shape)


def _launch(
    kernel: Any,
    vectors: list[Tensor],
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    before: Tensor | None,
    after: Tensor | None,
    shape: Sequence[int],
) -> Tensor:
    x = x.contiguous()
    rows, n, layout = _sizes(x, shape)
    out = torch.empty_like(x)
    if rows:
        b, a = (x if y is None else y.contiguous() for y in (before, after))
        kernel[(rows,)](
            *(v.contiguous() for v in vectors),
            x,
            mean,
            rstd,
            b,
            a,
            out,
            n,
            BEFORE=before is not None,
            AFTER=after is not None,
            **layout,
        )
    return out
