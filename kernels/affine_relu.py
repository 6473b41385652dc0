"""Differentiate a ReLU after evaluated BatchNorm: ``scale g`` where the output is positive.

A program takes a stretch of one channel of one image, so its scale is a scalar; with few positions a channel
(below `BLOCK`) part of it idles. Numbers moved per element: 3.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit
def affine_relu_grad_kernel(g, y, scale, out, channels, positions, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < positions
    a = tl.load(scale + row % channels).to(tl.float32)
    grad = a * tl.load(g + row * positions + column, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(y + row * positions + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(
        out + row * positions + column, tl.where(value <= 0, 0.0, grad).to(out.dtype.element_ty), mask=inside
    )


def takes(x: Tensor, *_: Any) -> bool:
    return x.dtype in DTYPES and triton.cdiv(_positions(x), 1024) < 2**16


def _positions(x: Tensor) -> int:
    return x[0, 0].numel() if x.numel() else 0


def affine_relu_grad(g: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    g, y, scale = g.contiguous(), y.contiguous(), scale.contiguous()
    out = torch.empty_like(g)
    if positions := _positions(g):
        block = min(1024, max(128, triton.next_power_of_2(positions)))
        grid = (g.shape[0] * g.shape[1], triton.cdiv(positions, block))
        affine_relu_grad_kernel[grid](
            g, y, scale, out, g.shape[1], positions, BLOCK=block, num_warps=block // 256 or 1
        )
    return out
