"""The widths that a group of units, or anything else that can be made smaller, may have."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from snows.choosing.curves import Curve
from snows.networks.channels import Group

ROUNDING = 1e-9  # of a number of units, what a share of it may be off


class Widths(NamedTuple):
    """Hold the widths that one thing may have, and what each is predicted to cost in loss.

    Attributes:
        name: of a group, or of whatever else `Costs` knows a width of.
        allowed: int64 (n,), descending; the first is the present width.
        loss: float64 (n,), from 0 up.
    """

    name: str
    allowed: Tensor
    loss: Tensor

    @classmethod
    def of(cls, group: Group, curve: Curve, multiple: int = 8, floor: float = 0.1) -> Widths:
        """List how many units of a group may stay.

        Either all stay, or as many as make the outputs of the group's first layer a multiple of `multiple`.

        Args:
            group: of the units.
            curve: what it costs to lose them.
            multiple: of outputs.
            floor: the least share of the units that stays.
        """
        units, step = group.units, multiple // math.gcd(multiple, group.each)
        least = max(step, math.ceil(floor * units - ROUNDING))
        fits = [x for x in range(units - 1, least - 1, -1) if x % step == 0]
        allowed = torch.tensor([units, *fits])
        return cls(group.name, allowed, curve.cost[units - allowed])


def given_units(groups: Sequence[Group], kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Check units that were chosen elsewhere.

    Args:
        groups: of the network.
        kept: by group, int64 (n,), the numbers of the units that stay, in any order.

    Returns:
        The same in ascending order, on the CPU; a group that is not named is left out.

    Raises:
        ValueError: there is no such group, its units cannot be taken out, or the numbers are not units.
    """
    known, found = {x.name: x for x in groups}, {}
    for name, units in kept.items():
        group = known.get(name)
        if group is None:
            raise ValueError(
                f"Budget: expected names of groups such as {', '.join(list(known)[:3])}, got {name}"
            )
        if group.reason:
            raise ValueError(f"Budget: no unit of {name} can be taken out ({group.reason}); leave it out")
        units = torch.as_tensor(units).detach().cpu()
        whole = units.ndim == 1 and not units.is_floating_point() and units.dtype != torch.bool
        numbers = units.unique() if whole else units
        if (
            not whole
            or not len(units)
            or len(numbers) < len(units)
            or numbers[0] < 0
            or numbers[-1] >= group.units
        ):
            raise ValueError(
                f"Budget: expected different numbers from 0 to {group.units - 1} of the units of {name}"
                f"{f', each of {group.each} outputs' if group.each > 1 else ''}, "
                f"that stay, at least one, got {units.dtype} of shape {tuple(units.shape)}"
                f"{f' from {int(units.min())} to {int(units.max())}' if whole and len(units) else ''}"
            )
        found[name] = numbers.long()
    return found
