"""Choices of what is done to a network: by a share of its cost, by milliseconds, or as they were given."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from snows.choosing.budgets import Budget
from snows.choosing.choices import Choice
from snows.choosing.costs import WORDS, Costs
from snows.choosing.cuts import Cut
from snows.choosing.goals import Only
from snows.choosing.latency import latency
from snows.choosing.options import DENSE, Ladder, Option, treatment
from snows.choosing.runtimes import Clock, example_of
from snows.choosing.shares import ImpossibleError
from snows.choosing.structure import Deciding, Limited
from snows.choosing.tables import Timetable
from snows.choosing.timed import NEAR, part_saved, timed
from snows.choosing.widths import given_units
from snows.matching.losses import Objective
from snows.networks.batches import Batch
from snows.networks.twins import Twins

MOST = 0.999  # of a cost, the largest share that anything is chosen by


def decide_cut(
    twins: Twins,
    goal: Budget,
    only: Only | None,
    skip: Only | None,
    objective: Objective,
    doing: Callable[[str], None],
    limited: Limited | None = None,
) -> Cut:
    """Decide what is done to a network; arguments are those of `Deciding.of`.

    Raises:
        ValueError: nothing can be done, or not so much.
    """
    return decided(Deciding.of(twins, goal, only, skip, objective, doing, limited))


def decided(deciding: Deciding) -> Cut:
    """Choose what was asked for.

    Raises:
        ValueError: it is not possible.
    """
    goal, costs = deciding.goal, deciding.costs
    if isinstance(goal.share, Mapping):
        return _given(deciding, goal.share)
    if deciding.table is not None:
        return _by_table(deciding, deciding.table)
    if goal.of == "latency":
        return _in_time(deciding)
    share, whole = goal.share, costs.total(goal.of)
    if share is None:
        share = _part(goal.mb, whole / 1e6, "megabytes than the network has", "mb")
    with _amounts(goal, whole / 1e6):
        choice = deciding.choose(costs, share)
    left = costs.total(goal.of, choice.widths) / whole
    if left < (1 - NEAR) * share:
        choice.notes.append(
            f"{share:.1%} of the {WORDS[goal.of]} were asked for; the network that came nearest has "
            f"{left:.1%}, because widths (multiples of {goal.multiple}), ranks and patterns come in steps."
        )
    return deciding.described(choice)


@contextmanager
def _amounts(goal: Budget, whole: float) -> Iterator[None]:
    """Let what is impossible be said in milliseconds or megabytes, where those were asked for.

    Args:
        goal: what is asked.
        whole: of the cost, in milliseconds or megabytes.
    """
    try:
        yield
    except ImpossibleError as error:
        raise (error if goal.share is not None else error.amount(whole)) from None


class Settled(NamedTuple):
    """Hold costs by which any number of choices can be made.

    Attributes:
        costs: at any widths.
        correction: what makes a total of them, milliseconds, the one that was measured near the goal's share.
    """

    costs: Costs
    correction: float = 1.0

    def chosen(self, choose: Callable[[Costs, float], Choice], share: float) -> Choice:
        """Choose by a share of what the whole network takes.

        Raises:
            ImpossibleError: so small a share is not possible.
        """
        try:
            return choose(self.costs, min(share / self.correction, MOST))
        except ImpossibleError as error:
            raise error.asked(share, self.correction) from None


def settled(deciding: Deciding) -> Settled:
    """Return the costs that a goal is of; milliseconds are measured, by whole networks too.

    Raises:
        ValueError: the goal's own share is not possible.
    """
    if deciding.goal.of != "latency":
        return Settled(deciding.costs)
    table = deciding.table or _in_time(deciding).timetable
    assert table is not None
    example = example_of(deciding.twins.batches[0], table.images, deciding.twins.device)
    return Settled(_milliseconds(deciding, table, example, table.packed), table.correction)


def _part(asked: float | None, whole: float, of: str, name: str) -> float:
    """Return what is asked as a share of the whole."""
    assert asked is not None
    if asked >= whole:
        raise ValueError(f"Budget: expected fewer {of}, {whole:.4g}, got {name}={asked:g}")
    return asked / whole


def _share(goal: Budget, table: Timetable) -> float:
    """Return the share of the milliseconds that stays."""
    if goal.share is None:
        of = f"milliseconds than the network takes for {table.images} images at a time"
        return _part(goal.ms, table.whole, of, "ms")
    assert not isinstance(goal.share, Mapping)
    return goal.share


def _given(deciding: Deciding, share: Mapping[str, Tensor]) -> Cut:
    """Take units, ranks and patterns as they were given; time them where milliseconds are asked for."""
    possible, choose = deciding.choose.possible, deciding.choose
    options = {name: ladder[1] for name, ladder in possible.ladders.items()}
    choice = choose.edited(Choice(given_units(possible.groups, share), options))
    if deciding.goal.of != "latency" or deciding.table is not None:
        return deciding.described(choice)
    deciding.doing("timing what was chosen")
    pair = clock_of(deciding.twins, deciding.goal).beside(choice)
    return deciding.described(choice, (pair.dense, pair.small))


def _in_time(deciding: Deciding) -> Cut:
    """Choose by milliseconds that are measured."""
    clock = clock_of(deciding.twins, deciding.goal)
    deciding.doing("timing the network and its layers")
    table = Timetable.begin(clock)
    costs, share = partial(_milliseconds, deciding, table, clock.example), _share(deciding.goal, table)
    packed = _packed(deciding, clock, costs(1.0))
    with _amounts(deciding.goal, table.whole):
        found = timed(clock, costs, share, deciding.choose, deciding.doing, packed)
    table.packed, table.correction = found.packed, found.correction
    cut = deciding.described(found.choice, (found.pair.dense, found.pair.small))
    return replace(cut, timetable=table)


def _packed(deciding: Deciding, clock: Clock, costs: Costs) -> float:
    """Measure which part of what packed weights save in layers alone they save in the network.

    Every layer that is faster packed gets the pattern with which it is fastest.
    """
    options = dict[str, Option]()
    for name, ladder in deciding.choose.possible.ladders.items():
        saved = {x: _saved(costs, name, ladder, x) for x in ladder if x.pattern is not None}
        best = max(saved, key=lambda x: saved[x], default=DENSE)
        if best.pattern is not None and saved[best] > 0:
            options[name] = best
    if not options:
        return 1.0
    deciding.doing("timing the network with packed layers")
    choice = Choice({}, options, deciding.choose.widths({}, options))
    return part_saved(costs, choice, clock.beside(choice))


def _saved(costs: Costs, name: str, ladder: Ladder, option: Option) -> float:
    """Return the milliseconds that a layer's treatment alone saves."""
    place = torch.tensor([len(ladder) - 1 - ladder.index(option)])
    return float(costs.saved("latency", {}, treatment(name), place)[0])


def _by_table(deciding: Deciding, table: Timetable) -> Cut:
    """Choose by the milliseconds of a timetable; nothing is timed."""
    found = settled(deciding)
    with _amounts(deciding.goal, table.whole):
        choice = found.chosen(deciding.choose, _share(deciding.goal, table))
    choice.notes.append(f"Milliseconds are predicted, by a timetable of {table.machine}; none was measured.")
    choice.notes.extend(filter(None, [table.warning]))
    small = found.correction * found.costs.total("latency", choice.widths)
    return deciding.described(choice, (table.whole, small))


def _milliseconds(deciding: Deciding, table: Timetable, example: Batch, packed: float) -> Costs:
    net, possible = deciding.choose.net, deciding.choose.possible
    return latency(net, example, table.whole, possible.free, possible.ladders, table.times, packed)


def clock_of(twins: Twins, goal: Budget) -> Clock:
    """Make a clock for the runtime and number of images that are asked for."""
    example = example_of(twins.batches[0], goal.images, twins.device)
    return Clock(twins, example, goal.runtime, goal.masks)
