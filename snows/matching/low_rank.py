"""The best factors of a layer's weight: reduced-rank regression, weighed by inputs and output sensitivity.

Of all matrices M of rank r the one is found that minimises ``tr(G (L - M) A (L - M)ᵀ)``: A is the second
moment of the layer's inputs, G its output sensitivity, and L the layer's weight, or the least-squares
solution where the inputs are others than the dense network's (Izenman 1975; Eckart & Young 1936 for the
truncation). With roots ``G = RᵀR`` and ``A = SSᵀ`` that is the truncated singular value decomposition of ``R
L S``. Its Gram matrix is decomposed on the smaller side, so that only that side's root is taken.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from snows.matching.statistics import DAMPING, LayerStatistics, damped
from snows.networks.implants import Factored, full_rank, shaped
from snows.sparsity import rows

ROUNDING = 1e-12  # of a moment matrix's largest eigenvalue: smaller ones are zero but for rounding


class InputMoments(NamedTuple):
    """Hold the moments of a layer's inputs, in the row view.

    Attributes:
        gram: (in, in), the mean of ``x xᵀ``, uncentred; damped where it is to be inverted.
        mean: (in,), of x; None fits without an intercept.
        cross: (out, in), the mean of ``y xᵀ``, y being what the layer should return, without its bias; None
            where that is what its weight makes of x. Damping added to `gram` is added here times the weight.
        target: (out,), the mean of y; needed with `mean` and `cross`.
    """

    gram: Tensor
    mean: Tensor | None = None
    cross: Tensor | None = None
    target: Tensor | None = None

    @classmethod
    def of(cls, statistics: LayerStatistics, weight: Tensor, damping: float = DAMPING) -> InputMoments:
        """Take what the dense layer returns on the dense stream as what to return on the pruned stream.

        Args:
            statistics: of an ungrouped layer.
            weight: of the dense layer.
            damping: relative to the Gram's mean diagonal; it draws the solution to `weight`.
        """
        gram = damped(statistics.gram, damping)[0]
        added = (gram - statistics.gram[0]).diagonal().mean()
        cross = statistics.cross(weight)[0] + added * rows(weight).double()
        return cls(gram, statistics.mean[0], cross, statistics.target(weight)[0])


def low_rank(weight: Tensor, inputs: Tensor | InputMoments, sensitivity: Tensor, rank: int) -> Factored:
    """Find the two factors of this rank whose product loses least.

    Args:
        weight: (out, in) of a Linear, or of an ungrouped Conv2d.
        inputs: moments of the inputs; a tensor is their Gram matrix.
        sensitivity: G, (out, out); may be singular.
        rank: at least 1, below that of the weight.

    Returns:
        Factors as `Implant` takes them, in the weight's dtype; with an intercept where `inputs` has a mean.

    Raises:
        ValueError: the rank is none of these, or a matrix is of another shape or not finite.

    Example:
        >>> W, G = torch.tensor([3.0, 2.0, 1.0]).diag(), torch.tensor([0.1, 1.0, 1.0]).diag()
        >>> first, second, _ = low_rank(W, torch.eye(3), G, 1)
        >>> (second @ first).diag().round().tolist()
        [0.0, 2.0, 0.0]
    """
    if type(rank) is not int or not 1 <= rank < full_rank(weight):
        raise ValueError(
            f"low_rank: expected a rank of at least 1 and below {full_rank(weight)}, got {rank!r}"
        )
    problem = _Problem(weight, inputs, sensitivity)
    first, second = problem.factors(rank)
    intercept = None
    if problem.mean is not None:
        intercept = (problem.target - second @ (first @ problem.mean)).to(weight.dtype)
    return shaped(first, second, weight)._replace(intercept=intercept)


def spectrum(weight: Tensor, inputs: Tensor | InputMoments, sensitivity: Tensor) -> Tensor:
    """Compute the loss of the best factors for every rank.

    Args:
        weight: as `low_rank` takes it.
        inputs: as `low_rank` takes them.
        sensitivity: as `low_rank` takes it.

    Returns:
        (full rank + 1,), float64: entry r is the loss at rank r, above that of no limit on the rank.
    """
    values = _Problem(weight, inputs, sensitivity).values.clamp_min(0)
    return torch.cat([values.flip(0).cumsum(0).flip(0), values.new_zeros(1)])


class _Problem:
    """Hold one layer's regression, decomposed.

    Attributes:
        best: L, (out, in), what would be best without a limit on the rank.
        values: squared singular values of ``R L S``, largest first.
        mean: of the inputs, or None.
        target: mean of what should be returned, where there is a mean.
    """

    def __init__(self, weight: Tensor, inputs: Tensor | InputMoments, sensitivity: Tensor) -> None:
        W = rows(weight).double()
        moments = inputs if isinstance(inputs, InputMoments) else InputMoments(inputs)
        _check(W, moments, sensitivity)
        A, self.mean, cross, target = (None if x is None else x.double() for x in moments)
        G = sensitivity.double()
        assert A is not None
        if self.mean is not None:
            A = A - self.mean.outer(self.mean)
            self.target = W @ self.mean if target is None else target
            cross = None if cross is None else cross - self.target.outer(self.mean)
        L = self.best = W if cross is None else torch.cholesky_solve(cross.mT, _cholesky(A)).mT
        self.wide = len(L) <= L.shape[1]
        root, self.inverse = _roots(G if self.wide else A)
        self.root = root
        gram = root @ (L @ A @ L.mT if self.wide else L.mT @ G @ L) @ root
        values, vectors = torch.linalg.eigh((gram + gram.mT) / 2)
        self.values, self.vectors = values.flip(0), vectors.flip(1)

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """Return the factors, (rank, in) and (out, rank)."""
        kept = self.vectors[:, :rank]
        if self.wide:
            return kept.mT @ self.root @ self.best, self.inverse @ kept
        return kept.mT @ self.inverse, self.best @ self.root @ kept


def _roots(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return the symmetric root of a positive semi-definite matrix, and that root's pseudo-inverse."""
    values, vectors = torch.linalg.eigh(matrix)
    real = values > ROUNDING * values[-1].clamp_min(torch.finfo(torch.float64).tiny)
    root = torch.where(real, values, 0).sqrt()
    inverse = torch.where(real, 1 / root, 0)
    return (vectors * root) @ vectors.mT, (vectors * inverse) @ vectors.mT


def _cholesky(matrix: Tensor) -> Tensor:
    factor: Tensor
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if failed:
        raise ValueError(
            "low_rank: expected a positive definite Gram matrix to solve for the weight, got a singular one; "
            "damp it"
        )
    return factor


def _check(W: Tensor, moments: InputMoments, sensitivity: Tensor) -> None:
    out, width = W.shape
    shapes = {
        "a Gram matrix": (moments.gram, (width, width)),
        "a mean": (moments.mean, (width,)),
        "a cross moment": (moments.cross, (out, width)),
        "a target": (moments.target, (out,)),
        "a sensitivity": (sensitivity, (out, out)),
    }
    for name, (x, shape) in shapes.items():
        if x is not None and (tuple(x.shape) != shape or not x.isfinite().all()):
            got = tuple(x.shape) if tuple(x.shape) != shape else "NaN or infinity"
            raise ValueError(f"low_rank: expected {name} of {shape} finite numbers, got {got}")
    if moments.cross is not None and moments.mean is not None and moments.target is None:
        raise ValueError("low_rank: expected the target's mean with a mean and a cross moment, got none")
