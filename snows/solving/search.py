"""A line search by backtracking."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class Search(NamedTuple):
    """Say where a line search ended.

    The step's size (0.0 if nothing helped), the loss there, and how many losses it asked for.
    """

    size: float
    value: float
    tries: int


def armijo(
    loss: Callable[[Tensor], Tensor],
    weight: Tensor,
    direction: Tensor,
    *,
    value: float,
    slope: float,
    c: float = 1e-4,
    shrink: float = 0.5,
    tries: int = 6,
) -> Search:
    """Backtrack from a full step until the loss falls by a share of what its slope promises.

    The rule is Armijo's (1966).

    Args:
        loss: of a weight.
        weight: where the direction starts.
        direction: of descent; same shape.
        value: the loss at `weight`.
        slope: ``<gradient, direction>``; a search along a slope that is not negative fails at once.
        c: share of the promised decrease to ask for.
        shrink: factor between tries.
        tries: the most losses to evaluate.
    """
    if not slope < 0:
        return Search(0.0, value, 0)
    size = 1.0
    for attempt in range(1, tries + 1):
        found = loss(weight + size * direction).item()
        if found <= value + c * size * slope:  # False for NaN
            return Search(size, found, attempt)
        size *= shrink
    return Search(0.0, value, tries)


def damping_factor(slope: float, search: Search, value: float) -> float:
    """Say by how much the damping changes (Levenberg-Marquardt).

    It follows how well the model predicted the decrease.

    The direction solves the damped system in its Krylov space, so its quadratic model falls by half its
    slope.
    """
    predicted = slope * search.size * (1 - search.size / 2)
    agreement = (search.value - value) / predicted if predicted < 0 else 0.0
    return 4.0 if agreement < 0.25 else 0.5 if agreement > 0.75 else 1.0
