"""Time as a limit: how many calibration batches each layer that is left may use, so that all end in time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch

from snows import together
from snows.choosing.deadline import Deadline
from snows.choosing.work import Work, cost, selection, stepping, weighing, window
from snows.matching.losses import Matching
from snows.matching.normalisation import statistics_of
from snows.networks.attention import plain_forward
from snows.networks.batches import Batch
from snows.networks.layers import groups_of, prunable
from snows.networks.twins import Twins
from snows.solving.models import never
from snows.solving.newton import Newton

PARTS = 16  # that the calibration samples are divided into where there is not time for all of them
FEWEST = 2  # of these parts that a Newton step is still worth its time on
FADING = 0.7  # what a layer says of the speed weighs this much less from one layer to the next
RECALIBRATION = 3  # forward passes that correcting BatchNorm's statistics takes as long as
ALL = math.inf  # seconds: as many as are left


class Need(NamedTuple):
    """Predict the seconds that a stage of making a network smaller takes.

    Attributes:
        least: with the fewest samples.
        most: with all of them.
    """

    least: float
    most: float


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
        masks: whether layers get a mask before they are fitted.
    """

    def __init__(
        self,
        deadline: Deadline,
        twins: Twins,
        solver: Newton | None,
        matching: Matching,
        recalibrate: bool,
        masks: bool = True,
    ) -> None:
        self.whole = self.deadline = deadline
        self.twins, self.solver, self.matching, self.masks = twins, solver, matching, masks
        self.recalibrate = recalibrate and bool(statistics_of(twins.sparse))
        self.names: list[str] = []
        self.samples: set[int] = set()  # that layers used
        self._speed = 0.0  # seconds an operation of a forward pass
        self._seen = {stage: (0.0, 0.0) for stage in STAGES}  # what is recent weighs more

    @property
    def all_samples(self) -> int:
        """The samples that there are to fit to."""
        return sum(x.samples() for x in self.twins.pieces())

    def begin(self, names: Iterable[str], seconds: float = ALL, last: Work | None = None) -> None:
        """Predict a walk through some layers, and divide the batches if there is not time for all of them.

        Args:
            names: of the layers.
            seconds: that it may take at most.
            last: what comes after the layers, of a whole batch; by default correcting BatchNorm's statistics.
        """
        twins, self.deadline = self.twins, self.whole.part(seconds)
        self._predict(names, last)
        if self._most(self.names, self.deadline.left(), True) < max(2, len(self.sizes)):
            twins.parts = self._finest()
            self._measure()
        twins.begin_again()

    def need(self, names: Iterable[str], steps: bool = True, last: Work | None = None) -> Need:
        """Predict what a walk through some layers takes at least, with or without steps, and at most."""
        self._predict(names, last)
        most = self._seconds(self.names, len(self.sizes), True)
        self.twins.parts = self._finest()
        self._measure()
        fewest = FEWEST if steps and self.solver is not None else 1
        least = self._seconds(self.names, fewest, steps)
        self.twins.parts = 1
        return Need(min(least, most), most)

    @property
    def passing(self) -> float:
        """The seconds of a forward pass of a batch as it came."""
        return together.first(lambda: self._speed * sum(map(cost, self.twins.trace.events)))

    def weighing(self) -> float:
        """Predict the seconds that measuring the output sensitivity takes."""
        twins = self.twins
        share = twins.probe.part().samples() / max(twins.batches[0].part().samples(), 1)
        self._speed = self._speed or self._forward()
        found = self._speed * weighing(prunable(twins.sparse), twins.trace.events, share)
        return together.first(lambda: found)

    def weighs(self) -> bool:
        """Say whether there is time to measure the output sensitivity; without it there are no steps."""
        if self.solver is not None and self.weighing() > self.whole.left():
            self.solver = None
        return self.solver is not None

    def enough(self) -> bool:
        """Say whether all layers that are left end in time with some batches, without steps."""
        return not self.names or self._most(self.names, self.deadline.left(), False) >= 1

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
        pieces, most = self.twins.pieces(), self._lasting()
        return self.twins.batches if most > len(pieces) else pieces[: max(most, 0)]

    def last(self) -> tuple[list[Batch], float]:
        """Return the batches that there is time for after the layers, at least one, and their share."""
        pieces, most = self.twins.pieces(), max(self._lasting(), 1)
        if self.twins.parts == 1 and most >= len(pieces):
            return self.twins.batches, 1.0
        return pieces[:most], min(1.0, most / len(pieces))

    def _chosen(self, name: str, rest: list[str], left: float) -> tuple[int, bool, bool]:
        """Choose how many batches a layer may use, and whether to select and to step."""
        if self.solver is not None:
            fewest, most = min(FEWEST, len(self.sizes)), self._most([name, *rest], left, True)
            alone = self._layer(name, fewest, True) + self._seconds(rest, fewest, False)
            if most >= fewest or alone <= left:
                return max(most, fewest), True, True
        most = self._most([name, *rest], left, False)
        if most >= 1 or self._layer(name, 1, False) + self._ending(1) <= left:
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
        return sum(self._layer(name, batches, step) for name in names) + self._ending(batches)

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

    def _ending(self, batches: int) -> float:
        """Predict what comes after the layers."""
        return self._speed * (batches * self._last.batch + self._last.fixed)

    def _lasting(self) -> int:
        """Return the batches that there is time for in what comes after the layers."""
        left, each = self.deadline.left() - self._ending(0), self._ending(1) - self._ending(0)
        return int(left / max(each, 1e-12))

    def _predict(self, names: Iterable[str], last: Work | None) -> None:
        """Predict what some layers take, and what comes after them, with batches as they came."""
        self.names, self._after, self.twins.parts, self._speed = list(names), last, 1, self._forward()
        self._measure()

    def _finest(self) -> int:
        """Return into how many parts a batch is divided where there is not time for all samples."""
        return max(2, math.ceil(PARTS / len(self.sizes))) if self.all_samples >= 2 * PARTS else 1

    def _forward(self) -> float:
        """Measure how long an operation of a forward pass takes."""
        probe, twins = self.twins.probe.part(), self.twins
        seconds = []
        with torch.no_grad(), plain_forward():
            for _ in range(2):  # the first may be slower
                began = self.deadline.now()
                probe.map(torch.clone).through(twins.dense)
                seconds.append(self.deadline.now() - began)
        share = probe.samples() / max(twins.batches[0].part().samples(), 1)  # which was traced
        found = max(min(seconds), 1e-9) / max(share * sum(map(cost, twins.trace.events)), 1.0)
        return together.first(lambda: found)

    def _measure(self) -> None:
        """Predict what each layer takes with the batches as they are divided."""
        twins = self.twins
        self.sizes = [x.samples() for x in twins.pieces()]
        share = sum(self.sizes) / len(self.sizes) / max(twins.batches[0].samples(), 1)
        events = twins.trace.events
        passing = sum(map(cost, events))
        last = self._after or Work(RECALIBRATION * passing if self.recalibrate else 0.0)
        self._last = Work(share * last.batch, last.fixed)
        starts = {event.layer: i for i, event in reversed(list(enumerate(events))) if event.layer}
        layers = prunable(twins.sparse)
        self._works: dict[str, dict[str, Work]] = {}
        before = 0
        for name in self.names:
            weight = layers[name].weight
            at = starts.get(name, len(events) - 1)
            advance = 2 * share * sum(map(cost, events[min(before, at) : at + 1]))
            horizon = share * sum(map(cost, window(events, at, self.matching.horizon)))
            gram, fixed = selection(tuple(weight.shape), groups_of(layers[name]), events[at], self.masks)
            self._works[name] = {
                "advance": Work(advance, advance),  # the samples held back as well
                "select": Work(share * gram, fixed),
                **({"step": stepping(self.solver, horizon)} if self.solver is not None else {}),
            }
            before = at
        mine = self._works, self._last  # by this process's part of the first batch
        self._works, self._last = together.first(lambda: mine)
