"""How a share of a network's cost is divided over its widths.

Whatever can be made smaller has a `Widths`: the sizes that it may have, and the loss that is predicted at
each. `Costs` says what the network costs at any sizes. `divide` knows nothing else, so that the rank of a
layer is a width as the number of a group's units is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from snows.choosing.costs import WORDS, Costs, Of
from snows.choosing.curves import Curve
from snows.choosing.exchanges import EQUAL, Division, exchanged, settled
from snows.choosing.widths import Widths
from snows.networks.channels import Group


class NothingError(ValueError):
    """Say that nothing can be done to a network, and why."""


class ImpossibleError(ValueError):
    """Say that no widths cost so little, and how little is possible.

    Args:
        of: what is counted.
        least: the share that has to stay.
        share: that was asked for.
        parts: what most of the least is of.
        whole: of the cost, where an amount was asked for and not a share.
    """

    def __init__(
        self, of: Of, least: float, share: float, parts: Sequence[str], whole: float | None = None
    ) -> None:
        self.of, self.least, self.share, self.parts = of, least, share, parts
        unit = "ms" if of == "latency" else "MB"
        got, more = f"got {_amount(share, whole, unit)}", "allow more with using, or lower floor or multiple"
        if least < 1:
            most = f"most of that is of {', '.join(parts)}"
            more = f"{_amount(least, whole, unit, up=True)} or more, {got}; {most}; ask for more, {more}"
        else:
            more = f"{got} where nothing that may be done saves any; {more}"
        kind = "a share of the" if whole is None else "an amount of"
        super().__init__(f"Budget: expected {kind} {WORDS[of]} that is possible, {more}")

    def asked(self, share: float, correction: float) -> ImpossibleError:
        """Return what is to be said of the share that was asked for, where another was chosen by.

        Args:
            share: that was asked for.
            correction: what makes a predicted cost a real one.
        """
        return ImpossibleError(self.of, self.least * correction, share, self.parts)

    def amount(self, whole: float) -> ImpossibleError:
        """Return what is to be said where an amount was asked for, and not a share.

        Args:
            whole: of the cost, in milliseconds or megabytes.
        """
        return ImpossibleError(self.of, self.least, self.share, self.parts, whole)


def _amount(share: float, whole: float | None, unit: str, up: bool = False) -> str:
    """Write a share of a cost, in per cent or as an amount; the least that is possible is rounded up."""
    if whole is None:
        return f"{math.ceil(1000 * share) / 10 if up else 100 * share:.4g} %"
    digits = 3 - math.ceil(math.log10(max(share * whole, 1e-9)))
    found = math.ceil(share * whole * 10**digits) / 10**digits if up else share * whole
    return f"{found:.4g} of {whole:.4g} {unit}"


def allocate(
    groups: Sequence[Group],
    curves: Mapping[str, Curve],
    costs: Costs,
    share: float,
    of: Of = "macs",
    multiple: int = 8,
    floor: float = 0.1,
    uniform: bool = False,
    others: Sequence[Widths] = (),
) -> dict[str, int]:
    """Decide how many units of each group stay, and other widths such as ranks.

    Args:
        groups: of the network; one that has a reason to stay whole, or no curve, keeps all units.
        curves: by group.
        costs: of the network.
        share: of the cost that stays, above 0 and at most 1.
        of: what is counted.
        multiple: of outputs of a group's first layer that stay, unless all do.
        floor: the least share of a group's units that stays.
        uniform: keep the same share of every group, as near as its multiples allow, whatever the curves say.
        others: widths of other things that `costs` knows; where the share is uniform they stay as they are.

    Returns:
        By group, the units that stay; by name of another width, that.

    Raises:
        ValueError: a setting is out of range, or the floors leave more than the share.
    """
    if multiple < 1 or not 0 <= floor <= 1:
        raise ValueError(
            f"Budget: expected a multiple of at least 1 and a floor from 0 to 1, got {multiple} and {floor:g}"
        )
    options = [
        Widths.of(x, curves[x.name], multiple, floor) for x in groups if not x.reason and x.name in curves
    ]
    whole = {x.name: x.units for x in groups}
    if uniform:
        return whole | even(options, costs, share, of)
    return whole | divide([*options, *others], costs, share, of)


def divide(options: Sequence[Widths], costs: Costs, share: float, of: Of) -> dict[str, int]:
    """Divide a share of a cost over widths so that the predicted loss is least.

    From all widths as they are, always the step with the least loss per cost saved is taken. What the last
    step saves too much is given back, and exchanged between widths while that helps.

    Args:
        options: what may become narrower, and to what.
        costs: of the network at any widths.
        share: of the cost that stays.
        of: what is counted.

    Returns:
        By option, its width.

    Raises:
        ValueError: the share is out of range, or the least widths leave more than it.
    """
    whole = Division(options, costs, _limit(options, costs, share, of), of)
    return exchanged(settled(whole)).widths


def even(options: Sequence[Widths], costs: Costs, share: float, of: Of) -> dict[str, int]:
    """Keep the same share of every width, as near as what is allowed comes to it.

    Args:
        options: what may become narrower, and to what; losses are not read.
        costs: of the network at any widths.
        share: of the cost that stays.
        of: what is counted.

    Returns:
        By option, its width; together the widest that cost no more than the share.

    Raises:
        ValueError: the share is out of range, or the least widths leave more than it.
    """
    limit = _limit(options, costs, share, of)

    def widths(part: float) -> dict[str, int]:
        return {
            x.name: int(x.allowed[(x.allowed - part * int(x.allowed[0])).abs().argmin()]) for x in options
        }

    parts = sorted({float(part) for x in options for part in _between(x)} | {0.0, 1.0})
    low, high = 0, len(parts) - 1  # the cost grows with the part
    if costs.total(of, widths(parts[high])) <= limit:
        return widths(parts[high])
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if costs.total(of, widths(parts[middle])) <= limit else (low, middle)
    return widths(parts[low])


def _between(option: Widths) -> Tensor:
    """Return a part of the whole on either side of where the nearest allowed width changes."""
    middles = (option.allowed[1:] + option.allowed[:-1]) / 2 / option.allowed[0]
    return torch.cat([middles - EQUAL, middles + EQUAL]).double()


def _limit(options: Sequence[Widths], costs: Costs, share: float, of: Of) -> float:
    """Return what may be left of a cost.

    Raises:
        ValueError: the share is out of range.
        ImpossibleError: no widths leave so little.
    """
    if not 0 < share <= 1:
        raise ValueError(f"Budget: expected a share above 0 and of at most 1, got {share:g}")
    whole = costs.total(of)
    narrow = dict[str, int]()
    for option in options:  # groups first, then layers, whose best treatment depends on their widths
        saved = costs.saved(of, narrow, option.name, option.allowed)
        narrow[option.name] = int(option.allowed[int(saved.argmax())])
    least = costs.total(of, narrow)
    if least > share * whole * (1 + EQUAL):
        parts = costs.by_name(of, narrow)
        most = sorted(parts, key=lambda name: parts[name], reverse=True)[:3]
        raise ImpossibleError(of, least / whole, share, most)
    return share * whole * (1 + EQUAL)
