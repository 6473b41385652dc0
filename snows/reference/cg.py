"""One step of conjugate gradients, for one system and for many."""

from __future__ import annotations

import torch
from torch import Tensor

# Where the scalars are kept: a float64 tensor of five, and what the first of them says.
STATUS, ITERATIONS, RZ, RR, BB = range(5)
RUNNING, CONVERGED, NEGATIVE_CURVATURE, NOT_FINITE, ZERO = range(5)


def cg_direction(p: Tensor, r: Tensor, z: Tensor, state: Tensor) -> None:
    """See `ops.cg_direction`."""
    running = state[STATUS] == RUNNING
    rz = (r * z).sum().double()
    beta = torch.where(running, rz / state[RZ], 1)
    p.mul_(beta.to(p.dtype)).add_(torch.where(running, z, 0))
    state[RZ] = torch.where(running, rz, state[RZ])


def cg_update(x: Tensor, r: Tensor, p: Tensor, Ap: Tensor, state: Tensor, rtol: float) -> None:
    """See `ops.cg_update`."""
    status, iterations, rz, rr, bb = state.clone().unbind()
    running = status == RUNNING
    curvature = (p * Ap).sum().double()
    finite = curvature.isfinite()
    going = running & finite & (curvature > 0)
    leaving = running & finite & (curvature <= 0)
    alpha = torch.where(going, rz / curvature, 1).to(x.dtype)
    x.addcmul_(torch.where(going | (leaving & (iterations == 0)), p, 0), alpha)
    r.addcmul_(torch.where(going, Ap, 0), alpha, value=-1)
    rr = torch.where(going, (r * r).sum().double(), rr)
    state[STATUS] = torch.where(
        going,
        torch.where(rr <= rtol * rtol * bb, CONVERGED, RUNNING),
        torch.where(leaving, NEGATIVE_CURVATURE, torch.where(running, NOT_FINITE, status)),
    )
    state[ITERATIONS] = iterations + running
    state[RR] = rr


def batched_cg_update(
    x: Tensor,
    r: Tensor,
    p: Tensor,
    rz: Tensor,
    product: Tensor,
    mask: Tensor,
    inverse: Tensor,
    target: Tensor,
) -> None:
    """See `ops.batched_cg_update`."""
    Ap = product * mask
    curvature = (p * Ap).sum(-1).double()
    going = (rz > 0) & (curvature > 0)
    alpha = torch.where(going, rz / curvature, 0).to(x.dtype).unsqueeze(-1)
    x.addcmul_(alpha, p)
    r.addcmul_(alpha, Ap, value=-1)
    z = r * inverse.unsqueeze(-2)
    left = torch.where(going & ((r * r).sum(-1).double() > target), (r * z).sum(-1).double(), 0)
    turning = left > 0
    beta = torch.where(turning, left / rz, 1).to(x.dtype).unsqueeze(-1)
    p.mul_(beta).addcmul_(z, turning.to(x.dtype).unsqueeze(-1))
    rz.copy_(torch.where(turning, left, 0))
