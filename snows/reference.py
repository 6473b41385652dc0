"""Each op in plain PyTorch: the specification that every kernel is tested against."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# Where conjugate gradients keep their scalars: a float64 tensor of five, and what the first of them says.
STATUS, ITERATIONS, RZ, RR, BB = range(5)
RUNNING, CONVERGED, NEGATIVE_CURVATURE, NOT_FINITE, ZERO = range(5)


def nm_mask(scores: Tensor, n: int, m: int) -> Tensor:
    """Keep the `n` highest of every `m` consecutive scores of a row; the lower index wins a tie.

    Args:
        scores: (rows, columns), floating point, without NaN; a last group of fewer than `m` columns keeps
            its `n` highest too.
        n: entries kept in each group.
        m: entries in a group.

    Returns:
        (rows, columns), bool.
    """
    rows, columns = scores.shape
    pad = -columns % m
    if pad:
        scores = torch.nn.functional.pad(scores, (0, pad), value=-torch.inf)
    order = scores.view(rows, (columns + pad) // m, m).argsort(dim=-1, descending=True, stable=True)
    mask = torch.zeros_like(order, dtype=torch.bool)
    mask.scatter_(-1, order[..., :n], True)
    return mask.view(rows, columns + pad)[:, :columns].clone()


def nm_select(scores: Tensor, n: int, m: int) -> tuple[Tensor, Tensor]:
    """The mask of `nm_mask`, packed; and the codes of 2:4.

    Args:
        scores: (rows, columns), as in `nm_mask`.
        n: entries kept in each group.
        m: entries in a group.

    Returns:
        bits: (rows, ceil(columns / 8)), uint8: bit j of byte b is column 8 b + j, 0 beyond the last column.
        codes: the same shape for 2:4, (rows, 0) otherwise: group g's code is the lower (g even) or upper nibble of byte g / 2,
            its first kept index | the second << 2; what is missing of a group counts as -inf.
    """
    rows, columns = scores.shape
    padded = torch.nn.functional.pad(scores, (0, -columns % 8), value=-torch.inf)
    powers = 2 ** torch.arange(8, device=scores.device)
    mask = torch.nn.functional.pad(nm_mask(scores, n, m), (0, -columns % 8))
    bits = (mask.view(rows, mask.shape[1] // 8, 8) * powers).sum(-1).to(torch.uint8)
    if (n, m) != (2, 4):
        return bits, bits.new_empty(rows, 0)
    groups = nm_mask(padded, 2, 4).view(rows, padded.shape[1] // 4, 4).to(torch.uint8)
    code = groups.argmax(-1) | (3 - groups.flip(-1).argmax(-1)) << 2
    return bits, (code[:, 0::2] | code[:, 1::2] << 4).to(torch.uint8)


def cg_direction(p: Tensor, r: Tensor, z: Tensor, state: Tensor) -> None:
    """Turn the direction: ``p = z + β p`` with ``β = r·z / state[RZ]``, which becomes r·z.

    Args:
        p: the last direction, changed.
        r: the residual.
        z: the preconditioned residual.
        state: (5,), float64, changed; unless its status is RUNNING, nothing is.
    """
    running = state[STATUS] == RUNNING
    rz = (r * z).sum().double()
    beta = torch.where(running, rz / state[RZ], 1)
    p.mul_(beta.to(p.dtype)).add_(torch.where(running, z, 0))
    state[RZ] = torch.where(running, rz, state[RZ])


def cg_update(x: Tensor, r: Tensor, p: Tensor, Ap: Tensor, state: Tensor, rtol: float) -> None:
    """Make one step: ``x += α p``, ``r -= α Ap`` with ``α = state[RZ] / p·Ap``, and take down how it went.

    Where p·Ap is not finite the status becomes NOT_FINITE; where it is not positive, NEGATIVE_CURVATURE, and x is p if that was
    the first direction; where ``r·r <= rtol² state[BB]`` after the step, CONVERGED.

    Args:
        x: the solution so far, zero at first; changed.
        r: the residual, changed.
        p: the direction.
        Ap: the product with it.
        state: (5,), float64, changed; unless its status is RUNNING, nothing is.
        rtol: relative residual (2-norm) at which to stop.
    """
    status, iterations, rz, rr, bb = state.clone().unbind()
    running = status == RUNNING
    curvature = (p * Ap).sum().double()
    finite = curvature.isfinite()
    going = running & finite & (curvature > 0)
    leaving = running & finite & (curvature <= 0)
    alpha = torch.where(going, rz / curvature, 1).to(x.dtype)
    x.addcmul_(torch.where(going | (leaving & (iterations == 0)), p, 0), alpha)
    r.addcmul_(torch.where(going, Ap, 0), alpha, value=-1)
    rr = torch.where(going, (r * r).sum().double(), rr)
    state[STATUS] = torch.where(
        going, torch.where(rr <= rtol * rtol * bb, CONVERGED, RUNNING),
        torch.where(leaving, NEGATIVE_CURVATURE, torch.where(running, NOT_FINITE, status)))
    state[ITERATIONS] = iterations + running
    state[RR] = rr


def batched_cg_update(x: Tensor, r: Tensor, p: Tensor, rz: Tensor, product: Tensor, mask: Tensor, inverse: Tensor,
                      target: Tensor) -> None:
    """Make one step of conjugate gradients in every row that is not done, preconditioned by the diagonal.

    Args:
        x: (groups, rows, columns), the solutions so far; changed.
        r: the residuals, changed.
        p: the directions, changed.
        rz: (groups, rows), float64, r·z with z = r · inverse; changed. 0 where a row is done: it keeps x, r and p.
        product: p times the row's matrix, before the mask.
        mask: bool, the entries that a row may change.
        inverse: (groups, columns), above 0: one over the diagonal.
        target: (groups, rows), float64, the r·r at which a row is done.
    """
    Ap = product * mask
    curvature = (p * Ap).sum(-1).double()
    going = (rz > 0) & (curvature > 0)
    alpha = torch.where(going, rz / curvature, 0).to(x.dtype).unsqueeze(-1)
    x.addcmul_(alpha, p)
    r.addcmul_(alpha, Ap, value=-1)
    z = r * inverse.unsqueeze(-2)
    left = torch.where(going & ((r * r).sum(-1).double() > target), (r * z).sum(-1).double(), 0)
    turning = left > 0
    beta = torch.where(turning, left / rz, 1).to(x.dtype).unsqueeze(-1)
    p.mul_(beta).addcmul_(z, turning.to(x.dtype).unsqueeze(-1))
    rz.copy_(torch.where(turning, left, 0))


# ---------------------------------------------------------------- masks as bits


def pack_bits(mask: Tensor) -> Tensor:
    """Pack a mask into bytes: bit j of byte b is element 8 b + j of the flattened mask; the last byte is filled with zeros.

    Args:
        mask: any shape, bool.

    Returns:
        (ceil(elements / 8),), uint8.
    """
    flat = mask.flatten().to(torch.uint8)
    flat = torch.nn.functional.pad(flat, (0, -flat.numel() % 8)).view(-1, 8)
    return (flat << _bits(mask)).sum(1, dtype=torch.uint8)


def unpack_bits(bits: Tensor, shape: Sequence[int]) -> Tensor:
    """Undo `pack_bits`: a bool mask of this shape."""
    flat = (bits.unsqueeze(1) >> _bits(bits)).bitwise_and_(1).bool().flatten()
    return flat[: math.prod(shape)].view(shape)


def _bits(like: Tensor) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=like.device)


def masked(weight: Tensor, bits: Tensor) -> Tensor:
    """Keep the weight where its bit is set; +0.0 elsewhere, whatever stood there.

    Args:
        weight: any shape, floating point.
        bits: as `pack_bits` gives them.

    Returns:
        weight.shape, contiguous.
    """
    return torch.where(unpack_bits(bits, weight.shape), weight.contiguous(), 0.0)


# ---------------------------------------------------------------- what a loss passes through


def gelu(x: Tensor, approximate: str) -> tuple[Tensor, Tensor]:
    """``x Φ(x)`` and its slope ``Φ(x) + x φ(x)`` (Hendrycks & Gimpel 2016), or the same of its tanh approximation.

    Who keeps the slope pays one multiplication for a derivative, instead of erf and exp at each.

    Args:
        x: any shape, floating point.
        approximate: "none" or "tanh".

    Returns:
        Two tensors of x.shape.
    """
    one = torch.ones((), dtype=x.dtype, device=x.device).expand_as(x)
    return torch.nn.functional.gelu(x, approximate=approximate), torch.ops.aten.gelu_backward(one, x, approximate=approximate)


def gelu_curve(x: Tensor, g: Tensor, approximate: str) -> Tensor:
    """GELU's second derivative times g: ``φ(x) (2 - x²) g``, or that of the tanh approximation.

    With ``u = c (x + a x³)`` and ``t = tanh u`` the latter is ``(1 - t²) (u' + x u'' / 2 - x t u'²) g``.

    Args:
        x: any shape, floating point.
        g: x.shape.
        approximate: "none" or "tanh".

    Returns:
        x.shape.
    """
    wide, square = _wide(x), _wide(x).square()
    if approximate == "none":
        curve = (square / -2).exp_().mul_((2 * math.pi) ** -0.5).mul_(square.neg_().add_(2))
    else:
        c, a = (2 / math.pi) ** 0.5, 0.044715
        t = torch.addcmul(wide, square, wide, value=a).mul_(c).tanh_()
        slope = square.mul(3 * a * c).add_(c)  # u'; and x u'' / 2 = 3 a c x²
        curve = slope.square().mul_(t).mul_(wide).neg_().add_(slope).add_(square, alpha=3 * a * c)
        curve.mul_(t.square_().neg_().add_(1))
    return curve.mul_(g).to(x.dtype)


def affine_relu(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """``max(0, scale x + shift)``, channel by channel: evaluated BatchNorm and the ReLU after it.

    Args:
        x: (batch, channels, ...), floating point.
        scale: (channels,).
        shift: (channels,).

    Returns:
        x.shape.
    """
    return torch.addcmul(_channels(shift, x), x, _channels(scale, x)).relu_()


def affine_relu_grad(g: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    """``scale g`` where y, the output, is positive; 0 elsewhere. Linear in g, and its own adjoint.

    Args:
        g: (batch, channels, ...).
        y: g.shape.
        scale: (channels,).

    Returns:
        g.shape.
    """
    out: Tensor = torch.ops.aten.threshold_backward(g, y, 0).mul_(_channels(scale, g))
    return out


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, shape: Sequence[int], eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """``weight x̂ + bias`` with ``x̂ = r (x - mean x)``, ``r = (var x + eps)^-½`` over the last dimensions (Ba et al. 2016).

    Args:
        x: (..., *shape), floating point.
        weight: shape, or None for ones.
        bias: shape, or None for zeros.
        shape: the last dimensions of x.
        eps: added to the variance.

    Returns:
        The result, and the mean and r of each row in at least float32, with ones for the dimensions of `shape`.
    """
    y, mean, rstd = torch.native_layer_norm(_wide(x), list(shape), _wide_or_none(weight), _wide_or_none(bias), eps)
    return y.to(x.dtype), mean, rstd


def layer_norm_grad(g: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, before: Tensor | None, after: Tensor | None,
                    shape: Sequence[int]) -> Tensor:
    """``after A (before g)`` with ``A h = r (h - mean h - x̂ mean(x̂ h))``, the symmetric derivative of x̂ by x.

    With the weight before it is LayerNorm's adjoint, with the weight after it is its tangent: each is the other's transpose.

    Args:
        g: x.shape.
        x: (..., *shape), LayerNorm's input.
        mean: of each row, as `layer_norm` gives it.
        rstd: r of each row.
        before: shape, or None for ones.
        after: shape, or None for ones.
        shape: the last dimensions of x.

    Returns:
        x.shape.
    """
    out: Tensor = torch.ops.aten.native_layer_norm_backward(
        _wide(g).contiguous(), _wide(x), list(shape), mean, rstd, _wide_or_none(before), None, [True, False, False])[0]
    if after is not None:
        out.mul_(after)
    return out.to(x.dtype)


def layer_norm_curve(g: Tensor, v: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, before: Tensor | None, after: Tensor | None,
                     shape: Sequence[int]) -> Tensor:
    """The gradient by x of ``<v, layer_norm_grad(g, x)>``, mean and r following x.

    With ``h = before g`` and ``u = after v`` it is ``-r (b A h + a A u + r c x̂)``, where ``a = mean(h x̂)``,
    ``b = mean(u x̂)``, ``c = mean(h u) - mean h mean u - a b``.

    Args:
        g: x.shape.
        v: x.shape.
        x: (..., *shape); and all others as in `layer_norm_grad`.
        mean: of each row.
        rstd: r of each row.
        before: shape, or None.
        after: shape, or None.
        shape: the last dimensions of x.

    Returns:
        x.shape.
    """
    dims = tuple(range(-len(shape), 0))
    n = math.prod(shape)

    def inner(p: Tensor, q: Tensor) -> Tensor:
        return (p * q).sum(dims, keepdim=True) / n

    h = _wide(g if before is None else g * before)
    u = _wide(v if after is None else v * after)
    normal = (_wide(x) - mean).mul_(rstd)
    h, u = h - h.mean(dims, keepdim=True), u - u.mean(dims, keepdim=True)
    a, b = inner(h, normal), inner(u, normal)
    c = inner(h, u) - a * b
    # b A h + a A u = r (b h + a u - 2 a b x̂), with h and u centred
    out = normal.mul_(c - 2 * a * b).addcmul_(h, b).addcmul_(u, a)
    return out.mul_(rstd.square().neg_()).to(x.dtype)


# Attention works through a few heads at a time, so that its (queries, keys) matrices stay in the cache.
ATTENTION_BLOCK = 2**19


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, keep: bool) -> tuple[Tensor, Tensor]:
    """``P v`` with ``P = softmax(scale q kᵀ + bias)`` (Vaswani et al. 2017); a row with no key left gives zeros.

    Args:
        q: (heads, queries, width), floating point.
        k: (heads, keys, width).
        v: (heads, keys, depth).
        bias: (heads, queries, keys) in q's dtype, -inf for what is masked; None for none.
        scale: a number.
        keep: whether to return P for the derivatives, or what they make it from.

    Returns:
        (heads, queries, depth); and what is kept, in at least float32: P, or (heads, queries), the logarithm of each row's sum.
    """
    out = torch.empty(*q.shape[:2], v.shape[2], dtype=q.dtype, device=q.device)
    kept = torch.empty(*q.shape[:2], *([k.shape[1]] if keep else []), dtype=_wide(q).dtype, device=q.device)
    for part in _parts(q, k):
        scores = _scores(q[part], k[part], None if bias is None else bias[part], scale)
        total = scores.logsumexp(-1)
        total.masked_fill_(total == -torch.inf, 0.0)
        p = torch.exp(scores.sub_(total.unsqueeze(-1)), out=kept[part] if keep else scores)
        if not keep:
            kept[part] = total
        out[part] = p @ _wide(v[part])
    return out, kept


def attention_grad(g: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, kept: Tensor, bias: Tensor | None,
                   scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Pull g back through attention (Dao et al. 2022, algorithm 4).

    ``dv = Pᵀ g``, ``S̄ = P ∘ (g vᵀ - rowsum(g ∘ out))``, ``dq = scale S̄ k``, ``dk = scale S̄ᵀ q``.

    Args:
        g: (heads, queries, depth).
        q: as in `attention`, as are k, v, bias and scale.
        k: (heads, keys, width).
        v: (heads, keys, depth).
        out: what `attention` gave.
        kept: likewise.
        bias: (heads, queries, keys) or None.
        scale: a number.

    Returns:
        Shapes of q, k and v.
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


def attention_tangent(dq: Tensor, dk: Tensor, dv: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, kept: Tensor, bias: Tensor | None,
                      scale: float) -> Tensor:
    """Push tangents of q, k and v through attention: the transpose of `attention_grad`.

    ``S' = scale (dq kᵀ + q dkᵀ)`` and ``out' = (P ∘ S') v + P dv - rowsum(P ∘ S') out``.

    Args:
        dq: q.shape.
        dk: k.shape.
        dv: v.shape.
        q: as in `attention_grad`, as are all others.
        k: (heads, keys, width).
        v: (heads, keys, depth).
        out: what `attention` gave.
        kept: likewise.
        bias: (heads, queries, keys) or None.
        scale: a number.

    Returns:
        out.shape.
    """
    result = torch.empty_like(_wide(out))
    for part in _parts(q, k):
        p, (qq, kk, vv, oo, dqq, dkk, dvv) = _again(part, kept, bias, scale, q, k, v, out, dq, dk, dv)
        moved = _slope(dqq, dkk, qq, kk, scale).mul_(p)
        tangent = torch.bmm(p, dvv, out=result[part]).baddbmm_(moved, vv)
        tangent.addcmul_(moved.sum(-1, keepdim=True), oo, value=-1)
    return result.to(out.dtype)


def attention_curve(g: Tensor, dq: Tensor, dk: Tensor, dv: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, kept: Tensor,
                    bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient by q, k and v of ``<g, attention_tangent(dq, dk, dv)>``, P following q and k.

    With S̄ and S' as above, ``m = rowsum(P ∘ S')``, ``P' = P ∘ (S' - m)`` and ``E = g vᵀ``, the gradient by P is
    ``W = (E - rowsum(P ∘ E)) ∘ S' - m E + g dvᵀ`` and that by the scores ``H = P ∘ (W - rowsum(P ∘ W))``; then
    ``scale (S̄ dk + H k)``, ``scale (S̄ᵀ dq + Hᵀ q)`` and ``P'ᵀ g``.

    Args:
        g: (heads, queries, depth).
        dq: q.shape.
        dk: k.shape.
        dv: v.shape.
        q: as in `attention_grad`, as are all others.
        k: (heads, keys, width).
        v: (heads, keys, depth).
        out: what `attention` gave.
        kept: likewise.
        bias: (heads, queries, keys) or None.
        scale: a number.

    Returns:
        Shapes of q, k and v.
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


def _again(part: slice, kept: Tensor, bias: Tensor | None, scale: float, q: Tensor, k: Tensor, *others: Tensor) -> tuple[Tensor, list[Tensor]]:
    """P of a few heads, not to be written to, and the same heads of q, k and the others."""
    own = [_wide(x[part]) for x in (q, k, *others)]
    if kept.ndim == 3:
        return kept[part], own
    return _scores(own[0], own[1], None if bias is None else bias[part], scale).sub_(kept[part].unsqueeze(-1)).exp_(), own


def _scores(q: Tensor, k: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    q, k = _wide(q), _wide(k)
    if bias is None:
        return (q * scale) @ _turned(k)
    return torch.baddbmm(bias.to(q.dtype), q, _turned(k), alpha=scale)


def _slope(dq: Tensor, dk: Tensor, q: Tensor, k: Tensor, scale: float) -> Tensor:
    """``scale (dq kᵀ + q dkᵀ)`` as one product."""
    return torch.cat([dq, q], -1).mul_(scale) @ torch.cat([k.transpose(1, 2), dk.transpose(1, 2)], 1)


def _turned(x: Tensor) -> Tensor:
    """The transpose, laid out: at widths of 16 to 32 MKL multiplies with it twice as fast as with the view."""
    return x.transpose(1, 2).contiguous()


def _rowsum(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1, keepdim=True)


def _empty_like(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(_wide(q)), torch.empty_like(_wide(k)), torch.empty_like(_wide(v))


def _narrowed(grads: tuple[Tensor, Tensor, Tensor], like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return grads[0].to(like.dtype), grads[1].to(like.dtype), grads[2].to(like.dtype)


def _channels(x: Tensor, like: Tensor) -> Tensor:
    return x.view((1, -1) + (1,) * (like.ndim - 2))


def _wide_or_none(x: Tensor | None) -> Tensor | None:
    return None if x is None else _wide(x)


def _wide(x: Tensor) -> Tensor:
    """At least float32: what 16-bit numbers are computed in."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


# ---------------------------------------------------------------- packed layers


def code_bits(n: int, m: int) -> int:
    """Bits of one group's code: n positions of ceil(log2 m) bits where that is no more than a bit an entry, else m bits."""
    return min(n * (m - 1).bit_length(), m)


def to_bits(stream: Tensor, count: int) -> Tensor:
    """The first `count` bits of a stream of bytes, the least significant bit of each byte first: (count,), uint8."""
    shifts = torch.arange(8, dtype=torch.uint8, device=stream.device)
    return ((stream[:, None] >> shifts) & 1).flatten()[:count]


def kept(codes: Tensor, rows: int, columns: int, n: int, m: int) -> Tensor:
    """Which entries of the row view are stored.

    Args:
        codes: uint8, the packed positions; see `snows.packing`.
        rows: rows of the row view.
        columns: columns of the row view.
        n: entries stored in each group, 0 for unstructured.
        m: entries in a group, 0 for unstructured.

    Returns:
        (rows, columns rounded up to whole groups), bool.
    """
    if m == 0:
        return to_bits(codes, rows * columns).view(rows, columns).bool()
    groups, bits = -(-columns // m), code_bits(n, m)
    stream = to_bits(codes, rows * groups * bits)
    if n * (m - 1).bit_length() > m:
        return stream.view(rows, groups * m).bool()
    width = bits // n
    places = 2 ** torch.arange(width, device=codes.device)
    positions = (stream.view(rows, groups, n, width) * places).sum(-1)
    return torch.zeros(rows, groups, m, dtype=torch.bool, device=codes.device).scatter(-1, positions, True).view(rows, groups * m)


def unpack(values: Tensor, codes: Tensor, shape: list[int], n: int, m: int) -> Tensor:
    """Put the stored values back at their places, +0.0 elsewhere.

    Args:
        values: the stored entries in order of the row view: (rows, groups * n), or (stored,) for unstructured.
        codes: uint8, their positions; see `snows.packing`.
        shape: the weight's, (out, in) or (out, in, kernel height, kernel width).
        n: entries stored in each group, 0 for unstructured.
        m: entries in a group, 0 for unstructured.

    Returns:
        The weight, `shape`, contiguous.
    """
    out, channels, *kernel = shape
    columns = math.prod(shape[1:])
    mask = kept(codes, out, columns, n, m)
    matrix = torch.zeros(mask.shape, dtype=values.dtype, device=values.device).masked_scatter(mask, values)
    return matrix[:, :columns].reshape(out, *kernel, channels).movedim(-1, 1).contiguous()


def activate(output: Tensor, activation: str) -> Tensor:
    """Apply "relu" or "gelu" (the exact one, by erf); "none" changes nothing."""
    if activation == "relu":
        return output.relu()
    return F.gelu(output) if activation == "gelu" else output


def kernel_order(values: Tensor, codes: Tensor, shape: list[int], n: int, m: int) -> Tensor:
    """The stored weights in the order a device's kernels read them; empty where there is no kernel.

    A permutation of `values` with the positions spelled out. What it looks like is the kernel's own business, so it is
    made from the packed weight wherever that arrives, and never saved.
    """
    return values.new_empty(0, dtype=torch.int32)


def sparse_linear(
    input: Tensor, values: Tensor, codes: Tensor, bias: Tensor | None, shape: list[int], n: int, m: int,
    activation: str = "none", order: Tensor | None = None,
) -> Tensor:
    """Multiply by a packed weight, add the bias, apply the activation.

    Args:
        input: (..., in).
        values: see `unpack`, as `codes`, `n` and `m`.
        codes: uint8.
        bias: (out,) or None.
        shape: the weight's, (out, in).
        n: entries stored in each group.
        m: entries in a group.
        activation: "none", "relu" or "gelu".
        order: the weight in the order of a kernel, which the reference does not read.

    Returns:
        (..., out), contiguous.
    """
    return activate(F.linear(input, unpack(values, codes, shape, n, m), bias), activation).contiguous()


def images_innermost(x: Tensor) -> bool:
    """Whether an (images, channels, height, width) tensor lies in memory as (channels, height, width, images), 16 or a multiple of it."""
    return x.ndim == 4 and not x.is_contiguous() and x.stride(0) == 1 and x.permute(1, 2, 3, 0).is_contiguous() and x.shape[0] % 16 == 0


def innermost_images(x: Tensor) -> Tensor:
    """The same values, so laid out."""
    return x.flatten(1).t().contiguous().view(*x.shape[1:], x.shape[0]).permute(3, 0, 1, 2)


def sparse_conv2d(
    input: Tensor, values: Tensor, codes: Tensor, bias: Tensor | None, shape: list[int], n: int, m: int,
    stride: list[int], padding: list[int], dilation: list[int], activation: str = "none", order: Tensor | None = None,
) -> Tensor:
    """Convolve with a packed weight, add the bias, apply the activation.

    Args:
        input: (images, in, height, width).
        values: see `unpack`, as `codes`, `n` and `m`.
        codes: uint8.
        bias: (out,) or None.
        shape: the weight's, (out, in, kernel height, kernel width).
        n: entries stored in each group.
        m: entries in a group.
        stride: vertical, horizontal; likewise `padding` (zeros on both sides) and `dilation`.
        padding: see `stride`.
        dilation: see `stride`.
        activation: "none", "relu" or "gelu".
        order: the weight in the order of a kernel, which the reference does not read.

    Returns:
        (images, out, output height, output width), contiguous, or channels last or images innermost where the input is.
    """
    weight = unpack(values, codes, shape, n, m)
    if images_innermost(input):
        return innermost_images(activate(F.conv2d(input, weight, bias, stride, padding, dilation), activation))
    last = input.is_contiguous(memory_format=torch.channels_last) and not input.is_contiguous()
    layout = torch.channels_last if last else torch.contiguous_format
    output = F.conv2d(input.contiguous(memory_format=layout), weight, bias, stride, padding, dilation)
    return activate(output, activation).contiguous(memory_format=layout)
