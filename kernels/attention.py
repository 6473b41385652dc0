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
from torch import Tensor

from snows.kernels.attention_kernels import (
    attention_grad_key_kernel,
    attention_grad_query_kernel,
    attention_kernel,
    attention_tangent_kernel,
)

ROWS, COLUMNS = 32, 32  # queries and keys of a block
TANGENT_ROWS = 16  # it holds two blocks of queries and would spill at 32
# Eight warps and no pipelining: with four, or with loads in flight, float32 derivatives at width 64 spill on
# sm_80 (252 registers as it is), and shared memory passes the 99 KB of sm_86.
LAYOUT = {"num_warps": 8, "num_stages": 1}
WIDEST = {torch.float32: 64, torch.bfloat16: 128, torch.float16: 128}  # of a head; wider ones spill


def takes(*args: Any) -> bool:
    """Say whether the kernel runs this: heads as wide as `WIDEST`, and P not kept.

    Where P is kept it is in memory, and the reference reads it.
    """
    tensors = [x for x in args if isinstance(x, Tensor)]
    wide = [x for x in tensors if x.ndim == 3]
    # attention is asked; its derivatives get the logarithms
    made_again = args[-1] is False or len(wide) < len(tensors)
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
