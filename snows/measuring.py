"""Times calls in alternation, so that interference affects all of them alike, and says whether the times tell them apart."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

ROUNDS = 5  # at least so many runs of each
REPEATS = 3  # a race that is not decided is run so many times in all
SCATTER = 0.1  # quartiles of a quotient that lie further apart than this, relative to its median, are said to scatter


class Race(NamedTuple):
    """What each call took.

    Attributes:
        rounds: milliseconds, one tuple a round, one entry a call.
    """

    rounds: list[tuple[float, ...]]

    @property
    def medians(self) -> list[float]:
        """Median milliseconds of each call."""
        return [statistics.median(times) for times in zip(*self.rounds, strict=True)]

    def scatters(self, slow: int, fast: int, margin: float = 1.0) -> bool:
        """Say whether the times do not tell if call `fast` is `margin` times as fast as call `slow`.

        That is where the quartiles of the rounds' quotients lie on both sides of `margin`, further apart than `SCATTER`. Calls within a few
        per cent of each other are not reported, because either choice costs little.
        """
        quotients = [times[slow] / times[fast] for times in self.rounds]
        low, median, high = statistics.quantiles(quotients, n=4)
        return low <= margin <= high and high - low > SCATTER * median


def race(runs: Sequence[Callable[[], object]], seconds: float, undecided: Callable[[Race], bool] = lambda race: False) -> Race:
    """Time calls in alternation.

    Args:
        runs: what to call.
        seconds: for how long, at least; each is called `ROUNDS` times at least.
        undecided: whether to go on for as long again, `REPEATS` times in all.
    """
    found = Race([])
    with torch.inference_mode():
        for run in runs:
            run()
        for _ in range(REPEATS):
            end = time.perf_counter() + seconds
            rounds = 0
            while rounds < ROUNDS or time.perf_counter() < end:
                found.rounds.append(tuple(_milliseconds(run) for run in runs))
                rounds += 1
            if not undecided(found):
                break
    return found


def _milliseconds(run: Callable[[], object]) -> float:
    _wait()
    began = time.perf_counter()
    run()
    _wait()
    return 1e3 * (time.perf_counter() - began)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
