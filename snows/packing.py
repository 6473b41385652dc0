"""The packed format of a sparse weight: kept values in order, their positions as codes.

It is the same on every machine.

Everything is in the row view `sparsity.rows`: (out, columns), a group of m being m consecutive entries of a
row.

- **N:M** stores exactly n values of every group, `values` being (rows, groups * n). `codes` is one stream of
bits without
  gaps, least significant bit first: for each value its position in the group in ceil(log2 m) bits, ascending
  within the group; or, where that takes more than m bits a group, the group's m-bit mask. So 2:4 is the
  hardware's nibble `first | second << 2`, two groups a byte:

      weight    0  a  0  b | c  0  0  d       values  a b c d
      position  0  1  2  3 | 0  1  2  3       codes   0b1100_1101   (second group: 0 and 3; first group: 1 and
      3)

  A group with fewer than n kept is filled up with its lowest free positions, holding +0.0. A last group of
  fewer than m columns is a whole group whose missing columns come last.
- **Unstructured** stores the kept values, `values` being (kept,), and a bit for every entry, in the same
stream.

Codes come from the mask and never from `weight != 0`: kept zeros, and their signs, survive.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from snows import ops
from snows.reference import masks
from snows.reference.packed import code_bits
from snows.sparsity import NM, Unstructured, parse_pattern, rows

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
WIDEST = 32  # entries in a group
CANDIDATES = tuple(
    NM(n, m) for n, m in ((1, 32), (1, 16), (1, 8), (1, 4), (2, 8), (2, 4), (1, 2), (4, 8), (3, 4))
)  # sparsest first


class Packed(NamedTuple):
    """Hold a packed weight: plain tensors, and what is needed to read them."""

    values: Tensor
    codes: Tensor
    pattern: NM | Unstructured
    shape: tuple[int, ...]

    @property
    def group(self) -> tuple[int, int]:
        """The pattern as the ops take it: (n, m), or (0, 0) for unstructured."""
        return (self.pattern.n, self.pattern.m) if isinstance(self.pattern, NM) else (0, 0)

    @property
    def nbytes(self) -> int:
        """Bytes of values and codes."""
        return self.values.nbytes + self.codes.nbytes


def pack(weight: Tensor, mask: Tensor | None, pattern: NM | Unstructured) -> Packed:
    """Store what the mask keeps.

    Args:
        weight: (out, in) or (out, in, kernel height, kernel width); float32, float16, bfloat16 or float64.
        mask: weight.shape, bool; None where nothing better is known than `weight != 0`.
        pattern: what the mask obeys. The share of an unstructured pattern is not held against the mask.

    Raises:
        ValueError: a group keeps more than n, the weight is not zero off the mask, holds NaN, or has a dtype,
            shape or pattern that cannot be packed.

    Example:
        >>> packed = pack(torch.tensor([[0.0, 5.0, 0.0, 6.0, 7.0, 0.0, 0.0, 8.0]]), None, NM(2, 4))
        >>> packed.values.tolist(), bin(int(packed.codes))
        ([[5.0, 6.0, 7.0, 8.0]], '0b11001101')
    """
    if not isinstance(pattern, NM | Unstructured):
        raise ValueError(
            f"pack: expected a pattern such as snows.NM(2, 4) or snows.Unstructured(0.9), got {pattern!r}"
        )
    mask = _mask(weight, mask)
    matrix, kept = rows(weight.detach()), rows(mask)
    matrix = matrix.where(kept, torch.zeros_like(matrix))  # a -0.0 off the mask becomes +0.0
    if isinstance(pattern, NM):
        values, codes = _pack_groups(matrix, kept, pattern)
    else:
        values, codes = matrix[kept], masks.pack_bits(kept.flatten())
    return Packed(values, codes, pattern, tuple(weight.shape))


def unpack(packed: Packed) -> Tensor:
    """Return the weight, exactly: stored values bit for bit, +0.0 elsewhere."""
    return ops.unpack(packed.values, packed.codes, packed.shape, *packed.group)


def packable(text: str) -> NM | Unstructured:
    """Read a pattern that a weight can be packed by.

    Raises:
        ValueError: it is none, or none of these.
    """
    pattern = parse_pattern(text)
    if not isinstance(pattern, NM | Unstructured):
        raise ValueError(f"packable: expected N:M or a sparsity, got {pattern}; pack by what its mask obeys")
    return pattern


def find_pattern(weight: Tensor, mask: Tensor | None = None) -> NM | Unstructured:
    """Find the sparsest usual N:M that the mask obeys, or unstructured with the mask's share.

    Args:
        weight: (out, in) or (out, in, kernel height, kernel width).
        mask: weight.shape, bool; None where nothing better is known than `weight != 0`.

    Raises:
        ValueError: nothing is zero, or as for `pack`.

    Example:
        >>> find_pattern(torch.tensor([[1.0, 0.0, 0.0, 2.0], [0.0, 0.0, 0.0, 3.0]]))
        NM(n=2, m=4)
    """
    mask = _mask(weight, mask)
    if mask.all():
        raise ValueError(
            f"find_pattern: expected a weight with zeros, got {tuple(weight.shape)} without one; prune it "
            "first"
        )
    kept, density = rows(mask), float(mask.sum()) / mask.numel()
    for pattern in CANDIDATES:
        mostly_used = (
            density >= pattern.density / 2
        )  # else the places that hold no kept weight cost more than they help
        if (
            mostly_used
            and not pattern.fits(weight.shape)
            and int(kept.unflatten(1, (-1, pattern.m)).sum(-1).max()) <= pattern.n
        ):
            return pattern
    return Unstructured(min(1 - density, math.nextafter(1, 0)))  # nothing kept at all is a pattern too


def check(packed: Packed) -> None:
    """Make sure that codes and values belong together, as after reading them from a file.

    Raises:
        ValueError: sizes disagree, or the codes are not ones that `pack` writes.
    """
    n, m = packed.group
    out, columns = packed.shape[0], math.prod(packed.shape[1:])
    if packed.values.dtype not in DTYPES:
        raise ValueError(
            "packed weight: expected values in float32, float16, bfloat16 or float64, got "
            f"{packed.values.dtype}"
        )
    groups = -(-columns // m) if m else 0
    bits = out * groups * code_bits(n, m) if m else out * columns
    if packed.codes.dtype != torch.uint8 or packed.codes.shape != (-(-bits // 8),):
        raise ValueError(
            f"packed weight: expected {-(-bits // 8)} bytes of codes for {packed.shape} in {packed.pattern}, "
            f"got {tuple(packed.codes.shape)} {packed.codes.dtype}"
        )
    if m and packed.values.shape != (out, groups * n):
        raise ValueError(
            f"packed weight: expected {(out, groups * n)} values, got {tuple(packed.values.shape)}"
        )
    stored = _legal(packed.codes, out, groups, n, m) if m else masks.unpack_bits(packed.codes, (bits,)).sum()
    if int(stored) != packed.values.numel():
        raise ValueError(
            f"packed weight: expected codes for {packed.values.numel()} stored values, got codes for "
            f"{int(stored)}; they are corrupt, or from another weight"
        )


def _mask(weight: Tensor, mask: Tensor | None) -> Tensor:
    if weight.dtype not in DTYPES or weight.ndim not in (2, 4):
        raise ValueError(
            f"pack: expected a float32, float16, bfloat16 or float64 weight of 2 (Linear) or 4 (Conv2d) "
            f"dimensions, got {tuple(weight.shape)} {weight.dtype}"
        )
    if weight.isnan().any():
        raise ValueError("pack: expected a weight without NaN, got NaN; check how it was made")
    if mask is None:
        return weight.detach() != 0
    if mask.shape != weight.shape or mask.dtype != torch.bool:
        raise ValueError(
            f"pack: expected a bool mask of the weight's {tuple(weight.shape)}, got {tuple(mask.shape)} "
            f"{mask.dtype}"
        )
    if (lost := weight.detach().ne(0) & ~mask).any():
        raise ValueError(
            f"pack: expected zeros wherever the mask is False, got {int(lost.sum())} other weights; apply "
            "the mask first"
        )
    return mask


def _pack_groups(matrix: Tensor, kept: Tensor, pattern: NM) -> tuple[Tensor, Tensor]:
    n, m = pattern.n, pattern.m
    if m > WIDEST:
        raise ValueError(f"pack: expected groups of at most {WIDEST}, got {pattern}; pack it as unstructured")
    pad = (0, -matrix.shape[1] % m)
    groups = F.pad(kept, pad).unflatten(1, (-1, m))
    counts = groups.sum(-1)
    if (counts > n).any():
        row, group = (counts > n).nonzero()[0].tolist()
        raise ValueError(
            f"pack: expected at most {n} kept of every {m}, got {int(counts[row, group])} in row {row}, "
            f"group {group} (columns {group * m} to {group * m + m - 1} of the row view); mask the weight, "
            "or pack it as unstructured"
        )
    # Kept entries first, then the free ones from the lowest; both sorts leave the order of the rest alone.
    positions = groups.byte().argsort(dim=-1, descending=True, stable=True)[..., :n].sort(-1).values
    values = F.pad(matrix, pad).unflatten(1, (-1, m)).gather(-1, positions).flatten(1)
    width = (m - 1).bit_length()
    if n * width > m:
        return values, masks.pack_bits(torch.zeros_like(groups).scatter(-1, positions, True).flatten())
    places = torch.arange(width, device=matrix.device)
    return values, masks.pack_bits((positions[..., None] >> places & 1).flatten())


def _legal(codes: Tensor, out: int, groups: int, n: int, m: int) -> int:
    """Count the values that the codes of groups have places for.

    That is n for a group whose code `pack` could have written.
    """
    bits, width = code_bits(n, m), (m - 1).bit_length()
    stream = masks.unpack_bits(codes, (out * groups, bits))
    if n * width > m:
        legal = stream.sum(-1) == n
    else:
        positions = (stream.view(-1, n, width) * 2 ** torch.arange(width, device=codes.device)).sum(-1)
        legal = (positions[:, -1] < m) & (positions.diff(dim=-1) > 0).all(-1)
    return n * int(legal.sum())
