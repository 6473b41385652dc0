"""Groups: the interchangeable units of one width that can be taken out of a network together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from torch import Tensor

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
        kind: "heads" where a unit is several outputs of one Linear, "neurons" where it is one and no Conv2d
            takes part, else "channels".
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

    @property
    def units(self) -> int:
        """How many units there are."""
        return len(next(iter(self.rows.values())))

    @property
    def each(self) -> int:
        """How many outputs of its first layer one unit is: 1, or the width of a head."""
        return next(iter(self.rows.values())).shape[1]
