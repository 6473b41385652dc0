"""When a call has to end."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable

import torch

from snows import together

MARGIN = 0.02  # of the limit, for what comes after the last layer: closing and writing the network


def load() -> None:
    """Load what PyTorch loads in the first backward pass of a process, which takes seconds."""
    importlib.import_module("torch.fx.experimental.symbolic_shapes")


class Deadline:
    """Tell how much of a limited time is left.

    Args:
        seconds: from now.
        clock: gives the time in seconds.
    """

    def __init__(self, seconds: float, clock: Callable[[], float] = time.perf_counter) -> None:
        self.seconds, self._clock = seconds, clock
        self._began = self.now()
        self._end = self._began + (1 - MARGIN) * seconds

    def part(self, seconds: float) -> Deadline:
        """Return a deadline so many seconds from now, and not after this one."""
        found = Deadline(self.seconds, self._clock)
        found._end = min(self._end, self.now() + seconds)
        return found

    def now(self) -> float:
        """Read the clock, after a GPU has done what it was given."""
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        return together.first(self._clock)

    def gone(self) -> float:
        """Return the seconds since it was set."""
        return self.now() - self._began

    def left(self) -> float:
        """Return the seconds that are left; below 0 where it is too late."""
        return self._end - self.now()
