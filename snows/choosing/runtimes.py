"""Whole networks timed beside each other, in the runtime that they are made for."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from snows.choosing.compiling import RUNTIMES as RUNTIMES
from snows.choosing.compiling import Runtime as Runtime
from snows.choosing.compiling import UnavailableError, ready
from snows.choosing.measuring import Stopwatch
from snows.networks.batches import Batch
from snows.networks.copies import as_it_came
from snows.networks.edits import Edit
from snows.networks.layers import copied
from snows.networks.twins import Twins


class Pair(NamedTuple):
    """Hold what the dense network and a smaller one took, in turns.

    Attributes:
        dense: the dense network's median milliseconds.
        share: median of the rounds' quotients.
        error: how far that median may be off, relative to it: ``1.57 (q₃ - q₁) / √n`` of n rounds (McGill et
            al. 1978).
    """

    dense: float
    share: float
    error: float

    @property
    def small(self) -> float:
        """The smaller network's milliseconds: its share of the dense network's."""
        return self.dense * self.share


@dataclass
class Clock:
    """Time a network as it came, and cut copies of it.

    Attributes:
        twins: of the network.
        example: what is run, on the network's device.
        runtime: that they are made ready in.
        stopwatch: that times calls in turns.
    """

    twins: Twins
    example: Batch
    runtime: Runtime
    stopwatch: Stopwatch = field(default_factory=Stopwatch)

    def __post_init__(self) -> None:
        self._dense = self._ready(self.twins.sparse, [])

    def dense(self) -> float:
        """Return the median milliseconds of the network as it came."""
        with torch.no_grad():
            return self.stopwatch.network([partial(self.example.through, self._dense)]).medians[0]

    def beside(self, edits: Sequence[Edit]) -> Pair:
        """Time the network as it came and one with edits, in turns."""
        nets = self._dense, self._ready(self.twins.sparse, edits)
        with torch.no_grad():
            race = self.stopwatch.network([partial(self.example.through, x) for x in nets])
        low, share, high = statistics.quantiles([small / dense for dense, small in race.rounds], n=4)
        return Pair(race.medians[0], share, 1.57 * (high - low) / share / len(race.rounds) ** 0.5)

    def _ready(self, net: nn.Module, edits: Sequence[Edit]) -> nn.Module:
        """Return a copy with edits, as a user would run it."""
        net = copied(net)
        for edit in edits:
            edit.apply(net)
        net = as_it_came(net, self.twins.model, (), {})
        try:
            return ready(net, self.example, self.runtime)
        except UnavailableError as error:
            raise ValueError(f'prune: {error}; ask for the milliseconds of runtime="eager"') from error


def example_of(batch: Batch, images: int | None, device: torch.device) -> Batch:
    """Return the batch that is timed: so many samples, repeated where there are fewer.

    Args:
        batch: of the calibration.
        images: how many; None for as many as it has.
        device: of the network.

    Raises:
        ValueError: its tensors are no samples, so that no other number of them can be made.
    """
    batch, have = batch.to(device), batch.samples()
    if images is None or images == have:
        return batch
    if images < have:
        return batch.split(images)[0]

    def longer(x: Any) -> Any:
        return torch.cat([x] * -(-images // have))[:images] if x.ndim and len(x) == have else x

    return batch.map(longer)
