"""``softmax(scale q kᵀ + bias) v``, its adjoint and its tangent, without a (queries, keys) matrix in memory.

Forward with a running maximum and sum (Milakov & Gimelshein 2018; Dao et al. 2022); what is kept is the
logarithm of each row's sum, from which the derivatives make the probabilities again, a block at a time. A
program owns a block of queries of one head, or, for the adjoint's dk and dv, of keys; no atomics, so results
are the same from run to run. Products of float32 run as three tf32 ones, those of 16-bit numbers, exact in
tf32, as one; what is computed in between is rounded to tf32 first, for the tensor core cuts it off, which
would make every sum too small.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS = 32, 32  # queries and keys of a block
TANGENT_ROWS = 16  # it holds two blocks of queries and would spill at 32
# Eight warps and no pipelining: with four, or with loads in flight, float32 derivatives at width 64 spill on
# sm_80 (252 registers as it is), and shared memory passes the 99 KB of sm_86.
LAYOUT = {"num_warps": 8, "num_stages": 1}
WIDEST = {torch.float32: 64, torch.bfloat16: 128, torch.float16: 128}  # of a head; wider ones spill


@triton.jit
def _block(x, head, rows, columns, count, width):
    """Load a block of one head of x (heads, count, width), zeros outside."""
    inside = (rows[:, None] < count) & (columns[None, :] < width)
    return tl.load(
        x + head * count * width + rows[:, None] * width + columns[None, :], mask=inside, other=0.0
    ).to(tl.float32)


@triton.jit
def _rounded(x, PRECISION: tl.constexpr):
    """Round a computed operand to the nearest tf32 where that is multiplied.

    The hardware does not read the lower 13 bits.
    """
    if PRECISION == "tf32":
        x = ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return x


@triton.jit
def _put(x, value, head, rows, columns, count, width):
    inside = (rows[:, None] < count) & (columns[None, :] < width)
    tl.store(
        x + head * count * width + rows[:, None] * width + columns[None, :],
        value.to(x.dtype.element_ty),
        mask=inside,
    )


@triton.jit
def _scores(
    q,
    k,
    bias,
    head,
    i,
    j,
    queries,
    keys,
    by_head,
    by_query,
    by_key,
    scale,
    BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute ``scale q kᵀ + bias`` of a block of queries i and keys j; -inf where there is no key."""
    scores = scale * tl.dot(q, tl.trans(k), input_precision=PRECISION)
    inside = (i[:, None] < queries) & (j[None, :] < keys)
    if BIAS:
        scores += tl.load(
            bias + head * by_head + i[:, None] * by_query + j[None, :] * by_key, mask=inside, other=0.0
        ).to(tl.float32)
    return tl.where(j[None, :] < keys, scores, float("-inf"))


@triton.jit
def attention_kernel(
    q,
    k,
    v,
    bias,
    out,
    kept,
    queries,
    keys,
    width,
    depth,
    by_head,
    by_query,
    by_key,
    scale,
    BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    head = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    w, d = tl.arange(0, WIDTH), tl.arange(0, DEPTH)
    own = _block(q, head, i, w, queries, width)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    result = tl.zeros([ROWS, DEPTH], tl.float32)
    for start in range(0, keys, COLUMNS):
        j = start + tl.arange(0, COLUMNS)
        scores = _scores(
            own,
            _block(k, head, j, w, keys, width),
            bias,
            head,
            i,
            j,
            queries,
            keys,
            by_head,
            by_query,
            by_key,
            scale,
            BIAS,
            PRECISION,
        )
        higher = tl.maximum(top, tl.max(scores, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # no key so far
        p = tl.exp(scores - base[:, None])
        shrink = tl.exp(top - base)
        total = total * shrink + tl.sum(p, 1)
        result = result * shrink[:, None] + tl.dot(
            _rounded(p, PRECISION), _block(v, head, j, d, keys, depth), input_precision=PRECISION
        )
        top = higher
    none = total == 0
    result = result / tl.where(none, 1.0, total)[:, None]
    _put(out, result, head, i, d, queries, depth)
    tl.store(
        kept + head * queries + i,
        tl.where(none, 0.0, top + tl.log(tl.where(none, 1.0, total))),
        mask=i < queries,
    )


@triton.jit
def attention_tangent_kernel(
    dq,
    dk,
    dv,
    q,
    k,
    v,
    out,
    kept,
    bias,
    result,
    queries,
    keys,
    width,
    depth,
    by_head,
    by_query,
    by_key,
    scale,
    BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    head = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    w, d = tl.arange(0, WIDTH), tl.arange(0, DEPTH)
    own, moved = _block(q, head, i, w, queries, width), _block(dq, head, i, w, queries, width)
    lse = tl.load(kept + head * queries + i, mask=i < queries, other=0.0)
    mean = tl.zeros([ROWS], tl.float32)
    total = tl.zeros([ROWS, DEPTH], tl.float32)
    for start in range(0, keys, COLUMNS):
        j = start + tl.arange(0, COLUMNS)
        other = _block(k, head, j, w, keys, width)
        scores = _scores(
            own, other, bias, head, i, j, queries, keys, by_head, by_query, by_key, scale, BIAS, PRECISION
        )
        p = tl.exp(scores - lse[:, None])
        slope = tl.dot(moved, tl.trans(other), input_precision=PRECISION)
        slope += tl.dot(own, tl.trans(_block(dk, head, j, w, keys, width)), input_precision=PRECISION)
        slope *= scale * p
        mean += tl.sum(slope, 1)
        total += tl.dot(
            _rounded(slope, PRECISION), _block(v, head, j, d, keys, depth), input_precision=PRECISION
        )
        total += tl.dot(
            _rounded(p, PRECISION), _block(dv, head, j, d, keys, depth), input_precision=PRECISION
        )
    total -= mean[:, None] * _block(out, head, i, d, queries, depth)
    _put(result, total, head, i, d, queries, depth)


@triton.jit
def attention_grad_query_kernel(
    g,
    q,
    k,
    v,
    out,
    kept,
    bias,
    grad,
    queries,
    keys,
    width,
    depth,
    by_head,
    by_query,
    by_key,
    scale,
    BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    head = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    w, d = tl.arange(0, WIDTH), tl.arange(0, DEPTH)
    own, pulled = _block(q, head, i, w, queries, width), _block(g, head, i, d, queries, depth)
    lse = tl.load(kept + head * queries + i, mask=i < queries, other=0.0)
    mean = tl.sum(pulled * _block(out, head, i, d, queries, depth), 1)
    total = tl.zeros([ROWS, WIDTH], tl.float32)
    for start in range(0, keys, COLUMNS):
        j = start + tl.arange(0, COLUMNS)
        other = _block(k, head, j, w, keys, width)
        scores = _scores(
            own, other, bias, head, i, j, queries, keys, by_head, by_query, by_key, scale, BIAS, PRECISION
        )
        inner = (
            tl.dot(pulled, tl.trans(_block(v, head, j, d, keys, depth)), input_precision=PRECISION)
            - mean[:, None]
        )
        inner *= tl.exp(scores - lse[:, None])
        total += tl.dot(_rounded(inner, PRECISION), other, input_precision=PRECISION)
    _put(grad, total * scale, head, i, w, queries, width)


@triton.jit
def attention_grad_key_kernel(
    g,
    q,
    k,
    v,
    out,
    kept,
    bias,
    grad_k,
    grad_v,
    queries,
    keys,
    width,
    depth,
    by_head,
    by_query,
    by_key,
    scale,
    BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    head = tl.program_id(1).to(tl.int64)
    j = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    w, d = tl.arange(0, WIDTH), tl.arange(0, DEPTH)
    own, value = _block(k, head, j, w, keys, width), _block(v, head, j, d, keys, depth)
    total_k, total_v = tl.zeros([COLUMNS, WIDTH], tl.float32), tl.zeros([COLUMNS, DEPTH], tl.float32)
    for start in range(0, queries, ROWS):
        i = start + tl.arange(0, ROWS)
        other, pulled = _block(q, head, i, w, queries, width), _block(g, head, i, d, queries, depth)
        lse = tl.load(
            kept + head * queries + i, mask=i < queries, other=float("inf")
        )  # no query: no probability
        scores = _scores(
            other, own, bias, head, i, j, queries, keys, by_head, by_query, by_key, scale, BIAS, PRECISION
        )
        p = _rounded(
            tl.exp(scores - lse[:, None]), PRECISION
        )  # for both products: a second block of them would spill
        mean = tl.sum(pulled * _block(out, head, i, d, queries, depth), 1)
        inner = p * (tl.dot(pulled, tl.trans(value), input_precision=PRECISION) - mean[:, None])
        total_v += tl.dot(tl.trans(p), pulled, input_precision=PRECISION)
        total_k += tl.dot(tl.trans(_rounded(inner, PRECISION)), other, input_precision=PRECISION)
    _put(grad_k, total_k * scale, head, j, w, keys, width)
    _put(grad_v, total_v, head, j, d, keys, depth)


def takes(*args: Any) -> bool:
    """Say whether the kernel runs this: heads as wide as `WIDEST`, and P not kept.

    Where P is kept it is in memory, and the reference reads it.
    """
    tensors = [x for x in args if isinstance(x, Tensor)]
    wide = [x for x in tensors if x.ndim == 3]
    made_again = args[-1] is False or len(wide) < len(
        tensors
    )  # attention is asked; its derivatives get the logarithms
    dtype = wide[0].dtype
    return (
        made_again
        and dtype in WIDEST
        and all(x.dtype == dtype for x in wide)
        and wide[0].shape[0] < 2**16
        and all(x.shape[2] <= WIDEST[dtype] for x in (wide[:3] if args[-1] is False else wide[:4]))
    )


def _settings(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    strides = (0, 0, 0) if bias is None else bias.stride()
    sizes = (q.shape[1], k.shape[1], q.shape[2], v.shape[2], *strides, scale)
    padded = {name: max(16, triton.next_power_of_2(x.shape[2])) for name, x in (("WIDTH", q), ("DEPTH", v))}
    return sizes, {
        "BIAS": bias is not None,
        "PRECISION": "tf32x3" if q.dtype == torch.float32 else "tf32",
        **padded,
        "ROWS": ROWS,
        "COLUMNS": COLUMNS,
        **LAYOUT,
    }


def attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, keep: bool
) -> tuple[Tensor, Tensor]:
    q, k, v = (x.contiguous() for x in (q, k, v))
    out, kept = q.new_empty(*q.shape[:2], v.shape[2]), q.new_empty(q.shape[:2], dtype=torch.float32)
    sizes, settings = _settings(q, k, v, bias, scale)
    if kept.numel():
        attention_kernel[(triton.cdiv(q.shape[1], ROWS), q.shape[0])](
            q, k, v, q if bias is None else bias, out, kept, *sizes, **settings
        )
    return out, kept


def attention_tangent(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    kept: Tensor,
    bias: Tensor | None,
    scale: float,
) -> Tensor:
    tensors = [x.contiguous() for x in (dq, dk, dv, q, k, v, out, kept)]
    result = torch.empty_like(tensors[6])
    sizes, settings = _settings(q, k, v, bias, scale)
    if kept.numel():
        grid = (triton.cdiv(q.shape[1], TANGENT_ROWS), q.shape[0])
        attention_tangent_kernel[grid](
            *tensors, q if bias is None else bias, result, *sizes, **settings | {"ROWS": TANGENT_ROWS}
        )
    return result


def attention_grad(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, kept: Tensor, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    tensors = [x.contiguous() for x in (g, q, k, v, out, kept)]
    grads = tuple(torch.empty_like(x) for x in tensors[1:4])
    sizes, settings = _settings(q, k, v, bias, scale)
    b = q if bias is None else bias
    if q.shape[0]:
        attention_grad_query_kernel[(triton.cdiv(q.shape[1], ROWS), q.shape[0])](
            *tensors, b, grads[0], *sizes, **settings
        )
        attention_grad_key_kernel[(triton.cdiv(k.shape[1], COLUMNS), q.shape[0])](
            *tensors, b, *grads[1:], *sizes, **settings
        )
    return grads[0], grads[1], grads[2]
