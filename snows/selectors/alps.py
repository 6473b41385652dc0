"""ALPS (Meng et al. 2024) in the horizon's metric: a mask by ADMM.

What stays can make up for what goes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from snows import together
from snows.matching.metrics import RANK
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
    pattern, V the dual. Columns are scaled to a unit diagonal of A first, and G to a mean of 1. Every third
    iteration ρ grows by 1.3, 1.2 or 1.1, the faster the more of the mask still moves, until nothing of it
    does and W is near D (the paper's schedule). Conjugate gradients end it on the mask, as in
    `least_squares`. Several processes share the rows out.

    Args:
        weight: the dense weight.
        statistics: of the layer's inputs, and their sensitivity.
        pattern: which weights may stay.
        damping: λ relative to the mean diagonal of A.
        smoothing: what is added to the diagonal of G, relative to its mean.
        penalty: the first ρ.
        max_iterations: an upper bound; 30 to 60 are usual.
    """
    gram = statistics.gram  # (groups, in, in)
    right = ridge(weight, statistics, damping)  # (groups, out / groups, in)
    shares = together.Rows(right.shape[-2], 2 * right.numel() * right.shape[-1])
    scale, a, Q = (shares.same(x).to(weight.dtype) for x in _inputs(damped(gram, damping)))
    sensitivity = damped(statistics.sensitivity, smoothing)
    sensitivity = sensitivity / sensitivity.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    floor, g, U = (x.to(weight.dtype) for x in together.first(lambda: modes(sensitivity)))
    pull = sensitivity.to(weight.dtype) @ (right / scale)
    U = U[..., shares.own, :]

    def mask_of(scores: Tensor) -> Tensor:
        return rows(pattern.mask(unrows(scores.abs().flatten(0, 1), weight.shape))).view_as(scores)

    W = rows(weight).reshape(right.shape) * scale
    mask = settled = mask_of(W)
    D, V, rho = W * mask, torch.zeros_like(W), penalty
    kept = int(mask.sum())
    with unlooked():  # NaN spreads through D and V, so one look is enough, at the end
        for iteration in range(1, max_iterations + 1):
            near = (pull + rho * D - V)[..., shares.own, :] @ Q
            most, rest = g * a + rho, floor * a + rho
            seen = shares.total(U.mT @ near) * (1 / most - 1 / rest)
            X = shares.joined((near / rest + U @ seen) @ Q.mT)
            shifted = X + V / rho
            mask = mask_of(shifted)
            D = shifted * mask
            V += rho * (X - D)
            if iteration % 3 == 0:
                ratio = (X - D).norm() / D.norm()
                moved, ratio = shares.same(torch.stack([(mask & ~settled).sum(), ratio])).tolist()
                if moved == 0 and not ratio > 0.1:
                    break
                settled = mask
                rho *= 1.3 if moved >= 0.1 * kept else 1.2 if moved >= 0.005 * kept else 1.1
    refuse_nan("alps", D)
    mask = together.same(mask)
    solution = batched_cg(gram, right, mask, damping=damping)
    return MaskedWeight(*(unrows(x.flatten(0, 1), weight.shape) for x in (solution, mask)))


def _inputs(grams: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scale each matrix to a unit diagonal; return scale and eigenvalues as rows, and eigenvectors."""
    scale = grams.diagonal(dim1=-2, dim2=-1).sqrt().unsqueeze(-2)
    values, vectors = torch.linalg.eigh(grams / scale / scale.mT)
    return scale, values.unsqueeze(-2), vectors


def modes(matrices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Write each symmetric matrix as ``f I + U diag(g - f) Uᵀ``.

    A sensitivity has few directions that weigh more than all others (`matching.metrics`). Those of a wide
    matrix are found in the span of random vectors and their products, which has all of them if there are no
    more than the vectors; else this is the eigendecomposition.

    Args:
        matrices: (groups, n, n), float64.

    Returns:
        f (groups, 1, 1), g (groups, r, 1) and U (groups, n, r), orthonormal.
    """
    width, few = matrices.shape[-1], RANK + 16  # a few more than there are, so that none is hardly met
    if width >= 4 * few:
        start = torch.randn(width, few, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        start = start.to(matrices.device).expand(len(matrices), -1, -1)
        span = torch.linalg.qr(torch.cat([start, matrices @ start], -1)).Q
        values, vectors = torch.linalg.eigh(span.mT @ (matrices @ span))
        others = width - span.shape[-1]
        floor = (matrices.diagonal(dim1=-2, dim2=-1).sum(-1) - values.sum(-1)) / others
        whole = matrices.square().sum((-2, -1))
        missed = whole - values.square().sum(-1) - others * floor.square()  # squared norm of what is left out
        if (missed <= 1e-10 * whole).all():
            return floor[:, None, None], values.unsqueeze(-1), span @ vectors
    values, vectors = torch.linalg.eigh(matrices)
    return values.mean(-1)[:, None, None], values.unsqueeze(-1), vectors
