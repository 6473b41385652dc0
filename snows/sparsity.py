"""Patterns say which weights may stay; a masked weight is a weight and the mask it obeys.

N always counts what is *kept*: 1:4 keeps one weight of four and is 75 % sparse.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from snows import ops


def rows(weight: Tensor) -> Tensor:
    """View a layer's weight as (out, in): a group of m is m consecutive entries of a row.

    A Linear's weight is that already; a Conv2d's (out, in, kh, kw) becomes (out, kh * kw * in), input channel
    fastest, so that a group lies along the input channels at one kernel position, as sparse hardware wants it.

    Raises:
        ValueError: `weight` has neither two nor four dimensions.
    """
    if weight.ndim == 2:
        return weight
    if weight.ndim == 4:
        return weight.permute(0, 2, 3, 1).flatten(1)
    raise ValueError(f"rows: expected a weight of 2 (Linear) or 4 (Conv2d) dimensions, got {tuple(weight.shape)}")


def unrows(matrix: Tensor, shape: torch.Size) -> Tensor:
    """Undo `rows`: a (out, in) matrix back in the weight's `shape`."""
    if len(shape) == 2:
        return matrix.reshape(shape)
    out, channels, height, width = shape
    return matrix.reshape(out, height, width, channels).permute(0, 3, 1, 2).contiguous()


class MaskedWeight(NamedTuple):
    """A weight that is zero wherever its mask is False; the mask is never re-derived from `weight != 0`."""

    weight: Tensor
    mask: Tensor


@runtime_checkable
class Pattern(Protocol):
    """Which weights may stay."""

    def mask(self, scores: Tensor) -> Tensor:
        """Choose by `scores` (weight.shape, higher stays); bool, weight.shape."""
        ...

    def fits(self, shape: torch.Size) -> bool:
        """Whether a weight of this shape can follow the pattern."""
        ...

    @property
    def density(self) -> float:
        """The share of weights that stay."""
        ...


def _refuse_nan(scores: Tensor) -> None:
    if scores.isnan().any():
        raise ValueError("mask: expected scores without NaN, got NaN; check the weights and the calibration images")


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
            raise ValueError(f"NM: expected whole numbers 0 < n < m (n of every m weights are kept), got {self.n}:{self.m}")

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    @property
    def density(self) -> float:
        return self.n / self.m

    def fits(self, shape: torch.Size) -> bool:
        return len(shape) in (2, 4) and shape[1] % self.m == 0

    def mask(self, scores: Tensor) -> Tensor:
        if not self.fits(scores.shape):
            raise ValueError(f"NM: expected input channels divisible by {self.m}, got a weight of {tuple(scores.shape)}")
        return unrows(ops.nm_mask(rows(scores), self.n, self.m), scores.shape)


@dataclass(frozen=True)
class Unstructured:
    """Keep the share `1 - sparsity` of a tensor's weights, to the nearest whole weight.

    Given to `prune` it is one exact budget over all prunable weights; see `allocate`.

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
        return 1 - self.sparsity

    def fits(self, shape: torch.Size) -> bool:
        return True

    def mask(self, scores: Tensor) -> Tensor:
        _refuse_nan(scores)
        drop = round(self.sparsity * scores.numel())
        if drop == 0:
            return torch.ones_like(scores, dtype=torch.bool)
        flat = scores.flatten()
        threshold = flat.kthvalue(drop).values
        above, ties = flat > threshold, flat == threshold
        wanted = flat.numel() - drop - above.sum()  # of the ties: the first stay
        return (above | (ties & (ties.cumsum(0) <= wanted))).view(scores.shape)


def parse_pattern(text: str) -> NM | Unstructured:
    """Read a pattern: "2:4" is `NM(2, 4)`, "0.7" and "70%" are `Unstructured(0.7)`.

    Raises:
        ValueError: `text` is neither.

    Example:
        >>> parse_pattern("1:4"), str(parse_pattern("0.7"))
        (NM(n=1, m=4), '0.7')
    """
    text = str(text).strip()
    if match := re.fullmatch(r"(\d+):(\d+)", text):
        return NM(int(match[1]), int(match[2]))
    if match := re.fullmatch(r"(\d*\.?\d+(?:[eE]-?\d+)?)(%?)", text):
        return Unstructured(float(match[1]) / (100 if match[2] else 1))
    raise ValueError(f'parse_pattern: expected N:M like "2:4" or a sparsity like "0.7" or "70%", got {text!r}')


def allocate(scores: Mapping[str, Tensor], sparsity: float, cap: float = 0.95) -> dict[str, int]:
    """Spend one exact sparsity budget over several layers: how many weights each layer loses.

    The lowest scores of all layers go first; no layer loses more than the share `cap` of its own, nor its last weight, and
    what a layer may not lose is taken from the others. The denominator is the number of weights in `scores`.

    Args:
        scores: by layer, comparable between layers; higher stays.
        sparsity: share of all the weights to remove, between 0 and 1.
        cap: largest share that one layer may lose.

    Raises:
        ValueError: the caps leave less to remove than the budget asks for, or a score is NaN.
    """
    if not 0 < cap <= 1:
        raise ValueError(f"allocate: expected a cap above 0 and of at most 1, got {cap}")
    total = sum(s.numel() for s in scores.values())
    budget = round(sparsity * total)
    limits = {name: min(math.floor(cap * s.numel() + 1e-9), s.numel() - 1) for name, s in scores.items()}
    if budget > sum(limits.values()):
        raise ValueError(
            f"allocate: a sparsity of {sparsity:g} needs {budget} of {total} weights removed, but with a cap of {cap:g} "
            f"per layer, and one weight of each kept, at most {sum(limits.values())} can go; lower the sparsity or raise the cap"
        )
    candidates, owner = [], []
    for index, (name, score) in enumerate(scores.items()):
        _refuse_nan(score)
        candidates.append(score.flatten().float().sort(stable=True).values[: limits[name]])
        owner.append(torch.full((limits[name],), index))
    order = torch.cat(candidates).argsort(stable=True)[:budget].cpu()
    counts = torch.bincount(torch.cat(owner)[order], minlength=len(scores))
    return dict(zip(scores, counts.tolist(), strict=True))
