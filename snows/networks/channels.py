"""Groups: the interchangeable units of one width that can be taken out of a network together."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from snows.networks.batches import Batch
from snows.networks.coding import Link, links
from snows.networks.layers import groups_of, prunable
from snows.networks.tainting import Tainting
from snows.networks.ties import Axis, Ties, Unit, inputs_of, outputs_of

Kind = Literal["channels", "heads", "neurons"]


class Follow(NamedTuple):
    """Describe an attribute that holds a size, and must hold a smaller one once units are taken out.

    Attributes:
        module: the module's name.
        attribute: an int, or a tuple of ints whose last entry it is.
        each: what one unit counts in it; a network with k units left has `k * each` there.
    """

    module: str
    attribute: str
    each: int


@dataclass(frozen=True)
class Group:
    """Hold the interchangeable units of one width: channels, neurons or attention heads.

    All tensors of indices are int64 of (units, entries of one unit), on the CPU.

    Attributes:
        name: of the first layer whose outputs the units are; where that layer's outputs fall into several
            groups, with a number, such as `conv1#1`.
        kind: "heads" where a unit is several outputs side by side of one Linear, else "neurons" where no
            Conv2d takes part, else "channels".
        rows: by layer, which of its outputs a unit is.
        columns: by layer, which of its input channels or features a unit feeds; of all groups of a grouped
            convolution, counted through.
        entries: by name of any other parameter or buffer ("norm.running_mean") and dimension, which entries
            belong to a unit; biases of layers and grouped convolutions' weights are in `rows` alone.
        follows: attributes that hold the width.
        reason: why no unit can be taken out; empty if units can.
    """

    name: str
    kind: Kind
    rows: Mapping[str, Tensor]
    columns: Mapping[str, Tensor]
    entries: Mapping[tuple[str, int], Tensor] = field(default_factory=dict)
    follows: tuple[Follow, ...] = ()
    reason: str = ""

    def __repr__(self) -> str:
        why = f", {self.reason}" if self.reason else ""
        each = f" of {self.each} outputs each" if self.each > 1 else ""
        return f"Group({self.name}: {self.units} {self.kind}{each}{why})"

    @property
    def units(self) -> int:
        """How many units there are."""
        return len(next(iter(self.rows.values())))

    @property
    def each(self) -> int:
        """How many outputs of its first layer one unit is: 1, or the width of a head."""
        return next(iter(self.rows.values())).shape[1]

    def without(self, kept: Tensor) -> Tensor:
        """Say which units go if these stay.

        Args:
            kept: int64 numbers of units.

        Returns:
            bool, (units,).
        """
        return torch.ones(self.units, dtype=torch.bool).index_fill(0, kept, False)


def tainted_groups(net: nn.Module, batch: Batch) -> list[Group]:
    """Find the groups of units of a network by tainting one sample, see `tainting`.

    What some outputs of a layer reach, inputs of later layers and entries of other tensors, goes with them.
    All that belongs together is a unit; units of the same make are a group.

    Args:
        net: in evaluation mode, with open attention and without masks of `torch.nn.utils.prune`. It is run
            many times, and its tensors are left as they were.
        batch: whose first sample is used.

    Returns:
        Groups in order of execution. Every output of every layer is in exactly one; those with a `reason`
        cannot lose units.

    Raises:
        ValueError: the network cannot run the batch.
    """
    tainting = Tainting(net, batch)
    ties = Ties(tainting.nodes)
    for layer, count in tainting.groups.items():
        rows, columns = outputs_of(layer), inputs_of(layer)
        if count > 1:  # a grouped convolution loses whole groups
            for part in zip(ties.parts(rows, count), ties.parts(columns, count), strict=True):
                ties.join((*part[0], *part[1]))
        if tainting.read_outside(layer):
            for axis in (rows, columns):
                reason = f"the weight of {layer} is read outside of its calls"
                ties.refuse(tainting.nodes.numbers[axis], reason)
        source = tainting.from_layer(layer)
        ties.link(rows, links(source.size, source.everything, source.reach))
    live = ties.removable([outputs_of(layer) for layer in tainting.groups])
    for axes in _other_axes(tainting):
        _tie_tensors(tainting, ties, axes, live)
    layers = dict.fromkeys(tainting.groups)
    for layer, other in tainting.shared():
        layers[other] = None
        for side in (outputs_of, inputs_of):
            own = tainting.nodes.numbers[side(layer)]
            for pair in zip(own, tainting.nodes.add(side(other), len(own)), strict=True):
                ties.join(pair)
    return [*_collected(net, ties, list(layers)), *_idle(net, layers)]


def _other_axes(tainting: Tainting) -> Iterator[list[Axis]]:
    """List the dimensions of parameters and buffers that are no layer's, in order of their first reading.

    Vectors that the same calls read, as the weight, bias and statistics of a normalisation, go together.
    """
    together: dict[tuple[Any, ...], list[Axis]] = defaultdict(list)
    for name, readers in tainting.other_tensors():
        shape = tainting.tensor(name).shape
        for dim, size in enumerate(shape):
            if size > 1:
                together[(readers, size) if len(shape) == 1 else (readers, name, dim)].append((name, dim))
    for key in sorted(together, key=lambda x: x[0][0]):
        yield together[key]


def _tie_tensors(tainting: Tainting, ties: Ties, axes: list[Axis], live: Tensor) -> None:
    """Tie tensors' entries to what they reach, if that is of units that may go.

    A dimension of which some entry reaches all that they all do is not that of a width: a position, for
    example. What no entry seems to read is asked again with outputs of layers turned round, because an
    activation such as PReLU reads its weight where its input is negative.
    """
    found: list[Link] = []
    for sign in (1, -1):
        source = tainting.from_tensors(axes, sign)
        if source.everything.any() and not (source.everything & live).any():
            return
        more = links(source.size, source.everything, source.reach)
        if any(len(link.nodes) == int(source.everything.sum()) for link in more):
            return
        found += more
        if len({entry for link in found for entry in link.entries}) == source.size:
            break
    if found:
        for same in zip(*(ties.nodes.add(axis, source.size) for axis in axes), strict=True):
            ties.join(same)
        ties.link(axes[0], found)


# ---------------------------------------------------------------- units to groups


def _collected(net: nn.Module, ties: Ties, layers: list[str]) -> Iterator[Group]:
    """Make groups of all units that are outputs of some layer."""
    rows = {outputs_of(layer): layer for layer in layers}
    columns = {inputs_of(layer): layer for layer in layers}
    alike: dict[tuple[str, tuple[tuple[Axis, int], ...]], list[Unit]] = defaultdict(list)
    for unit, refusal in ties.units():
        if any(axis in rows for axis in unit):
            unread = not any(axis in columns for axis in unit)
            reason = refusal or ("nothing reads its units" if unread else "")
            make = tuple((axis, len(entries)) for axis, entries in unit.items())
            alike[reason, make].append(unit)
    counts: Counter[str] = Counter()
    for (reason, _), units in alike.items():
        stacked = {axis: torch.tensor([unit[axis] for unit in units]) for axis in units[0]}
        own = {rows[axis]: x for axis, x in stacked.items() if axis in rows}
        read = {columns[axis]: x for axis, x in stacked.items() if axis in columns}
        first = next(iter(own))
        name = f"{first}#{counts[first]}" if counts[first] else first
        counts[first] += 1
        yield Group(
            name,
            _kind(net, own, read),
            own,
            read,
            {axis: x for axis, x in stacked.items() if axis not in rows and axis not in columns},
            reason=reason or (_alone(net, ties, units[0], first) if len(units) == 1 else ""),
        )


def _kind(net: nn.Module, rows: Mapping[str, Tensor], columns: Mapping[str, Tensor]) -> Kind:
    first, entries = next(iter(rows.items()))
    if isinstance(net.get_submodule(first), nn.Linear) and bool((entries.diff(dim=1) == 1).any()):
        return "heads"
    mixed = any(isinstance(net.get_submodule(layer), nn.Conv2d) for layer in (*rows, *columns))
    return "channels" if mixed else "neurons"


def _alone(net: nn.Module, ties: Ties, unit: Unit, first: str) -> str:
    """Say why a unit is the only one of its group."""
    numbers = ties.nodes.numbers
    if len(unit[outputs_of(first)]) < len(numbers[outputs_of(first)]):
        return "no other unit is like it"
    for layer, module in prunable(net).items():  # a grouped convolution never mixes all by itself
        axis = inputs_of(layer)
        if groups_of(module) == 1 and axis in unit and len(unit[axis]) == len(numbers[axis]):
            return f"every unit reaches all columns of {layer}"
    return "all its units are tied together"


def _idle(net: nn.Module, layers: Container[str]) -> Iterator[Group]:
    """Make a group of each layer that the network does not apply."""
    for name, layer in [(name, layer) for name, layer in prunable(net).items() if name not in layers]:
        rows = {name: torch.arange(len(layer.weight))[:, None]}
        reason = "the network does not apply it as a layer on this batch"
        yield Group(name, _kind(net, rows, {}), rows, {}, reason=reason)
