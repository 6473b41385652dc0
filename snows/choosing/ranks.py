"""The ranks that layers may have, and which layers become two thin ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from snows.choosing.costs import rank_width
from snows.choosing.goals import Only, excluded
from snows.choosing.widths import Widths
from snows.matching.losses import Objective
from snows.matching.low_rank import InputMoments, spectrum
from snows.matching.statistics import DAMPING, LayerStatistics, damped
from snows.networks.batches import Batch, first_line
from snows.networks.copies import sharing
from snows.networks.edits import Edit
from snows.networks.implants import Implant, full_rank, why_not
from snows.networks.twins import Twins


def spectra(
    twins: Twins, objective: Objective, only: Only | None, skip: Only | None, doing: Callable[[str], None]
) -> dict[str, Tensor]:
    """Measure what each rank of each layer is predicted to cost.

    Args:
        twins: of a network that nothing was taken out of yet.
        objective: how a mismatch is measured.
        only: layers that may get low rank.
        skip: which of those may not.
        doing: is told what is done.

    Returns:
        By layer, float64 (full rank + 1,), as `spectrum` gives it, with an intercept fitted.
    """
    found = {}
    for name in twins.order:
        layer = twins.sparse.get_submodule(name)
        if excluded(name, layer, only, skip) or twins.calls[name] != 1:
            continue
        if why_not(twins.sparse, twins.trace, name):
            continue
        doing(f"{name}: what each rank costs")
        site = twins.at(name)
        if not site.training:
            continue
        losses = objective.at(site)
        seen = LayerStatistics.of(site, losses.sensitivity)
        inputs = InputMoments(damped(seen.gram, DAMPING)[0], seen.mean[0])
        found[name] = spectrum(site.weight, inputs, seen.sensitivity[0]).cpu()
    twins.begin_again()
    return found


def allowed_ranks(layer: str, loss: Tensor, weight: Tensor, multiple: int) -> Widths | None:
    """List the ranks that a layer may have: the full one, or multiples that make two layers cheaper than one.

    Args:
        layer: its name.
        loss: of each rank.
        weight: of the layer.
        multiple: of the rank.

    Returns:
        The ranks; None where no rank makes the layer cheaper.
    """
    rows, columns, full = len(weight), weight[0].numel(), full_rank(weight)
    even = -(-rows * columns // (rows + columns))  # from here on two layers cost as much as one
    ranks = [x for x in range(even - 1, 0, -1) if x % multiple == 0]
    allowed = torch.tensor([full, *ranks])
    return Widths(rank_width(layer), allowed, loss[allowed]) if ranks else None


def worthwhile(net: nn.Module, ranks: Mapping[str, int]) -> dict[str, int]:
    """Return the ranks with which two layers are smaller than one, in a network whose widths were cut."""
    weights: dict[str, Tensor] = {name: net.get_submodule(name).weight for name in ranks}  # type: ignore[misc]
    return {
        name: rank
        for name, rank in ranks.items()
        if rank * (len(weights[name]) + weights[name][0].numel()) < weights[name].numel()
    }


def implants(
    net: nn.Module, batch: Batch, cut: Sequence[Edit], ranks: Mapping[str, int]
) -> tuple[list[Implant], list[str]]:
    """Make implants of the layers whose network still runs with them.

    Args:
        net: the whole network.
        batch: that it is run on.
        cut: what is done to it before.
        ranks: by layer.

    Returns:
        The implants, and a sentence for each layer that stays as it is.
    """
    small = sharing(net)
    for edit in cut:
        edit.apply(small)
    chosen, notes = [Implant(name, rank) for name, rank in worthwhile(small, ranks).items()], []
    if _fault(small, batch, chosen):
        faults = {x.layer: _fault(small, batch, [x]) for x in chosen}
        chosen = [x for x in chosen if not faults[x.layer]]
        notes = [f"{name} stays one layer: {why}." for name, why in faults.items() if why]
    return chosen, notes


def _fault(net: nn.Module, batch: Batch, edits: Sequence[Edit]) -> str:
    """Say why a network does not run with edits; empty if it does."""
    other = sharing(net)
    try:
        for edit in edits:
            edit.apply(other)
        with torch.no_grad():
            batch.map(torch.clone).through(other)
    except Exception as error:
        return first_line(error)
    return ""
