"""One step of conjugate gradients, for one system and for many: in place, without waiting for the device.

What is changed must be contiguous, all vectors of one shape, dtype and device; a ValueError says which is
not.
"""

from __future__ import annotations

import torch
from torch import Tensor

from snows.ops.checks import FLOATS, check_contiguous, check_like


def cg_direction(p: Tensor, r: Tensor, z: Tensor, state: Tensor) -> None:
    """Turn the direction: ``p = z + β p`` with ``β = r·z / state[RZ]``, which becomes r·z.

    Args:
        p: the last direction, zero at first; changed.
        r: the residual.
        z: the preconditioned residual.
        state: (5,), float64: the scalars, as `reference` names them; changed. Nothing is unless its status is
            RUNNING.
    """
    _check_vectors("cg_direction", {"p": p}, {"r": r, "z": z})
    check_like("cg_direction", "state", state, (5,), torch.float64, p.device)
    check_contiguous("cg_direction", "state", state)
    torch.ops.snows.cg_direction(p, r.contiguous(), z.contiguous(), state)


def cg_update(x: Tensor, r: Tensor, p: Tensor, Ap: Tensor, state: Tensor, rtol: float) -> None:
    """Make one step: ``x += α p``, ``r -= α Ap`` with ``α = state[RZ] / p·Ap``, and take down how it went.

    Where p·Ap is not finite the status becomes NOT_FINITE; where it is not positive, NEGATIVE_CURVATURE, and
    x is p if that was the first direction; where ``r·r <= rtol² state[BB]`` after the step, CONVERGED.

    Args:
        x: the solution so far, zero at first; changed.
        r: the residual; changed.
        p: the direction.
        Ap: the product with it.
        state: as in `cg_direction`.
        rtol: relative residual (2-norm) at which to stop.
    """
    _check_vectors("cg_update", {"x": x, "r": r}, {"p": p, "Ap": Ap})
    check_like("cg_update", "state", state, (5,), torch.float64, x.device)
    check_contiguous("cg_update", "state", state)
    torch.ops.snows.cg_update(x, r, p.contiguous(), Ap.contiguous(), state, rtol)


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
    """Make one step in every row that is not done, preconditioned by the diagonal.

    Args:
        x: (groups, rows, columns), the solutions so far; changed.
        r: the residuals; changed.
        p: the directions; changed.
        rz: (groups, rows), float64, r·z with z = r · inverse, 0 where a row is done: it keeps x, r and p;
            changed.
        product: p times the row's matrix, before the mask.
        mask: bool, the entries that a row may change.
        inverse: (groups, columns), above 0: one over the matrix's diagonal.
        target: (groups, rows), float64, the r·r at which a row is done.
    """
    op = "batched_cg_update"
    if x.ndim != 3:
        raise ValueError(f"{op}: expected x to be (groups, rows, columns), got {tuple(x.shape)}")
    _check_vectors(op, {"x": x, "r": r, "p": p}, {"product": product})
    groups, rows, columns = x.shape
    check_like(op, "mask", mask, (groups, rows, columns), torch.bool, x.device)
    check_like(op, "inverse", inverse, (groups, columns), x.dtype, x.device)
    for name, value in (("rz", rz), ("target", target)):
        check_like(op, name, value, (groups, rows), torch.float64, x.device)
    check_contiguous(op, "rz", rz)
    torch.ops.snows.batched_cg_update(
        x, r, p, rz, product.contiguous(), mask.contiguous(), inverse.contiguous(), target.contiguous()
    )


def _check_vectors(op: str, changed: dict[str, Tensor], read: dict[str, Tensor]) -> None:
    """Ask that all are alike, and what is changed contiguous."""
    first, lead = next(iter(changed.items()))
    if lead.dtype not in FLOATS:
        raise ValueError(f"{op}: expected {first} to be floating point, got {lead.dtype}")
    for name, value in (changed | read).items():
        check_like(op, name, value, (*lead.shape,), lead.dtype, lead.device)
    for name, value in changed.items():
        check_contiguous(op, name, value)
