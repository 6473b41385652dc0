"""Time as a limit: how many calibration batches each layer that is left may use, so that all end in time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch

from snows.matching.losses import Matching
from snows.matching.normalisation import statistics_of
from snows.networks.attention import plain_forward
from snows.networks.batches import Batch
from snows.networks.functions import known
from snows.networks.layers import groups_of, prunable
from snows.networks.trace import Event
from snows.networks.twins import Twins
from snows.solving.models import never
from snows.solving.newton import Newton

MARGIN = 0.02  # of the limit, for what comes after the last layer: closing and writing the network
PARTS = 16  # that the calibration samples are divided into where there is not time for all of them
FEWEST = 2  # of these that a Newton step is still worth its time on
FADING = 0.7  # what a layer says of the speed weighs this much less from one layer to the next
ELEMENT = 50  # operations that reading and writing an element of an activation takes as long as
RECALIBRATION = 3  # forward passes that correcting BatchNorm's statistics takes as long as


def check_seconds(seconds: float | None, where: str = "prune: expected seconds") -> None:
    """Refuse a limit that is none.

    Raises:
        ValueError: it is no number above 0.
    """
    if seconds is None:
        return
    number = isinstance(seconds, int | float) and not isinstance(seconds, bool)
    if not (number and 0 < seconds < math.inf):
        raise ValueError(f"{where} to be a number above 0, got {seconds!r}")


class Deadline:
    """Tell how much of a limited time is left.

    Args:
        seconds: from now.
        clock: gives the time in seconds.
    """

    def __init__(self, seconds: float, clock: Callable[[], float] = time.perf_counter) -> None:
        self.seconds, self._clock = seconds, clock
        self._end = clock() + (1 - MARGIN) * seconds

    def now(self) -> float:
        """Read the clock, after a GPU has done what it was given."""
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        return self._clock()

    def left(self) -> float:
        """Return the seconds that are left; below 0 where it is too late."""
        return self._end - self.now()


class Work(NamedTuple):
    """Predict what a stage of a layer takes, in operations: of each batch, and beside the batches."""

    batch: float
    fixed: float = 0.0


STAGES = ("advance", "select", "step")  # of the batches; with statistics; of Newton's method


@dataclass(frozen=True)
class Ration:
    """Say what a layer may use; by default all that was asked.

    Attributes:
        batches: to fit to; None for all.
        select: whether there is time for the selector.
        step: whether there is time for Newton's method.
        late: says whether so many seconds more would take what the layers after this one need.
        lap: called with the name of a stage when that is done.
    """

    batches: int | None = None
    select: bool = True
    step: bool = True
    late: Callable[[float], bool] = never
    lap: Callable[[str], None] = lambda stage: None


class Pace:
    """Give each layer its ration of a limited time.

    What a layer takes is predicted from the sizes of its weight and of the operations of its horizon, at the
    speed of a forward pass, and corrected by what the layers so far took. All layers that are left get the
    same number of batches, the most with which they end in time. Where that is fewer than `FEWEST`, Newton
    steps are left out, from the last layer on; where the selectors alone would take too long, those too.

    Args:
        deadline: when all has to be done.
        twins: the networks and batches; where there is not time for all samples, batches are divided.
        solver: its settings are what is done at most; None for no steps.
        matching: tells how long a horizon is.
        recalibrate: whether BatchNorm's statistics are corrected at the end.
    """

    def __init__(
        self, deadline: Deadline, twins: Twins, solver: Newton | None, matching: Matching, recalibrate: bool
    ) -> None:
        self.deadline, self.twins, self.solver, self.matching = deadline, twins, solver, matching
        self.recalibrate = recalibrate and bool(statistics_of(twins.sparse))
        self.names: list[str] = []
        self.samples: set[int] = set()  # that layers used
        self._seen = {stage: (0.0, 0.0) for stage in STAGES}

    @property
    def all_samples(self) -> int:
        """The samples that there are to fit to."""
        return sum(x.samples() for x in self.twins.pieces())

    def begin(self, names: Iterable[str]) -> None:
        """Predict a walk through some layers, and divide the batches if there is not time for all of them."""
        twins, self.names = self.twins, list(names)
        self._speed, twins.parts = self._forward(), 1
        self._measure()
        samples, most = self.all_samples, self._most(self.names, self.deadline.left(), True)
        if samples >= 2 * PARTS and (most < len(self.sizes) or most == 1):
            twins.parts = max(2, math.ceil(PARTS / len(self.sizes)))
            self._measure()
        twins.begin_again()

    def ration(self, name: str) -> Ration:
        """Say what the next layer may use; those before it are done."""
        self.names = self.names[self.names.index(name) :]
        rest, began = self.names[1:], self.deadline.now()
        needed = self._seconds(rest, 1, False)

        def late(ahead: float) -> bool:
            return self.deadline.left() < needed + ahead

        batches, select, step = self._chosen(name, rest, self.deadline.left())
        return Ration(batches, select, step, late, partial(self._learn, name, batches, [began]))

    def fits_any(self) -> bool:
        """Say whether there is time for the first layer's selector."""
        return bool(self.names) and self.ration(self.names[0]).select

    def recalibration(self) -> list[Batch]:
        """Return the batches that there is time for to correct BatchNorm's statistics with."""
        pieces, most = self.twins.pieces(), int(self.deadline.left() / max(self._recalibration(1), 1e-12))
        return self.twins.batches if most > len(pieces) else pieces[: max(most, 0)]

    def _chosen(self, name: str, rest: list[str], left: float) -> tuple[int, bool, bool]:
        """Choose how many batches a layer may use, and whether to select and to step."""
        if self.solver is not None:
            fewest, most = min(FEWEST, len(self.sizes)), self._most([name, *rest], left, True)
            alone = self._layer(name, fewest, True) + self._seconds(rest, fewest, False)
            if most >= fewest or alone <= left:
                return max(most, fewest), True, True
        most = self._most([name, *rest], left, False)
        if most >= 1 or self._layer(name, 1, False) + self._recalibration(1) <= left:
            return max(most, 1), True, False
        return 0, False, False

    def _learn(self, name: str, batches: int, began: list[float], stage: str) -> None:
        """Learn from what a stage of a layer took."""
        now, work = self.deadline.now(), self._works[name][stage]
        took, units = (FADING * x for x in self._seen[stage])
        self._seen[stage] = (took + now - began[0], units + work.batch * batches + work.fixed)
        self.samples.add(sum(self.sizes[:batches]))
        began[0] = now

    # ---------------------------------------------------------------- predictions

    def _most(self, names: list[str], left: float, step: bool) -> int:
        """Return the most batches with which some layers end in time; 0 for none."""
        none = self._seconds(names, 0, step)
        each = self._seconds(names, 1, step) - none
        return max(0, min(len(self.sizes), int((left - none) / max(each, 1e-12))))

    def _seconds(self, names: list[str], batches: int, step: bool) -> float:
        """Predict what layers and the correction of BatchNorm's statistics take."""
        return sum(self._layer(name, batches, step) for name in names) + self._recalibration(batches)

    def _layer(self, name: str, batches: int, step: bool) -> float:
        return sum(
            self._rate(stage) * (batches * work.batch + work.fixed)
            for stage, work in self._works[name].items()
            if step or stage != "step"
        )

    def _rate(self, stage: str) -> float:
        """Return seconds an operation: of the layers so far, else of a forward pass."""
        took, units = self._seen[stage]
        return took / units if units > 0 else self._speed

    def _recalibration(self, batches: int) -> float:
        return batches * self._pass * self._speed * RECALIBRATION if self.recalibrate else 0.0

    def _forward(self) -> float:
        """Measure how long an operation of a forward pass takes."""
        probe, twins = self.twins.probe, self.twins
        seconds = []
        with torch.no_grad(), plain_forward():
            for _ in range(2):  # the first may be slower
                began = self.deadline.now()
                probe.map(torch.clone).through(twins.dense)
                seconds.append(self.deadline.now() - began)
        share = probe.samples() / max(twins.batches[0].samples(), 1)
        return max(min(seconds), 1e-9) / max(share * sum(map(_cost, twins.trace.events)), 1.0)

    def _measure(self) -> None:
        """Predict what each layer takes with the batches as they are divided."""
        twins = self.twins
        self.sizes = [x.samples() for x in twins.pieces()]
        share = sum(self.sizes) / len(self.sizes) / max(twins.batches[0].samples(), 1)
        events = twins.trace.events
        self._pass = share * sum(map(_cost, events))
        starts = {event.layer: i for i, event in reversed(list(enumerate(events))) if event.layer}
        layers = prunable(twins.sparse)
        self._works: dict[str, dict[str, Work]] = {}
        before = 0
        for name in self.names:
            weight = layers[name].weight
            at = starts.get(name, len(events) - 1)
            advance = 2 * share * sum(map(_cost, events[min(before, at) : at + 1]))
            horizon = share * sum(map(_cost, _window(events, at, self.matching.horizon)))
            gram, fixed = _selection(tuple(weight.shape), groups_of(layers[name]), events[at])
            self._works[name] = {
                "advance": Work(advance, advance),  # the samples held back as well
                "select": Work(share * gram, fixed),
                **({"step": _step(self.solver, horizon)} if self.solver is not None else {}),
            }
            before = at


def _cost(event: Event) -> float:
    return event.flops + ELEMENT * math.prod(event.shape)


def _window(events: list[Event], at: int, horizon: int | str) -> list[Event]:
    """List the events from a layer to the end of its horizon."""
    counted = [i for i in range(at, len(events)) if known(events[i].function).counted]
    last = counted[horizon] if isinstance(horizon, int) and horizon < len(counted) else len(events) - 1
    return events[at : last + 1]


def _selection(shape: tuple[int, ...], groups: int, event: Event) -> tuple[float, float]:
    """Predict second moments of one batch, and a selector: two eigendecompositions and some 50 products."""
    rows, columns = shape[0] // groups, math.prod(shape[1:])
    positions = math.prod(event.shape) / shape[0]
    moments = positions * groups * (2 * columns * (columns + rows) + ELEMENT * columns)
    return moments, groups * (10 * (columns**3 + rows**3) + 200 * rows * columns * (columns + rows))


def _step(solver: Newton, horizon: float) -> Work:
    """Predict Newton's method: a gradient a batch, and the curvature's products and the search of one."""
    gradient, products = 4 * horizon, (5 + 3 * solver.max_iterations) * horizon
    if solver.gradient == "batch":
        return Work(solver.passes * (gradient + products), horizon)
    return Work(solver.passes * gradient, solver.passes * products + horizon)
