"""Whole networks timed beside each other, in the runtime that they are made for."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import nn

from snows import together
from snows.choosing.choices import Choice
from snows.choosing.compiling import Runtime, UnavailableError, ready
from snows.choosing.measuring import Race, Stopwatch
from snows.choosing.sketches import folded, folded_and_packed, masked
from snows.networks.batches import Batch
from snows.networks.copies import as_it_came
from snows.networks.layers import copied
from snows.networks.twins import Twins
from snows.ops.precision import as_given

KNOWN = 0.03  # of a share: known so well it is measured long enough


class Pair(NamedTuple):
    """Hold what the dense network and a smaller one took, in turns.

    Attributes:
        dense: the dense network's median milliseconds.
        share: median of the rounds' quotients.
        error: how far that median may be off, relative to it: ``1.57 (q₃ - q₁) / √n`` of n rounds (McGill et
            al. 1978).
        without_zeros: the share of the smaller network with dense weights in place of packed ones.
    """

    dense: float
    share: float
    error: float
    without_zeros: float

    @property
    def small(self) -> float:
        """The smaller network's milliseconds: its share of the dense network's."""
        return self.dense * self.share


@dataclass
class Clock:
    """Time a network as it came, and copies of it as they were chosen.

    Attributes:
        twins: of the network.
        example: what is run, on the network's device.
        runtime: that they are made ready in.
        folded: time all of them as `deploy` would leave them, the network as it came too: with normalisations
            folded, and layers packed that get zeros.
        stopwatch: that times calls in turns.
    """

    twins: Twins
    example: Batch
    runtime: Runtime
    folded: bool = False
    stopwatch: Stopwatch = field(default_factory=Stopwatch)

    def dense(self) -> float:
        """Return the median milliseconds of the network as it came."""
        return together.first(self._dense_ms)

    def beside(self, choice: Choice) -> Pair:
        """Time the network as it came and as it was chosen, in turns, and again while times scatter."""
        return together.first(partial(self._pair, choice))

    @cached_property
    def _dense(self) -> nn.Module:
        """The network as it came, as a user would run it."""
        return self._ready(self._networks(Choice({}))[0])

    @as_given()
    def _dense_ms(self) -> float:
        with torch.no_grad():
            return self.stopwatch.network([partial(self.example.through, self._dense)]).told().medians[0]

    @as_given()
    def _pair(self, choice: Choice) -> Pair:
        nets = [self._dense, *map(self._ready, self._networks(choice))]
        with torch.no_grad():
            race = self.stopwatch.network([partial(self.example.through, x) for x in nets], _unsure)
        share, error = _shares(race.told(), 1)
        return Pair(race.medians[0], share, error, _shares(race, len(nets) - 1)[0])

    def _networks(self, choice: Choice) -> list[nn.Module]:
        """Return the network as it was chosen, and with dense weights if that is another."""
        net = copied(self.twins.sparse)
        for edit in choice.edits:
            edit.apply(net)
        net = as_it_came(net, self.twins.model, (), masked(net, choice.patterns))
        if choice.patterns:
            dense, packed = folded_and_packed(net, self.example, choice.patterns)
            return [packed, dense]
        return [folded(net, self.example) if self.folded else net]

    def _ready(self, net: nn.Module) -> nn.Module:
        """Return a network as a user would run it."""
        try:
            return ready(net, self.example, self.runtime)
        except UnavailableError as error:
            raise ValueError(f'prune: {error}; ask for the milliseconds of runtime="eager"') from error


def _unsure(race: Race) -> bool:
    """Say whether to time on."""
    return _shares(race.told(), 1)[1] > KNOWN


def _shares(race: Race, call: int) -> tuple[float, float]:
    """Return the median of what a call takes as a share of the first one, and how far off it may be."""
    low, share, high = statistics.quantiles([row[call] / row[0] for row in race.rounds], n=4)
    return share, 1.57 * (high - low) / share / len(race.rounds) ** 0.5


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
