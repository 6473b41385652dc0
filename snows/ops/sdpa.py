"""Attention, with derivatives in closed form."""

from __future__ import annotations

import torch
from torch import Tensor

from snows.ops.checks import check_constant, check_real, describe, expect
from snows.ops.register import implementation

# The devices on which a kernel makes attention's matrix again. Found once: what asks the dispatcher cannot be
# traced.
MADE_AGAIN = {
    device for device in ("cpu", "cuda") if implementation("attention", device.upper()) != "reference"
}


def attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """Compute ``softmax(scale q kᵀ + bias) v`` (Vaswani et al. 2017), differentiable twice by q, k, v.

    The reference, which fills the (queries, keys) matrix anyway, keeps it for the derivatives; a kernel makes
    it again.

    Args:
        q: (..., queries, width), floating point.
        k: (..., keys, width), leading dimensions as q's.
        v: (..., keys, depth), likewise.
        bias: broadcasts to (..., queries, keys); a constant, -inf for what is masked.
        scale: 1 / sqrt(width) without it.

    Returns:
        (..., queries, depth).

    Raises:
        ValueError: a dtype, shape or device is wrong, or the bias requires grad.
    """
    check_real("attention", "q", q)
    expect(q.ndim >= 2, "attention", "q", "(..., queries, width)", tuple(q.shape))
    for name, x in (("k", k), ("v", v)):
        right = (
            x.ndim == q.ndim and x.shape[:-2] == q.shape[:-2] and x.dtype == q.dtype and x.device == q.device
        )
        expect(
            right, "attention", name, f"{(*q.shape[:-2], '...', '...')} {q.dtype} on {q.device}", describe(x)
        )
    expect(k.shape[-1] == q.shape[-1], "attention", "k", f"width {q.shape[-1]}", k.shape[-1])
    expect(v.shape[-2] == k.shape[-2], "attention", "v", f"{k.shape[-2]} keys", v.shape[-2])
    if bias is not None:
        full = (*q.shape[:-1], k.shape[-2])
        fits = bias.ndim <= len(full) and all(
            b in (1, f) for b, f in zip(bias.shape[::-1], full[::-1], strict=False)
        )
        expect(fits, "attention", "bias", f"what broadcasts to {full}", tuple(bias.shape))
        check_constant("attention", "bias", bias, bias.shape, q)
        bias = bias.expand(full).reshape(-1, *full[-2:])
    lead = q.shape[:-2]
    q, k, v = (
        x.reshape(-1, *x.shape[-2:]) if x.numel() else x.reshape(lead.numel(), *x.shape[-2:])
        for x in (q, k, v)
    )
    keep = q.device.type not in MADE_AGAIN
    out: Tensor = torch.ops.snows.attention(
        q, k, v, bias, q.shape[-1] ** -0.5 if scale is None else scale, keep
    )[0]
    return out.view(*lead, *out.shape[-2:])
