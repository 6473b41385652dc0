"""GELU with its slope, and its second derivative times g (Hendrycks & Gimpel 2016), element by element.

Bytes moved per element: gelu 3 numbers (x in, value and slope out), gelu_curve 3. The derivative between them
is one multiplication by the slope, which needs no kernel of its own.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BLOCK = 1024


@triton.jit
def _tanh_parts(x):
    """Compute u' and tanh u of ``u = c (x + a x³)``.

    ``1 - 2 / (exp 2u + 1)`` neither overflows nor loses digits against the 1 it is added to.
    """
    slope = 0.7978845608028654 * (1 + 3 * 0.044715 * x * x)
    u = 0.7978845608028654 * (x + 0.044715 * x * x * x)
    return slope, 1 - 2 / (tl.exp(2 * u) + 1)


@triton.jit
def gelu_kernel(x, value, slope, n, TANH: tl.constexpr, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < n
    at = tl.load(x + index, mask=inside, other=0.0).to(tl.float32)
    if TANH:
        inner, t = _tanh_parts(at)
        share = 0.5 * (1 + t)
        bend = 0.5 * at * (1 - t * t) * inner
    else:
        share = 0.5 * (1 + tl.erf(at * 0.7071067811865476))
        bend = at * 0.3989422804014327 * tl.exp(-0.5 * at * at)
    tl.store(value + index, (at * share).to(value.dtype.element_ty), mask=inside)
    tl.store(slope + index, (share + bend).to(slope.dtype.element_ty), mask=inside)


@triton.jit
def gelu_curve_kernel(x, g, out, n, TANH: tl.constexpr, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < n
    at = tl.load(x + index, mask=inside, other=0.0).to(tl.float32)
    factor = tl.load(g + index, mask=inside, other=0.0).to(tl.float32)
    if TANH:
        inner, t = _tanh_parts(at)
        bent = 3 * 0.044715 * 0.7978845608028654 * at * at  # x u'' / 2
        curve = (1 - t * t) * (inner + bent - at * t * inner * inner)
    else:
        curve = 0.3989422804014327 * tl.exp(-0.5 * at * at) * (2 - at * at)
    tl.store(out + index, (curve * factor).to(out.dtype.element_ty), mask=inside)


def takes(x: Tensor, *_: Any) -> bool:
    return x.dtype in DTYPES


def gelu(x: Tensor, approximate: str) -> tuple[Tensor, Tensor]:
    x = x.contiguous()
    value, slope = torch.empty_like(x), torch.empty_like(x)
    if n := x.numel():
        gelu_kernel[(triton.cdiv(n, BLOCK),)](
            x, value, slope, n, TANH=approximate == "tanh", BLOCK=BLOCK, num_warps=4
        )
    return value, slope


def gelu_curve(x: Tensor, g: Tensor, approximate: str) -> Tensor:
    x, g = x.contiguous(), g.contiguous()
    out = torch.empty_like(x)
    if n := x.numel():
        gelu_curve_kernel[(triton.cdiv(n, BLOCK),)](
            x, g, out, n, TANH=approximate == "tanh", BLOCK=BLOCK, num_warps=4
        )
    return out
