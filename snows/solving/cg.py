"""Conjugate gradients: for one system that may be indefinite, and for many rows at once."""

from __future__ import annotations

import enum
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from snows import ops, reference, together
from snows.solving.operators import LinearOperator


class Stop(enum.Enum):
    """Say why conjugate gradients ended; the value is the sentence to read."""

    CONVERGED = "the residual fell below rtol times the right-hand side"
    ITERATIONS = "max_iterations was reached; raise it, or rtol, if the step matters"
    NEGATIVE_CURVATURE = (
        "a direction of negative or zero curvature was met; the descent found so far is returned"
    )
    ZERO = "the right-hand side is zero: nothing to solve"
    TIME = "the time for the layer was over"
    NOT_FINITE = "a number stopped being finite; look at the loss and its scale"


_STOPS = {
    reference.RUNNING: Stop.ITERATIONS,
    reference.CONVERGED: Stop.CONVERGED,
    reference.ZERO: Stop.ZERO,
    reference.NEGATIVE_CURVATURE: Stop.NEGATIVE_CURVATURE,
    reference.NOT_FINITE: Stop.NOT_FINITE,
}


class Solution(NamedTuple):
    """Hold what conjugate gradients found.

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


def cg(
    A: LinearOperator,
    b: Tensor,
    *,
    preconditioner: LinearOperator | None = None,
    rtol: float = 1e-2,
    max_iterations: int = 50,
    check_every: int | None = None,
    late: Callable[[], bool] = lambda: False,
) -> Solution:
    """Solve ``A x = b`` from zero by preconditioned conjugate gradients (Hestenes & Stiefel 1952).

    Args:
        A: symmetric; where it is not positive definite the iteration leaves at the first direction that shows
            it (Steihaug 1983), with that direction itself if it is the first.
        b: the right-hand side, any shape.
        preconditioner: symmetric positive definite on the space in which `b` lies, near to the inverse of
            `A`.
        rtol: the relative residual (2-norm, not preconditioned) at which to stop.
        max_iterations: the most products with `A`.
        check_every: iterations from one look at the status to the next; until then a state that has stopped
            leaves everything as it is. By default 1 on a CPU, and 8 where the host has to wait for the
            device.
        late: says at each look whether to stop before the next product.
    """
    r, over = b.clone(memory_format=torch.contiguous_format), False
    x, p = torch.zeros_like(r), torch.zeros_like(r)
    state = _start(r)
    for iteration in range(max_iterations):
        if _looks(iteration, r, check_every):
            state = together.same(state)  # so that all processes end alike
            if state[reference.STATUS].item() != reference.RUNNING or (over := late()):
                break
        ops.cg_direction(p, r, r if preconditioner is None else preconditioner @ r, state)
        ops.cg_update(x, r, p, A @ p, state, rtol)
    status, iterations, _, rr, bb = together.same(state).tolist()
    stop = Stop.TIME if over else _STOPS[int(status)]
    residual = math.nan if stop is Stop.NOT_FINITE else math.sqrt(rr / bb) if bb > 0 else 0.0
    return Solution(x, int(iterations), residual, stop)


def _start(b: Tensor) -> Tensor:
    """Make the scalars of conjugate gradients before the first direction, which r·z = ∞ makes ``p = z``."""
    bb = (b * b).sum().double()
    status = torch.where(
        bb == 0, reference.ZERO, torch.where(bb.isfinite(), reference.RUNNING, reference.NOT_FINITE)
    )
    zero = torch.zeros_like(bb)
    return torch.stack([status.double(), zero, zero + math.inf, bb, bb])


def _looks(iteration: int, b: Tensor, every: int | None = None) -> bool:
    """Say whether to read a scalar before this iteration: by default each on a CPU, every 8 elsewhere."""
    every = every or (1 if b.is_cpu else 8)
    return iteration % every == every - 1


def tolerance(dtype: torch.dtype) -> float:
    """Return the relative residual at which `batched_cg` stops for a network of some dtype.

    What an early stop leaves depends on how sums are rounded; in double precision nobody is to see that.
    """
    return 1e-10 if dtype == torch.float64 else 1e-4


def batched_cg(
    gram: Tensor, right: Tensor, mask: Tensor, *, damping: float = 0.01, rtol: float | None = None
) -> Tensor:
    """Solve one masked system per row, all sharing a Gram matrix: ``P (A + λI) P x = P b``.

    P projects on the row's mask.

    Rows stop by themselves, at the latest after 50 products for each decimal of `rtol`; the diagonal of `A`
    preconditions. Several processes share the rows out.

    Args:
        gram: A, (groups, in, in), positive semi-definite.
        right: b, (groups, rows, in).
        mask: bool, (groups, rows, in).
        damping: λ relative to the mean diagonal of `A`.
        rtol: the relative residual at which a row is done; by default `tolerance` of A's dtype.

    Returns:
        x, (groups, rows, in), zero off the mask.
    """
    rtol = tolerance(gram.dtype) if rtol is None else rtol
    matrix = gram.clone()
    diagonal = matrix.diagonal(dim1=-2, dim2=-1)
    diagonal += damping * diagonal.mean(-1, keepdim=True)
    inverse = diagonal.clamp_min(torch.finfo(gram.dtype).tiny).reciprocal()
    shares = together.Rows(right.shape[-2], 50 * right.numel() * right.shape[-1])  # some 50 products
    mask = mask[..., shares.own, :].contiguous()
    r = (right[..., shares.own, :] * mask).contiguous()
    x, p = torch.zeros_like(r), r * inverse.unsqueeze(-2)
    rz, target = (r * p).sum(-1).double(), rtol * rtol * (r * r).sum(-1).double()
    for iteration in range(math.ceil(-50 * math.log10(rtol))):
        if _looks(iteration, r) and not (rz > 0).any():
            break
        ops.batched_cg_update(x, r, p, rz, p @ matrix, mask, inverse, target)
    return shares.joined(x)
