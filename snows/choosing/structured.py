"""What is asked of a network that is to become smaller: `Structured`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from snows.choosing.costs import Of
from snows.choosing.goals import PatternChoice
from snows.choosing.orders import ORDERS, Order
from snows.choosing.runtimes import RUNTIMES, Runtime
from snows.choosing.shares import WORDS

Using = Literal["channels", "heads", "neurons", "low-rank"]
ALL: tuple[Using, ...] = ("channels", "heads", "neurons", "low-rank")


@dataclass(frozen=True)
class Structured:
    """Ask for whole units to be taken out, so that the network gets smaller.

    Attributes:
        share: what stays of the network's cost, above 0 and below 1; or by name of a group (see
            `snows.groups`) the numbers of the units that stay.
        of: the cost: "macs" (multiplications of one sample, attention's products too), "params", "bytes", or
            "latency" (milliseconds of the whole network, measured here and now).
        using: what may be taken out.
        order: how it is found what goes first: "compensated" (what costs least after the rest is fitted),
            "hap", "fisher", "magnitude", or a function that gives each unit of a `Group` a score, higher
            stays.
        multiple: widths are multiples of this, in channels or features.
        floor: the least share of a group's units that stays.
        uniform: take the same share from every group.
        refit: fit what stays by least squares.
        then: a pattern for the layers of the smaller network.
        runtime: of the milliseconds: "eager", or "compile" (`torch.compile` with constant weights).
        images: of the milliseconds: how many at a time; None for as many as the first batch has.

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
    runtime: Runtime = "eager"
    images: int | None = None

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
        if self.of not in WORDS:
            raise ValueError(f"Structured: expected of to be {', '.join(WORDS)}, got {self.of!r}")
        if self.runtime not in RUNTIMES or not (
            self.images is None or (type(self.images) is int and self.images > 0)
        ):
            raise ValueError(
                f"Structured: expected a runtime of {' or '.join(RUNTIMES)} and a number of images above 0, "
                f"got {self.runtime!r} and {self.images!r}"
            )
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
