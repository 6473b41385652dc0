"""Choices of what stays of a network, made from one set of statistics for any share of any cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from torch import Tensor, nn

from snows.choosing.budgets import Budget
from snows.choosing.costs import WORDS, Costs
from snows.choosing.curves import Curve
from snows.choosing.options import Ladder, Option, Zeros, chosen, treatment, widths
from snows.choosing.ranks import implants
from snows.choosing.shares import ImpossibleError, allocate
from snows.networks import proving
from snows.networks.batches import Batch
from snows.networks.channels import Group
from snows.networks.copies import sharing
from snows.networks.edits import Edit
from snows.networks.layers import Layer, prunable


class Possible(NamedTuple):
    """Hold what may be done to a network.

    Attributes:
        groups: all of the network; those that have to stay whole say why.
        ladders: by layer that may be treated, how.
    """

    groups: list[Group]
    ladders: dict[str, Ladder]

    @property
    def free(self) -> list[Group]:
        """The groups that can lose units."""
        return [x for x in self.groups if not x.reason]


@dataclass(frozen=True)
class Choice:
    """Hold what was chosen to stay, and the edits that leave it.

    Attributes:
        kept: by group that loses units, the numbers of those that stay, int64.
        options: by layer that is treated, how.
        widths: of groups and layers that are not left as they are, as `Costs` takes them.
        edits: in order.
        whole: by name, groups that stay whole all the same, with the reason.
        notes: sentences on what stays.
    """

    kept: dict[str, Tensor]
    options: dict[str, Option] = field(default_factory=dict)
    widths: dict[str, int] = field(default_factory=dict)
    edits: list[Edit] = field(default_factory=list)
    whole: dict[str, Group] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def patterns(self) -> dict[str, Zeros]:
        """By layer that gets zeros, their pattern."""
        return {name: x.pattern for name, x in self.options.items() if x.pattern is not None}

    @property
    def without_zeros(self) -> dict[str, int]:
        """The widths, layers that get zeros being left as they are."""
        patterned = {treatment(name) for name in self.patterns}
        return {name: x for name, x in self.widths.items() if name not in patterned}


class Refused(NamedTuple):
    """Hold what was chosen and could not be done.

    Attributes:
        groups: by name, those that stay whole, with the reason.
        options: by layer, the treatments.
    """

    groups: Mapping[str, Group] = {}
    options: Mapping[str, frozenset[Option]] = {}

    def and_of(self, wanted: Choice, found: Choice) -> Refused:
        """Add what was left out of a choice."""
        options = dict(self.options)
        for name, option in wanted.options.items():
            if name not in found.options:
                options[name] = options.get(name, frozenset()) | {option}
        return Refused({**self.groups, **found.whole}, options)


@dataclass(frozen=True)
class Chooser:
    """Choose what stays of a network.

    Attributes:
        net: the network.
        example: one sample.
        goal: what is asked.
        possible: what may be done.
        curves: by group, what its units are ordered by; empty where they were given.
    """

    net: nn.Module
    example: Batch
    goal: Budget
    possible: Possible
    curves: dict[str, Curve]

    def __call__(self, costs: Costs, share: float) -> Choice:
        """Choose by the share of a cost that stays.

        Choices of groups and layers are independent, and not all go together: a pattern needs a width that it
        divides. What was left out of a choice is not chosen again, until nothing is left out.

        Raises:
            ValueError: so small a share is not possible.
        """
        refused, found = Refused(), list[Choice]()
        while True:
            try:
                wanted = self.divided(costs, share, refused)
            except ImpossibleError:
                if not found:
                    raise
                of, widths = self.goal.of, found[-1].widths
                stays = f"{costs.total(of, widths) / costs.total(of):.1%} of the {WORDS[of]}"
                note = f"What can be done together leaves {stays}, which is more than was asked for."
                return _together(found, [note])
            found.append(self.edited(wanted))
            more = refused.and_of(wanted, found[-1])
            if more == refused:
                return _together(found, [])
            refused = more

    def divided(self, costs: Costs, share: float, refused: Refused) -> Choice:
        """Divide a share of a cost over groups and layers, without the edits that leave it.

        Raises:
            ImpossibleError: so small a share is not possible.
        """
        goal, ladders = self.goal, self.possible.ladders
        found = allocate(
            [x for x in self.possible.free if x.name not in refused.groups],
            self.curves,
            costs,
            share,
            goal.of,
            goal.multiple,
            goal.floor,
            goal.uniform,
            [widths(name, ladder, refused.options.get(name, ())) for name, ladder in ladders.items()],
        )
        free = [x for x in self.possible.free if x.name in found]
        kept = {x.name: self.curves[x.name].kept(found[x.name]) for x in free}
        options = chosen(ladders, found)
        return Choice(kept, options, self.widths(kept, options))

    def widths(self, kept: Mapping[str, Tensor], options: Mapping[str, Option]) -> dict[str, int]:
        """Return the widths of groups and layers, as `Costs` takes them; others are left as they are.

        Args:
            kept: by group, the units that stay.
            options: by layer, how it is treated.
        """
        ladders = self.possible.ladders
        found = {name: len(x) for name, x in kept.items()}
        return found | {
            treatment(name): len(ladders[name]) - 1 - ladders[name].index(x) for name, x in options.items()
        }

    def loss(self, choice: Choice) -> float:
        """Return what a choice is predicted to lose: the sum over groups and layers."""
        units = (float(self.curves[name].cost[-1 - len(x)]) for name, x in choice.kept.items())
        return sum(units) + sum(x.loss for x in choice.options.values())

    def edited(self, choice: Choice) -> Choice:
        """Make the edits of a choice, and leave out what cannot be done.

        Raises:
            ValueError: nothing of it can be cut.
        """
        kept, free = choice.kept, self.possible.free
        fewer = {x.name: kept[x.name] for x in free if x.name in kept and len(kept[x.name]) < x.units}
        edits: list[Edit] = []
        whole: dict[str, Group] = {}
        if fewer:
            take, whole = proving.proved(self.net, self.example, free, fewer)
            edits.append(take)
        ranks = {name: x.rank for name, x in choice.options.items() if x.rank}
        thin, notes = implants(self.net, self.example, edits, ranks)
        notes += [f"{x.name} stays whole: {x.reason}." for x in whole.values()]
        made = {x.layer for x in thin}
        options = {name: x for name, x in choice.options.items() if not x.rank or name in made}
        unfit = _unfit(self.net, edits, options)
        notes += [f"{name} gets no zeros: {why}." for name, why in unfit.items()]
        options = {name: x for name, x in options.items() if name not in unfit}
        fewer = {name: x for name, x in fewer.items() if name not in whole}
        return Choice(fewer, options, self.widths(fewer, options), [*edits, *thin], whole, notes)


def _together(found: Sequence[Choice], notes: list[str]) -> Choice:
    """Return the last of several choices, with the groups that were refused before and notes."""
    before = {name: group for x in found[:-1] for name, group in x.whole.items()}
    said = [f"{x.name} stays whole: {x.reason}." for x in before.values()]
    return replace(found[-1], whole={**before, **found[-1].whole}, notes=[*said, *found[-1].notes, *notes])


def layers_of_cut(net: nn.Module, cut: Sequence[Edit]) -> dict[str, Layer]:
    """Return the layers that a cut leaves of a network, which stays as it is."""
    small = sharing(net)
    for edit in cut:
        edit.apply(small)
    return prunable(small)


def _unfit(net: nn.Module, cut: Sequence[Edit], options: Mapping[str, Option]) -> dict[str, str]:
    """Say of which layers of the cut network the weights do not fit the pattern, and why."""
    layers = layers_of_cut(net, cut)
    why = {name: x.pattern.fits(layers[name].weight.shape) for name, x in options.items() if x.pattern}
    return {name: reason for name, reason in why.items() if reason}
