"""Packed layers; the format is described in `snows.packing`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

ACTIVATIONS = ("none", "relu", "gelu")


def unpack(values: Tensor, codes: Tensor, shape: Sequence[int], n: int, m: int) -> Tensor:
    """Put the stored values of a packed weight back at their places, +0.0 elsewhere.

    Args:
        values: the stored entries in order of the row view: (rows, groups * n), or (stored,) for
            unstructured.
        codes: uint8, their positions.
        shape: the weight's, (out, in) or (out, in, kernel height, kernel width).
        n: entries stored in each group, 0 for unstructured.
        m: entries in a group, 0 for unstructured.

    Returns:
        The weight, `shape`, contiguous.
    """
    weight: Tensor = torch.ops.snows.unpack(values, codes, shape, n, m)
    return weight


def kernel_order(values: Tensor, codes: Tensor, shape: Sequence[int], n: int, m: int) -> Tensor:
    """Put a packed weight in the order in which the kernels of its device read it.

    It is empty where there is no kernel.

    A permutation of `values` with the positions spelled out. What it looks like is the kernel's own business,
    so it is made from the packed weight wherever that arrives, and never saved. Arguments as in `unpack`.

    Returns:
        int32, opaque: for `sparse_linear` and `sparse_conv2d` in the same process, on the same device.
    """
    order: Tensor = torch.ops.snows.kernel_order(values, codes, shape, n, m)
    return order


def sparse_linear(
    input: Tensor,
    values: Tensor,
    codes: Tensor,
    bias: Tensor | None,
    shape: Sequence[int],
    n: int,
    m: int,
    activation: str = "none",
    order: Tensor | None = None,
) -> Tensor:
    """Multiply by a packed weight, add the bias, apply the activation; gradients pass to input and bias.

    Args:
        input: (..., in), of the weight's dtype.
        values: the weight, (out, in), as in `unpack`, as are `codes`, `shape`, `n` and `m`.
        codes: see `values`.
        bias: (out,) or None.
        shape: see `values`.
        n: see `values`.
        m: see `values`.
        activation: "none", "relu" or "gelu" (the exact one, by erf).
        order: what `kernel_order` made of the weight; without it the weight is unpacked at every call, or
            ordered (CUDA).

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
    input: Tensor,
    values: Tensor,
    codes: Tensor,
    bias: Tensor | None,
    shape: Sequence[int],
    n: int,
    m: int,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    activation: str = "none",
    order: Tensor | None = None,
) -> Tensor:
    """Convolve with a packed weight, add the bias, apply the activation; gradients pass to input and bias.

    The input is (images, in, height, width) or (in, height, width), the weight (out, in, kernel height,
    kernel width); stride, padding (zeros on both sides) and dilation are vertical, horizontal. All else is as
    in `sparse_linear`.

    Returns:
        (images, out, output height, output width), or without images as the input; contiguous, or channels
        last or images innermost where the input is.

    Raises:
        ValueError: the input's dimensions, channels or dtype are not the weight's, it is smaller than the
            kernel, or the activation is unknown.
    """
    if input.ndim not in (3, 4):
        raise ValueError(f"sparse_conv2d: expected an input of 3 or 4 dimensions, got {tuple(input.shape)}")
    _check_input("sparse_conv2d", input, values, input.shape[-3], shape[1], activation)
    for name, pair, least in (
        ("a stride", stride, 1),
        ("a padding", padding, 0),
        ("a dilation", dilation, 1),
    ):
        if len(pair) != 2 or min(pair) < least:
            raise ValueError(
                f"sparse_conv2d: expected {name} of two numbers of at least {least}, got {tuple(pair)}"
            )
    for axis in (0, 1):
        extent = (shape[2 + axis] - 1) * dilation[axis] + 1
        if input.shape[axis - 2] + 2 * padding[axis] < extent:
            raise ValueError(
                f"sparse_conv2d: expected a padded input no smaller than the kernel's extent of {extent}, "
                f"got {tuple(input.shape)} with padding {tuple(padding)}"
            )
    images = input if input.ndim == 4 else input[None]
    output: Tensor = torch.ops.snows.sparse_conv2d(
        images, values, codes, bias, shape, n, m, stride, padding, dilation, activation, order
    )
    return output if input.ndim == 4 else output[0]


def _check_input(
    op: str, input: Tensor, values: Tensor, channels: int, expected: int, activation: str
) -> None:
    if channels != expected:
        raise ValueError(
            f"{op}: expected an input with {expected} channels, got {channels} in {tuple(input.shape)}"
        )
    if input.dtype != values.dtype and not torch.is_autocast_enabled(input.device.type):
        raise ValueError(
            f"{op}: expected an input of the weight's {values.dtype}, got {input.dtype}; convert one of them"
        )
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: expected an activation of {', '.join(ACTIVATIONS)}, got {activation!r}")
