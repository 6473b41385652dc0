"""Each op in plain PyTorch: the specification that every kernel is tested against."""

from __future__ import annotations

import torch
from torch import Tensor

# Where conjugate gradients keep their scalars: a float64 tensor of five, and what the first of them says.
STATUS, ITERATIONS, RZ, RR, BB = range(5)
RUNNING, CONVERGED, NEGATIVE_CURVATURE, NOT_FINITE, ZERO = range(5)


def nm_mask(scores: Tensor, n: int, m: int) -> Tensor:
    """Keep the `n` highest of every `m` consecutive scores of a row; the lower index wins a tie.

    Args:
        scores: (rows, columns), floating point, without NaN; a last group of fewer than `m` columns keeps
            its `n` highest too.
        n: entries kept in each group.
        m: entries in a group.

    Returns:
        (rows, columns), bool.
    """
    rows, columns = scores.shape
    pad = -columns % m
    if pad:
        scores = torch.nn.functional.pad(scores, (0, pad), value=-torch.inf)
    order = scores.view(rows, (columns + pad) // m, m).argsort(dim=-1, descending=True, stable=True)
    mask = torch.zeros_like(order, dtype=torch.bool)
    mask.scatter_(-1, order[..., :n], True)
    return mask.view(rows, columns + pad)[:, :columns].clone()


def nm_select(scores: Tensor, n: int, m: int) -> tuple[Tensor, Tensor]:
    """The mask of `nm_mask`, packed; and the codes of 2:4.

    Args:
        scores: (rows, columns), as in `nm_mask`.
        n: entries kept in each group.
        m: entries in a group.

    Returns:
        bits: (rows, ceil(columns / 8)), uint8: bit j of byte b is column 8 b + j, 0 beyond the last column.
        codes: the same shape for 2:4, (rows, 0) otherwise: group g's code is the lower (g even) or upper nibble of byte g / 2,
            its first kept index | the second << 2; what is missing of a group counts as -inf.
    """
    rows, columns = scores.shape
    padded = torch.nn.functional.pad(scores, (0, -columns % 8), value=-torch.inf)
    powers = 2 ** torch.arange(8, device=scores.device)
    mask = torch.nn.functional.pad(nm_mask(scores, n, m), (0, -columns % 8))
    bits = (mask.view(rows, mask.shape[1] // 8, 8) * powers).sum(-1).to(torch.uint8)
    if (n, m) != (2, 4):
        return bits, bits.new_empty(rows, 0)
    groups = nm_mask(padded, 2, 4).view(rows, padded.shape[1] // 4, 4).to(torch.uint8)
    code = groups.argmax(-1) | (3 - groups.flip(-1).argmax(-1)) << 2
    return bits, (code[:, 0::2] | code[:, 1::2] << 4).to(torch.uint8)


def cg_direction(p: Tensor, r: Tensor, z: Tensor, state: Tensor) -> None:
    """Turn the direction: ``p = z + β p`` with ``β = r·z / state[RZ]``, which becomes r·z.

    Args:
        p: the last direction, changed.
        r: the residual.
        z: the preconditioned residual.
        state: (5,), float64, changed; unless its status is RUNNING, nothing is.
    """
    running = state[STATUS] == RUNNING
    rz = (r * z).sum().double()
    beta = torch.where(running, rz / state[RZ], 1)
    p.mul_(beta.to(p.dtype)).add_(torch.where(running, z, 0))
    state[RZ] = torch.where(running, rz, state[RZ])


def cg_update(x: Tensor, r: Tensor, p: Tensor, Ap: Tensor, state: Tensor, rtol: float) -> None:
    """Make one step: ``x += α p``, ``r -= α Ap`` with ``α = state[RZ] / p·Ap``, and take down how it went.

    Where p·Ap is not finite the status becomes NOT_FINITE; where it is not positive, NEGATIVE_CURVATURE, and x is p if that was
    the first direction; where ``r·r <= rtol² state[BB]`` after the step, CONVERGED.

    Args:
        x: the solution so far, zero at first; changed.
        r: the residual, changed.
        p: the direction.
        Ap: the product with it.
        state: (5,), float64, changed; unless its status is RUNNING, nothing is.
        rtol: relative residual (2-norm) at which to stop.
    """
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
        going, torch.where(rr <= rtol * rtol * bb, CONVERGED, RUNNING),
        torch.where(leaving, NEGATIVE_CURVATURE, torch.where(running, NOT_FINITE, status)))
    state[ITERATIONS] = iterations + running
    state[RR] = rr


def batched_cg_update(x: Tensor, r: Tensor, p: Tensor, rz: Tensor, product: Tensor, mask: Tensor, inverse: Tensor,
                      target: Tensor) -> None:
    """Make one step of conjugate gradients in every row that is not done, preconditioned by the diagonal.

    Args:
        x: (groups, rows, columns), the solutions so far; changed.
        r: the residuals, changed.
        p: the directions, changed.
        rz: (groups, rows), float64, r·z with z = r · inverse; changed. 0 where a row is done: it keeps x, r and p.
        product: p times the row's matrix, before the mask.
        mask: bool, the entries that a row may change.
        inverse: (groups, columns), above 0: one over the diagonal.
        target: (groups, rows), float64, the r·r at which a row is done.
    """
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
