"""What may be done to a network that is to cost less, and what that loses and saves."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeAlias

from torch import nn

from snows.choosing.allowance import Pace
from snows.choosing.budgets import Budget
from snows.choosing.choices import Choice, Chooser, Possible, layers_of_cut
from snows.choosing.costs import Costs
from snows.choosing.curves import Curve
from snows.choosing.cuts import Cut
from snows.choosing.goals import Only, excluded
from snows.choosing.ladders import has_kernel, ladders, treatable
from snows.choosing.options import DENSE, Ladder, Option, Zeros
from snows.choosing.orders import curves
from snows.choosing.packing import nbytes
from snows.choosing.runtimes import example_of
from snows.choosing.shares import NothingError
from snows.choosing.tables import Timetable
from snows.choosing.work import Work, ordering
from snows.matching.consumers import Measured
from snows.matching.losses import Objective
from snows.networks import proving
from snows.networks.channels import Group
from snows.networks.checks import shared_weights
from snows.networks.implants import full_rank, why_not
from snows.networks.layers import Layer, prunable
from snows.networks.taking import Take
from snows.networks.twins import Twins
from snows.results.structure import GroupReport

COUNTED = {"bytes": "bytes, packed", "nonzeros": "weights that are not zero"}  # and in no report otherwise
Limited: TypeAlias = Callable[[list[str], Work], Pace]  # of layers to treat, and what ordering units takes


@dataclass(frozen=True)
class Deciding:
    """Hold what is decided by: what may be done, what it loses, and what it saves.

    Attributes:
        twins: the networks and batches.
        goal: what is asked.
        choose: makes choices.
        costs: all but milliseconds.
        table: milliseconds that were measured before; None where they are measured or not asked for.
        doing: is told what is done.
    """

    twins: Twins
    goal: Budget
    choose: Chooser
    costs: Costs
    table: Timetable | None
    doing: Callable[[str], None]

    @classmethod
    def of(
        cls,
        twins: Twins,
        goal: Budget,
        only: Only | None,
        skip: Only | None,
        objective: Objective,
        doing: Callable[[str], None],
        limited: Limited | None = None,
    ) -> Deciding:
        """Gather statistics, once for any number of choices.

        Args:
            twins: the networks and batches.
            goal: what is asked.
            only: layers whose outputs may be taken out, and that may be treated.
            skip: which of those may not.
            objective: how a mismatch is measured.
            doing: is told what is done.
            limited: begins the pace of a limited time; None for no limit.

        Raises:
            ValueError: nothing can be done.
        """
        if twins.carried:
            raise ValueError(
                "Budget: expected a model without masks of torch.nn.utils.prune, got one on "
                f"{twins.carried[0].module}; make it permanent with torch.nn.utils.prune.remove"
            )
        net, example = twins.sparse, twins.batches[0].split(1)[0].to(twins.device)
        table = _table(twins, goal)
        size = nbytes(net) / 1e6
        if goal.mb is not None and goal.mb >= size:  # before anything that takes time
            raise ValueError(
                f"Budget: expected fewer megabytes than the network has, {size:.4g}, got mb={goal.mb:g}"
            )
        doing("looking for units that can be taken out")
        groups = [_allowed(x, net, goal, only, skip) for x in proving.groups(net, example)]
        free = [x for x in groups if not x.reason]
        pace, batches, order = None, twins.batches, goal.order
        treated, lost = _given_ladders(twins, goal, only, skip), dict[str, Curve]()
        if not isinstance(goal.share, Mapping):
            known = partial(has_kernel, goal.of) if table is None else table.has
            layers = treatable(twins, goal, only, skip, known)
            if limited is not None:
                work = ordering(order, free, prunable(twins.dense), twins.trace.events, len(batches))
                pace = limited(list(layers), work)
            treated = ladders(twins, layers, goal.multiple, objective, doing, pace)
        possible = Possible(groups, treated)
        _refuse_nothing(possible, goal)
        doing("deciding what goes")
        if free and not isinstance(goal.share, Mapping):
            share = 1.0
            if pace is not None:
                batches, share = pace.last()
            sensitivity = objective.sensitivity if order == "compensated" else None  # others do not ask
            measured = Measured(twins.dense, batches, sensitivity)
            lost = curves(order, measured, free, objective.seed, share)
        costs = Costs.of(net, example, free, treated)
        return cls(twins, goal, Chooser(net, example, goal, possible, lost), costs, table, doing)

    def described(self, choice: Choice, milliseconds: tuple[float, ...] = ()) -> Cut:
        """Write down a choice, with a line of the report for each group and each layer that is treated."""
        groups = self.choose.possible.groups
        kept = {name: len(x) for name, x in choice.kept.items()}
        rows = [
            _row(choice.whole.get(x.name, x), kept.get(x.name, x.units), self.choose.curves.get(x.name))
            for x in groups
        ]
        layers = layers_of_cut(self.choose.net, [x for x in choice.edits if isinstance(x, Take)])
        rows += [_treated(name, layers[name], option) for name, option in choice.options.items()]
        macs = round(self.costs.total("macs")), round(self.costs.total("macs", choice.widths))
        patterns = {name: str(x) for name, x in choice.patterns.items()}
        of, counted, unit = self.goal.of, tuple[int, ...](), ""
        if of in COUNTED:
            counted = tuple(round(self.costs.total(of, x)) for x in ({}, choice.widths))
            unit = COUNTED[of]
        return Cut(choice.edits, rows, macs, choice.notes, milliseconds, patterns, counted, unit)


def _table(twins: Twins, goal: Budget) -> Timetable | None:
    """Read the timetable that a goal names.

    Raises:
        ValueError: it is none, or of another model, runtime or number of images.
    """
    if goal.times is None:
        return None
    table = Timetable.read(goal.times)
    example = example_of(twins.batches[0], table.images, twins.device)
    table.check(twins.sparse, example, goal.runtime, goal.images)
    return table


def _given_ladders(twins: Twins, goal: Budget, only: Only | None, skip: Only | None) -> dict[str, Ladder]:
    """Return the treatments of layers that were given.

    Raises:
        ValueError: there is no such layer, or it cannot be treated so.
    """
    layers, found = prunable(twins.sparse), dict[str, Ladder]()
    for name, asked in (goal.layers or {}).items():
        if name not in layers:
            raise ValueError(f"Budget: expected layers such as {', '.join(list(layers)[:3])}, got {name!r}")
        why = "only or skip leaves it out" if excluded(name, layers[name], only, skip) else ""
        if isinstance(asked, int):
            option, why = Option(math.nan, rank=asked), why or _no_rank(twins, name, asked)
        else:
            option, why = Option(math.nan, pattern=asked), why or _no_zeros(twins, name, asked)
        if why:
            raise ValueError(f"Budget: {name} cannot get {asked} ({why}); leave it out")
        found[name] = [DENSE, option]
    return found


def _no_rank(twins: Twins, name: str, rank: int) -> str:
    """Say why a layer cannot get a rank; empty if it can."""
    most = full_rank(prunable(twins.sparse)[name].weight) - 1
    why = why_not(twins.sparse, twins.trace, name)
    return why or ("" if 0 < rank <= most else f"its rank can be from 1 to {most}")


def _no_zeros(twins: Twins, name: str, pattern: Zeros) -> str:
    """Say why a layer cannot follow a pattern; empty if it can."""
    if other := shared_weights(twins.sparse).get(name):
        return f"it shares its weight with {other}"
    if (calls := twins.calls.get(name, 0)) != 1:
        return f"it is called {calls} times in one forward pass"
    return pattern.fits(prunable(twins.sparse)[name].weight.shape)


def _refuse_nothing(possible: Possible, goal: Budget) -> None:
    """Raise a NothingError where nothing may be done."""
    if possible.free or possible.ladders:
        return
    said = [f"{x.name}: {x.reason}" for x in possible.groups[:4]] or ["the model has no Linear or Conv2d"]
    if "low-rank" in goal.using:
        said.append("of no layer can the rank be lowered so that it gets cheaper")
    if goal.masks:
        said.append("no layer can follow a pattern and cost less by it")
    raise NothingError(f"prune: no unit can be taken out ({'; '.join(said)})")


def _allowed(group: Group, net: nn.Module, goal: Budget, only: Only | None, skip: Only | None) -> Group:
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


def _treated(name: str, layer: Layer, option: Option) -> GroupReport:
    """Write the line of a layer that gets low rank or zeros."""
    if option.rank:
        return GroupReport(name, "low-rank", full_rank(layer.weight), option.rank, option.loss)
    size = layer.weight.numel()
    return GroupReport(name, str(option.pattern), size, round(option.density * size), option.loss)
