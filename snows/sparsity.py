"""Patterns say which weights may stay; a masked weight is a weight and the mask it obeys.

N always counts what is *kept*: 1:4 keeps one weight of four and is 75 % sparse.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from snows import ops
from snows.ops.masks import refuse_nan


def rows(weight: Tensor) -> Tensor:
    """View a layer's weight as (out, in): a group of m is m consecutive entries of a row.

    A Linear's weight is that already; a Conv2d's (out, in, kh, kw) becomes (out, kh * kw * in), input channel
    fastest, so that a group lies along the input channels at one kernel position, as sparse hardware wants
    it.

    Raises:
        ValueError: `weight` has neither two nor four dimensions.
    """
    if weight.ndim == 2:
        return weight
    if weight.ndim == 4:
        return weight.permute(0, 2, 3, 1).flatten(1)
    raise ValueError(
        f"rows: expected a weight of 2 (Linear) or 4 (Conv2d) dimensions, got {tuple(weight.shape)}"
    )


def unrows(matrix: Tensor, shape: torch.Size) -> Tensor:
    """Undo `rows`: a (out, in) matrix back in the weight's `shape`."""
    if len(shape) == 2:
        return matrix.reshape(shape)
    out, channels, height, width = shape
    return matrix.reshape(out, height, width, channels).permute(0, 3, 1, 2).contiguous()


class MaskedWeight(NamedTuple):
    """Hold a weight that is zero wherever its mask is False.

    The mask is never re-derived from `weight != 0`.
    """

    weight: Tensor
    mask: Tensor


@runtime_checkable
class Pattern(Protocol):
    """Say which weights may stay."""

    def mask(self, scores: Tensor) -> Tensor:
        """Choose by `scores` (weight.shape, higher stays); bool, weight.shape."""
        ...

    def fits(self, shape: torch.Size) -> str:
        """Say why a weight of this shape cannot follow the pattern; empty if it can."""
        ...

    @property
    def density(self) -> float:
        """The share of weights that stay."""
        ...

    @property
    def group(self) -> int | None:
        """How many consecutive columns of the row view are decided together; None for the whole weight."""
        ...


@dataclass(frozen=True)
class NM:
    """Keep `n` of every `m` consecutive input channels (at each kernel position of a convolution).

    Raises:
        ValueError: not 0 < n < m.
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        if not (isinstance(self.n, int) and isinstance(self.m, int) and 0 < self.n < self.m):
            raise ValueError(
                f"NM: expected whole numbers 0 < n < m (n of every m weights are kept), got {self.n}:{self.m}"
            )

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    @property
    def density(self) -> float:
        """The share of weights that stay."""
        return self.n / self.m

    @property
    def group(self) -> int:
        """The columns that are decided together."""
        return self.m

    def fits(self, shape: torch.Size) -> str:
        """Say why a weight of this shape cannot follow the pattern; empty if it can."""
        if len(shape) not in (2, 4):
            return f"a weight of {len(shape)} dimensions is none of a Linear or Conv2d"
        return f"{shape[1]} input channels do not divide into groups of {self.m}" if shape[1] % self.m else ""

    def mask(self, scores: Tensor) -> Tensor:
        """Keep the `n` highest scores of every group; bool, scores.shape."""
        if self.fits(scores.shape):
            raise ValueError(
                f"NM: expected input channels divisible by {self.m}, got a weight of {tuple(scores.shape)}"
            )
        return unrows(ops.nm_mask(rows(scores), self.n, self.m), scores.shape)


@dataclass(frozen=True)
class Unstructured:
    """Keep the share `1 - sparsity` of a tensor's weights, to the nearest whole weight.

    Given to `prune` alone it is one exact budget over all prunable weights; see `choosing.zeros`.

    Raises:
        ValueError: not 0 < sparsity < 1.
    """

    sparsity: float

    def __post_init__(self) -> None:
        if not (isinstance(self.sparsity, int | float) and 0 < self.sparsity < 1):
            raise ValueError(f"Unstructured: expected a sparsity between 0 and 1, got {self.sparsity!r}")

    def __str__(self) -> str:
        return f"{self.sparsity:g}"

    @property
    def density(self) -> float:
        """The share of weights that stay."""
        return 1 - self.sparsity

    @property
    def group(self) -> None:
        """None: all weights are decided together."""
        return None

    def fits(self, shape: torch.Size) -> str:
        """Say nothing: every weight can follow the pattern."""
        return ""

    def mask(self, scores: Tensor) -> Tensor:
        """Keep the highest scores; of equal ones the first; bool, scores.shape."""
        refuse_nan("mask", scores)
        drop = round(self.sparsity * scores.numel())
        if drop == 0:
            return torch.ones_like(scores, dtype=torch.bool)
        flat = scores.flatten()
        threshold = flat.kthvalue(drop).values
        above, ties = flat > threshold, flat == threshold
        wanted = flat.numel() - drop - above.sum()  # of the ties: the first stay
        return (above | (ties & (ties.cumsum(0) <= wanted))).view(scores.shape)


@dataclass(frozen=True)
class Taps:
    """Keep either all taps of an output channel's kernels, or the centre tap alone (HAP, Yu et al. 2022).

    It is for comparison: taking channels out was measured to lose no more for the same cost. SparseGPT, which
    decides column by column, cannot choose by it.

    Attributes:
        share: of the output channels, to the nearest, that keep the centre alone: those with the least scores
            off the centre.

    Raises:
        ValueError: not 0 < share < 1.
    """

    share: float

    def __post_init__(self) -> None:
        if not (isinstance(self.share, int | float) and 0 < self.share < 1):
            raise ValueError(f"Taps: expected a share between 0 and 1, got {self.share!r}")

    def __str__(self) -> str:
        return f"taps:{self.share:g}"

    @property
    def density(self) -> float:
        """The share of weights that stay of a 3 x 3 kernel."""
        return 1 - self.share * 8 / 9

    @property
    def group(self) -> None:
        """None: all channels are decided together."""
        return None

    def fits(self, shape: torch.Size) -> str:
        """Say why a weight of this shape cannot follow the pattern; empty if it can."""
        if len(shape) != 4 or shape[2] * shape[3] == 1:
            return "it is no convolution of more than one tap"
        odd = shape[2] % 2 and shape[3] % 2
        return "" if odd else f"a kernel of {shape[2]} x {shape[3]} has no centre"

    def mask(self, scores: Tensor) -> Tensor:
        """Keep all of the channels with the highest scores off the centre; bool, scores.shape."""
        if reason := self.fits(scores.shape):
            raise ValueError(f"Taps: expected a kernel with a centre, got {tuple(scores.shape)}: {reason}")
        refuse_nan("mask", scores)
        mask = torch.zeros_like(scores, dtype=torch.bool)
        mask[:, :, scores.shape[2] // 2, scores.shape[3] // 2] = True
        around = scores.masked_fill(mask, 0).flatten(1).sum(1)
        order = around.argsort(descending=True, stable=True)  # of equal ones the first stay
        mask[order[: len(scores) - round(self.share * len(scores))]] = True
        return mask


def parse_pattern(text: str) -> NM | Unstructured | Taps:
    """Read a pattern: "2:4" is `NM(2, 4)`, "0.7" and "70%" are `Unstructured(0.7)`, "taps:0.5" `Taps(0.5)`.

    Raises:
        ValueError: `text` is none of these.

    Example:
        >>> parse_pattern("1:4"), str(parse_pattern("0.7"))
        (NM(n=1, m=4), '0.7')
    """
    text = str(text).strip()
    if match := re.fullmatch(r"(\d+):(\d+)", text):
        return NM(int(match[1]), int(match[2]))
    if match := re.fullmatch(r"(\d*\.?\d+(?:[eE]-?\d+)?)(%?)", text):
        return Unstructured(float(match[1]) / (100 if match[2] else 1))
    if match := re.fullmatch(r"taps:(\d*\.?\d+)", text):
        return Taps(float(match[1]))
    raise ValueError(
        f'parse_pattern: expected N:M like "2:4" or a sparsity like "0.7" or "70%", got {text!r}'
    )
