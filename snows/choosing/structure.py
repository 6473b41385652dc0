"""Which units of a network go, decided before anything is fitted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import Tensor, nn

from snows.choosing.costs import Costs, rank_width
from snows.choosing.curves import Curve
from snows.choosing.cuts import Cut
from snows.choosing.goals import Only, excluded
from snows.choosing.latency import latency
from snows.choosing.orders import curves
from snows.choosing.ranks import allowed_ranks, implants, spectra
from snows.choosing.runtimes import Clock, example_of
from snows.choosing.shares import allocate
from snows.choosing.structured import Structured
from snows.choosing.timed import timed
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
    """Hold what was chosen to stay, and the edits that leave it.

    Attributes:
        kept: by group that loses units, the numbers of those that stay, int64.
        edits: in order.
        whole: by name, groups that stay whole all the same, with the reason.
        notes: sentences on what stays.
    """

    kept: dict[str, Tensor]
    edits: list[Edit]
    whole: dict[str, Group]
    notes: list[str]


@dataclass(frozen=True)
class _Chooser:
    """Choose what stays of a network.

    Attributes:
        net: the network.
        example: one sample.
        goal: what is asked.
        removable: what may be taken out.
        curves: by group, what its units are ordered by; empty where they were given.
    """

    net: nn.Module
    example: Batch
    goal: Structured
    removable: _Removable
    curves: dict[str, Curve]

    def __call__(self, costs: Costs, share: float) -> _Choice:
        """Choose by the share of a cost that stays.

        Raises:
            ValueError: so small a share is not possible.
        """
        goal, full = self.goal, self.removable.full
        widths = allocate(
            self.removable.free,
            self.curves,
            costs,
            share,
            goal.of,
            goal.multiple,
            goal.floor,
            goal.uniform,
            self.removable.ranks,
        )
        kept = {x.name: self.curves[x.name].kept(widths[x.name]) for x in self.removable.free}
        return self.given(kept, {name: widths.get(rank_width(name), most) for name, most in full.items()})

    def given(self, kept: Mapping[str, Tensor], ranks: Mapping[str, int]) -> _Choice:
        """Choose what is given: by group the units that stay, by layer the rank.

        Raises:
            ValueError: nothing of it can be cut.
        """
        fewer = {
            x.name: kept[x.name]
            for x in self.removable.free
            if x.name in kept and len(kept[x.name]) < x.units
        }
        edits: list[Edit] = []
        whole: dict[str, Group] = {}
        if fewer:
            take, whole = proving.proved(self.net, self.example, self.removable.free, fewer)
            edits.append(take)
        lower = {name: rank for name, rank in ranks.items() if rank < self.removable.full[name]}
        thin, notes = implants(self.net, self.example, edits, lower)
        notes += [f"{x.name} stays whole: {x.reason}." for x in whole.values()]
        return _Choice(fewer, [*edits, *thin], whole, notes)


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
    lost: dict[str, Curve] = {}
    if removable.free and not isinstance(goal.share, Mapping):
        measured = Measured(twins.dense, twins.batches, objective.sensitivity)
        lost = curves(goal.order, measured, removable.free, objective.seed)
    choose, milliseconds = _Chooser(net, example, goal, removable, lost), tuple[float, ...]()
    if isinstance(goal.share, Mapping):
        choice = choose.given(given_units(groups, goal.share), {})
    elif goal.of == "latency":
        clock = Clock(twins, example_of(twins.batches[0], goal.images, twins.device), goal.runtime)
        doing("timing the network and its layers")
        times = latency(net, clock.example, clock.dense(), removable.free, removable.full, clock.stopwatch)
        choice, pair, note = timed(clock, times, goal.share, choose, doing)
        milliseconds = pair.dense, pair.small
        choice.notes.extend(note)
    else:
        choice = choose(costs, goal.share)
    ranks = removable.full | {x.layer: x.rank for x in choice.edits if isinstance(x, Implant)}
    units = {x.name: x.units for x in groups}
    units |= {name: len(kept) for name, kept in choice.kept.items() if name not in choice.whole}
    rows = [_row(choice.whole.get(x.name, x), units[x.name], lost.get(x.name)) for x in groups] + [
        GroupReport(name, "low-rank", removable.full[name], rank, float(removable.spectra[name][rank]))
        for name, rank in ranks.items()
        if rank < removable.full[name]
    ]
    widths = units | {rank_width(name): rank for name, rank in ranks.items()}
    macs = round(costs.total("macs")), round(costs.total("macs", widths))
    return Cut(choice.edits, rows, macs, choice.notes, milliseconds)


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
            said.append("of no layer can the rank be lowered so that it gets cheaper")
        raise ValueError(f"prune: no unit can be taken out ({'; '.join(said)})")
    return found


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
