"""Each op in plain PyTorch: the specification that every kernel is tested against."""

from __future__ import annotations

import torch
from torch import Tensor


def nm_mask(scores: Tensor, n: int, m: int) -> Tensor:
    """Keep the `n` highest of every `m` consecutive scores of a row; the lower index wins a tie.

    Args:
        scores: (rows, columns), floating point, without NaN; a last group of fewer than `m` columns keeps
            its `n` highest too.
        n: entries kept in each group.
        m: entries in a group.

    Returns:
        (rows, columns), bool.
    """
    rows, columns = scores.shape
    pad = -columns % m
    if pad:
        scores = torch.nn.functional.pad(scores, (0, pad), value=-torch.inf)
    order = scores.view(rows, (columns + pad) // m, m).argsort(dim=-1, descending=True, stable=True)
    mask = torch.zeros_like(order, dtype=torch.bool)
    mask.scatter_(-1, order[..., :n], True)
    return mask.view(rows, columns + pad)[:, :columns].clone()
