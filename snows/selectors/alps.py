"""ALPS (Meng et al. 2024): choose a mask by ADMM, the whole row at a time, so that what stays can make up for what goes."""

from __future__ import annotations

import torch
from torch import Tensor

from snows.selectors.statistics import LayerStatistics, damped
from snows.sparsity import MaskedWeight, Pattern, rows, unrows


def alps(weight: Tensor, statistics: LayerStatistics, pattern: Pattern, *, damping: float = 0.01, penalty: float = 0.03,
         max_iterations: int = 300) -> MaskedWeight:
    """Minimise ``tr((W - W₀) A (W - W₀)ᵀ)`` over weights that the pattern allows, by ADMM with a growing penalty ρ.

    In turn: W unconstrained near D (one eigendecomposition of A serves every ρ), D the projection of ``W + V / ρ`` on the
    pattern, V the dual. Columns are scaled to a unit diagonal of A first. Every third iteration ρ grows by 1.3, 1.2 or 1.1,
    the faster the more of the mask still moves, until nothing of it does (the paper's schedule).

    Args:
        weight: the dense weight W₀.
        statistics: of the layer's inputs; A is their Gram matrix.
        pattern: which weights may stay.
        damping: added to A's diagonal, relative to its mean.
        penalty: the first ρ.
        max_iterations: an upper bound; 30 to 60 are usual.
    """
    gram = damped(statistics.gram, damping)  # (groups, in, in), float64
    scale = gram.diagonal(dim1=-2, dim2=-1).sqrt().unsqueeze(-2)  # (groups, 1, in)
    eigenvalues, Q = (x.to(weight.dtype) for x in torch.linalg.eigh(gram / scale / scale.transpose(-1, -2)))
    scale = scale.to(weight.dtype)
    W = rows(weight).reshape(len(gram), -1, gram.shape[-1]) * scale  # (groups, out / groups, in)
    right = (W @ Q) * eigenvalues.unsqueeze(-2)

    def mask_of(scores: Tensor) -> Tensor:
        return rows(pattern.mask(unrows(scores.abs().flatten(0, 1), weight.shape))).view_as(scores)

    mask = settled = mask_of(W)
    D, V, rho = W * mask, torch.zeros_like(W), penalty
    kept = int(mask.sum())
    for iteration in range(1, max_iterations + 1):
        X = ((right + (rho * D - V) @ Q) / (eigenvalues.unsqueeze(-2) + rho)) @ Q.transpose(-1, -2)
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
    chosen = unrows(mask.flatten(0, 1), weight.shape)
    return MaskedWeight(unrows((D / scale).flatten(0, 1), weight.shape) * chosen, chosen)
