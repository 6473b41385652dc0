"""Convolutions whose derivatives are convolutions: by input or by weight, any number of times."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CONV2D = (
    "input",
    "weight",
    "bias",
    "stride",
    "padding",
    "dilation",
    "groups",
)  # the arguments of F.conv2d, in order
_DEFAULTS: dict[str, Any] = {"bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}


def conv2d(*args: Any, **kwargs: Any) -> Tensor:
    """Compute ``F.conv2d`` through the function that differentiates by what needs it.

    That is its input, or its weight.

    Where both need gradients, or the padding is a word, it is ``F.conv2d`` itself.
    """
    bound = _DEFAULTS | dict(zip(CONV2D, args, strict=False)) | kwargs
    x, weight, bias = bound["input"], bound["weight"], bound["bias"]
    if isinstance(bound["padding"], str) or x.ndim != 4 or (x.requires_grad and weight.requires_grad):
        return F.conv2d(*args, **kwargs)
    settings = (bound["stride"], bound["padding"], bound["dilation"], bound["groups"])
    out = (
        _apply(_ByInput, x, weight, *settings) if x.requires_grad else _apply(_ByWeight, weight, x, *settings)
    )
    return out if bias is None else out + bias.view(-1, 1, 1)


def _apply(function: type[torch.autograd.Function], *args: Any) -> Tensor:
    result: Tensor = function.apply(*args)
    return result


class _ByInput(torch.autograd.Function):
    """Convolve, as a linear map of the input: each derivative is one convolution.

    The weight is a constant.

    PyTorch's own double backward also computes the weight's gradient, which nobody asks for here.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, *settings: Any) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.shape, ctx.settings = x.shape, settings
        return F.conv2d(x, weight, None, *settings)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (weight,) = ctx.saved_tensors
        return (
            _apply(_ByInputAdjoint, grads[0], weight, ctx.shape, *ctx.settings),
            None,
            None,
            None,
            None,
            None,
        )


class _ByInputAdjoint(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, g: Tensor, weight: Tensor, shape: torch.Size, *settings: Any) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.settings = settings
        layout = (
            torch.channels_last
            if g.is_contiguous(memory_format=torch.channels_last)
            else torch.contiguous_format
        )
        like = torch.empty(
            shape, dtype=g.dtype, device=g.device, memory_format=layout
        )  # never read: shape and layout count
        return _convolution_backward(g, like, weight, settings, by_input=True)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (weight,) = ctx.saved_tensors
        return _apply(_ByInput, grads[0], weight, *ctx.settings), None, None, None, None, None, None


class _ByWeight(torch.autograd.Function):
    """Convolve, as a linear map of the weight: the input is a constant."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, x: Tensor, *settings: Any) -> Tensor:
        ctx.save_for_backward(x)
        ctx.shape, ctx.settings = weight.shape, settings
        return F.conv2d(x, weight, None, *settings)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return _apply(_ByWeightAdjoint, grads[0], x, ctx.shape, *ctx.settings), None, None, None, None, None


class _ByWeightAdjoint(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, shape: torch.Size, *settings: Any) -> Tensor:
        ctx.save_for_backward(x)
        ctx.settings = settings
        return _convolution_backward(g, x, x.new_empty(shape), settings, by_input=False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return _apply(_ByWeight, grads[0], x, *ctx.settings), None, None, None, None, None, None


def _convolution_backward(g: Tensor, x: Tensor, weight: Tensor, settings: Any, by_input: bool) -> Tensor:
    stride, padding, dilation = ([v, v] if isinstance(v, int) else list(v) for v in settings[:3])
    grads = torch.ops.aten.convolution_backward(
        g,
        x,
        weight,
        None,
        stride,
        padding,
        dilation,
        False,
        [0, 0],
        settings[3],
        [by_input, not by_input, False],
    )
    result: Tensor = grads[0 if by_input else 1]
    return result
