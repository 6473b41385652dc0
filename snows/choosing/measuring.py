"""The stopwatch: calls timed in alternation, and whether their times tell them apart.

Interference affects all calls alike.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

ROUNDS = 5  # at least so many runs of each
REPEATS = 3  # a race that is not decided is run so many times in all
# quartiles of a quotient that lie further apart than this, relative to its median, are said to scatter
SCATTER = 0.1


class Race(NamedTuple):
    """Hold what each call took.

    Attributes:
        rounds: milliseconds, one tuple a round, one entry a call.
    """

    rounds: list[tuple[float, ...]]

    def quartiles(self, call: int) -> list[float]:
        """Return the quartiles of a call's milliseconds."""
        return statistics.quantiles([times[call] for times in self.rounds], n=4)

    @property
    def medians(self) -> list[float]:
        """Median milliseconds of each call."""
        return [statistics.median(times) for times in zip(*self.rounds, strict=True)]

    def each(self, calls: int) -> Race:
        """Return the times of one call, where so many were timed as one."""
        return Race([tuple(ms / calls for ms in times) for times in self.rounds])

    def told(self) -> Race:
        """Return the race, where the clock could tell the times.

        Raises:
            ValueError: a call took no time.
        """
        if min(map(min, self.rounds)) <= 0:
            raise ValueError(
                "measuring: expected a clock that tells how long a call takes, got a time of 0; ask for more "
                "images at a time, or for a share of the MACs"
            )
        return self

    def scatters(self, slow: int, fast: int, margin: float = 1.0) -> bool:
        """Say whether the times do not tell if call `fast` is `margin` times as fast as call `slow`.

        That is where the quartiles of the rounds' quotients lie on both sides of `margin`, further apart than
        `SCATTER`. Calls within a few per cent of each other are not reported, because either choice costs
        little.
        """
        quotients = [times[slow] / times[fast] for times in self.rounds]
        low, median, high = statistics.quantiles(quotients, n=4)
        return low <= margin <= high and high - low > SCATTER * median


@dataclass(frozen=True)
class Stopwatch:
    """Time calls in alternation.

    Attributes:
        layer_seconds: for how long a layer is timed, at least.
        network_seconds: for how long a network is timed, at least.
        rounds: each call is run so often, at least.
        repeats: a race that is not decided is run so many times in all.
    """

    layer_seconds: float = 0.15
    network_seconds: float = 1.0
    rounds: int = ROUNDS
    repeats: int = REPEATS

    def layer(
        self, runs: Sequence[Callable[[], object]], undecided: Callable[[Race], bool] = lambda race: False
    ) -> Race:
        """Time ways to run one layer."""
        return self.race(runs, self.layer_seconds, undecided)

    def network(
        self, runs: Sequence[Callable[[], object]], undecided: Callable[[Race], bool] = lambda race: False
    ) -> Race:
        """Time ways to run a network."""
        return self.race(runs, self.network_seconds, undecided)

    def race(
        self,
        runs: Sequence[Callable[[], object]],
        seconds: float = 0.0,
        undecided: Callable[[Race], bool] = lambda race: False,
    ) -> Race:
        """Time calls in turns, after one run of each that does not count.

        Args:
            runs: what to call.
            seconds: for how long, at least.
            undecided: whether to go on for as long again.
        """
        found = Race([])
        for run in runs:
            run()
        for _ in range(self.repeats):
            end = time.perf_counter() + seconds
            rounds = 0
            while rounds < self.rounds or time.perf_counter() < end:
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
