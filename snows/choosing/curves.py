"""What it costs a network to lose the units of a group, one after the other."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from snows.networks.channels import Group


class Curve(NamedTuple):
    """Say in which order the units of a group go, and what the network loses.

    Attributes:
        order: int64 (units,), numbers of units; the first goes first.
        cost: float64 (units + 1,), the loss that is predicted when the first k have gone; 0 at 0, and never
            decreasing.
        error: float64 (units,), by number of unit, the relative standard error of what was estimated; None
            where nothing was drawn at random.
    """

    order: Tensor
    cost: Tensor
    error: Tensor | None = None

    @classmethod
    def of_scores(cls, group: Group, scores: Tensor, error: Tensor | None = None) -> Curve:
        """Let units go by ascending score, each at the cost of its score.

        Args:
            group: of the units.
            scores: (units,), at least 0; higher stays.
            error: relative standard error of the scores.

        Raises:
            ValueError: there is not one score a unit, or one is negative or not finite.
        """
        if not isinstance(scores, Tensor) or scores.shape != (group.units,):
            got = f"shape {tuple(scores.shape)}" if isinstance(scores, Tensor) else type(scores).__name__
            raise ValueError(_expected(group, got))
        scores = scores.detach().double().cpu()
        if not bool(((scores >= 0) & scores.isfinite()).all()):
            raise ValueError(_expected(group, f"{float(scores.min()):g} to {float(scores.max()):g}"))
        order = scores.argsort(stable=True)
        return cls(order, torch.cat([scores.new_zeros(1), scores[order].cumsum(0)]), error)

    def kept(self, width: int) -> Tensor:
        """Return the numbers of the units that stay when `width` of them do, in ascending order."""
        return self.order[len(self.order) - width :].sort().values


def _expected(group: Group, got: str) -> str:
    return (
        f"{group.name}: expected one finite score of at least 0 for each of {group.units} units, got {got}; "
        "return a tensor of shape (group.units,)"
    )
