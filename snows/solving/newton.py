"""Newton's method on the weights that a mask keeps, Hessian-free."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from snows import together
from snows.ops import graphs
from snows.ops.precision import PRECISIONS, Precision, products_in
from snows.solving.cg import Stop, cg
from snows.solving.models import CURVATURES, Losses, OverdueError, Timed, from_all, from_each, never, summed
from snows.solving.operators import LinearOperator, Loss, Restricted, trace
from snows.solving.preconditioners import Factors, Kronecker, RowBlocks
from snows.solving.search import Search, armijo, damping_factor
from snows.sparsity import MaskedWeight


@dataclass(frozen=True)
class Step:
    """Record one Newton step.

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
    """Hold what Newton's method made of a layer.

    Attributes:
        masked: the best weight on the held-back samples (the last one without them), and its mask.
        steps: in order.
        before, after: the loss on the held-back samples at the start and at that weight; NaN without them.
    """

    masked: MaskedWeight
    steps: list[Step]
    before: float
    after: float


@dataclass(frozen=True)
class Newton:
    """Set Hessian-free Newton on the kept weights.

    Attributes:
        gradient: "all": a step takes its gradient from all batches and its curvature from one, another each
            pass (sub-sampled Newton, Byrd et al. 2011), and is searched on the held-back samples, or without
            them on all batches; "batch": one step a batch with gradient, curvature and search from it alone,
            as published.
        curvature: "gauss-newton" (positive semi-definite; equal to the Hessian on ReLU networks) or
            "hessian".
        preconditioner: "rows" (each row's block of the curvature inverted on its mask; "kronecker" takes its
            place where the blocks would take more than 256 MB), "kronecker" (inverse input and output
            factors) or "none".
        rtol: relative residual at which conjugate gradients stop.
        max_iterations: the most conjugate-gradient iterations a step.
        damping: to begin with, relative to the mean of the curvature's diagonal on the mask; it adapts
            (Levenberg-Marquardt) to how well the quadratic model predicted the decrease.
        passes: over the batches, at most.
        min_decrease: a pass that lowers the held-back loss by less than this share is the last.
        precision: of float32 on a CUDA device in the curvature's products, which are most of the work:
            "float32", or "tf32" (matrix products and convolutions rounded to 10 bits). Targets, gradients
            and the search are computed in float32 in any case.
    """

    gradient: Literal["all", "batch"] = "all"
    curvature: Literal["gauss-newton", "hessian"] = "gauss-newton"
    preconditioner: Literal["rows", "kronecker", "none"] = "rows"
    rtol: float = 1e-2
    max_iterations: int = 5
    damping: float = 1e-3
    passes: int = 1
    min_decrease: float = 0.01
    precision: Precision = "float32"

    def __post_init__(self) -> None:
        choices = {
            "gradient": ("all", "batch"),
            "curvature": tuple(CURVATURES),
            "preconditioner": ("rows", "kronecker", "none"),
            "precision": tuple(PRECISIONS),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"Newton: expected {name} to be one of {', '.join(allowed)}, got {getattr(self, name)!r}"
                )
        for name in ("rtol", "damping"):
            if not getattr(self, name) > 0:
                raise ValueError(f"Newton: expected {name} above 0, got {getattr(self, name)}")
        for name in ("max_iterations", "passes"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(
                    f"Newton: expected {name} to be a whole number of at least 1, got {getattr(self, name)}"
                )

    @classmethod
    def published(cls, max_iterations: int = 50, rtol: float = 1e-2) -> Newton:
        """Return the solver of the paper: a step a batch, unpreconditioned (Lucas & Mazumder 2025)."""
        return cls(gradient="batch", preconditioner="none", max_iterations=max_iterations, rtol=rtol)

    @graphs.one_pool()
    @products_in("float32")
    def solve(
        self,
        losses: Losses,
        start: MaskedWeight,
        *,
        held: Loss | None = None,
        factors: Factors | None = None,
        generator: torch.Generator | None = None,
        tell: Callable[[Step], None] = lambda step: None,
        late: Callable[[float], bool] = never,
    ) -> Fit:
        """Lower the mean of the losses over the kept weights.

        Args:
            losses: one a batch.
            start: the weight to begin with, zero off its mask.
            held: the loss on held-back samples; the best weight by it is returned, so never a worse one than
                `start`.
            factors: for the preconditioner, which is left out without them.
            generator: source of the probe that measures the curvature's mean.
            tell: called after every step.
            late: says whether so many seconds more are too many. It is asked before each step, with what the
                last one took, and within a step between batches and between products: what was found so far
                is then returned.
        """
        weight, mask = start
        judge = None if held is None else partial(summed, held)
        damping, mean = self.damping, math.nan
        models = from_all if self.gradient == "all" else from_each
        build = partial(CURVATURES[self.curvature], calls=1 + self.max_iterations, precision=self.precision)
        steps: list[Step] = []
        first = _value(judge, weight)
        best = _Point(weight, first)
        try:
            for index in range(self.passes):
                before_pass = best.value
                for model in models(Timed(losses, late), index, build):
                    began = time.perf_counter()
                    if late(steps[-1].seconds if steps else 0.0):
                        raise OverdueError
                    H, loss, gradient = model(weight)
                    if not (math.isfinite(H.value) and gradient.isfinite().all()):
                        steps.append(Step(H.value, math.nan, 0, Stop.NOT_FINITE, 0.0, damping, 0.0))
                        return Fit(MaskedWeight(best.weight, mask), steps, first, best.value)
                    if math.isnan(mean):
                        mean = _mean_curvature(H, start, generator)
                    direction = self._direction(H, gradient, mask, damping, mean, factors, late)
                    value = H.value
                    del H  # the graph, before the search needs room
                    search, value = self._search(loss, judge, _Point(weight, value), best.value, direction)
                    weight = weight + search.size * direction.d
                    steps.append(
                        Step(
                            value,
                            search.value,
                            direction.iterations,
                            direction.stop,
                            search.size,
                            damping,
                            time.perf_counter() - began,
                        )
                    )
                    tell(steps[-1])
                    now = search.value if self._searches_held(judge) else _value(judge, weight)
                    if not now >= best.value:  # True where there are no held-back samples
                        best = _Point(weight, now)
                    damping *= damping_factor(direction.slope, search, value)
                if (
                    best.value > (1 - self.min_decrease) * before_pass
                ):  # False where there are no held-back samples
                    break
        except OverdueError:
            steps.append(Step(best.value, math.nan, 0, Stop.TIME, 0.0, damping, 0.0))
        return Fit(MaskedWeight(best.weight, mask), steps, first, best.value)

    # ---------------------------------------------------------------- direction

    def _direction(
        self,
        H: LinearOperator,
        gradient: Tensor,
        mask: Tensor,
        damping: float,
        mean: float,
        factors: Factors | None,
        late: Callable[[float], bool],
    ) -> _Direction:
        """Solve the damped model on the mask by conjugate gradients."""
        g = gradient * mask
        d, iterations, _, stop = cg(
            Restricted(H, mask, damping * mean),
            -g,
            rtol=self.rtol,
            max_iterations=self.max_iterations,
            preconditioner=self._preconditioner(factors, mask, damping),
            late=lambda: late(0.0),
        )
        return _Direction(d, together.same((g * d).sum()).item(), iterations, stop)

    def _preconditioner(self, factors: Factors | None, mask: Tensor, damping: float) -> LinearOperator | None:
        if factors is None or self.preconditioner == "none":
            return None
        kind = RowBlocks if self.preconditioner == "rows" and RowBlocks.fits(mask) else Kronecker
        return kind(factors, mask, max(damping, SMALLEST_DAMPING))

    # ---------------------------------------------------------------- search

    def _searches_held(self, held: Callable[[Tensor], Tensor] | None) -> bool:
        return self.gradient == "all" and held is not None

    def _search(
        self,
        loss: Callable[[Tensor], Tensor],
        held: Callable[[Tensor], Tensor] | None,
        at: _Point,
        best: float,
        direction: _Direction,
    ) -> tuple[Search, float]:
        """Search along a direction; return where that ended, and the loss at its start.

        On held-back samples whatever is better there than the best weight so far is accepted: that weight is
        the one at which the search starts. Elsewhere the loss has to fall by a share of what its slope
        promises.
        """
        if held is not None and self._searches_held(held):
            loss, value, share = held, best, 0.0
        else:
            value, share = at.value if self.gradient == "batch" else _value(loss, at.weight), 1e-4
        with torch.no_grad():
            return armijo(loss, at.weight, direction.d, value=value, slope=direction.slope, c=share), value


SMALLEST_DAMPING = 1e-4  # of a preconditioner, so that its blocks can be inverted in float32


class _Point(NamedTuple):
    """Hold a weight, and a loss there."""

    weight: Tensor
    value: float


class _Direction(NamedTuple):
    """Hold what conjugate gradients found, and the gradient's inner product with it."""

    d: Tensor
    slope: float
    iterations: int
    stop: Stop


# ---------------------------------------------------------------- curvature and losses


def _mean_curvature(H: LinearOperator, at: MaskedWeight, generator: torch.Generator | None) -> float:
    """Estimate the mean of the curvature's diagonal on the mask, by one probe."""
    probe = trace(H, at.mask, probes=1, generator=generator, dtype=at.weight.dtype)
    return abs(probe.mean) / max(int(at.mask.sum()), 1)


def _value(loss: Callable[[Tensor], Tensor] | None, weight: Tensor) -> float:
    """Evaluate a loss; NaN where there is none."""
    with torch.no_grad():
        return loss(weight).item() if loss is not None else math.nan
