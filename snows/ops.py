"""The register of ops: a schema, the reference behind it, and one typed public function that validates.

The reference serves every device and is its own fake kernel; native kernels are registered over it for the devices
they serve, and PyTorch's dispatcher chooses. `SNOWS_REFERENCE=1`, set before the import, leaves the kernels out.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import torch
from torch import Tensor

from snows import reference

_SCHEMAS = {
    "nm_mask": "(Tensor scores, int n, int m) -> Tensor",
    "nm_select": "(Tensor scores, int n, int m) -> (Tensor bits, Tensor codes)",
    "cg_direction": "(Tensor(a!) p, Tensor r, Tensor z, Tensor(b!) state) -> ()",
    "cg_update": "(Tensor(a!) x, Tensor(b!) r, Tensor p, Tensor Ap, Tensor(c!) state, float rtol) -> ()",
    "batched_cg_update": "(Tensor(a!) x, Tensor(b!) r, Tensor(c!) p, Tensor(d!) rz, Tensor product, Tensor mask, "
                         "Tensor inverse, Tensor target) -> ()",
}
OPS = tuple(_SCHEMAS)

_library = torch.library.Library("snows", "DEF")
for _name, _schema in _SCHEMAS.items():
    _library.define(_name + _schema)
    _library.impl(_name, getattr(reference, _name), "CompositeExplicitAutograd")


def _load_native() -> str:
    """Load the compiled kernels if they were built; say in one phrase what happened."""
    if os.environ.get("SNOWS_REFERENCE") == "1":
        return "left out by SNOWS_REFERENCE=1"
    for path in sorted(Path(__file__).parent.glob("_native*.so")):
        try:
            torch.ops.load_library(str(path))
        except OSError as error:
            warnings.warn(f"snows: the native kernels in {path.name} do not load ({error}); "
                          "the reference runs instead. Reinstall snows with the torch in use.", stacklevel=3)
            return "built, but does not load"
        return "loaded"
    return "not built"


native = _load_native()

_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def implementation(op: str, device: str = "CPU") -> str:
    """Name what runs `op` on `device`: "native" or "reference"."""
    registered = torch._C._dispatch_has_kernel_for_dispatch_key(f"snows::{op}", device)
    return "native" if registered else "reference"


def _check_selection(op: str, scores: Tensor, n: int, m: int) -> None:
    if scores.ndim != 2 or scores.dtype not in _FLOATS:
        raise ValueError(f"{op}: expected scores to be a matrix of float16, bfloat16, float32 or float64, "
                         f"got {tuple(scores.shape)} {scores.dtype}")
    if not 0 < n < m:
        raise ValueError(f"{op}: expected 0 < n < m, got n = {n}, m = {m}")
    if scores.isnan().any():
        raise ValueError(f"{op}: expected scores without NaN, got NaN; check the weights and the calibration images")


def _check_like(op: str, name: str, value: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    if (*value.shape,) != shape or value.dtype != dtype or value.device != device:
        raise ValueError(f"{op}: expected {name} to be {shape} {dtype} on {device}, "
                         f"got {tuple(value.shape)} {value.dtype} on {value.device}")


def _check_vectors(op: str, changed: dict[str, Tensor], read: dict[str, Tensor]) -> None:
    """All alike, and what is changed contiguous."""
    first, lead = next(iter(changed.items()))
    if lead.dtype not in _FLOATS:
        raise ValueError(f"{op}: expected {first} to be floating point, got {lead.dtype}")
    for name, value in (changed | read).items():
        _check_like(op, name, value, (*lead.shape,), lead.dtype, lead.device)
    for name, value in changed.items():
        _check_contiguous(op, name, value)


def _check_contiguous(op: str, name: str, value: Tensor) -> None:
    if not value.is_contiguous():
        raise ValueError(f"{op}: expected {name} to be contiguous, since it is changed in place, got strides {value.stride()}")


def nm_mask(scores: Tensor, n: int, m: int) -> Tensor:
    """Keep the `n` highest of every `m` consecutive scores of a row; the lower index wins a tie.

    Args:
        scores: (rows, columns), floating point.
        n: entries kept in each group, 0 < n < m.
        m: entries in a group; above 32 the reference does it.

    Returns:
        (rows, columns), bool.

    Raises:
        ValueError: `scores` is not a floating-point matrix or holds NaN, or `n` and `m` are out of order.

    Example:
        >>> nm_mask(torch.tensor([[3.0, 1.0, 3.0, 2.0]]), 2, 4).int().tolist()
        [[1, 0, 1, 0]]
    """
    _check_selection("nm_mask", scores, n, m)
    select = torch.ops.snows.nm_mask if m <= 32 else reference.nm_mask
    mask: Tensor = select(scores.contiguous(), n, m)
    return mask


def nm_select(scores: Tensor, n: int, m: int) -> tuple[Tensor, Tensor]:
    """Make the mask of `nm_mask` as packed bits, and for 2:4 the codes that sparse matrix units read.

    Args:
        scores: (rows, columns), floating point.
        n: entries kept in each group, 0 < n < m.
        m: entries in a group; above 32 the reference does it.

    Returns:
        bits: (rows, ceil(columns / 8)), uint8: bit j of byte b is column 8 b + j.
        codes: of the same shape for 2:4, (rows, 0) otherwise: a nibble a group, lower first: its first kept index | the
            second << 2.

    Raises:
        ValueError: as in `nm_mask`.

    Example:
        >>> bits, codes = nm_select(torch.tensor([[3.0, 1.0, 3.0, 2.0, 0.0, 0.0, 1.0, 2.0]]), 2, 4)
        >>> f"{bits.item():08b} {codes.item():08b}"
        '11000101 11101000'
    """
    _check_selection("nm_select", scores, n, m)
    select = torch.ops.snows.nm_select if m <= 32 else reference.nm_select
    bits, codes = select(scores.contiguous(), n, m)
    return bits, codes


def cg_direction(p: Tensor, r: Tensor, z: Tensor, state: Tensor) -> None:
    """Turn the direction of conjugate gradients in place: ``p = z + β p``, β from r·z and the last one.

    Args:
        p: the last direction, zero at first; changed, contiguous.
        r: the residual.
        z: the preconditioned residual.
        state: (5,), float64: the scalars, as `reference` names them; changed. Nothing is unless it says RUNNING.

    Raises:
        ValueError: the tensors do not fit together.
    """
    _check_vectors("cg_direction", {"p": p}, {"r": r, "z": z})
    _check_like("cg_direction", "state", state, (5,), torch.float64, p.device)
    _check_contiguous("cg_direction", "state", state)
    torch.ops.snows.cg_direction(p, r.contiguous(), z.contiguous(), state)


def cg_update(x: Tensor, r: Tensor, p: Tensor, Ap: Tensor, state: Tensor, rtol: float) -> None:
    """Make one step of conjugate gradients in place: ``x += α p`` and ``r -= α Ap``, and take down how it went.

    Args:
        x: the solution so far, zero at first; changed, contiguous.
        r: the residual, likewise.
        p: the direction.
        Ap: the product with it.
        state: (5,), float64: the scalars, as `reference` names them; changed. Nothing is unless it says RUNNING.
        rtol: relative residual at which the status becomes CONVERGED.

    Raises:
        ValueError: the tensors do not fit together.
    """
    _check_vectors("cg_update", {"x": x, "r": r}, {"p": p, "Ap": Ap})
    _check_like("cg_update", "state", state, (5,), torch.float64, x.device)
    _check_contiguous("cg_update", "state", state)
    torch.ops.snows.cg_update(x, r, p.contiguous(), Ap.contiguous(), state, rtol)


def batched_cg_update(x: Tensor, r: Tensor, p: Tensor, rz: Tensor, product: Tensor, mask: Tensor, inverse: Tensor,
                      target: Tensor) -> None:
    """Make one step of conjugate gradients in place, in every row that is not done.

    Args:
        x: (groups, rows, columns), the solutions so far; changed, contiguous.
        r: the residuals, likewise.
        p: the directions, likewise.
        rz: (groups, rows), float64: r·z, 0 where a row is done; likewise.
        product: p times the row's matrix, before the mask.
        mask: bool, the entries that a row may change.
        inverse: (groups, columns), the preconditioner: one over the matrix's diagonal.
        target: (groups, rows), float64, the r·r at which a row is done.

    Raises:
        ValueError: the tensors do not fit together.
    """
    op = "batched_cg_update"
    if x.ndim != 3:
        raise ValueError(f"{op}: expected x to be (groups, rows, columns), got {tuple(x.shape)}")
    _check_vectors(op, {"x": x, "r": r, "p": p}, {"product": product})
    groups, rows, columns = x.shape
    _check_like(op, "mask", mask, (groups, rows, columns), torch.bool, x.device)
    _check_like(op, "inverse", inverse, (groups, columns), x.dtype, x.device)
    for name, value in (("rz", rz), ("target", target)):
        _check_like(op, name, value, (groups, rows), torch.float64, x.device)
    _check_contiguous(op, "rz", rz)
    torch.ops.snows.batched_cg_update(x, r, p, rz, product.contiguous(), mask.contiguous(), inverse.contiguous(), target.contiguous())
