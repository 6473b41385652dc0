"""``weight`` where its bit is set, +0.0 elsewhere.

A thread holds the eight weights of one byte, so the mask costs one byte read per thread and no shuffle. Bytes
moved: 2 per weight byte, and 1/8 for its bit: 8.125 a float32.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BYTES = 128  # of the mask, and threads, in a program


@triton.jit
def masked_kernel(weight, bits, out, n, BYTES: tl.constexpr):
    byte = tl.program_id(0).to(tl.int64) * BYTES + tl.arange(0, BYTES)
    bit = tl.arange(0, 8)
    word = tl.load(bits + byte, mask=byte * 8 < n, other=0)
    index = byte[:, None] * 8 + bit[None, :]
    inside = index < n
    value = tl.load(weight + index, mask=inside, other=0.0)
    kept = ((word.to(tl.int32)[:, None] >> bit[None, :]) & 1) != 0
    tl.store(out + index, tl.where(kept, value, 0.0), mask=inside)


def takes(weight: Tensor, *_: Any) -> bool:
    return weight.dtype in DTYPES


def masked(weight: Tensor, bits: Tensor) -> Tensor:
    weight, bits = weight.contiguous(), bits.contiguous()
    out = torch.empty_like(weight)
    if n := weight.numel():
        masked_kernel[(triton.cdiv(n, 8 * BYTES),)](weight, bits, out, n, BYTES=BYTES, num_warps=4)
    return out
