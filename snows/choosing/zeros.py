"""One exact sparsity budget over several layers."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from snows.networks.layers import Layer, groups_of
from snows.ops.masks import refuse_nan
from snows.sparsity import Unstructured


def spend(layers: Mapping[str, Layer], budget: Unstructured, cap: float) -> dict[str, Unstructured]:
    """Divide an `Unstructured` budget over layers; one from which nothing is taken is left out.

    Weights are ranked by ``|W| (groups)^¼ / rms(W)^½``. That is half-way, in the logarithm, between the
    global ranking by magnitude and one in which a weight counts by its layer's root mean square, and in a
    grouped convolution by the share of the output that it makes; `docs/experiments.md` compares the three.

    Args:
        layers: by name.
        budget: share of all their weights to remove.
        cap: largest share that one layer may lose.

    Raises:
        ValueError: the budget cannot be met, or removes nothing.
    """
    scores = {}
    for name, layer in layers.items():
        weight = layer.weight.detach()
        rms = weight.square().mean().sqrt().clamp_min(1e-30)
        scores[name] = weight.abs() * (groups_of(layer) ** 0.5 / rms).sqrt()
    counts = allocate(scores, budget.sparsity, cap)
    shares = {name: counts[name] / score.numel() for name, score in scores.items()}
    if not any(shares.values()):
        total = sum(s.numel() for s in scores.values())
        raise ValueError(
            f"prune: a sparsity of {budget.sparsity:g} removes none of {total} weights; raise it"
        )
    return {name: Unstructured(share) for name, share in shares.items() if share > 0}


def allocate(scores: Mapping[str, Tensor], sparsity: float, cap: float = 0.95) -> dict[str, int]:
    """Spend one exact sparsity budget over several layers: how many weights each layer loses.

    The lowest scores of all layers go first; no layer loses more than the share `cap` of its own, nor its
    last weight, and what a layer may not lose is taken from the others. The denominator is the number of
    weights in `scores`.

    Args:
        scores: by layer, comparable between layers; higher stays.
        sparsity: share of all the weights to remove, between 0 and 1.
        cap: largest share that one layer may lose.

    Raises:
        ValueError: the caps leave less to remove than the budget asks for, or a score is NaN.
    """
    if not 0 < cap <= 1:
        raise ValueError(f"allocate: expected a cap above 0 and of at most 1, got {cap}")
    total = sum(s.numel() for s in scores.values())
    budget = round(sparsity * total)
    limits = {name: min(math.floor(cap * s.numel() + 1e-9), s.numel() - 1) for name, s in scores.items()}
    if budget > sum(limits.values()):
        raise ValueError(
            f"allocate: a sparsity of {sparsity:g} needs {budget} of {total} weights removed, but with a "
            f"cap of {cap:g} per layer, and one weight of each kept, at most {sum(limits.values())} can go; "
            "lower the sparsity or raise the cap"
        )
    candidates, owner = [], []
    for index, (name, score) in enumerate(scores.items()):
        refuse_nan("mask", score)
        candidates.append(score.flatten().float().sort(stable=True).values[: limits[name]])
        owner.append(torch.full((limits[name],), index))
    order = torch.cat(candidates).argsort(stable=True)[:budget].cpu()
    counts = torch.bincount(torch.cat(owner)[order], minlength=len(scores))
    return dict(zip(scores, counts.tolist(), strict=True))
