"""A limited time, shared by deciding what goes of a network, means, least squares and the walk."""

from __future__ import annotations

from collections.abc import Sequence

from snows.choosing.allowance import Need, Pace
from snows.choosing.budgets import Budget
from snows.choosing.deadline import Deadline
from snows.choosing.work import Work
from snows.matching.losses import Matching
from snows.networks.twins import Twins
from snows.solving.newton import Newton

APPLYING = 6  # forward passes that cutting and tracing a network takes as long as
JUDGING = 2  # and that measuring what a stage left of the loss does


def part(own: int, needs: Sequence[Need], left: float) -> float:
    """Return the seconds of one of several stages, 0 where there is not time for it.

    Each gets the least that it needs, the last ones nothing where that is not enough for all; what is left
    over is shared in proportion to what more they need.

    Args:
        own: number of the stage.
        needs: of all stages that are left, those first that may least be left out.
        left: seconds for all of them.
    """
    while len(needs) > 1 and sum(x.least for x in needs) > left:
        needs = needs[:-1]
    if own >= len(needs):
        return 0.0
    spare, more = left - sum(x.least for x in needs), sum(x.most - x.least for x in needs)
    return needs[own].least + spare * ((needs[own].most - needs[own].least) / more if more > 0 else 1.0)


class Stages:
    """Share what is left of a limited time among stages.

    Args:
        deadline: when all has to be done.
        twins: the networks and batches.
        goal: what is asked.
        solver: of the walk; None for no steps.
        matching: of the walk.
        recalibrate: whether BatchNorm's statistics are corrected after each walk.
    """

    def __init__(
        self,
        deadline: Deadline,
        twins: Twins,
        goal: Budget,
        solver: Newton | None,
        matching: Matching,
        recalibrate: bool,
    ) -> None:
        self.deadline, self.twins, self.goal = deadline, twins, goal
        self.began = deadline.now()
        self.deciding = Pace(deadline, twins, None, matching, False)
        self.masks = goal.then is not None or bool(goal.masks)
        self.sweeps = Pace(deadline, twins, None, matching, recalibrate, False)
        self.walk = Pace(deadline, twins, solver, matching, recalibrate, self.masks)

    def decide(self, names: list[str], ordering: Work) -> Pace:
        """Begin the pace of the statistics that are decided by; groups have been found.

        Args:
            names: of layers that may be treated.
            ordering: of the units of groups.
        """
        own, sweep = self.deciding.need(names, last=ordering), self.sweeps.need(self.twins.order)
        applying = self.deadline.now() - self.began + APPLYING * self.deciding.passing
        seconds = part(0, [own, sweep, *self._later(sweep)], self.deadline.left() - applying)
        self.deciding.begin(names, max(seconds, own.least), ordering)
        return self.deciding

    def late(self) -> bool:
        """Say whether no time is left."""
        return self.deadline.left() <= 0

    def sweep(self, names: list[str], weights: bool) -> bool:
        """Begin the pace of means, or of weights; say whether there is time for that.

        Args:
            names: of layers that are not on disk.
            weights: whether they are fitted too.
        """
        if self.late():
            return False
        own = self.sweeps.need(names)
        later = self._later(own)
        needs, at = (later, later.index(own)) if weights else ([own, *later], 0)
        self.sweeps.begin(names, part(at, needs, self.deadline.left() - self._judging()))
        return self.sweeps.enough()

    def walking(self) -> Pace:
        """Return the pace of the walk, which leaves the time to measure what it left of the loss."""
        if self.sweeps.names:
            self.walk.whole = self.deadline.part(self.deadline.left() - self._judging())
        return self.walk

    def _judging(self) -> float:
        return JUDGING * self.sweeps.passing

    def _later(self, sweep: Need) -> list[Need]:
        """List what comes after means; least squares may be left out before masks, but after steps."""
        walk = self.walk.need(self.twins.order, not self.masks)
        beside = self._judging() + (self.walk.weighing() if self.walk.solver is not None else 0.0)
        walk = Need(*(x + beside for x in walk))
        walks = [walk] if self.masks or self.walk.solver is not None else []
        sweeps = [sweep] if self.goal.refit else []
        return [*walks, *sweeps] if self.masks else [*sweeps, *walks]
