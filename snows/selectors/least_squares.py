"""Layer-wise least squares on a fixed mask: the K = 0 reconstruction."""

from __future__ import annotations

from torch import Tensor

from snows import together
from snows.matching.statistics import LayerStatistics, Selector
from snows.selectors.scores import magnitude
from snows.solving.cg import batched_cg
from snows.sparsity import MaskedWeight, Pattern, rows, unrows


def least_squares(
    weight: Tensor,
    statistics: LayerStatistics,
    pattern: Pattern,
    *,
    select: Selector = magnitude,
    damping: float = 0.01,
) -> MaskedWeight:
    """Take `select`'s mask and fit the kept weights to the dense layer's outputs on the dense stream.

    Row by row, ``min ‖w X − w₀ X₀‖² + λ‖w − w₀‖²`` over w on its mask, X the pruned stream's inputs and X₀
    the dense one's; all rows at once by batched conjugate gradients on the one Gram matrix.

    Args:
        weight: the dense weight w₀.
        statistics: of the layer's inputs.
        pattern: for `select`.
        select: gives the mask.
        damping: λ relative to the Gram's mean diagonal.
    """
    chosen = select(weight, statistics, pattern)
    right = ridge(weight, statistics, damping)
    mask = together.same(chosen.mask)
    solution = batched_cg(statistics.gram, right, rows(mask).reshape(right.shape), damping=damping)
    return MaskedWeight(unrows(solution.flatten(0, 1), weight.shape), mask)


def ridge(weight: Tensor, statistics: LayerStatistics, damping: float) -> Tensor:
    """Compute the right-hand side ``w₀ X₀ Xᵀ + λ w₀`` of that problem: (groups, out / groups, in)."""
    cross = statistics.cross(weight)
    shift = damping * statistics.gram.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    return cross + shift * rows(weight).reshape(cross.shape)
