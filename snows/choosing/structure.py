"""Which units of a network go, decided before anything is fitted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from torch import Tensor, nn

from snows.choosing.costs import Costs, Of, rank_width
from snows.choosing.curves import Curve
from snows.choosing.cuts import Cut
from snows.choosing.goals import Only, PatternChoice, excluded
from snows.choosing.orders import ORDERS, Order, curves
from snows.choosing.ranks import allowed_ranks, implants, spectra
from snows.choosing.shares import allocate
from snows.choosing.widths import Widths, given_units
from snows.matching.consumers import Measured
from snows.matching.losses import Objective
from snows.networks import proving
from snows.networks.batches import Batch
from snows.networks.channels import Group
from snows.networks.edits import Edit
from snows.networks.implants import Implant
from snows.networks.twins import Twins
from snows.results.structure import GroupReport

Using = Literal["channels", "heads", "neurons", "low-rank"]
ALL: tuple[Using, ...] = ("channels", "heads", "neurons", "low-rank")


@dataclass(frozen=True)
class Structured:
    """Ask for whole units to be taken out, so that the network gets smaller.

    Attributes:
        share: what stays of the network's cost, above 0 and below 1; or by name of a group (see
            `snows.groups`) the numbers of the units that stay.
        of: the cost: "macs" (multiplications of one sample, attention's products too), "params" or "bytes".
        using: what may be taken out.
        order: how it is found what goes first: "compensated" (what costs least after the rest is fitted),
            "hap", "fisher", "magnitude", or a function that gives each unit of a `Group` a score, higher
            stays.
        multiple: widths are multiples of this, in channels or features.
        floor: the least share of a group's units that stays.
        uniform: take the same share from every group.
        refit: fit what stays by least squares.
        then: a pattern for the layers of the smaller network.

    Raises:
        ValueError: a setting is out of range.
    """

    share: float | Mapping[str, Tensor]
    of: Of = "macs"
    using: Sequence[Using] = ALL
    order: Order = "compensated"
    multiple: int = 8
    floor: float = 0.1
    uniform: bool = False
    refit: bool = True
    then: PatternChoice = None

    def __post_init__(self) -> None:
        if not isinstance(self.share, Mapping) and not (
            isinstance(self.share, int | float) and 0 < self.share < 1
        ):
            raise ValueError(
                f"Structured: expected a share above 0 and below 1 that stays, got {self.share!r}"
            )
        if isinstance(self.share, Mapping) and not self.share:
            raise ValueError(
                "Structured: expected the units of at least one group that stay, got none; "
                "see snows.groups for their names"
            )
        if self.of not in ("macs", "params", "bytes"):
            raise ValueError(f"Structured: expected of to be macs, params or bytes, got {self.of!r}")
        if isinstance(self.using, str) or not self.using or not set(self.using) <= set(ALL):
            raise ValueError(
                f"Structured: expected using to name some of {', '.join(ALL)}, got {self.using!r}"
            )
        if self.order not in ORDERS if isinstance(self.order, str) else not callable(self.order):
            raise ValueError(
                f"Structured: expected order to be {', '.join(ORDERS)} or a function of a group, got "
                f"{self.order!r}"
            )
        if not (type(self.multiple) is int and self.multiple >= 1 and 0 <= self.floor < 1):
            raise ValueError(
                "Structured: expected a multiple of at least 1 and a floor from 0 to below 1, got "
                f"{self.multiple!r} and {self.floor!r}"
            )


class _Removable(NamedTuple):
    """Hold what may be taken out of a network.

    Attributes:
        groups: all of the network; those that have to stay whole say why.
        spectra: by layer that may get low rank, the loss at each rank, float64 (full rank + 1,).
        ranks: of those layers for which two thin ones can be cheaper, the ranks that they may have.
    """

    groups: list[Group]
    spectra: dict[str, Tensor]
    ranks: list[Widths]

    @property
    def free(self) -> list[Group]:
        """The groups that can lose units."""
        return [x for x in self.groups if not x.reason]

    @property
    def full(self) -> dict[str, int]:
        """By layer that may get low rank, its full rank."""
        return {name: len(loss) - 1 for name, loss in self.spectra.items()}


class _Choice(NamedTuple):
    """Hold what was chosen to stay.

    Attributes:
        kept: by group that loses units, the numbers of those that stay, int64.
        ranks: by layer that may get low rank, its rank.
        curves: by group, what its units were ordered by; empty where they were given.
    """

    kept: dict[str, Tensor]
    ranks: dict[str, int]
    curves: dict[str, Curve]


def decide_cut(
    twins: Twins,
    goal: Structured,
    only: Only | None,
    skip: Only | None,
    objective: Objective,
    doing: Callable[[str], None],
) -> Cut:
    """Decide what is taken out of a network.

    Args:
        twins: the networks and batches.
        goal: what is asked.
        only: layers whose outputs may be taken out.
        skip: which of those may not.
        objective: how a mismatch is measured.
        doing: is told what is done.

    Raises:
        ValueError: nothing can be taken out, or not so much.
    """
    net, example = twins.sparse, twins.batches[0].split(1)[0].to(twins.device)
    doing("looking for units that can be taken out")
    groups = [_allowed(x, net, goal, only, skip) for x in proving.groups(net, example)]
    losses: dict[str, Tensor] = {}
    if "low-rank" in goal.using and not isinstance(goal.share, Mapping):
        losses = spectra(twins, objective, only, skip, doing)
    removable = _removable(net, groups, losses, goal)
    doing("deciding what goes")
    costs = Costs.of(net, example, removable.free, removable.full)
    choice = _chosen(twins, goal, objective, removable, costs)
    edits, whole, notes = _edits(net, example, removable, choice)
    ranks = removable.full | {x.layer: x.rank for x in edits if isinstance(x, Implant)}
    units = {x.name: x.units for x in groups}
    units |= {name: len(kept) for name, kept in choice.kept.items() if name not in whole}
    rows = [_row(whole.get(x.name, x), units[x.name], choice.curves.get(x.name)) for x in groups] + [
        GroupReport(name, "low-rank", removable.full[name], rank, float(removable.spectra[name][rank]))
        for name, rank in ranks.items()
        if rank < removable.full[name]
    ]
    widths = units | {rank_width(name): rank for name, rank in ranks.items()}
    macs = round(costs.total("macs")), round(costs.total("macs", widths))
    return Cut(edits, rows, macs, notes)


def _removable(
    net: nn.Module, groups: list[Group], losses: dict[str, Tensor], goal: Structured
) -> _Removable:
    """Put together what may be taken out.

    Raises:
        ValueError: nothing may.
    """
    weights: dict[str, Tensor] = {name: net.get_submodule(name).weight for name in losses}  # type: ignore[misc]
    ranks = [allowed_ranks(name, loss, weights[name], goal.multiple) for name, loss in losses.items()]
    found = _Removable(groups, losses, [x for x in ranks if x is not None])
    if not found.free and not found.ranks:
        said = [f"{x.name}: {x.reason}" for x in groups[:4]] or ["the model has no Linear or Conv2d"]
        if "low-rank" in goal.using:
            said.append("no layer can become two that are cheaper, such as one that is half of an implant")
        raise ValueError(f"prune: no unit can be taken out ({'; '.join(said)})")
    return found


def _chosen(
    twins: Twins, goal: Structured, objective: Objective, removable: _Removable, costs: Costs
) -> _Choice:
    """Choose which units and ranks stay: those that were given, or what the share of the cost asks for.

    Raises:
        ValueError: given units are none of the network, or so small a share is not possible.
    """
    free, full = removable.free, removable.full
    lost: dict[str, Curve] = {}
    ranks: dict[str, int] = {}
    if isinstance(goal.share, Mapping):
        kept = given_units(removable.groups, goal.share)
    else:
        if free:
            measured = Measured(twins.dense, twins.batches, objective.sensitivity)
            lost = curves(goal.order, measured, free, objective.seed)
        widths = allocate(
            free, lost, costs, goal.share, goal.of, goal.multiple, goal.floor, goal.uniform, removable.ranks
        )
        kept = {x.name: lost[x.name].kept(widths[x.name]) for x in free}
        ranks = {name: widths.get(rank_width(name), most) for name, most in full.items()}
    fewer = {x.name: kept[x.name] for x in free if x.name in kept and len(kept[x.name]) < x.units}
    return _Choice(fewer, ranks, lost)


def _edits(
    net: nn.Module, example: Batch, removable: _Removable, choice: _Choice
) -> tuple[list[Edit], dict[str, Group], list[str]]:
    """Make the edits that leave what was chosen to stay.

    Returns:
        The edits; by name, groups that stay whole all the same, with the reason; sentences on what stays.
    """
    edits: list[Edit] = []
    whole: dict[str, Group] = {}
    if choice.kept:
        take, whole = proving.proved(net, example, removable.free, choice.kept)
        edits.append(take)
    lower = {name: rank for name, rank in choice.ranks.items() if rank < removable.full[name]}
    thin, notes = implants(net, example, edits, lower)
    notes += [f"{x.name} stays whole: {x.reason}." for x in whole.values()]
    return [*edits, *thin], whole, notes


def _allowed(group: Group, net: nn.Module, goal: Structured, only: Only | None, skip: Only | None) -> Group:
    """Return a group with the reason why its units are not asked for, if they are not."""
    if group.reason:
        return group
    if group.kind not in goal.using:
        return replace(group, reason="excluded")
    if any(excluded(name, net.get_submodule(name), only, skip) for name in group.rows):
        return replace(group, reason="excluded")
    return group


def _row(group: Group, kept: int, curve: Curve | None) -> GroupReport:
    """Write a group's line of the report."""
    predicted, error = float("nan"), float("nan")
    if curve is not None:
        predicted = float(curve.cost[group.units - kept])
        error = float("nan") if curve.error is None else float(curve.error.median())
    return GroupReport(group.name, group.kind, group.units, kept, predicted, error, group.reason)
