"""The attention kernels; what they compute and how is told in `attention`."""

from __future__ import annotations

import triton
import triton.language as tl


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
