"""SparseGPT (Frantar & Alistarh 2023): choose and compensate column by column."""

from __future__ import annotations

import torch
from torch import Tensor

from snows import together
from snows.matching.statistics import LayerStatistics, damped
from snows.ops.masks import refuse_nan, unlooked
from snows.sparsity import MaskedWeight, Pattern, rows, unrows


def sparsegpt(
    weight: Tensor, statistics: LayerStatistics, pattern: Pattern, *, damping: float = 0.01, block: int = 128
) -> MaskedWeight:
    """Remove weights from left to right; each removal is made up for by the columns still to come.

    Scores are ``w² / U_jj²``, U the upper Cholesky factor of the inverse damped Gram matrix. A pattern of
    groups, such as N:M, is decided group by group, another by its density over all rows of `block` columns at
    a time (exact over the layer). Several processes share the rows out where there are groups.

    Args:
        weight: the dense weight.
        statistics: of the layer's inputs.
        pattern: which weights may stay.
        damping: relative to the Gram's mean diagonal.
        block: columns decided together where the pattern has no groups.
    """
    gram = damped(statistics.gram, damping)
    factor = torch.linalg.cholesky(
        torch.cholesky_inverse(torch.linalg.cholesky(gram)), upper=True
    )  # (groups, in, in)
    W = rows(weight).double().reshape(len(gram), -1, gram.shape[-1]).clone()  # (groups, out / groups, in)
    shares = together.Rows(W.shape[-2], W.numel() * W.shape[-1] if pattern.group else 0)
    W = W[:, shares.own]
    mask = torch.ones_like(W, dtype=torch.bool)
    width = pattern.group or block
    columns, done, removed = W.shape[-1], 0, 0
    with unlooked():  # NaN stays in W, so one look is enough, at the end
        for start in range(0, columns, width):
            part = slice(start, min(start + width, columns))
            diagonal = factor.diagonal(dim1=-2, dim2=-1)[:, None, part]
            scores = (W[..., part] / diagonal).square()
            done += scores.numel()
            if pattern.group:
                mask[..., part] = pattern.mask(scores.flatten(0, 1)).view_as(scores)
            else:
                drop = round((1 - pattern.density) * done) - removed
                order = scores.flatten().argsort(stable=True)[:drop]
                mask[..., part] = (
                    torch.ones(scores.numel(), dtype=torch.bool, device=W.device)
                    .index_fill_(0, order, False)
                    .view_as(scores)
                )
                removed += drop
            for j in range(part.start, part.stop):
                error = (W[..., j] * ~mask[..., j]) / factor[:, None, j, j]  # (groups, out / groups)
                W[..., j:] -= error.unsqueeze(-1) * factor[:, None, j, j:]
                W[..., j] *= mask[..., j]
    W, mask = shares.joined(W), shares.joined(mask.to(W.dtype)).bool()
    refuse_nan("sparsegpt", W)
    chosen = unrows(mask.flatten(0, 1), weight.shape)
    return MaskedWeight(unrows(W.flatten(0, 1), weight.shape).to(weight.dtype) * chosen, chosen)
