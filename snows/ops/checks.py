"""What the public functions ask of their arguments."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def expect(right: bool, op: str, argument: str, expected: str, got: object) -> None:
    """Raise a ValueError unless this is right."""
    if not right:
        raise ValueError(f"{op}: {argument}: expected {expected}, got {got}")


def describe(x: Tensor) -> str:
    """Describe a tensor, for `expect`."""
    return f"{tuple(x.shape)} {x.dtype} on {x.device}"


def check_real(op: str, argument: str, x: Tensor) -> None:
    """Ask for floating point, of any precision."""
    expect(x.is_floating_point(), op, argument, "floating point", x.dtype)


def check_like(
    op: str, name: str, value: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    """Ask for a tensor of this shape, dtype and device."""
    if (*value.shape,) != shape or value.dtype != dtype or value.device != device:
        raise ValueError(
            f"{op}: expected {name} to be {shape} {dtype} on {device}, "
            f"got {tuple(value.shape)} {value.dtype} on {value.device}"
        )


def check_contiguous(op: str, name: str, value: Tensor) -> None:
    """Ask it of a tensor that is changed."""
    if not value.is_contiguous():
        raise ValueError(
            f"{op}: expected {name} to be contiguous, since it is changed in place, got strides "
            f"{value.stride()}"
        )


def check_constant(op: str, argument: str, x: Tensor | None, shape: Sequence[int], like: Tensor) -> None:
    """Ask that a parameter has this shape, `like`'s dtype and device, and needs no gradient."""
    if x is None:
        return
    right = tuple(x.shape) == tuple(shape) and x.dtype == like.dtype and x.device == like.device
    expect(right, op, argument, f"{tuple(shape)} {like.dtype} on {like.device}", describe(x))
    expect(
        not (x.requires_grad and torch.is_grad_enabled()),
        op,
        argument,
        "a constant",
        "a tensor that requires grad",
    )
