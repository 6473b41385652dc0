"""Which unit is missed least once the layers that read it are fitted again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from snows.choosing.curves import Curve
from snows.matching.consumers import Consumer, Measured
from snows.matching.statistics import DAMPING
from snows.networks.channels import Group

SINGLE = 512  # units of a group up to which one goes at a time
STEP = 32  # of more units, what divides those that are left into those that go together


def compensated(measured: Measured, groups: Sequence[Group], damping: float = DAMPING) -> dict[str, Curve]:
    """Let the unit go whose removal costs least after its consumers are fitted again, and so on.

    Without the inputs S a layer with weight W that is fitted by least squares with an intercept loses
    ``tr(G W_S ([A⁻¹]_SS)⁻¹ W_Sᵀ)``, where A is the damped covariance of its inputs and G the metric of its
    output (optimal brain surgeon by blocks: Hassibi & Stork 1993; for units: OSSCAR, Meng et al. 2024).

    Args:
        measured: of the dense network.
        groups: with units that can be taken out.
        damping: added to the diagonal of A, relative to its mean.
    """
    found = {}
    for group, consumers in measured.consumers(groups):
        readers = [
            _Reader(consumer, consumer.inputs(group.columns[name]), damping)
            for name, consumer in consumers.items()
        ]
        found[group.name] = _curve(group.units, readers)
        del consumers, readers  # before the next pass over the batches gathers as much again
    return found


def _curve(units: int, readers: Sequence[_Reader]) -> Curve:
    """Take all units out, one or a few at a time."""
    slots = torch.arange(units)  # which unit stands where
    order, steps = list[Tensor](), [torch.zeros(1, dtype=torch.float64)]
    while left := len(slots):
        scores = sum((x.scores() for x in readers), torch.zeros(left, dtype=torch.float64))
        gone = scores.argsort(stable=True)[: 1 if units <= SINGLE else max(1, left // STEP)]
        steps.append(sum((x.lose(gone) for x in readers), torch.zeros(len(gone), dtype=torch.float64)))
        order.append(slots[gone])
        slots = _closed(gone, left, slots)
    return Curve(torch.cat(order), torch.cat(steps).clamp_min(0).cumsum(0))


def _moves(gone: Tensor, left: int) -> tuple[Tensor, Tensor]:
    """Say which slots at the end move to which that become free, so that those left stand at the front."""
    rest = left - len(gone)
    free = gone[gone < rest]
    stays = torch.ones(left, dtype=torch.bool)
    stays[gone] = False
    return rest + stays[rest:].nonzero().flatten(), free


def _closed(gone: Tensor, left: int, slots: Tensor) -> Tensor:
    source, target = _moves(gone, left)
    slots = slots.clone()
    slots[target] = slots[source]
    return slots[: left - len(gone)]


class _Reader:
    """Hold what is left of a consumer: A⁻¹ and Y with ``YᵀY = WᵀGW``, of the inputs that are still there.

    Inputs of no unit stand first, then those of the units that are left, unit by unit.

    Args:
        consumer: with second moments.
        inputs: int64 (units, entries), which of its inputs each unit feeds.
        damping: of A.
    """

    def __init__(self, consumer: Consumer, inputs: Tensor, damping: float) -> None:
        self.units, self.entries = inputs.shape
        inverse, weighed = consumer.inverse(damping), consumer.weighed()
        own = inputs.flatten().to(inverse.device)
        other = torch.ones(len(inverse), dtype=torch.bool, device=inverse.device)
        other[own] = False
        order = torch.cat([other.nonzero().flatten(), own])
        self.first = len(order) - len(own)
        self.inverse, self.weighed = inverse[order][:, order], weighed[:, order]

    def scores(self) -> Tensor:
        """Return what each unit costs that goes next: (units,)."""
        m, e = self.units, self.entries
        own = self.inverse[self.first :, self.first :]
        if e == 1:
            return (self.weighed[:, self.first :].square().sum(0) / own.diagonal()).cpu()
        blocks = own.unflatten(0, (m, e)).unflatten(2, (m, e)).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        weighed = self.weighed[:, self.first :].unflatten(1, (m, e)).permute(1, 2, 0)
        solved: Tensor = torch.linalg.solve_triangular(torch.linalg.cholesky(blocks), weighed, upper=False)
        return solved.square().sum((1, 2)).cpu()

    def lose(self, gone: Tensor) -> Tensor:
        """Take units out together, and return what each of them adds to the cost, in this order.

        Args:
            gone: int64 (n,), their slots.
        """
        at = self._inputs(gone)
        root = torch.linalg.cholesky(self.inverse[at][:, at])
        rows = torch.linalg.solve_triangular(root, self.inverse[at], upper=False)
        weights: Tensor = torch.linalg.solve_triangular(root, self.weighed[:, at].mT, upper=False)
        self.inverse.addmm_(rows.mT, rows, alpha=-1)
        self.weighed.addmm_(weights.mT, rows, alpha=-1)
        source, target = (self._inputs(x) for x in _moves(gone, self.units))
        self.inverse[target] = self.inverse[source]
        self.inverse[:, target] = self.inverse[:, source]
        self.weighed[:, target] = self.weighed[:, source]
        self.units -= len(gone)
        size = self.first + self.units * self.entries
        self.inverse, self.weighed = self.inverse[:size, :size], self.weighed[:, :size]
        return weights.square().sum(1).view(len(gone), self.entries).sum(1).cpu()

    def _inputs(self, slots: Tensor) -> Tensor:
        at = self.first + slots[:, None] * self.entries + torch.arange(self.entries)
        return at.flatten().to(self.inverse.device)
