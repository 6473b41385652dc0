"""Layer-wise least squares on a fixed mask: the warm start, and the classic K = 0 reconstruction."""

from __future__ import annotations

from torch import Tensor

from snows.selectors.alps import alps
from snows.selectors.statistics import LayerStatistics, Selector
from snows.solvers import batched_cg
from snows.sparsity import MaskedWeight, Pattern, rows, unrows


def least_squares(weight: Tensor, statistics: LayerStatistics, pattern: Pattern, *, select: Selector = alps,
                  damping: float = 0.01) -> MaskedWeight:
    """Take `select`'s mask and fit the kept weights to the dense layer's outputs on the dense stream.

    Row by row, ``min ‖w X − w₀ X₀‖² + λ‖w − w₀‖²`` over w on its mask, X the pruned stream's inputs and X₀ the dense
    one's; all rows at once by batched conjugate gradients on the one Gram matrix.

    Args:
        weight: the dense weight w₀.
        statistics: of the layer's inputs.
        pattern: for `select`.
        select: gives the mask.
        damping: λ relative to the Gram's mean diagonal.
    """
    chosen = select(weight, statistics, pattern)
    gram = statistics.gram
    dense = rows(weight).reshape(len(gram), -1, gram.shape[-1])
    mask = rows(chosen.mask).reshape(dense.shape)
    shift = damping * gram.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    right = statistics.cross(weight) + shift * dense
    solution = batched_cg(gram, right, mask, damping=damping)
    return MaskedWeight(unrows(solution.flatten(0, 1), weight.shape), chosen.mask)
