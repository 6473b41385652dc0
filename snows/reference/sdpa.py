"""Attention and its derivatives in closed form, a few heads at a time, to stay in the cache.

Throughout, q is (heads, queries, width), k (heads, keys, width), v (heads, keys, depth), bias (heads,
queries, keys) of their dtype, -inf for what is masked, or None; dq, dk, dv are shaped like q, k, v and g like
out; out and kept are what `attention` gave.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from snows.reference.nonlinear import widened

ATTENTION_BLOCK = 2**19  # entries of those matrices


def attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, keep: bool
) -> tuple[Tensor, Tensor]:
    """Compute `ops.attention`, ``P v`` with ``P = softmax(scale q kᵀ + bias)``.

    A row with no key left gives zeros.

    Returns:
        out: (heads, queries, depth).
        kept: for the derivatives, in at least float32: P where they are to `keep` it, else what they make it
            from, (heads, queries), the logarithm of each row's sum.
    """
    out = torch.empty(*q.shape[:2], v.shape[2], dtype=q.dtype, device=q.device)
    kept = torch.empty(*q.shape[:2], *([k.shape[1]] if keep else []), dtype=widened(q).dtype, device=q.device)
    for part in _parts(q, k):
        scores = _scores(q[part], k[part], None if bias is None else bias[part], scale)
        total = scores.logsumexp(-1)
        total.masked_fill_(total == -torch.inf, 0.0)
        p = torch.exp(scores.sub_(total.unsqueeze(-1)), out=kept[part] if keep else scores)
        if not keep:
            kept[part] = total
        out[part] = p @ widened(v[part])
    return out, kept


def attention_grad(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, kept: Tensor, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Pull g back through attention (Dao et al. 2022, algorithm 4), to q, k and v.

    ``dv = Pᵀ g``, ``S̄ = P ∘ (g vᵀ - rowsum(g ∘ out))``, ``dq = scale S̄ k``, ``dk = scale S̄ᵀ q``.
    """
    grads = _empty_like(q, k, v)
    for part in _parts(q, k):
        p, (qq, kk, vv, oo, gg) = _again(part, kept, bias, scale, q, k, v, out, g)
        torch.bmm(p.transpose(1, 2), gg, out=grads[2][part])
        gg = gg * scale
        inner = (gg @ _turned(vv)).sub_(_rowsum(gg, oo)).mul_(p)
        torch.bmm(inner, kk, out=grads[0][part])
        torch.bmm(inner.transpose(1, 2), qq, out=grads[1][part])
    return _narrowed(grads, q)


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
    """Push tangents of q, k and v through attention, to out: the transpose of `attention_grad`.

    ``S' = scale (dq kᵀ + q dkᵀ)`` and ``out' = (P ∘ S') v + P dv - rowsum(P ∘ S') out``.
    """
    result = torch.empty_like(widened(out))
    for part in _parts(q, k):
        p, (qq, kk, vv, oo, dqq, dkk, dvv) = _again(part, kept, bias, scale, q, k, v, out, dq, dk, dv)
        moved = _slope(dqq, dkk, qq, kk, scale).mul_(p)
        tangent = torch.bmm(p, dvv, out=result[part]).baddbmm_(moved, vv)
        tangent.addcmul_(moved.sum(-1, keepdim=True), oo, value=-1)
    return result.to(out.dtype)


def attention_curve(
    g: Tensor,
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
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradient by q, k and v of ``<g, attention_tangent(dq, dk, dv)>``.

    P follows q and k.

    With S̄ and S' as above, ``m = rowsum(P ∘ S')``, ``P' = P ∘ (S' - m)`` and ``E = g vᵀ``, the gradient by P
    is ``W = (E - rowsum(P ∘ E)) ∘ S' - m E + g dvᵀ`` and that by the scores ``H = P ∘ (W - rowsum(P ∘ W))``;
    then ``scale (S̄ dk + H k)``, ``scale (S̄ᵀ dq + Hᵀ q)`` and ``P'ᵀ g``.
    """
    grads = _empty_like(q, k, v)
    for part in _parts(q, k):
        p, (qq, kk, vv, oo, gg, dqq, dkk, dvv) = _again(part, kept, bias, scale, q, k, v, out, g, dq, dk, dv)
        slope = _slope(dqq, dkk, qq, kk, scale)
        mean = _rowsum(p, slope)
        e = gg @ _turned(vv)
        centred = e - _rowsum(gg, oo)
        w = torch.baddbmm(centred * slope, gg, _turned(dvv)).addcmul_(e, mean, value=-1)
        h = w.sub_(_rowsum(p, w)).mul_(p).mul_(scale)
        inner = centred.mul_(p).mul_(scale)
        grads[0][part] = torch.baddbmm(inner @ dkk, h, kk)
        grads[1][part] = torch.baddbmm(inner.transpose(1, 2) @ dqq, h.transpose(1, 2), qq)
        grads[2][part] = slope.sub_(mean).mul_(p).transpose(1, 2) @ gg
    return _narrowed(grads, q)


def _parts(q: Tensor, k: Tensor) -> Iterator[slice]:
    step = max(1, ATTENTION_BLOCK // max(1, q.shape[1] * k.shape[1]))
    for start in range(0, q.shape[0], step):
        yield slice(start, start + step)


def _again(
    part: slice, kept: Tensor, bias: Tensor | None, scale: float, q: Tensor, k: Tensor, *others: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """Compute P of a few heads, not to be written to, and the same heads of q, k and the others."""
    own = [widened(x[part]) for x in (q, k, *others)]
    if kept.ndim == 3:
        return kept[part], own
    return _scores(own[0], own[1], None if bias is None else bias[part], scale).sub_(
        kept[part].unsqueeze(-1)
    ).exp_(), own


def _scores(q: Tensor, k: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    q, k = widened(q), widened(k)
    if bias is None:
        return (q * scale) @ _turned(k)
    return torch.baddbmm(bias.to(q.dtype), q, _turned(k), alpha=scale)


def _slope(dq: Tensor, dk: Tensor, q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Compute ``scale (dq kᵀ + q dkᵀ)`` as one product."""
    return torch.cat([dq, q], -1).mul_(scale) @ torch.cat([k.transpose(1, 2), dk.transpose(1, 2)], 1)


def _turned(x: Tensor) -> Tensor:
    """Lay the transpose out.

    At widths of 16 to 32 MKL multiplies with it twice as fast as with the view.
    """
    return x.transpose(1, 2).contiguous()


def _rowsum(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1, keepdim=True)


def _empty_like(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(widened(q)), torch.empty_like(widened(k)), torch.empty_like(widened(v))


def _narrowed(grads: tuple[Tensor, Tensor, Tensor], like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return grads[0].to(like.dtype), grads[1].to(like.dtype), grads[2].to(like.dtype)
