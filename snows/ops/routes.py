"""Where a differentiated pass leaves PyTorch's functions for ops that are cheap to differentiate twice."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from snows import ops
from snows.ops.convolution import conv2d


def reroute(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Call a function, through its route if it has one."""
    return ROUTES.get(func, func)(*args, **kwargs)


class Rerouted(TorchFunctionMode):
    """Reroute every call inside it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return reroute(func, args, kwargs or {})


def _differentiated(inputs: tuple[Tensor, ...], constants: tuple[Tensor | None, ...] = ()) -> bool:
    """Say whether gradients flow to the inputs and to nothing else: what the ops are for."""
    return (
        torch.is_grad_enabled()
        and any(x.requires_grad for x in inputs)
        and not any(x is not None and x.requires_grad for x in constants)
    )


def _gelu(input: Tensor, approximate: str = "none") -> Tensor:
    return (
        ops.gelu(input, approximate) if _differentiated((input,)) else F.gelu(input, approximate=approximate)
    )


def _layer_norm(
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    if not _differentiated((input,), (weight, bias)) or any(
        x is not None and x.dtype != input.dtype for x in (weight, bias)
    ):
        return F.layer_norm(input, normalized_shape, weight, bias, eps)
    return ops.layer_norm(input, normalized_shape, weight, bias, eps)


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Compute evaluated BatchNorm as one multiplication and addition per channel.

    Input and scale stay with the output, for a ReLU after it.
    """
    if training or running_mean is None or running_var is None:
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    scale = (running_var + eps).rsqrt()
    if weight is not None:
        scale = scale * weight
    shift = -running_mean * scale if bias is None else bias - running_mean * scale
    shape = (1, -1) + (1,) * (input.ndim - 2)
    out = torch.addcmul(shift.view(shape), input, scale.view(shape))
    if _differentiated((input,), (scale, shift)) and scale.dtype == shift.dtype == input.dtype:
        out._affine = (out._version, input, input._version, scale)  # type: ignore[attr-defined]
    return out


def _relu(func: Callable[..., Any]) -> Callable[..., Any]:
    """Make a ReLU that has one derivative with the evaluated BatchNorm before it.

    In place it is left alone: others may hold the tensor that it changes.
    """

    def call(input: Tensor, inplace: bool = False) -> Tensor:
        made: tuple[int, Tensor, int, Tensor] | None = getattr(input, "_affine", None)
        if inplace or made is None or (made[0], made[2]) != (input._version, made[1]._version):
            return F.relu(input, inplace) if func is F.relu else func(input)
        return ops.affine_relu(made[1], input.detach(), made[3])

    return call


def _hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    """Compute hardsigmoid as the clamp that it is: PyTorch's own has no second derivative."""
    out = (input / 6 + 0.5).clamp(0, 1)
    return input.copy_(out) if inplace else out


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    lead = query.shape[:-2]
    if (
        not _differentiated((query, key, value), (attn_mask,))
        or dropout_p
        or enable_gqa
        or {key.shape[:-2], value.shape[:-2]} != {lead}
    ):
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    if is_causal:
        attn_mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
    if attn_mask is not None:
        attn_mask = (
            query.new_zeros(attn_mask.shape).masked_fill_(~attn_mask, -torch.inf)
            if attn_mask.dtype == torch.bool
            else attn_mask.to(query.dtype)
        )
    return ops.attention(query, key, value, attn_mask, scale)


def _entered(composite: Any) -> Callable[..., Any]:
    """Make a function that is made of others reroute inside.

    PyTorch hands such a function to a mode as one call and runs what is in it without the mode; with the mode
    on it would hand it over again. So this runs the same code with its first question, whether anybody
    overrides it, answered no.
    """
    inner = FunctionType(
        composite.__code__,
        {**composite.__globals__, "has_torch_function": lambda tensors: False},
        composite.__name__,
        composite.__defaults__,
        composite.__closure__,
    )
    inner.__kwdefaults__ = composite.__kwdefaults__

    def call(*args: Any, **kwargs: Any) -> Any:
        with Rerouted():
            return inner(*args, **kwargs)

    return call


ROUTES: dict[Callable[..., Any], Callable[..., Any]] = {
    F.conv2d: conv2d,
    F.gelu: _gelu,
    F.layer_norm: _layer_norm,
    F.batch_norm: _batch_norm,
    F.hardsigmoid: _hardsigmoid,
    **{func: _relu(func) for func in (F.relu, torch.relu, Tensor.relu)},
    F.scaled_dot_product_attention: _attention,
    F.multi_head_attention_forward: _entered(F.multi_head_attention_forward),
}
