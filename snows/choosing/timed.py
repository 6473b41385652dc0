"""A choice that is timed as a whole, and made again until its milliseconds are what was asked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from snows.choosing.costs import Costs
from snows.choosing.runtimes import Clock, Pair
from snows.networks.edits import Edit

NEAR = 0.03  # of the share asked for, or how far off its time may be if that is more: near enough
TRIES = 5


class Chosen(Protocol):
    """Stand for a choice of what stays."""

    @property
    def edits(self) -> Sequence[Edit]:
        """The edits that leave it."""
        ...


Choice = TypeVar("Choice", bound=Chosen)


def timed(
    clock: Clock,
    costs: Costs,
    share: float,
    choose: Callable[[Costs, float], Choice],
    doing: Callable[[str], None],
) -> tuple[Choice, Pair, list[str]]:
    """Choose so that a share of the network's milliseconds stays, measured on the whole network.

    A choice by the predicted milliseconds is timed beside the network as it came. Where it is not near the
    share, the choice is made again by the share of the prediction that would have been, until it is.

    Args:
        clock: times networks.
        costs: predicted milliseconds at any widths.
        share: of the milliseconds that stays.
        choose: makes a choice that leaves at most a share of the predicted milliseconds.
        doing: is told what is done.

    Returns:
        The choice that came nearest, not above the share if that can be; its times; sentences on what falls
        short.

    Raises:
        ValueError: the smallest choice is predicted to take more.
    """
    asked, best = share, None
    for turn in range(TRIES):
        try:
            choice = choose(costs, asked)
        except ValueError:
            if best is None:
                raise
            break  # no smaller network is possible
        doing(f"timing what was chosen, {turn + 1} of at most {TRIES}")
        pair = clock.beside(choice.edits)
        if best is None or _distance(pair.share, share) < _distance(best[1].share, share):
            best = choice, pair
        if abs(pair.share / share - 1) <= max(NEAR, pair.error):
            break
        asked = min(asked * share / pair.share, 0.999)
    assert best is not None
    choice, pair = best
    notes = []
    if abs(pair.share / share - 1) > max(NEAR, pair.error):
        notes.append(
            f"{100 * share:g} % of the milliseconds were asked for; the network that came nearest takes "
            f"{100 * pair.share:.1f} %."
        )
    return choice, pair, notes


def _distance(found: float, share: float) -> float:
    """Say how far a share is from what was asked; above it counts twice."""
    return max(2 * (found - share), share - found)
