"""GELU, evaluated BatchNorm with its ReLU, LayerNorm, and their derivatives in closed form."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def gelu(x: Tensor, approximate: str) -> tuple[Tensor, Tensor]:
    """Compute `ops.gelu`, and its slope ``Φ(x) + x φ(x)``.

    Where the slope is kept a derivative costs one multiplication, instead of erf and exp each time.
    """
    one = torch.ones((), dtype=x.dtype, device=x.device).expand_as(x)
    return F.gelu(x, approximate=approximate), torch.ops.aten.gelu_backward(one, x, approximate=approximate)


def gelu_curve(x: Tensor, g: Tensor, approximate: str) -> Tensor:
    """Compute GELU's second derivative times g: ``φ(x) (2 - x²) g``, or the tanh approximation's.

    With ``u = c (x + a x³)`` and ``t = tanh u`` the latter is ``(1 - t²) (u' + x u'' / 2 - x t u'²) g``.

    Args:
        x: as in `ops.gelu`, as is `approximate`.
        g: x.shape.
        approximate: "none" or "tanh".

    Returns:
        x.shape.
    """
    wide, square = widened(x), widened(x).square()
    if approximate == "none":
        curve = (square / -2).exp_().mul_((2 * math.pi) ** -0.5).mul_(square.neg_().add_(2))
    else:
        c, a = (2 / math.pi) ** 0.5, 0.044715
        t = torch.addcmul(wide, square, wide, value=a).mul_(c).tanh_()
        slope = square.mul(3 * a * c).add_(c)  # u'; and x u'' / 2 = 3 a c x²
        curve = slope.square().mul_(t).mul_(wide).neg_().add_(slope).add_(square, alpha=3 * a * c)
        curve.mul_(t.square_().neg_().add_(1))
    return curve.mul_(g).to(x.dtype)


def affine_relu(x: Tensor, affine: Tensor, scale: Tensor) -> Tensor:
    """See `ops.affine_relu`."""
    if affine.shape != x.shape or scale.ndim != 1 or x.ndim < 2 or scale.shape[0] != x.shape[1]:
        raise ValueError(
            f"affine_relu: expected affine of {tuple(x.shape)} and a scale a channel, got "
            f"{tuple(affine.shape)} and {tuple(scale.shape)}"
        )
    return affine.relu()


def affine_relu_grad(g: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    """Compute ``scale g`` where y, the output, is positive; 0 elsewhere.

    It is linear in g, and its own adjoint.

    Args:
        g: (batch, channels, ...).
        y: g.shape.
        scale: (channels,).

    Returns:
        g.shape.
    """
    if y.shape != g.shape or scale.ndim != 1 or g.ndim < 2 or scale.shape[0] != g.shape[1]:
        raise ValueError(
            f"affine_relu_grad: expected y of {tuple(g.shape)} and a scale a channel, got {tuple(y.shape)} "
            f"and {tuple(scale.shape)}"
        )
    out: Tensor = torch.ops.aten.threshold_backward(g, y, 0).mul_(scale.view((1, -1) + (1,) * (g.ndim - 2)))
    return out


def layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, shape: Sequence[int], eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `ops.layer_norm`: ``weight x̂ + bias`` with ``x̂ = r (x - mean x)``.

    Here ``r = (var x + eps)^-½``.

    Returns:
        The result, and the mean and r of each row in at least float32, with ones for the dimensions of
        `shape`.
    """
    y, mean, rstd = torch.native_layer_norm(
        widened(x), list(shape), _widened_or_none(weight), _widened_or_none(bias), eps
    )
    return y.to(x.dtype), mean, rstd


def layer_norm_grad(
    g: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    before: Tensor | None,
    after: Tensor | None,
    shape: Sequence[int],
) -> Tensor:
    """Compute ``after A (before g)`` with ``A h = r (h - mean h - x̂ mean(x̂ h))``.

    A is the symmetric derivative of x̂ by x.

    With the weight before it is LayerNorm's adjoint, with the weight after it is its tangent: each is the
    other's transpose.

    Args:
        g: x.shape.
        x: (..., *shape), LayerNorm's input.
        mean: of each row, as `layer_norm` gives it, as is `rstd`.
        rstd: r of each row.
        before: shape, or None for ones, as is `after`.
        after: see `before`.
        shape: the last dimensions of x.

    Returns:
        x.shape.
    """
    _check_rows("layer_norm_grad", x, (g,), (mean, rstd), (before, after), shape)
    out: Tensor = torch.ops.aten.native_layer_norm_backward(
        widened(g).contiguous(),
        widened(x),
        list(shape),
        mean,
        rstd,
        _widened_or_none(before),
        None,
        [True, False, False],
    )[0]
    if after is not None:
        out.mul_(after)
    return out.to(x.dtype)


def layer_norm_curve(
    g: Tensor,
    v: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    before: Tensor | None,
    after: Tensor | None,
    shape: Sequence[int],
) -> Tensor:
    """Compute the gradient by x of ``<v, layer_norm_grad(g, x)>``, mean and r following x.

    With ``h = before g`` and ``u = after v`` it is ``-r (b A h + a A u + r c x̂)``, where ``a = mean(h x̂)``,
    ``b = mean(u x̂)``, ``c = mean(h u) - mean h mean u - a b``. Arguments as in `layer_norm_grad`; v and the
    result are x.shape.
    """
    _check_rows("layer_norm_curve", x, (g, v), (mean, rstd), (before, after), shape)
    dims = tuple(range(-len(shape), 0))
    n = math.prod(shape)

    def inner(p: Tensor, q: Tensor) -> Tensor:
        return (p * q).sum(dims, keepdim=True) / n

    h = widened(g if before is None else g * before)
    u = widened(v if after is None else v * after)
    normal = (widened(x) - mean).mul_(rstd)
    h, u = h - h.mean(dims, keepdim=True), u - u.mean(dims, keepdim=True)
    a, b = inner(h, normal), inner(u, normal)
    c = inner(h, u) - a * b
    # b A h + a A u = r (b h + a u - 2 a b x̂), with h and u centred
    out = normal.mul_(c - 2 * a * b).addcmul_(h, b).addcmul_(u, a)
    return out.mul_(rstd.square().neg_()).to(x.dtype)


def _check_rows(
    op: str,
    x: Tensor,
    others: Sequence[Tensor],
    rows: Sequence[Tensor],
    weights: Sequence[Tensor | None],
    shape: Sequence[int],
) -> None:
    """Refuse what LayerNorm did not give: PyTorch's own kernel would read past its end."""
    last = len(shape)
    kept = (*x.shape[: x.ndim - last], *(1 for _ in shape))
    right = 0 < last <= x.ndim and tuple(x.shape[x.ndim - last :]) == tuple(shape)
    right = right and all(y.shape == x.shape for y in others) and all(tuple(y.shape) == kept for y in rows)
    if not right or not all(w is None or tuple(w.shape) == tuple(shape) for w in weights):
        raise ValueError(
            f"{op}: expected tensors of x's shape, means of {kept} and weights of {tuple(shape)}, got x of "
            f"{tuple(x.shape)}, "
            f"{[tuple(y.shape) for y in (*others, *rows, *(w for w in weights if w is not None))]}"
        )


def _widened_or_none(x: Tensor | None) -> Tensor | None:
    return None if x is None else widened(x)


def widened(x: Tensor) -> Tensor:
    """At least float32: what 16-bit numbers are computed in."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
