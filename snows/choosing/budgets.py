"""What is asked of a network that is to become smaller or faster: `Budget`, and `Structured`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from torch import Tensor

from snows.choosing.compiling import RUNTIMES, Runtime
from snows.choosing.costs import WORDS, Of
from snows.choosing.goals import PatternChoice
from snows.choosing.options import Zeros
from snows.choosing.orders import ORDERS, Order
from snows.sparsity import NM, Unstructured

Using = Literal["channels", "heads", "neurons", "low-rank", "nm", "unstructured"]
UNITS: tuple[Using, ...] = ("channels", "heads", "neurons")
SMALLER: tuple[Using, ...] = (*UNITS, "low-rank")
ALL: tuple[Using, ...] = (*SMALLER, "nm", "unstructured")


@dataclass(frozen=True)
class Budget:
    """Ask for a part of a network's cost to stay, by whatever loses least for it.

    Units may be taken out, layers may get low rank, and weights may become zeros that packed layers do not
    multiply: layer by layer what loses least for what it saves. Exactly one of `share`, `ms` and `mb` is
    given.

    Attributes:
        share: what stays of the network's cost, above 0 and below 1; or by name of a group (see
            `snows.groups`) the numbers of the units that stay.
        of: the cost: "macs" (multiplications of one sample by weights that are not zero, and those of
            attention's products), "params", "bytes", "nonzeros" (weights that are not zero), or "latency"
            (milliseconds of the whole network, measured here and now). Zeros that the network came with are
            not kept, and count as other weights.
        using: what may be done, of "channels", "heads" and "neurons" (taken out), "low-rank" (two thin layers
            in place of one), "nm" (N of M weights stay) and "unstructured" (a share of the weights stays).
        order: how it is found what goes first: "compensated" (what costs least after the rest is fitted),
            "hap", "fisher", "magnitude", or a function that gives each unit of a `Group` a score, higher
            stays.
        multiple: widths are multiples of this, in channels or features.
        floor: the least share of a group's units that stays.
        uniform: take the same share from every group; layers stay as they are otherwise.
        refit: fit what stays by least squares.
        then: a pattern for all layers of the smaller network, where `using` names none.
        runtime: of the milliseconds: "eager", "compile" (`torch.compile` with constant weights), or
            "cuda-graph". Where zeros may be chosen, all networks are timed as `deploy` would leave them, also
            the one that came.
        images: of the milliseconds: how many at a time; None for as many as the first batch has.
        ms: milliseconds that stay, in place of a share.
        mb: megabytes that stay, in place of a share.
        times: a file of `snows measure` with the milliseconds of another machine, or of this one before; None
            measures them.
        layers: with units by name of a group as `share`, by name of a layer its rank, or a pattern of its
            weight.

    Raises:
        ValueError: a setting is out of range.
    """

    allowed: ClassVar[tuple[Using, ...]] = ALL

    share: float | Mapping[str, Tensor] | None = None
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
    ms: float | None = None
    mb: float | None = None
    times: Path | str | None = None
    layers: Mapping[str, int | Zeros] | None = None

    def __post_init__(self) -> None:
        self._check_limit()
        self._expect(
            self.runtime in RUNTIMES
            and (self.images is None or (type(self.images) is int and self.images > 0)),
            f"a runtime of {' or '.join(RUNTIMES)} and a number of images above 0",
            f"{self.runtime!r} and {self.images!r}",
        )
        self._expect(
            not isinstance(self.using, str) and bool(self.using) and set(self.using) <= set(self.allowed),
            f"using to name some of {', '.join(self.allowed)}",
            repr(self.using) if isinstance(self.using, str) else ", ".join(map(str, self.using)) or "none",
        )
        object.__setattr__(self, "using", tuple(x for x in ALL if x in self.using))  # a set has no order
        self._expect(
            self.order in ORDERS if isinstance(self.order, str) else callable(self.order),
            f"order to be {', '.join(ORDERS)} or a function of a group",
            repr(self.order),
        )
        self._expect(
            type(self.multiple) is int and self.multiple >= 1 and 0 <= self.floor < 1,
            "a multiple of at least 1 and a floor from 0 to below 1",
            f"{self.multiple!r} and {self.floor!r}",
        )
        masks = sorted(set(self.using) - set(SMALLER))
        self._expect(
            not (masks and self.then is not None),
            "a pattern for all layers (then) or a choice by layer (using)",
            f"then={self.then} and using {', '.join(masks)}",
        )

    def _check_limit(self) -> None:
        given = [x for x in ("share", "ms", "mb") if getattr(self, x) is not None]
        self._expect(len(given) == 1, "one of a share, ms and mb that stays", " and ".join(given) or "none")
        self._expect(self.of in WORDS, f"of to be {', '.join(WORDS)}", repr(self.of))
        if isinstance(self.share, Mapping):
            self._expect(
                bool(self.share) or bool(self.layers),
                "the units of at least one group that stay",
                "none; see snows.groups for their names",
            )
        elif self.share is not None:
            sound = isinstance(self.share, int | float) and 0 < self.share < 1
            self._expect(sound, "a share above 0 and below 1 that stays", repr(self.share))
        for name, of in (("ms", "latency"), ("mb", "bytes")):
            value = getattr(self, name)
            if value is not None:
                self._expect(isinstance(value, int | float) and value > 0, f"{name} above 0", repr(value))
                object.__setattr__(self, "of", of)
        self._expect(
            self.layers is None or isinstance(self.share, Mapping),
            "units by name of a group as the share, with layers",
            f"{self.share!r}",
        )
        for asked in (self.layers or {}).values():
            self._expect(
                type(asked) is int or isinstance(asked, NM | Unstructured),
                "a rank or a pattern such as snows.NM(2, 4) for each of the layers",
                repr(asked),
            )
        self._expect(
            self.times is None or self.of == "latency", "times with milliseconds to save", f"of={self.of!r}"
        )
        if self.times is not None:
            self._expect(isinstance(self.times, str | Path), "times to be a file", repr(self.times))
            object.__setattr__(self, "times", Path(self.times))  # a run records it the same in either form

    def _expect(self, sound: bool, expected: str, got: str) -> None:
        if not sound:
            raise ValueError(f"{type(self).__name__}: expected {expected}, got {got}")

    @property
    def masks(self) -> bool:
        """Whether weights may become zeros, layer by layer."""
        if isinstance(self.share, Mapping):
            return any(not isinstance(x, int) for x in (self.layers or {}).values())
        return bool(set(self.using) & {"nm", "unstructured"})


@dataclass(frozen=True)
class Structured(Budget):
    """Ask for whole units to be taken out and for low rank alone, so that the network gets smaller.

    It is a `Budget` whose layers run anywhere without kernels of their own. Attributes are those of `Budget`.
    """

    allowed: ClassVar[tuple[Using, ...]] = SMALLER

    using: Sequence[Using] = SMALLER
