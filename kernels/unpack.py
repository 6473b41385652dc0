"""A packed weight unpacked: every stored value at its place, +0.0 elsewhere.

    weight[entry] = values[stored entries before it] if its code says that it is stored, else +0.0

In the row view and the bit stream of `snows.packing`. A program takes whole groups of one row, a thread eight
neighbouring entries, and a running sum over what is stored is where each finds its value. N:M stores n a
group, so a program knows where its values begin; unstructured are groups of one, counted before. Nothing is
computed with values: every bit pattern survives. Bytes moved: the packed weight read once, the bits of an
unstructured one twice; the dense weight written once, and copied once more for taps beyond 1 x 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
BLOCK = 1024
WIDEST = 32  # entries in a group; a position of 5 bits spans at most 2 bytes


@triton.jit
def _field(codes, index, size, WIDTH: tl.constexpr):
    """Field number `index` of a stream of fields of WIDTH bits."""
    bit = index * WIDTH
    word = tl.load(codes + bit // 8, mask=bit // 8 < size, other=0).to(tl.int32)
    if 8 % WIDTH:
        word |= tl.load(codes + bit // 8 + 1, mask=bit // 8 + 1 < size, other=0).to(tl.int32) << 8
    return (word >> (bit % 8).to(tl.int32)) & (2**WIDTH - 1)


@triton.jit
def count_kernel(codes, counts, size, BLOCK: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    tl.store(counts + program, tl.sum(_field(codes, program * BLOCK + tl.arange(0, BLOCK), size, 1)))


@triton.jit
def unpack_kernel(
    values,
    codes,
    starts,
    out,
    columns,
    blocks,
    stored,
    size,
    N: tl.constexpr,
    M: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    row, block = program // blocks, program % blocks
    lane = tl.arange(0, BLOCK)
    group = row * tl.cdiv(columns, M) + block * (BLOCK // M)  # the program's first
    column = block * (BLOCK // M * M) + lane
    if WIDTH == 0:  # a bit an entry
        here = _field(codes, group * M + lane, size, 1)
    else:  # a position a value
        here = tl.zeros([BLOCK], tl.int32)
        for i in tl.static_range(N):
            here |= (_field(codes, (group + lane // M) * N + i, size, WIDTH) == lane % M).to(tl.int32)
    start = group * N if N else tl.load(starts + program)
    at = start + tl.cumsum(here, 0) - here
    value = tl.load(values + at, mask=(here != 0) & (at < stored), other=0)
    tl.store(
        out + row * columns + column, value, mask=column < columns
    )  # beyond its groups, what the next program stores there too


def takes(values: Tensor, codes: Tensor, shape: Sequence[int], n: int, m: int) -> bool:
    return values.dtype in DTYPES and m <= WIDEST


def unpack(values: Tensor, codes: Tensor, shape: Sequence[int], n: int, m: int) -> Tensor:
    values, codes = values.contiguous(), codes.contiguous()
    out, channels, *kernel = shape
    weight = values.new_empty(out, *kernel, channels)
    rows, columns, m = out, math.prod(shape[1:]), m or 1
    if columns % m == 0:  # rows without gaps between them are one long row
        rows, columns = 1, rows * columns
    width = (m - 1).bit_length() if n * (m - 1).bit_length() <= m else 0
    if weight.numel():
        block = min(BLOCK, max(128, triton.next_power_of_2(columns)))
        blocks = triton.cdiv(triton.cdiv(columns, m), block // m)
        layout = {"BLOCK": block, "num_warps": block // 256 or 1}
        starts = codes
        if n == 0:
            starts = codes.new_empty(blocks, dtype=torch.int64)
            count_kernel[(blocks,)](codes, starts, codes.numel(), **layout)
            starts = starts.cumsum(0) - starts
        unpack_kernel[(rows * blocks,)](
            values,
            codes,
            starts,
            weight,
            columns,
            blocks,
            values.numel(),
            codes.numel(),
            N=n,
            M=m,
            WIDTH=width,
            **layout,
        )
    return weight.movedim(-1, 1).contiguous()
