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

_library = torch.library.Library("snows", "DEF")
_library.define("nm_mask(Tensor scores, int n, int m) -> Tensor")
_library.impl("nm_mask", reference.nm_mask, "CompositeExplicitAutograd")

OPS = ("nm_mask",)


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


def implementation(op: str, device: str = "CPU") -> str:
    """Name what runs `op` on `device`: "native" or "reference"."""
    registered = torch._C._dispatch_has_kernel_for_dispatch_key(f"snows::{op}", device)
    return "native" if registered else "reference"


def nm_mask(scores: Tensor, n: int, m: int) -> Tensor:
    """Keep the `n` highest of every `m` consecutive scores of a row; the lower index wins a tie.

    Args:
        scores: (rows, columns), floating point.
        n: entries kept in each group, 0 < n < m.
        m: entries in a group.

    Returns:
        (rows, columns), bool.

    Raises:
        ValueError: `scores` is not a floating-point matrix or holds NaN, or `n` and `m` are out of order.

    Example:
        >>> nm_mask(torch.tensor([[3.0, 1.0, 3.0, 2.0]]), 2, 4).int().tolist()
        [[1, 0, 1, 0]]
    """
    if scores.ndim != 2 or not scores.is_floating_point():
        raise ValueError(f"nm_mask: expected a floating-point matrix of scores, got {tuple(scores.shape)} {scores.dtype}")
    if not 0 < n < m:
        raise ValueError(f"nm_mask: expected 0 < n < m, got n = {n}, m = {m}")
    if scores.isnan().any():
        raise ValueError("nm_mask: expected scores without NaN, got NaN; check the weights and the calibration images")
    mask: Tensor = torch.ops.snows.nm_mask(scores.contiguous(), n, m)
    return mask
