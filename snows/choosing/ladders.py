"""What each way to treat a layer is predicted to lose."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from snows.choosing.allowance import Pace, Ration
from snows.choosing.budgets import Budget
from snows.choosing.costs import Of
from snows.choosing.goals import Only, ends, excluded
from snows.choosing.options import DENSE, Ladder, Option, Zeros
from snows.layers import SparseConv2d, SparseLinear
from snows.matching.losses import Objective
from snows.matching.low_rank import InputMoments, spectrum
from snows.matching.statistics import DAMPING, LayerStatistics, damped
from snows.networks.checks import shared_weights
from snows.networks.implants import full_rank, why_not
from snows.networks.layers import Layer, groups_of
from snows.networks.sites import Site
from snows.networks.twins import Twins
from snows.packing import pack
from snows.selectors.sparsegpt import sparsegpt
from snows.sparsity import NM, Unstructured, rows

GROUPED: tuple[NM, ...] = (NM(4, 8), NM(2, 4), NM(1, 4))
SCATTERED: tuple[Unstructured, ...] = (Unstructured(0.7), Unstructured(0.8), Unstructured(0.9))
SAMPLED = 128  # rows of a wide layer, of which the loss of a pattern is estimated


class Treatable(NamedTuple):
    """Say what may be done to a layer.

    Attributes:
        thin: whether its rank may be lowered.
        patterns: that its weight may follow.
    """

    thin: bool
    patterns: list[Zeros]


def treatable(
    twins: Twins,
    goal: Budget,
    only: Only | None,
    skip: Only | None,
    known: Callable[[str, Layer, Zeros], bool],
) -> dict[str, Treatable]:
    """List the layers to which something may be done.

    Args:
        twins: of a network that nothing was taken out of yet.
        goal: what may be done.
        only: layers that may be treated.
        skip: which of those may not.
        known: whether a layer, by its name, can save something by a pattern.
    """
    found = dict[str, Treatable]()
    shared = shared_weights(twins.sparse)
    outer = ends(twins) if only is None else {}
    for name in twins.order:
        layer: Layer = twins.sparse.get_submodule(name)  # type: ignore[assignment]
        one = twins.calls[name] == 1 and name not in shared and groups_of(layer) == 1
        if excluded(name, layer, only, skip) or not one:
            continue
        thin = "low-rank" in goal.using and not why_not(twins.sparse, twins.trace, name)
        patterns = [x for x in _patterns(layer, goal) if name not in outer and known(name, layer, x)]
        if thin or patterns:
            found[name] = Treatable(thin, patterns)
    return found


def ladders(
    twins: Twins,
    layers: Mapping[str, Treatable],
    multiple: int,
    objective: Objective,
    doing: Callable[[str], None],
    pace: Pace | None = None,
) -> dict[str, Ladder]:
    """List the options of each layer that has some, with what each is predicted to lose.

    Args:
        twins: of a network that nothing was taken out of yet.
        layers: what may be done to which.
        multiple: of which ranks are.
        objective: how a mismatch is measured.
        doing: is told what is done.
        pace: of a limited time, says how many batches a layer may use; None for no limit.
    """
    found = dict[str, Ladder]()
    for name, (thin, patterns) in layers.items():
        doing(f"{name}: what each rank and pattern costs" if patterns else f"{name}: what each rank costs")
        ration = Ration() if pace is None else pace.ration(name)
        site = twins.at(name, ration.batches if ration.batches is None else max(ration.batches, 1))
        if not site.training:
            continue
        ration.lap("advance")
        seen = LayerStatistics.of(site, objective.at(site).sensitivity)
        options = [*_ranks(site.weight, seen, multiple)] if thin else []
        options += [Option(_lost(site, seen, x), pattern=x) for x in patterns]
        ration.lap("select")
        if options:
            found[name] = [DENSE, *sorted(options, key=lambda x: x.loss)]
    twins.begin_again()
    return found


def _patterns(layer: Layer, goal: Budget) -> list[Zeros]:
    """List the patterns that are asked for and that a layer may follow."""
    kinds: dict[str, tuple[Zeros, ...]] = {"nm": GROUPED, "unstructured": SCATTERED}
    asked = [x for kind, patterns in kinds.items() if kind in goal.using for x in patterns]
    return [x for x in asked if not x.fits(layer.weight.shape)]


def has_kernel(of: Of, name: str, layer: Layer, pattern: Zeros) -> bool:
    """Say whether a layer can save something by a pattern; milliseconds, only where a kernel is here.

    Args:
        of: what is to be saved.
        name: of the layer.
        layer: ungrouped.
        pattern: that fits its weight.
    """
    if of != "latency":
        return True
    weight = layer.weight.detach()
    mask = pattern.mask(weight.abs())
    kind = SparseLinear if weight.ndim == 2 else SparseConv2d
    return kind(pack(weight * mask, mask, pattern), None).kernel != "reference"


def _ranks(weight: Tensor, seen: LayerStatistics, multiple: int) -> list[Option]:
    """List the ranks with which two layers are cheaper than one, multiples of a number."""
    inputs = InputMoments(damped(seen.gram, DAMPING)[0], seen.mean[0])
    losses = spectrum(weight, inputs, seen.sensitivity[0]).tolist()
    return [Option(losses[x], rank=x) for x in thin_ranks(weight, multiple)]


def thin_ranks(weight: Tensor, multiple: int) -> list[int]:
    """List the multiples of a number that, as ranks, make two layers cheaper than one; descending."""
    size, sides = weight.numel(), len(weight) + weight[0].numel()
    even = min(-(-size // sides), full_rank(weight))  # from here on two layers cost as much as one
    return [x for x in range(even - 1, 0, -1) if x % multiple == 0]


def _lost(site: Site, seen: LayerStatistics, pattern: Zeros) -> float:
    """Predict what a pattern loses: by SparseGPT's mask and weights, on some rows of a wide layer.

    With D what changes in the weight, A the covariance of the inputs and G the output sensitivity, that is
    the sum over rows d of D of ``G_ii dᵀ A d``: rows are taken to err independently.
    """
    weight = rows(site.weight)
    some = torch.arange(0, len(weight), max(1, len(weight) // SAMPLED), device=weight.device)
    part = weight[some]
    changed = rows(sparsegpt(part, seen, pattern).weight).double() - part.double()
    mean = seen.mean[0].double()
    covariance = seen.gram[0].double() - mean.outer(mean)
    own = torch.einsum("oi,ij,oj->o", changed, covariance, changed).clamp_min(0)
    return float((seen.sensitivity[0].double().diagonal()[some] * own).sum()) * len(weight) / len(some)
