"""Which layers of a network become two thin ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from snows.networks.batches import Batch, first_line
from snows.networks.copies import sharing
from snows.networks.edits import Edit
from snows.networks.implants import Implant


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
    kept = worthwhile(small, ranks)
    chosen = [Implant(name, rank) for name, rank in kept.items()]
    notes = [
        f"{name} stays one layer: of the smaller layer rank {rank} saves nothing."
        for name, rank in ranks.items()
        if name not in kept
    ]
    if _fault(small, batch, chosen):
        faults = {x.layer: _fault(small, batch, [x]) for x in chosen}
        chosen = [x for x in chosen if not faults[x.layer]]
        notes += [f"{name} stays one layer: {why}." for name, why in faults.items() if why]
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
