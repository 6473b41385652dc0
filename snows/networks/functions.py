"""What is known of each torch function: one table, for everything that watches a network's operations.

A function without an entry is not counted as an operation of a horizon, is called as it is, and keeps
channels where its input has them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from snows.ops.convolution import CONV2D

Function = Callable[..., Any]
Times = Callable[[str, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Known:
    """Say what is known of a torch function.

    Attributes:
        counted: whether a call of it is an operation of a horizon.
        channel: the dimension that holds the channels of its output; None where its input has them.
        arguments: its parameters by position, for those that apply a layer's weight; empty for others.
        absorbed: whether a convolution or a packed layer before it can compute it too.
        product: of a function that multiplies matrices, its products: called with a `times` and the
            function's own arguments, it calls `times` with an equation of `torch.einsum` and two operands for
            each, and returns what the last call did; None where the function is called in a way not known.
        multiplies: of another convolution, which of its tensors' numbers meet a slice ``weight[0]`` each.
    """

    counted: bool = False
    channel: int | None = None
    arguments: tuple[str, ...] = ()
    absorbed: bool = False
    product: Callable[..., Tensor | None] | None = None
    multiplies: Literal["", "input", "output"] = ""


def _matmul(times: Times, *args: Any, **kwargs: Any) -> Tensor:
    left, right = (*args, *kwargs.values())[:2]
    m, n = ("" if x.ndim == 1 else name for x, name in ((left, "...m"), (right, "n")))
    batch = "..." if right.ndim > 1 else ""
    kept = "..." * (left.ndim > 1 or right.ndim > 1) + m.strip(".") + n
    return times(f"{m}k,{batch}k{n}->{kept}", left, right)


def _added(times: Times, *args: Any, **kwargs: Any) -> Tensor:
    """Multiply as `torch.baddbmm` and `torch.addmm` do, which add the product to their first argument."""
    return _matmul(times, *(*args, *kwargs.values())[1:3])


def _einsum(times: Times, *args: Any) -> Tensor | None:
    """Multiply as `torch.einsum` does with an equation in letters and two operands."""
    operands = args[1] if len(args) == 2 and isinstance(args[1], list | tuple) else args[1:]
    if not isinstance(args[0], str) or len(operands) != 2 or "->" not in args[0]:
        return None
    return times(args[0], *operands)


def _attention(
    times: Times,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *args: Any,
    enable_gqa: bool = False,
    **kwargs: Any,
) -> Tensor:
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], -3) for x in (key, value))
    return _matmul(times, _matmul(times, query, key.mT), value)


_CONVOLUTIONS = (F.conv1d, F.conv3d)
_TRANSPOSED = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
_LAST = (F.bilinear, F.layer_norm, F.rms_norm, F.multi_head_attention_forward)
_PRODUCTS = (
    torch.matmul,
    torch.mm,
    torch.bmm,
    torch.mv,
    torch.linalg.matmul,
    Tensor.matmul,
    Tensor.mm,
    Tensor.bmm,
    Tensor.mv,
)
_ADDED = (torch.baddbmm, torch.addmm, torch.addmv, Tensor.baddbmm, Tensor.addmm, Tensor.addmv)
_ACTIVATIONS = (
    F.relu_,
    F.relu6,
    F.silu,
    F.mish,
    F.elu,
    F.elu_,
    F.selu,
    F.celu,
    F.leaky_relu,
    F.leaky_relu_,
    F.prelu,
    F.hardswish,
    F.hardsigmoid,
    F.hardtanh,
    F.hardtanh_,
    F.softplus,
    F.softsign,
    F.tanhshrink,
    F.softmax,
    F.log_softmax,
    F.sigmoid,
    F.tanh,
    F.glu,
    F.logsigmoid,
    torch.relu,
    torch.relu_,
    torch.sigmoid,
    torch.sigmoid_,
    torch.tanh,
    torch.tanh_,
    torch.softmax,
    torch.selu,
    torch.prelu,
    Tensor.relu,
    Tensor.relu_,
    Tensor.sigmoid,
    Tensor.sigmoid_,
    Tensor.tanh,
    Tensor.tanh_,
    Tensor.softmax,
)

FUNCTIONS: dict[Function, Known] = {
    F.conv2d: Known(counted=True, channel=1, arguments=CONV2D),
    F.linear: Known(counted=True, channel=-1, arguments=("input", "weight", "bias")),
    F.batch_norm: Known(channel=1, absorbed=True),
    F.instance_norm: Known(channel=1),
    F.relu: Known(counted=True, absorbed=True),
    F.gelu: Known(counted=True, absorbed=True),
    F.group_norm: Known(counted=True, channel=1),
    **dict.fromkeys(_CONVOLUTIONS, Known(counted=True, channel=1, multiplies="output")),
    **dict.fromkeys(_TRANSPOSED, Known(counted=True, channel=1, multiplies="input")),
    **dict.fromkeys(_LAST, Known(counted=True, channel=-1)),
    **dict.fromkeys(_ACTIVATIONS, Known(counted=True)),
    F.scaled_dot_product_attention: Known(counted=True, channel=-1, product=_attention),
    **dict.fromkeys(_PRODUCTS, Known(product=_matmul)),
    **dict.fromkeys(_ADDED, Known(product=_added)),
    torch.einsum: Known(product=_einsum),
    torch.functional.einsum: Known(product=_einsum),
}
_UNKNOWN = Known()

LOOKS = {  # functions that ask what a tensor is like, and do not read its numbers
    getattr(Tensor, name).__get__
    for name in ("shape", "dtype", "device", "ndim", "requires_grad", "is_cuda", "layout", "grad_fn")
} | {
    Tensor.size,
    Tensor.dim,
    Tensor.numel,
    Tensor.is_floating_point,
    Tensor.stride,
    Tensor.is_contiguous,
    Tensor.__len__,
}


def known(function: Function) -> Known:
    """Look a function up."""
    return FUNCTIONS.get(function, _UNKNOWN)


def arguments(function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """Return a call's arguments by name, of a function that applies a layer's weight; None for any other."""
    names = known(function).arguments
    return dict(zip(names, args, strict=False)) | kwargs if names else None


def channel_of(function: Function, inputs: list[tuple[Tensor, int]], output: Tensor) -> int:
    """Say which dimension of a function's output holds its channels.

    Args:
        function: what was called.
        inputs: its input tensors whose channels are known, with the dimension.
        output: a tensor that it made.

    Returns:
        The dimension; -1 where it cannot be told.
    """
    fixed = known(function).channel
    if fixed is not None:
        return fixed % output.ndim if -output.ndim <= fixed < output.ndim else -1
    for x, channel in inputs:
        shared = output.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
        if shared and (
            output.shape != x.shape or output.stride() != x.stride()
        ):  # permuted, flattened, divided
            return _followed(x, channel, output)
        if output.ndim == x.ndim:
            return channel
    return -1


def _followed(x: Tensor, channel: int, view: Tensor) -> int:
    """Find a tensor's channels in a view of it: by stride, and by number where that leaves a choice."""
    stride, size = x.stride(channel), x.shape[channel]
    same = [i for i in range(view.ndim) if view.stride(i) == stride and (view.shape[i] > 1 or size == 1)]
    exact = [i for i in same if view.shape[i] == size]
    return exact[0] if exact else same[0] if same else -1
