"""Masks: n of every m by their scores, and masks as bits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from snows import reference
from snows.ops.checks import FLOATS, check_real, describe, expect
from snows.ops.register import implementation

KERNEL_LOOKS = implementation("nm_mask") == "native"  # the CPU's refuses NaN in the same pass
_looking: ContextVar[bool] = ContextVar("_looking", default=True)


@contextmanager
def unlooked() -> Iterator[None]:
    """Rank scores without looking for NaN, for which the host would wait for a device each time.

    Where there is NaN, which are chosen, and how many, says nothing: the caller has to look later.
    """
    token = _looking.set(False)
    try:
        yield
    finally:
        _looking.reset(token)


def refuse_nan(op: str, scores: Tensor) -> None:
    """Raise a ValueError for scores that cannot be ranked, if anybody looks, see `unlooked`."""
    # infinities of both signs sum to NaN too
    if _looking.get() and scores.sum().isnan() and scores.isnan().any():
        raise ValueError(
            f"{op}: expected scores without NaN, got NaN; check the weights and the calibration images"
        )


def nm_mask(scores: Tensor, n: int, m: int) -> Tensor:
    """Keep the `n` highest of every `m` consecutive scores of a row; the lower index wins a tie.

    Args:
        scores: (rows, columns), floating point; a last group of fewer than `m` columns keeps its `n` highest
            too.
        n: entries kept in each group, 0 < n < m.
        m: entries in a group; above 32 the reference does it.

    Returns:
        (rows, columns), bool.

    Raises:
        ValueError: `scores` is not a floating-point matrix or holds NaN, or `n` and `m` are out of order.

    Example:
        >>> nm_mask(torch.tensor([[3.0, 1.0, 3.0, 2.0]]), 2, 4).int().tolist()
        [[1, 0, 1, 0]]
    """
    _check_selection("nm_mask", scores, n, m)
    select = torch.ops.snows.nm_mask if m <= 32 else reference.nm_mask
    mask: Tensor = select(scores.contiguous(), n, m)
    return mask


def nm_select(scores: Tensor, n: int, m: int) -> tuple[Tensor, Tensor]:
    """Make the mask of `nm_mask` as packed bits, and for 2:4 the codes of sparse matrix units.

    Arguments and errors are those of `nm_mask`.

    Returns:
        bits: (rows, ceil(columns / 8)), uint8: bit j of byte b is column 8 b + j, 0 beyond the last column.
        codes: of the same shape for 2:4, (rows, 0) otherwise: a nibble a group, lower first: its first kept
            index | the second << 2; what is missing of a group counts as -inf.

    Example:
        >>> bits, codes = nm_select(torch.tensor([[3.0, 1.0, 3.0, 2.0, 0.0, 0.0, 1.0, 2.0]]), 2, 4)
        >>> f"{bits.item():08b} {codes.item():08b}"
        '11000101 11101000'
    """
    _check_selection("nm_select", scores, n, m)
    select = torch.ops.snows.nm_select if m <= 32 else reference.nm_select
    bits, codes = select(scores.contiguous(), n, m)
    return bits, codes


def _check_selection(op: str, scores: Tensor, n: int, m: int) -> None:
    if scores.ndim != 2 or scores.dtype not in FLOATS:
        raise ValueError(
            f"{op}: expected scores to be a matrix of float16, bfloat16, float32 or float64, "
            f"got {tuple(scores.shape)} {scores.dtype}"
        )
    if not 0 < n < m:
        raise ValueError(f"{op}: expected 0 < n < m, got n = {n}, m = {m}")
    looks_itself = KERNEL_LOOKS and scores.is_cpu and m <= 32
    if not looks_itself:
        refuse_nan(op, scores)


def pack_bits(mask: Tensor) -> Tensor:
    """Pack a mask into bytes, as `masked` takes it.

    Bit j of byte b is element 8 b + j of the flattened mask, 0 beyond the last.

    Args:
        mask: any shape, bool.

    Returns:
        (ceil(elements / 8),), uint8.

    Raises:
        ValueError: `mask` is not bool.

    Example:
        >>> pack_bits(torch.tensor([True, False, True, False, False, False, False, False, True])).tolist()
        [5, 1]
    """
    expect(mask.dtype == torch.bool, "pack_bits", "mask", "bool", mask.dtype)
    result: Tensor = reference.pack_bits(mask)
    return result


def masked(weight: Tensor, bits: Tensor) -> Tensor:
    """Keep the weight where its bit is set; +0.0 elsewhere, whatever stood there.

    It can be differentiated any number of times.

    Args:
        weight: any shape, floating point.
        bits: (ceil(elements / 8),), uint8, as `pack_bits` gives them.

    Returns:
        weight.shape, contiguous.

    Raises:
        ValueError: a dtype, shape or device is wrong.

    Example:
        >>> masked(torch.tensor([3.0, -2.0, 1.0]), torch.tensor([5], dtype=torch.uint8))
        tensor([3., 0., 1.])
    """
    check_real("masked", "weight", weight)
    shape = (-(-weight.numel() // 8),)
    right = bits.shape == shape and bits.dtype == torch.uint8 and bits.device == weight.device
    expect(right, "masked", "bits", f"{shape} torch.uint8 on {weight.device}", describe(bits))
    result: Tensor = torch.ops.snows.masked(weight, bits)
    return result
