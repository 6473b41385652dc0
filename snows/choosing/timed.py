"""A choice that is timed as a whole, and made again until its milliseconds are what was asked."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from snows.choosing.choices import Choice
from snows.choosing.costs import Costs
from snows.choosing.runtimes import Clock, Pair

NEAR = 0.03  # of the share asked for, or how far off its time may be if that is more: near enough
NOISE = 0.15  # of a time: what is not known better than that is not chosen by
TRIES = 5
MOST_SAVED = 3.0  # times what packed weights save in a layer alone, that they may save in the network


class NoisyError(ValueError):
    """Say that times scatter too much to choose by, and how much.

    Args:
        error: how far a median may be off, relative to it.
    """

    def __init__(self, error: float) -> None:
        self.error = error
        super().__init__(
            f"Budget: expected times whose median is known to {NOISE:.0%} or better, got one that is known "
            f"to {error:.1%} although it was taken repeatedly; ask on a quieter machine, for more images at "
            "a time, or for a share of the MACs"
        )


class Nearest(NamedTuple):
    """Hold the choice that came nearest, not above the share if that can be.

    Attributes:
        choice: with a note where it falls short.
        pair: its times.
        packed: of what packed weights save in layers alone, the part that they were predicted to save.
        correction: its time, relative to the one predicted for it.
    """

    choice: Choice
    pair: Pair
    packed: float
    correction: float


def timed(
    clock: Clock,
    predicted: Callable[[float], Costs],
    share: float,
    choose: Callable[[Costs, float], Choice],
    doing: Callable[[str], None],
    packed: float = 1.0,
) -> Nearest:
    """Choose so that a share of the network's milliseconds stays, measured on the whole network.

    A choice by the predicted milliseconds is timed beside the network as it came. Where it is not near the
    share, the choice is made again, by the share of the prediction that would have been, until it is. Packed
    weights that save another part of the milliseconds in the network than in a layer alone are predicted to
    save that part from then on.

    Args:
        clock: times networks.
        predicted: milliseconds at any widths, by the part of what packed weights save in a layer alone that
            they save in the network.
        share: of the milliseconds that stays.
        choose: makes a choice that leaves at most a share of the predicted milliseconds.
        doing: is told what is done.
        packed: that part, to begin with.

    Raises:
        ValueError: the smallest choice is predicted to take more.
        NoisyError: times scatter too much to choose by.
    """
    asked = share
    best: Nearest | None = None
    for turn in range(TRIES):
        costs = predicted(packed)
        try:
            choice = choose(costs, asked)
        except ValueError:
            if best is None:
                raise
            break  # no smaller network is possible
        doing(f"timing what was chosen, {turn + 1} of at most {TRIES}")
        pair = clock.beside(choice)
        if pair.error > NOISE:
            raise NoisyError(pair.error)
        if best is None or _distance(pair.share, share) < _distance(best.pair.share, share):
            predicted_ms = costs.total("latency", choice.widths)
            best = Nearest(choice, pair, packed, pair.small / predicted_ms)
        if abs(pair.share / share - 1) <= max(NEAR, pair.error):
            break
        if choice.patterns:
            packed = part_saved(predicted(1.0), choice, pair)
            costs = predicted(packed)
        left = costs.total("latency", choice.widths) / costs.total("latency")
        asked = min(share * left / pair.share, 0.999)
    assert best is not None
    if abs(best.pair.share / share - 1) > max(NEAR, best.pair.error):
        best.choice.notes.append(
            f"{100 * share:g} % of the milliseconds were asked for; the network that came nearest takes "
            f"{100 * best.pair.share:.1f} %."
        )
    return best


def part_saved(costs: Costs, choice: Choice, pair: Pair) -> float:
    """Return of what packed weights save in layers alone the part that they save in the network."""
    alone = costs.total("latency", choice.without_zeros) - costs.total("latency", choice.widths)
    return min(max(pair.dense * (pair.without_zeros - pair.share) / alone, 0.0), MOST_SAVED)


def _distance(found: float, share: float) -> float:
    """Say how far a share is from what was asked; above it counts twice."""
    return max(2 * (found - share), share - found)
