"""Conjugate gradients, a line search, and Newton's method on the kept weights."""

from __future__ import annotations

import enum
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from snows import ops, reference
from snows.operators import Curvature, Factors, GaussNewton, Hessian, Kronecker, LinearOperator, Loss, Restricted, RowBlocks, trace
from snows.sparsity import MaskedWeight


class Stop(enum.Enum):
    """Why conjugate gradients ended; the value is the sentence to read."""

    CONVERGED = "the residual fell below rtol times the right-hand side"
    ITERATIONS = "max_iterations was reached; raise it, or rtol, if the step matters"
    NEGATIVE_CURVATURE = "a direction of negative or zero curvature was met; the descent found so far is returned"
    ZERO = "the right-hand side is zero: nothing to solve"
    NOT_FINITE = "a number stopped being finite; look at the loss and its scale"


_STOPS = {
    reference.RUNNING: Stop.ITERATIONS, reference.CONVERGED: Stop.CONVERGED, reference.ZERO: Stop.ZERO,
    reference.NEGATIVE_CURVATURE: Stop.NEGATIVE_CURVATURE, reference.NOT_FINITE: Stop.NOT_FINITE,
}


class Solution(NamedTuple):
    """What conjugate gradients found.

    Attributes:
        x: the solution, shaped like the right-hand side.
        iterations: made until it stopped, a product each.
        residual: ``|b - A x| / |b|`` by the recurrence.
        stop: why it ended.
    """

    x: Tensor
    iterations: int
    residual: float
    stop: Stop


def cg(A: LinearOperator, b: Tensor, *, preconditioner: LinearOperator | None = None, rtol: float = 1e-2,
       max_iterations: int = 50) -> Solution:
    """Solve ``A x = b`` from zero by preconditioned conjugate gradients (Hestenes & Stiefel 1952).

    Args:
        A: symmetric; where it is not positive definite the iteration leaves at the first direction that shows it
            (Steihaug 1983), with that direction itself if it is the first.
        b: the right-hand side, any shape.
        preconditioner: symmetric positive definite on the space in which `b` lies, near to the inverse of `A`.
        rtol: the relative residual (2-norm, not preconditioned) at which to stop.
        max_iterations: the most products with `A`.
    """
    r = b.clone(memory_format=torch.contiguous_format)
    x, p = torch.zeros_like(r), torch.zeros_like(r)
    state = _start(r)
    for iteration in range(max_iterations):
        if _look(iteration, r) and state[reference.STATUS].item() != reference.RUNNING:
            break  # until then a state that has stopped leaves everything as it is
        ops.cg_direction(p, r, r if preconditioner is None else preconditioner @ r, state)
        ops.cg_update(x, r, p, A @ p, state, rtol)
    status, iterations, _, rr, bb = state.tolist()
    stop = _STOPS[int(status)]
    residual = math.nan if stop is Stop.NOT_FINITE else math.sqrt(rr / bb) if bb > 0 else 0.0
    return Solution(x, int(iterations), residual, stop)


def _start(b: Tensor) -> Tensor:
    """The scalars of conjugate gradients before the first direction, which r·z = ∞ makes ``p = z``."""
    bb = (b * b).sum().double()
    status = torch.where(bb == 0, reference.ZERO, torch.where(bb.isfinite(), reference.RUNNING, reference.NOT_FINITE))
    zero = torch.zeros_like(bb)
    return torch.stack([status.double(), zero, zero + math.inf, bb, bb])


def _look(iteration: int, b: Tensor) -> bool:
    """Whether to read a scalar before this iteration: always on a CPU; after 7, 15, … elsewhere, where the host has to wait for it."""
    every = 1 if b.is_cpu else 8
    return iteration % every == every - 1


def batched_cg(gram: Tensor, right: Tensor, mask: Tensor, *, damping: float = 0.01, rtol: float = 1e-4,
               max_iterations: int = 200) -> Tensor:
    """Solve one masked system per row, all sharing a Gram matrix: ``P (A + λI) P x = P b`` with P the row's mask.

    Rows stop by themselves; the diagonal of `A` preconditions.

    Args:
        gram: A, (groups, in, in), positive semi-definite.
        right: b, (groups, rows, in).
        mask: bool, (groups, rows, in).
        damping: λ relative to the mean diagonal of `A`.
        rtol: the relative residual at which a row is done.
        max_iterations: the most products.

    Returns:
        x, (groups, rows, in), zero off the mask.
    """
    matrix = gram.clone()
    diagonal = matrix.diagonal(dim1=-2, dim2=-1)
    diagonal += damping * diagonal.mean(-1, keepdim=True)
    inverse = diagonal.clamp_min(torch.finfo(gram.dtype).tiny).reciprocal()
    r = (right * mask).contiguous()
    x, p = torch.zeros_like(r), r * inverse.unsqueeze(-2)
    rz, target = (r * p).sum(-1).double(), rtol * rtol * (r * r).sum(-1).double()
    for iteration in range(max_iterations):
        if _look(iteration, r) and not (rz > 0).any():
            break
        ops.batched_cg_update(x, r, p, rz, p @ matrix, mask, inverse, target)
    return x


class Search(NamedTuple):
    """Where a line search ended: the step's size (0.0 if nothing helped), the loss there, the losses it asked for."""

    size: float
    value: float
    tries: int


def armijo(loss: Callable[[Tensor], Tensor], weight: Tensor, direction: Tensor, *, value: float, slope: float,
           c: float = 1e-4, shrink: float = 0.5, tries: int = 6) -> Search:
    """Backtrack from a full step until the loss falls by the share `c` of what its slope promises (Armijo 1966).

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


@dataclass(frozen=True)
class Step:
    """One Newton step, as it happened.

    Attributes:
        before, after: the loss that the line search lowered, at the step's start and end.
        iterations: of conjugate gradients.
        stop: why they ended.
        size: of the step; 0.0 if the search failed and nothing moved.
        damping: relative to the curvature's mean, as used.
        seconds: wall time.
    """

    before: float
    after: float
    iterations: int
    stop: Stop
    size: float
    damping: float
    seconds: float


class Fit(NamedTuple):
    """What Newton's method made of a layer.

    Attributes:
        masked: the best weight on the held-back samples (the last one without them), and its mask.
        steps: in order.
        before, after: the loss on the held-back samples at the start and at that weight; NaN without them.
    """

    masked: MaskedWeight
    steps: list[Step]
    before: float
    after: float


class Batches(Protocol):
    """One loss a batch, made anew at each iteration."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Loss]: ...


@dataclass(frozen=True)
class Newton:
    """Hessian-free Newton on the kept weights.

    Attributes:
        gradient: "all": a step takes its gradient from all batches and its curvature from one, another each pass
            (sub-sampled Newton, Byrd et al. 2011), and is searched on the held-back samples; "batch": one step a batch
            with gradient, curvature and search from it alone, as published.
        curvature: "gauss-newton" (positive semi-definite; equal to the Hessian on ReLU networks) or "hessian".
        preconditioner: "rows" (each row's block of the curvature inverted on its mask; "kronecker" takes its place where
            the blocks would take more than 256 MB), "kronecker" (inverse input and output factors) or "none".
        rtol: relative residual at which conjugate gradients stop.
        max_iterations: the most conjugate-gradient iterations a step.
        damping: to begin with, relative to the mean of the curvature's diagonal on the mask; it adapts
            (Levenberg-Marquardt) to how well the quadratic model predicted the decrease.
        passes: over the batches, at most.
        min_decrease: a pass that lowers the held-back loss by less than this share is the last.
    """

    gradient: Literal["all", "batch"] = "all"
    curvature: Literal["gauss-newton", "hessian"] = "gauss-newton"
    preconditioner: Literal["rows", "kronecker", "none"] = "rows"
    rtol: float = 1e-2
    max_iterations: int = 5
    damping: float = 1e-3
    passes: int = 1
    min_decrease: float = 0.01

    def __post_init__(self) -> None:
        choices = {"gradient": ("all", "batch"), "curvature": tuple(_CURVATURES), "preconditioner": ("rows", "kronecker", "none")}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"Newton: expected {name} to be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        for name in ("rtol", "damping"):
            if not getattr(self, name) > 0:
                raise ValueError(f"Newton: expected {name} above 0, got {getattr(self, name)}")
        for name in ("max_iterations", "passes"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"Newton: expected {name} to be a whole number of at least 1, got {getattr(self, name)}")

    def solve(self, losses: Batches, start: MaskedWeight, *, held: Loss | None = None, factors: Factors | None = None,
              generator: torch.Generator | None = None, tell: Callable[[Step], None] = lambda step: None) -> Fit:
        """Lower the mean of the losses over the kept weights.

        Args:
            losses: one a batch.
            start: the weight to begin with, zero off its mask.
            held: the loss on held-back samples; the best weight by it is returned, so never a worse one than `start`.
            factors: for the preconditioner, which is left out without them.
            generator: for the probe that measures the curvature's mean.
            tell: called after every step.
        """
        weight, mask = start
        damping, mean = self.damping, math.nan
        steps: list[Step] = []
        best = weight
        first = best_value = self._value(held, weight)
        for index in range(self.passes):
            before_pass = best_value
            for model in self._models(losses, index):
                began = time.perf_counter()
                H, loss, gradient = model(weight)
                if not (math.isfinite(H.value) and gradient.isfinite().all()):
                    steps.append(Step(H.value, math.nan, 0, Stop.NOT_FINITE, 0.0, damping, 0.0))
                    return Fit(MaskedWeight(best, mask), steps, first, best_value)
                if math.isnan(mean):
                    probe = trace(H, mask, probes=1, generator=generator, dtype=weight.dtype)
                    mean = abs(probe.mean) / max(int(mask.sum()), 1)
                g = gradient * mask
                d, iterations, _, stop = cg(
                    Restricted(H, mask, damping * mean), -g, rtol=self.rtol, max_iterations=self.max_iterations,
                    preconditioner=self._preconditioner(factors, mask, damping),
                )
                slope, value = (g * d).sum().item(), H.value
                del H  # the graph, before the search needs room
                if self.gradient == "all" and held is not None:
                    loss, value, c = held, best_value, 0.0  # of this very weight: only what is better there is accepted
                else:
                    value, c = value if self.gradient == "batch" else self._value(loss, weight), 1e-4
                with torch.no_grad():
                    search = armijo(loss, weight, d, value=value, slope=slope, c=c)
                weight = weight + search.size * d
                steps.append(Step(value, search.value, iterations, stop, search.size, damping, time.perf_counter() - began))
                tell(steps[-1])
                now = search.value if loss is held else self._value(held, weight)
                if not now >= best_value:
                    best, best_value = weight, now
                # d solves the damped system in its Krylov space, so its quadratic model falls by half its slope
                predicted = slope * search.size * (1 - search.size / 2)
                agreement = (search.value - value) / predicted if predicted < 0 else 0.0
                damping *= 4.0 if agreement < 0.25 else 0.5 if agreement > 0.75 else 1.0
            if best_value > (1 - self.min_decrease) * before_pass:  # False without held-back samples
                break
        return Fit(MaskedWeight(best, mask), steps, first, best_value)

    @staticmethod
    def _value(loss: Loss | None, weight: Tensor) -> float:
        with torch.no_grad():
            return loss(weight).item() if loss is not None else math.nan

    def _models(self, losses: Batches, index: int) -> Iterator[Callable[[Tensor], _Model]]:
        """The quadratic models of one pass, each as a function of the weight it is built at."""
        build = _CURVATURES[self.curvature]

        def pooled(weight: Tensor) -> _Model:
            gradient = torch.zeros_like(weight)
            for i, loss in enumerate(losses):
                if i == index % len(losses):
                    chosen = loss
                else:
                    gradient += _gradient(loss, weight)
            H = build(chosen, weight)  # last, so that its graph is not kept through the others'
            return _Model(H, chosen, (gradient + H.grad) / len(losses))

        def single(loss: Loss, weight: Tensor) -> _Model:
            H = build(loss, weight)
            return _Model(H, loss, H.grad)

        if self.gradient == "all":
            yield pooled
        else:
            yield from (partial(single, loss) for loss in losses)

    def _preconditioner(self, factors: Factors | None, mask: Tensor, damping: float) -> LinearOperator | None:
        if factors is None or self.preconditioner == "none":
            return None
        kind = RowBlocks if self.preconditioner == "rows" and RowBlocks.fits(mask) else Kronecker
        return kind(factors, mask, max(damping, 1e-4))


class _Model(NamedTuple):
    """A quadratic model at a weight: its curvature and the loss that it is of, and the gradient over all it covers."""

    H: Curvature
    loss: Loss
    gradient: Tensor


def _gradient(loss: Loss, weight: Tensor) -> Tensor:
    with torch.enable_grad():
        at = weight.detach().clone().requires_grad_()
        residuals = loss.residuals(at)
        (gradient,) = torch.autograd.grad(residuals, at, loss.weigh([r.detach() for r in residuals]))
    return gradient


_CURVATURES: dict[str, Callable[[Loss, Tensor], Curvature]] = {"gauss-newton": GaussNewton, "hessian": Hessian}
