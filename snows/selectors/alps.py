"""ALPS (Meng et al. 2024): choose a mask by ADMM, the whole row at a time, so that what stays can make up for what goes."""

from __future__ import annotations

import torch
from torch import Tensor

from snows.selectors.least_squares import ridge
from snows.selectors.statistics import LayerStatistics, damped
from snows.solvers import batched_cg
from snows.sparsity import MaskedWeight, Pattern, rows, unrows


def alps(weight: Tensor, statistics: LayerStatistics, pattern: Pattern, *, damping: float = 0.01, penalty: float = 0.03,
         max_iterations: int = 300) -> MaskedWeight:
    """Minimise ``‖W X - W₀ X₀‖² + λ‖W - W₀‖²`` over weights that the pattern allows, by ADMM with a growing penalty ρ.

    X is the pruned stream's inputs, X₀ the dense one's. In turn: W unconstrained near D (one eigendecomposition of
    ``A = X Xᵀ + λI`` serves every ρ), D the projection of ``W + V / ρ`` on the pattern, V the dual. Columns are scaled to
    a unit diagonal of A first. Every third iteration ρ grows by 1.3, 1.2 or 1.1, the faster the more of the mask still
    moves, until nothing of it does (the paper's schedule). Conjugate gradients end it on the mask, as in `least_squares`.

    Args:
        weight: the dense weight W₀.
        statistics: of the layer's inputs.
        pattern: which weights may stay.
        damping: λ relative to the Gram's mean diagonal.
        penalty: the first ρ.
        max_iterations: an upper bound; 30 to 60 are usual.
    """
    gram, right = statistics.gram, ridge(weight, statistics, damping)
    A = damped(gram, damping)  # (groups, in, in), float64
    scale = A.diagonal(dim1=-2, dim2=-1).sqrt().unsqueeze(-2)  # (groups, 1, in)
    eigenvalues, Q = (x.to(weight.dtype) for x in torch.linalg.eigh(A / scale / scale.transpose(-1, -2)))
    eigenvalues, scale = eigenvalues.unsqueeze(-2), scale.to(weight.dtype)
    W = rows(weight).reshape(right.shape) * scale  # (groups, out / groups, in)
    target = (right / scale) @ Q

    def mask_of(scores: Tensor) -> Tensor:
        return rows(pattern.mask(unrows(scores.abs().flatten(0, 1), weight.shape))).view_as(scores)

    mask = settled = mask_of(W)
    D, V, rho = W * mask, torch.zeros_like(W), penalty
    kept = int(mask.sum())
    for iteration in range(1, max_iterations + 1):
        X = ((target + (rho * D - V) @ Q) / (eigenvalues + rho)) @ Q.transpose(-1, -2)
        shifted = X + V / rho
        mask = mask_of(shifted)
        D = shifted * mask
        V += rho * (X - D)
        if iteration % 3 == 0:
            moved = int((mask & ~settled).sum())
            if moved == 0:
                break
            settled = mask
            rho *= 1.3 if moved >= 0.1 * kept else 1.2 if moved >= 0.005 * kept else 1.1
    solution = batched_cg(gram, right, mask, damping=damping)
    return MaskedWeight(*(unrows(x.flatten(0, 1), weight.shape) for x in (solution, mask)))
