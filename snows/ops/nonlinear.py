"""GELU, evaluated BatchNorm with its ReLU, and LayerNorm, with derivatives in closed form."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from snows.ops.checks import check_constant, check_real, expect


def gelu(x: Tensor, approximate: str = "none") -> Tensor:
    """Compute GELU, ``x Φ(x)``, or its tanh approximation (Hendrycks & Gimpel 2016).

    It can be differentiated twice.

    Args:
        x: any shape, floating point.
        approximate: "none" or "tanh".

    Returns:
        x.shape.

    Raises:
        ValueError: `x` is not floating point, or `approximate` is neither.
    """
    check_real("gelu", "x", x)
    expect(approximate in ("none", "tanh"), "gelu", "approximate", '"none" or "tanh"', repr(approximate))
    result: Tensor = torch.ops.snows.gelu(x, approximate)[0]
    return result


def affine_relu(x: Tensor, affine: Tensor, scale: Tensor) -> Tensor:
    """Compute ``max(0, affine)``, where ``affine = scale x + shift`` channel by channel is at hand.

    It can be differentiated twice by x.

    Args:
        x: (batch, channels, ...), floating point.
        affine: x.shape, a constant: gradients pass it by.
        scale: (channels,), a constant.

    Returns:
        x.shape.

    Raises:
        ValueError: a dtype, shape or device is wrong, or a constant requires grad.
    """
    check_real("affine_relu", "x", x)
    expect(x.ndim >= 2, "affine_relu", "x", "(batch, channels, ...)", tuple(x.shape))
    check_constant("affine_relu", "affine", affine, x.shape, x)
    check_constant("affine_relu", "scale", scale, x.shape[1:2], x)
    result: Tensor = torch.ops.snows.affine_relu(x, affine, scale)
    return result


def layer_norm(
    x: Tensor,
    shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Compute LayerNorm over the last dimensions (Ba et al. 2016); differentiable twice by x.

    Args:
        x: (..., *shape), floating point.
        shape: the last dimensions of x, one at least.
        weight: shape, a constant; None for ones.
        bias: shape, a constant; None for zeros.
        eps: added to the variance.

    Returns:
        x.shape.

    Raises:
        ValueError: a dtype, shape or device is wrong, or a constant requires grad.
    """
    check_real("layer_norm", "x", x)
    shape = tuple(shape)
    expect(
        0 < len(shape) <= x.ndim and tuple(x.shape[-len(shape) :]) == shape,
        "layer_norm",
        "x",
        f"(..., *{shape})",
        tuple(x.shape),
    )
    check_constant("layer_norm", "weight", weight, shape, x)
    check_constant("layer_norm", "bias", bias, shape, x)
    result: Tensor = torch.ops.snows.layer_norm(x, weight, bias, shape, eps)[0]
    return result
