"""Quadratic models of a loss at a weight: from all batches at once, or one a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from snows import together
from snows.solving.operators import Curvature, GaussNewton, Hessian, Loss

Build = Callable[[Loss, Tensor], Curvature]
CURVATURES: dict[str, type[GaussNewton] | type[Hessian]] = {"gauss-newton": GaussNewton, "hessian": Hessian}


class Losses(Protocol):
    """Give one loss a batch, made anew at each iteration."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Loss]: ...


def never(seconds: float) -> bool:
    """Say that it is not too late."""
    return False


class OverdueError(Exception):
    """Say that a step cannot be finished in time."""


class Timed:
    """Give losses for as long as there is time.

    Args:
        losses: one a batch.
        late: says whether so many seconds more are too many.
    """

    def __init__(self, losses: Losses, late: Callable[[float], bool]) -> None:
        self._losses, self._late = losses, late

    def __len__(self) -> int:
        return len(self._losses)

    def __iter__(self) -> Iterator[Loss]:
        """Give one loss after the other.

        Raises:
            OverdueError: it is too late for another.
        """
        for loss in self._losses:
            if self._late(0.0):
                raise OverdueError
            yield loss


class Model(NamedTuple):
    """Hold a quadratic model: its curvature, the loss that a search lowers, and the gradient."""

    H: Curvature
    loss: Callable[[Tensor], Tensor]
    gradient: Tensor


def from_all(losses: Losses, index: int, build: Build) -> Iterator[Callable[[Tensor], Model]]:
    """Give the one model of a pass, as a function of the weight it is built at.

    Its gradient is that of all batches, its curvature that of one, another each pass.

    Args:
        losses: one a batch.
        index: of the pass.
        build: makes the curvature.
    """
    yield partial(_pooled, losses, index, build)


def from_each(losses: Losses, index: int, build: Build) -> Iterator[Callable[[Tensor], Model]]:
    """Give one model a batch, as a function of the weight it is built at; arguments as in `from_all`."""
    yield from (partial(_single, loss, build) for loss in losses)


def _pooled(losses: Losses, index: int, build: Build, weight: Tensor) -> Model:
    gradient = torch.zeros_like(weight)
    for i, loss in enumerate(losses):
        if i == index % len(losses):
            chosen = loss
        else:
            gradient += _gradient(loss, weight)
    gradient = together.total(gradient)
    H = build(chosen, weight)  # last, so that its graph is not kept through the others'
    return Model(H, partial(_mean_loss, losses), (gradient + H.grad) / len(losses))


def _single(loss: Loss, build: Build, weight: Tensor) -> Model:
    H = build(loss, weight)
    return Model(H, partial(summed, loss), H.grad)


def _mean_loss(losses: Losses, weight: Tensor) -> Tensor:
    return together.total(torch.stack([loss(weight) for loss in losses]).mean())


def summed(loss: Loss, weight: Tensor) -> Tensor:
    """Compute a loss by the samples of all processes."""
    return together.total(loss(weight))


def _gradient(loss: Loss, weight: Tensor) -> Tensor:
    with torch.enable_grad():
        at = weight.detach().clone().requires_grad_()
        residuals = loss.residuals(at)
        (gradient,) = torch.autograd.grad(residuals, at, loss.weigh([r.detach() for r in residuals]))
    return gradient
