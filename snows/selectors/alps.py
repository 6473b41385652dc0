"""ALPS (Meng et al. 2024) in the horizon's metric: a mask by ADMM.

What stays can make up for what goes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from snows import together
from snows.matching.statistics import LayerStatistics, damped
from snows.ops.masks import refuse_nan, unlooked
from snows.selectors.least_squares import ridge
from snows.solving.cg import batched_cg
from snows.sparsity import MaskedWeight, Pattern, rows, unrows


def alps(
    weight: Tensor,
    statistics: LayerStatistics,
    pattern: Pattern,
    *,
    damping: float = 0.01,
    smoothing: float = 0.1,
    penalty: float = 0.03,
    max_iterations: int = 300,
) -> MaskedWeight:
    """Minimise ``tr(G E A Eᵀ)`` over weights that the pattern allows, by ADMM with a growing penalty ρ.

    E is the difference to the least-squares weight on the dense stream, ``A = X Xᵀ + λI`` the Gram matrix of
    the layer's inputs and G the sensitivity of the features a few operations later to the layer's outputs
    (the identity in the paper): the two factors of the curvature, after K-FAC. In turn: W unconstrained near
    D (one eigendecomposition of each factor serves every ρ), D the projection of ``W + V / ρ`` on the
    pattern, V the dual. Rows and columns are scaled to unit diagonals first. Every third iteration ρ grows by
    1.3, 1.2 or 1.1, the faster the more of the mask still moves, until nothing of it does and W is near D
    (the paper's schedule). Conjugate gradients end it on the mask, as in `least_squares`. Several processes
    share the products out.

    Args:
        weight: the dense weight.
        statistics: of the layer's inputs, and their sensitivity.
        pattern: which weights may stay.
        damping: λ relative to the mean diagonal of A.
        smoothing: what is added to the diagonal of G, relative to its mean.
        penalty: the first ρ.
        max_iterations: an upper bound; 30 to 60 are usual.
    """
    gram, right = (
        statistics.gram,
        ridge(weight, statistics, damping),
    )  # (groups, in, in), (groups, out / groups, in)
    columns, a, Q = _modes(damped(gram, damping), weight.dtype)
    lines, g, U = _modes(damped(statistics.sensitivity, smoothing), weight.dtype)
    scale = columns.unsqueeze(-2) * lines.unsqueeze(-1)
    curvature = g.unsqueeze(-1) * a.unsqueeze(-2)
    target = g.unsqueeze(-1) * (U.mT @ (right * lines.unsqueeze(-1) / columns.unsqueeze(-2)) @ Q)

    def mask_of(scores: Tensor) -> Tensor:
        return rows(pattern.mask(unrows(scores.abs().flatten(0, 1), weight.shape))).view_as(scores)

    W = rows(weight).reshape(right.shape) * scale
    own_rows, own_columns = (together.own(count) for count in W.shape[-2:])
    mask = settled = mask_of(W)
    D, V, rho = W * mask, torch.zeros_like(W), penalty
    kept = int(mask.sum())
    with unlooked():  # NaN spreads through D and V, so one look is enough, at the end
        for iteration in range(1, max_iterations + 1):
            near = together.total(U.mT @ (rho * D - V)[..., own_columns] @ Q[..., own_columns, :])
            X = U[..., own_rows, :] @ ((target + near) / (curvature + rho)) @ Q.mT
            X = together.joined(X, W.shape[-2])
            shifted = X + V / rho
            mask = mask_of(shifted)
            D = shifted * mask
            V += rho * (X - D)
            if iteration % 3 == 0:
                ratio = (X - D).norm() / D.norm()
                moved, ratio = together.same(torch.stack([(mask & ~settled).sum(), ratio])).tolist()
                if moved == 0 and not ratio > 0.1:
                    break
                settled = mask
                rho *= 1.3 if moved >= 0.1 * kept else 1.2 if moved >= 0.005 * kept else 1.1
    refuse_nan("alps", D)
    solution = batched_cg(gram, right, mask, damping=damping)
    return MaskedWeight(*(unrows(x.flatten(0, 1), weight.shape) for x in (solution, mask)))


def _modes(matrices: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Scale each matrix to a unit diagonal; return the scale, and its eigenvalues and eigenvectors."""
    scale = matrices.diagonal(dim1=-2, dim2=-1).sqrt()
    found = torch.linalg.eigh(matrices / scale.unsqueeze(-1) / scale.unsqueeze(-2))
    values, vectors = map(together.same, found)  # other processors find other signs, for example
    return scale.to(dtype), values.to(dtype), vectors.to(dtype)
