"""Which units of a network go, decided before anything is fitted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from snows.choosing.costs import Costs, Of, rank_of
from snows.choosing.curves import Curve
from snows.choosing.goals import Only, PatternChoice
from snows.choosing.orders import Order, curves
from snows.choosing.ranks import implants, ranks_of, spectra
from snows.choosing.shares import allocate
from snows.choosing.widths import given_units
from snows.matching.consumers import Measured
from snows.matching.losses import Objective
from snows.networks.channels import Group
from snows.networks.edits import Edit, described
from snows.networks.implants import Implant
from snows.networks.layers import prunable
from snows.networks.proving import groups, proved
from snows.networks.taking import Take
from snows.networks.twins import Twins
from snows.results.formats import read_edit
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
        if self.of not in ("macs", "params", "bytes"):
            raise ValueError(f"Structured: expected of to be macs, params or bytes, got {self.of!r}")
        if isinstance(self.using, str) or not self.using or not set(self.using) <= set(ALL):
            raise ValueError(
                f"Structured: expected using to name some of {', '.join(ALL)}, got {self.using!r}"
            )
        if not (type(self.multiple) is int and self.multiple >= 1 and 0 <= self.floor < 1):
            raise ValueError(
                "Structured: expected a multiple of at least 1 and a floor from 0 to below 1, got "
                f"{self.multiple!r} and {self.floor!r}"
            )


@dataclass(frozen=True)
class Cut:
    """Hold what is taken out of a network, as it is kept on disk before anything is fitted.

    Attributes:
        edits: that take it out, in order.
        groups: a line of the report for each group.
        macs: multiplications of one sample, before and after.
        notes: sentences that a reader should see.
    """

    edits: list[Edit] = field(default_factory=list)
    groups: list[GroupReport] = field(default_factory=list)
    macs: tuple[int, int] = (0, 0)
    notes: list[str] = field(default_factory=list)

    def described(self) -> dict[str, Any]:
        """Describe it as JSON."""
        rows = [{key: None if x != x else x for key, x in asdict(row).items()} for row in self.groups]
        edits = [described(edit) for edit in self.edits]
        return {"edits": edits, "groups": rows, "macs": list(self.macs), "notes": self.notes}

    @classmethod
    def read(cls, content: Mapping[str, Any]) -> Cut:
        """Read what `described` wrote."""
        nan: Any = float("nan")
        rows = [
            GroupReport(**{key: nan if x is None else x for key, x in row.items()})
            for row in content["groups"]
        ]
        before, after = content["macs"]
        return cls([read_edit(x) for x in content["edits"]], rows, (before, after), list(content["notes"]))

    def left(self) -> dict[str, Tensor]:
        """Return of BatchNorms that lost channels, by name, which are left."""
        found = {}
        for edit in self.edits:
            for (name, dim), kept in edit.kept.items() if isinstance(edit, Take) else ():
                module, _, key = name.rpartition(".")
                if key == "running_mean" and dim == 0:
                    found[module] = kept
        return found

    def gone(self, dense: nn.Module) -> dict[str, Tensor]:
        """Return by layer of the dense network which of its outputs are taken out."""
        found = {}
        for edit in self.edits:
            for (name, dim), kept in edit.kept.items() if isinstance(edit, Take) else ():
                module, _, key = name.rpartition(".")
                if key == "weight" and dim == 0 and module in (layers := prunable(dense)):
                    stays = torch.zeros(len(layers[module].weight), dtype=torch.bool)
                    found[module] = (~stays.index_fill(0, kept, True)).nonzero().flatten()
        return found

    def sources(self) -> dict[str, str]:
        """Return, of layers with another name than in the dense network, whose place they have."""
        thin = [edit.layer for edit in self.edits if isinstance(edit, Implant)]
        return {f"{layer}.{part}": layer for layer in thin for part in (0, 1)}


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
    found = [_allowed(x, net, goal, only, skip) for x in groups(net, example)]
    free = [x for x in found if not x.reason]
    exact = isinstance(goal.share, Mapping)
    losses = {} if exact or "low-rank" not in goal.using else spectra(twins, objective, only, skip, doing)
    options = (
        ranks_of(rank_of(name), loss, net.get_submodule(name).weight, goal.multiple)  # type: ignore[arg-type]
        for name, loss in losses.items()
    )
    others = [x for x in options if x is not None]
    if not free and not others:
        said = "; ".join(f"{x.name}: {x.reason}" for x in found[:4])
        raise ValueError(f"prune: no unit can be taken out ({said or 'the model has no Linear or Conv2d'})")
    doing("deciding what goes")
    full = {name: len(loss) - 1 for name, loss in losses.items()}
    costs = Costs.of(net, example, free, full)
    lost: dict[str, Curve] = {}
    ranks: dict[str, int] = {}
    if isinstance(goal.share, Mapping):
        kept = given_units(found, goal.share)
    else:
        if free:
            lost = curves(goal.order, Measured(twins.dense, twins.batches, objective.sensitivity), free)
        widths = allocate(
            free, lost, costs, goal.share, goal.of, goal.multiple, goal.floor, goal.uniform, others
        )
        kept = {x.name: lost[x.name].kept(widths[x.name]) for x in free}
        ranks = {x: widths.get(rank_of(x), full[x]) for x in full}
    kept = {x.name: kept[x.name] for x in free if x.name in kept and len(kept[x.name]) < x.units}
    edits: list[Edit] = []
    declined: dict[str, Group] = {}
    if kept:
        take, declined = proved(net, example, free, kept)
        edits.append(take)
    thin, notes = implants(net, example, edits, {x: rank for x, rank in ranks.items() if rank < full[x]})
    edits += thin
    ranks = full | {x.layer: x.rank for x in thin}
    found = [declined.get(x.name, x) for x in found]
    stays = {x.name: x.units for x in found} | {
        name: len(units) for name, units in kept.items() if name not in declined
    }
    rows = [_row(x, stays[x.name], lost.get(x.name)) for x in found]
    rows += [
        GroupReport(name, "low rank", full[name], rank, float(losses[name][rank]))
        for name, rank in ranks.items()
    ]
    widths = {x.name: stays[x.name] for x in free} | {rank_of(x): rank for x, rank in ranks.items()}
    before, after = (round(costs.total("macs", x)) for x in ({}, widths))
    notes += [f"{x.name} stays whole: {x.reason}." for x in declined.values()]
    return Cut(edits, rows, (before, after), notes)


def _allowed(group: Group, net: nn.Module, goal: Structured, only: Only | None, skip: Only | None) -> Group:
    """Return a group with the reason why its units are not asked for, if they are not."""
    if group.reason:
        return group
    if group.kind not in goal.using:
        return replace(group, reason="excluded")
    for name in group.rows:
        module = net.get_submodule(name)
        if (only is not None and not only(name, module)) or (skip is not None and skip(name, module)):
            return replace(group, reason="excluded")
    return group


def _row(group: Group, kept: int, curve: Curve | None) -> GroupReport:
    """Write a group's line of the report."""
    predicted, error = float("nan"), float("nan")
    if curve is not None:
        predicted = float(curve.cost[group.units - kept])
        error = float("nan") if curve.error is None else float(curve.error.median())
    return GroupReport(group.name, group.kind, group.units, kept, predicted, error, group.reason)
