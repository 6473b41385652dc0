"""Divisions of a limited cost over widths, and exchanges between them."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from snows.choosing.costs import Costs, Of
from snows.choosing.widths import Widths

EQUAL = 1e-9  # of a number: what rounding leaves between two that are the same
STEPS = 4  # allowed widths by which an exchange moves one width down or up
SWEEPS = 20
WORTH = 1e-4  # of the predicted loss, what an exchange must save


class Division:
    """Hold a width for each option, and know what every change of one would save.

    Args:
        options: what may become narrower, and to what; all begin as wide as they are.
        costs: of the network at any widths.
        limit: of the cost.
        of: what is counted.
    """

    def __init__(self, options: Sequence[Widths], costs: Costs, limit: float, of: Of) -> None:
        self.options = {x.name: x for x in options}
        self.costs, self.limit, self.of = costs, limit, of
        self.at = dict.fromkeys(self.options, 0)  # places in `Widths.allowed`
        self.widths = {x.name: int(x.allowed[0]) for x in options}
        self.total, self.loss = costs.total(of, self.widths), 0.0
        self.losses = {x.name: x.loss.numpy() for x in options}
        self._saved: dict[str, NDArray[np.float64]] = {}

    @property
    def over(self) -> float:
        """What has to be saved to meet the limit; at most 0 where it is met."""
        return self.total - self.limit

    def moved(self, name: str, to: int) -> Division:
        """Return another division, with one width in another place of those that are allowed."""
        other, option, losses = copy.copy(self), self.options[name], self.losses[name]
        other.at = self.at | {name: to}
        other.widths = self.widths | {name: int(option.allowed[to])}
        other.total = self.total - float(self.saved(name)[to])
        other.loss = self.loss + float(losses[to] - losses[self.at[name]])
        stale = self.costs.beside(name)
        other._saved = {x: saved for x, saved in self._saved.items() if x not in stale}
        return other

    def saved(self, name: str) -> NDArray[np.float64]:
        """Return what is saved at each width that an option may have, below 0 at wider ones."""
        if name not in self._saved:
            allowed = self.options[name].allowed
            self._saved[name] = self.costs.saved(self.of, self.widths, name, allowed).numpy()
        return self._saved[name]

    def step(self, name: str) -> tuple[float, str, int]:
        """Find the step to a narrower width that loses least per cost saved.

        It may end at any narrower width, so that a curve that is not convex is followed along its lower hull.

        Returns:
            The loss per cost saved, infinite where no step saves anything; the option; where the step ends.
        """
        losses, at = self.losses[name], self.at[name]
        saved = self.saved(name)[at + 1 :]
        rates = np.full(len(saved), np.inf)
        np.divide(losses[at + 1 :] - losses[at], saved, out=rates, where=saved > 0)
        best = float(rates.min()) if len(rates) else math.inf
        if math.isinf(best):
            return best, name, at
        return best, name, at + 1 + int((rates <= best * (1 + EQUAL)).argmax())  # the shortest such

    def fitting(self, name: str) -> tuple[float, str, int]:
        """Find the widest width with which the limit is met, narrower or wider than the present one.

        Returns:
            What the loss changes by, infinite where there is none; the option; the place of that width.
        """
        losses, at = self.losses[name], self.at[name]
        fits = self.saved(name) >= self.over
        to = int(fits.argmax())
        return (float(losses[to] - losses[at]), name, to) if fits[to] else (math.inf, name, at)


def settled(division: Division, fixed: str = "") -> Division:
    """Meet the limit: narrow widths by the best steps, then widen those that there is room for.

    Every division on the way that one more step brings within the limit is a candidate.

    Args:
        division: whose limit can be met.
        fixed: an option that is not narrowed.

    Returns:
        The candidate with the least loss; the division as it is where there is none.
    """
    names = [x for x in division.options if x != fixed]
    found, now = list[Division](), division
    while now.over > 0 and names:
        change, name, to = min(map(now.fitting, names))
        if change < math.inf:
            found.append(now.moved(name, to))
        rate, name, to = min(map(now.step, names))
        if rate == math.inf:
            break
        now = now.moved(name, to)
    found = [_filled(x) for x in (*found, now) if x.over <= 0]
    return min(found, key=lambda x: x.loss, default=division)


def _filled(division: Division) -> Division:
    """Widen, the most loss first, as long as there is room."""
    while True:
        change, name, to = min(map(division.fitting, division.options))
        if change >= 0:
            return division
        division = division.moved(name, to)


def exchanged(division: Division) -> Division:
    """Lower the predicted loss: move one width, let the others settle, and keep what is better.

    Args:
        division: within the limit.
    """
    for _ in range(SWEEPS):
        before = division
        for name, option in division.options.items():
            at = division.at[name]
            for to in range(max(0, at - STEPS), min(len(option.allowed), at + STEPS + 1)):
                other = settled(division.moved(name, to), name)
                if other.over <= 0 and other.loss < (1 - WORTH) * division.loss:
                    division = other
        if division is before:
            break
    return division
