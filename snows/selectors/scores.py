"""Masks by a score of each weight; the weights that stay are left as they are."""

from __future__ import annotations

from torch import Tensor

from snows.matching.statistics import LayerStatistics, columns
from snows.sparsity import MaskedWeight, Pattern, rows, unrows


def magnitude(weight: Tensor, statistics: LayerStatistics, pattern: Pattern) -> MaskedWeight:
    """Keep the largest ``|W|``."""
    mask = pattern.mask(weight.abs())
    return MaskedWeight(weight * mask, mask)


def wanda(weight: Tensor, statistics: LayerStatistics, pattern: Pattern) -> MaskedWeight:
    """Keep the largest ``|W| · ‖x‖₂`` (Sun et al. 2024), compared over the layer or within groups of m."""
    norms = columns(statistics.energy, weight).sqrt()
    mask = pattern.mask(unrows(rows(weight).abs() * norms, weight.shape))
    return MaskedWeight(weight * mask, mask)
