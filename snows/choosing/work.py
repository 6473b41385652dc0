"""How much work a layer, or a stage of making a network smaller, is predicted to be."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from snows.choosing.orders import MOST, NOISY, Order
from snows.matching.consumers import readers
from snows.matching.metrics import RANK, ROUNDS
from snows.networks.channels import Group
from snows.networks.functions import known
from snows.networks.layers import Layer, groups_of
from snows.networks.trace import Event
from snows.solving.newton import Newton

ELEMENT = 50  # operations that reading and writing an element of an activation takes as long as


class Work(NamedTuple):
    """Predict what a stage of a layer takes, in operations: of each batch, and beside the batches."""

    batch: float
    fixed: float = 0.0


def cost(event: Event) -> float:
    """Predict one call of a function."""
    return event.flops + ELEMENT * math.prod(event.shape)


def window(events: list[Event], at: int, horizon: int | str) -> list[Event]:
    """List the events from a layer to the end of its horizon."""
    counted = [i for i in range(at, len(events)) if known(events[i].function).counted]
    last = counted[horizon] if isinstance(horizon, int) and horizon < len(counted) else len(events) - 1
    return events[at : last + 1]


def selection(shape: tuple[int, ...], groups: int, event: Event, masks: bool) -> tuple[float, float]:
    """Predict second moments of one batch, and beside them a least-squares fit, or a selector of masks.

    A selector takes two eigendecompositions and some 50 products.
    """
    rows, columns = shape[0] // groups, math.prod(shape[1:])
    positions = math.prod(event.shape) / shape[0]
    moments = positions * groups * (2 * columns * (columns + rows) + ELEMENT * columns)
    if not masks:
        return moments, groups * 4 * columns**2 * (columns + rows)
    return moments, groups * (10 * (columns**3 + rows**3) + 200 * rows * columns * (columns + rows))


def stepping(solver: Newton, horizon: float) -> Work:
    """Predict Newton's method: a gradient a batch, and the curvature's products and the search of one."""
    gradient, products = 4 * horizon, (5 + 3 * solver.max_iterations) * horizon
    if solver.gradient == "batch":
        return Work(solver.passes * (gradient + products), horizon)
    return Work(solver.passes * gradient, solver.passes * products + horizon)


def weighing(layers: dict[str, Layer], events: Sequence[Event], share: float) -> float:
    """Predict measuring the output sensitivity on a share of a batch: a backward pass, and subspaces."""
    work = 3 * share * sum(map(cost, events))
    for event in (x for x in events if x.layer):
        width = len(layers[event.layer].weight)
        positions, rank = share * math.prod(event.shape) / width, min(RANK, width)
        work += width**2 * (2 * positions + ROUNDS * 2 * rank) + ROUNDS * 10 * width * rank**2
    return work


def ordering(
    order: Order, groups: Sequence[Group], layers: dict[str, Layer], events: Sequence[Event], batches: int
) -> Work:
    """Predict what ordering the units of groups takes, of each of so many batches and beside them."""
    passing = sum(map(cost, events))
    if order in NOISY:
        return Work(3 * passing * MOST / batches)
    if order != "compensated" or not groups:
        return Work(0.0)
    shapes = {event.layer: event.shape for event in events if event.layer}
    batch, fixed = passing, 0.0
    for name in {x for group in groups for x in readers(group, layers)} & set(shapes):
        rows, columns = len(layers[name].weight), layers[name].weight[0].numel()
        positions = math.prod(shapes[name]) / rows
        batch += positions * groups_of(layers[name]) * columns * (4 * columns + ELEMENT)  # in float64
        fixed += 10 * columns**2 * (columns + rows)
    return Work(batch, fixed)
