"""Masks: n of every m by their scores, and masks as bits."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def nm_mask(scores: Tensor, n: int, m: int) -> Tensor:
    """See `ops.nm_mask`; without NaN."""
    rows, columns = scores.shape
    pad = -columns % m
    if pad:
        scores = F.pad(scores, (0, pad), value=-torch.inf)
    order = scores.view(rows, (columns + pad) // m, m).argsort(dim=-1, descending=True, stable=True)
    mask = torch.zeros_like(order, dtype=torch.bool)
    mask.scatter_(-1, order[..., :n], True)
    return mask.view(rows, columns + pad)[:, :columns].clone()


def nm_select(scores: Tensor, n: int, m: int) -> tuple[Tensor, Tensor]:
    """See `ops.nm_select`."""
    rows, columns = scores.shape
    padded = F.pad(scores, (0, -columns % 8), value=-torch.inf)
    powers = 2 ** torch.arange(8, device=scores.device)
    mask = F.pad(nm_mask(scores, n, m), (0, -columns % 8))
    bits = (mask.view(rows, mask.shape[1] // 8, 8) * powers).sum(-1).to(torch.uint8)
    if (n, m) != (2, 4):
        return bits, bits.new_empty(rows, 0)
    groups = nm_mask(padded, 2, 4).view(rows, padded.shape[1] // 4, 4).to(torch.uint8)
    code = groups.argmax(-1) | (3 - groups.flip(-1).argmax(-1)) << 2
    return bits, (code[:, 0::2] | code[:, 1::2] << 4).to(torch.uint8)


def pack_bits(mask: Tensor) -> Tensor:
    """See `ops.pack_bits`."""
    flat = mask.flatten().to(torch.uint8)
    flat = F.pad(flat, (0, -flat.numel() % 8)).view(-1, 8)
    return (flat << _bits(mask)).sum(1, dtype=torch.uint8)


def unpack_bits(bits: Tensor, shape: Sequence[int]) -> Tensor:
    """Undo `pack_bits`: a bool mask of this shape."""
    flat = (bits.unsqueeze(1) >> _bits(bits)).bitwise_and_(1).bool().flatten()
    return flat[: math.prod(shape)].view(shape)


def _bits(like: Tensor) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=like.device)


def masked(weight: Tensor, bits: Tensor) -> Tensor:
    """See `ops.masked`."""
    return torch.where(unpack_bits(bits, weight.shape), weight.contiguous(), 0.0)
