"""In what precision a CUDA device multiplies float32: as it is, or rounded to TF32, with 10 bits of mantissa.

PyTorch's default is TF32 for convolutions and float32 for matrix products. Its settings are the process's, on
a CPU they change nothing, and graphs keep the kernels that were chosen when they were captured.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal

import torch

Precision = Literal["float32", "tf32"]
PRECISIONS: dict[Precision, str] = {"float32": "ieee", "tf32": "tf32"}  # PyTorch's names
_given: ContextVar[tuple[str, ...] | None] = ContextVar("_given", default=None)


@contextmanager
def products_in(precision: Precision) -> Iterator[None]:
    """Multiply matrices, and convolve, in a precision; afterwards as before."""
    before = settings()
    token = _given.set(_given.get() or before)
    _set((PRECISIONS[precision],) * len(before))
    try:
        yield
    finally:
        _set(before)
        _given.reset(token)


@contextmanager
def as_given() -> Iterator[None]:
    """Multiply as outside of all `products_in`: what is timed is what the user will run."""
    before = settings()
    _set(_given.get() or before)
    try:
        yield
    finally:
        _set(before)


def settings() -> tuple[str, ...]:
    """Return what PyTorch is set to: for matrix products, convolutions and recurrent layers.

    The last two go together: PyTorch has an older flag for both, which cannot be read where they differ.
    """
    return tuple(x.fp32_precision for x in _switches())


def _set(values: tuple[str, ...]) -> None:
    for switch, value in zip(_switches(), values, strict=True):
        switch.fp32_precision = value


def _switches() -> tuple[Any, ...]:
    backends: Any = torch.backends
    return backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn
