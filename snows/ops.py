"""The register of ops: a schema, the reference behind it, and one typed public function that validates.

The reference serves every device and is its own fake kernel; native kernels are registered over it for the devices
they serve, and PyTorch's dispatcher chooses. `SNOWS_REFERENCE=1`, set before the import, leaves the kernels out.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.grad import conv2d_input

from snows import reference

_library = torch.library.Library("snows", "DEF")
_PACKED = "int[] shape, int n, int m"
_LAST = 'str activation="none", Tensor? order=None'

OPS = ("nm_mask", "unpack", "kernel_order", "sparse_linear", "sparse_conv2d")

for _schema in (
    "nm_mask(Tensor scores, int n, int m) -> Tensor",
    f"unpack(Tensor values, Tensor codes, {_PACKED}) -> Tensor",
    f"kernel_order(Tensor values, Tensor codes, {_PACKED}) -> Tensor",
    f"sparse_linear(Tensor input, Tensor values, Tensor codes, Tensor? bias, {_PACKED}, {_LAST}) -> Tensor",
    f"sparse_conv2d(Tensor input, Tensor values, Tensor codes, Tensor? bias, {_PACKED}, "
    f"int[2] stride, int[2] padding, int[2] dilation, {_LAST}) -> Tensor",
):
    _library.define(_schema)
for _op in OPS:
    _library.impl(_op, getattr(reference, _op), "CompositeExplicitAutograd")


def _autocast(op: str, device: str) -> Callable[..., Tensor]:
    """Under autocast a packed layer computes in its own precision and rounds its output to autocast's."""
    key = getattr(torch._C.DispatchKey, f"Autocast{device}")

    def cast(input: Tensor, values: Tensor, *rest: Any, **named: Any) -> Tensor:
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
            output: Tensor = getattr(torch.ops.snows, op)(input.to(values.dtype), values, *rest, **named)
            return output if values.dtype == torch.float64 else output.to(torch.get_autocast_dtype(device.lower()))

    return cast


for _op in ("sparse_linear", "sparse_conv2d"):
    for _device in ("CPU", "CUDA"):
        _library.impl(_op, _autocast(_op, _device), f"Autocast{_device}")


def _before_activation(op: str, context: Any, grad: Tensor) -> Tensor:
    """The gradient of what the activation was applied to, which is computed again."""
    input, values, codes, bias = context.saved_tensors
    if context.rest[-2] == "none":
        return grad
    inner = getattr(torch.ops.snows, op)(input, values, codes, bias, *context.rest[:-2], "none", context.rest[-1])
    return grad * (inner > 0) if context.rest[-2] == "relu" else torch.ops.aten.gelu_backward(grad, inner)  # type: ignore[no-any-return]


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.rest = inputs[4:]


def _linear_backward(context: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of input and bias; the stored weights are not trained."""
    grad, (shape, n, m, *_) = _before_activation("sparse_linear", context, grad), context.rest
    _, values, codes, bias = context.saved_tensors
    to_bias = None if bias is None else grad.flatten(0, -2).sum(0) if grad.ndim > 1 else grad
    return grad @ unpack(values, codes, shape, n, m), None, None, to_bias, *(None for _ in context.rest)


def _conv2d_backward(context: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of input and bias; the stored weights are not trained."""
    grad, (shape, n, m, *settings) = _before_activation("sparse_conv2d", context, grad), context.rest
    input, values, codes, bias = context.saved_tensors
    weight = unpack(values, codes, shape, n, m)
    to_input = conv2d_input(input.shape, weight, grad, *settings[:3])
    return to_input, None, None, None if bias is None else grad.sum((0, 2, 3)), *(None for _ in context.rest)


torch.library.register_autograd("snows::sparse_linear", _linear_backward, setup_context=_remember, lib=_library)
torch.library.register_autograd("snows::sparse_conv2d", _conv2d_backward, setup_context=_remember, lib=_library)


def _load_native() -> str:
    """Load the compiled kernels if they were built; say in one phrase what happened."""
    if os.environ.get("SNOWS_REFERENCE") == "1":
        return "left out by SNOWS_REFERENCE=1"
    for path in sorted(Path(__file__).parent.glob("_native*.so")):
        try:
            torch.ops.load_library(str(path))
        except OSError as error:
            warnings.warn(f"snows: the native kernels in {path.name} do not load ({error}); "
                          "the reference runs instead. Reinstall snows with the torch in use.", stacklevel=3)
            return "built, but does not load"
        return "loaded"
    return "not built"


native = _load_native()


def implementation(op: str, device: str = "CPU") -> str:
    """Name what runs `op` on `device`: "native" or "reference"."""
    registered = torch._C._dispatch_has_kernel_for_dispatch_key(f"snows::{op}", device)
    return "native" if registered else "reference"


def nm_mask(scores: Tensor, n: int, m: int) -> Tensor:
    """Keep the `n` highest of every `m` consecutive scores of a row; the lower index wins a tie.

    Args:
        scores: (rows, columns), floating point.
        n: entries kept in each group, 0 < n < m.
        m: entries in a group.

    Returns:
        (rows, columns), bool.

    Raises:
        ValueError: `scores` is not a floating-point matrix or holds NaN, or `n` and `m` are out of order.

    Example:
        >>> nm_mask(torch.tensor([[3.0, 1.0, 3.0, 2.0]]), 2, 4).int().tolist()
        [[1, 0, 1, 0]]
    """
    if scores.ndim != 2 or not scores.is_floating_point():
        raise ValueError(f"nm_mask: expected a floating-point matrix of scores, got {tuple(scores.shape)} {scores.dtype}")
    if not 0 < n < m:
        raise ValueError(f"nm_mask: expected 0 < n < m, got n = {n}, m = {m}")
    if scores.isnan().any():
        raise ValueError("nm_mask: expected scores without NaN, got NaN; check the weights and the calibration images")
    mask: Tensor = torch.ops.snows.nm_mask(scores.contiguous(), n, m)
    return mask


ACTIVATIONS = ("none", "relu", "gelu")


def unpack(values: Tensor, codes: Tensor, shape: Sequence[int], n: int, m: int) -> Tensor:
    """Put the stored values of a packed weight back at their places; see `snows.packing` for the format.

    Returns:
        The weight, `shape`.
    """
    weight: Tensor = torch.ops.snows.unpack(values, codes, shape, n, m)
    return weight


def kernel_order(values: Tensor, codes: Tensor, shape: Sequence[int], n: int, m: int) -> Tensor:
    """A packed weight in the order in which the kernels of its device read it; empty where there is no kernel.

    Returns:
        int32, opaque: for `sparse_linear` and `sparse_conv2d` in the same process, on the same device. Never saved.
    """
    order: Tensor = torch.ops.snows.kernel_order(values, codes, shape, n, m)
    return order


def _check_input(op: str, input: Tensor, values: Tensor, channels: int, expected: int, activation: str) -> None:
    if channels != expected:
        raise ValueError(f"{op}: expected an input with {expected} channels, got {channels} in {tuple(input.shape)}")
    if input.dtype != values.dtype and not torch.is_autocast_enabled(input.device.type):
        raise ValueError(f"{op}: expected an input of the weight's {values.dtype}, got {input.dtype}; convert one of them")
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: expected an activation of {', '.join(ACTIVATIONS)}, got {activation!r}")


def sparse_linear(
    input: Tensor, values: Tensor, codes: Tensor, bias: Tensor | None, shape: Sequence[int], n: int, m: int,
    activation: str = "none", order: Tensor | None = None,
) -> Tensor:
    """Multiply by a packed weight, add the bias, apply the activation; gradients pass to input and bias.

    Args:
        input: (..., in), of the weight's dtype.
        values: the stored weights and `codes` their positions, as `packing.pack` gives them; so are `shape`, `n`, `m`.
        codes: uint8.
        bias: (out,) or None.
        shape: (out, in).
        n: entries stored in each group, 0 for unstructured.
        m: entries in a group, 0 for unstructured.
        activation: "none", "relu" or "gelu".
        order: what `kernel_order` made of the weight; without it a kernel does not run, or runs slower.

    Returns:
        (..., out), contiguous.

    Raises:
        ValueError: the input's channels or dtype are not the weight's, or the activation is unknown.
    """
    if input.ndim == 0:
        raise ValueError("sparse_linear: expected an input of at least one dimension, got a scalar")
    _check_input("sparse_linear", input, values, input.shape[-1], shape[1], activation)
    output: Tensor = torch.ops.snows.sparse_linear(input, values, codes, bias, shape, n, m, activation, order)
    return output


def sparse_conv2d(
    input: Tensor, values: Tensor, codes: Tensor, bias: Tensor | None, shape: Sequence[int], n: int, m: int,
    stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int],
    activation: str = "none", order: Tensor | None = None,
) -> Tensor:
    """Convolve with a packed weight, add the bias, apply the activation; gradients pass to input and bias.

    Args:
        input: (images, in, height, width) or (in, height, width), of the weight's dtype.
        values: see `sparse_linear`, as `codes`, `bias`, `n`, `m`, `activation` and `order`.
        codes: uint8.
        bias: (out,) or None.
        shape: (out, in, kernel height, kernel width).
        n: entries stored in each group.
        m: entries in a group.
        stride: vertical, horizontal; likewise `padding` (zeros on both sides) and `dilation`.
        padding: see `stride`.
        dilation: see `stride`.
        activation: "none", "relu" or "gelu".
        order: what `kernel_order` made of the weight.

    Returns:
        (images, out, output height, output width), or without images as the input; contiguous.

    Raises:
        ValueError: the input's dimensions, channels or dtype are not the weight's, it is smaller than the kernel, or
            the activation is unknown.
    """
    if input.ndim not in (3, 4):
        raise ValueError(f"sparse_conv2d: expected an input of 3 or 4 dimensions, got {tuple(input.shape)}")
    _check_input("sparse_conv2d", input, values, input.shape[-3], shape[1], activation)
    for axis in (0, 1):
        extent = (shape[2 + axis] - 1) * dilation[axis] + 1
        if input.shape[axis - 2] + 2 * padding[axis] < extent:
            raise ValueError(f"sparse_conv2d: expected a padded input no smaller than the kernel's extent of {extent}, "
                             f"got {tuple(input.shape)} with padding {tuple(padding)}")
    images = input if input.ndim == 4 else input[None]
    output: Tensor = torch.ops.snows.sparse_conv2d(
        images, values, codes, bias, shape, n, m, stride, padding, dilation, activation, order)
    return output if input.ndim == 4 else output[0]
