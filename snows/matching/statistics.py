"""Second moments of a layer's inputs in the row view, and the Kronecker model of its curvature."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from snows import together
from snows.matching import moments
from snows.networks.sites import Site
from snows.networks.watching import Call
from snows.solving.preconditioners import Factors
from snows.sparsity import MaskedWeight, Pattern

DAMPING = 0.01  # of the mean variance of a layer's inputs, the ridge of a least-squares fit


class LayerStatistics:
    """Hold second moments of a layer's inputs over the calibration batches, per group of a convolution.

    Attributes:
        calls: the layer's on the pruned network's stream, one a batch, with the samples of this process; what
            is returned is of all.
        counts: by call, whether its samples are this process's own.

    Args:
        sparse: the layer's calls on the pruned network's stream, one a batch.
        dense: the same calls on the dense network's stream.
        sensitivity: makes what `sensitivity` returns.
        target: the dense network's weight, where the layer was cut; None where it is the one to prune.
        left: which outputs of the dense layer the cut one has; None for all.
        counts: by call, whether its samples are this process's own; None for all.
    """

    def __init__(
        self,
        sparse: Sequence[Call],
        dense: Sequence[Call],
        sensitivity: Callable[[], Tensor],
        target: Tensor | None = None,
        left: Tensor | None = None,
        counts: Sequence[bool] | None = None,
    ) -> None:
        self.calls, self._dense, self._sensitivity = sparse, dense, sensitivity
        self._target, self._left = target, left
        self.counts = [True] * len(sparse) if counts is None else counts

    @classmethod
    def of(cls, site: Site, sensitivity: Callable[[], Tensor], whole: bool = False) -> LayerStatistics:
        """Gather a layer's statistics over all batches to fit to.

        Args:
            site: the layer.
            sensitivity: as of the class.
            whole: of the first of two layers that stand for one, take what that one should return. Else such
                a layer, which the dense network has none like, is to return what it makes of its own inputs.
        """
        calls = [pair.calls for pair in site.training]
        counts = [pair.sparse.batch.share > 0 for pair in site.training]
        if site.first and not whole:
            own = [sparse for _, sparse in calls]
            return cls(own, own, sensitivity, counts=counts)
        dense, sparse = [dense for dense, _ in calls], [sparse for _, sparse in calls]
        return cls(sparse, dense, sensitivity, site.target, site.left, counts)

    @cached_property
    def sensitivity(self) -> Tensor:
        """(groups, out / groups, out / groups): second moment of the gradients by the layer's outputs."""
        return self._sensitivity()

    @cached_property
    def factors(self) -> Factors:
        """The Kronecker factors of the layer's curvature, which selectors and preconditioners share."""
        return Factors(self.gram, self.sensitivity)

    @cached_property
    def count(self) -> int:
        """The rows seen: images times tokens or output positions."""
        own = sum(moments.positions(call) for call, real in zip(self.calls, self.counts, strict=True) if real)
        return int(together.total(torch.tensor(own, device=self.calls[0].x.device)))

    @cached_property
    def mean(self) -> Tensor:
        """(groups, in): the mean row."""
        return self._mean(_sum(x.sum(1) for x in moments.patches(call)) for call in self.calls)

    @cached_property
    def energy(self) -> Tensor:
        """(groups, in): the mean square of each input, the diagonal of `gram`."""
        return self._mean(_sum(x.square().sum(1) for x in moments.patches(call)) for call in self.calls)

    @cached_property
    def gram(self) -> Tensor:
        """(groups, in, in): the mean of ``x xᵀ`` over rows x of the pruned stream."""
        return self._mean(moments.gram(call) for call in self.calls)

    def cross(self, weight: Tensor) -> Tensor:
        """Return the mean of ``y xᵀ``: (groups, out / groups, in).

        Here y is what `weight` makes of the dense stream's row, or what is left of the dense layer's output
        where the layer was cut, and x the pruned stream's row.
        """
        return self._mean(
            moments.cross(sparse, y) for sparse, y in zip(self.calls, self.wanted(weight), strict=True)
        )

    def wanted(self, weight: Tensor) -> Iterator[Tensor]:
        """Give what the layer should return without its bias, one tensor a batch, as in `cross`."""
        for dense, sparse in zip(self._dense, self.calls, strict=True):
            if self._target is None or dense is sparse:
                yield moments.output(dense, weight)
                continue
            y = moments.output(dense, self._target)
            yield (
                y
                if self._left is None
                else y.index_select(1 if dense.kernel else -1, self._left.to(y.device))
            )

    def target(self, weight: Tensor) -> Tensor:
        """Return the mean of that y: (groups, out / groups)."""
        sums = (y.movedim(-1 if weight.ndim == 2 else 1, 0).flatten(1).sum(1) for y in self.wanted(weight))
        return self._mean(x.view(len(self.mean), -1) for x in sums)

    def _mean(self, sums: Iterator[Tensor]) -> Tensor:
        return self.total(sums).div_(self.count).to(self.calls[0].input.dtype)

    def total(self, sums: Iterator[Tensor]) -> Tensor:
        """Sum what calls give over all that are this process's own, and over all processes: float64."""
        both = zip(sums, self.counts, strict=True)
        own = (x.double() if real else torch.zeros_like(x).double() for x, real in both)
        return together.total(_sum(own))


def _sum(parts: Iterator[Tensor]) -> Tensor:
    """Sum tensors in float64."""
    total = next(parts).double()
    for part in parts:
        total += part
    return total


class Selector(Protocol):
    """Choose a mask and give the weights on it; settings go in with `functools.partial`."""

    def __call__(self, weight: Tensor, statistics: LayerStatistics, pattern: Pattern) -> MaskedWeight:
        """Choose which entries of a weight stay, as the pattern allows, and their values."""
        ...


def columns(per_group: Tensor, weight: Tensor) -> Tensor:
    """Spread (groups, in) over a layer's rows: (out, in), group by group."""
    return per_group.repeat_interleave(len(weight) // len(per_group), dim=0)


def damped(gram: Tensor, share: float) -> Tensor:
    """Add `share` of the mean diagonal to the diagonal of each (in, in) matrix; float64."""
    return _raised(gram.double(), _share(gram, share))


def factored(covariance: Tensor, share: float, gram: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Factor damped covariances, (groups, in, in), that means were taken off.

    Inputs that hardly vary leave rounding alone there, and `share` of its mean diagonal is not enough. What
    is added is no less than rounding of the second moments may be, and more where it turns out to be more.

    Args:
        covariance: float64.
        share: of the mean diagonal, that is added.
        gram: the second moments, with their means.
        dtype: that they were summed in.

    Returns:
        The Cholesky factors, and what was added to each diagonal, (groups,).
    """
    added, least = _share(covariance, share), gram.double().diagonal(dim1=-2, dim2=-1).sum(-1)
    for power in range(6):
        added = added.maximum(torch.finfo(dtype).eps * 10**power * least)
        factor, wrong = torch.linalg.cholesky_ex(_raised(covariance, added))
        if not wrong.any():
            return factor, added
    return torch.linalg.cholesky(_raised(covariance, added)), added


def _share(gram: Tensor, share: float) -> Tensor:
    mean = gram.double().diagonal(dim1=-2, dim2=-1).mean(-1)
    return share * torch.where(mean > 0, mean, 1.0)


def _raised(gram: Tensor, added: Tensor) -> Tensor:
    found = gram.clone()
    found.diagonal(dim1=-2, dim2=-1).add_(added[..., None])
    return found
