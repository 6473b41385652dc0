"""What can be measured of a network from its file alone: zeros, patterns, sizes, kept indices."""

from __future__ import annotations

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from snows.layers.base import PackedLayer
from snows.networks.edits import Edit, Pack, inside
from snows.networks.implants import Implant
from snows.networks.taking import Take
from snows.packing import Packed, check, find_pattern, packable, unpack
from snows.sparsity import NM, parse_pattern, rows


class Contents(NamedTuple):
    """Hold what a file brings.

    Attributes:
        tensors: by name.
        edits: that make the network from the dense architecture.
        others: tensors that are no parameters, or that are a parameter's second name.
    """

    tensors: Mapping[str, Tensor]
    edits: Sequence[Edit]
    others: Collection[str]

    @property
    def packs(self) -> list[Pack]:
        """The packed layers, each once."""
        packs = [edit for edit in self.edits if isinstance(edit, Pack)]
        return [edit for edit in packs if inside(edit.layer, "values") not in self.others]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(x.nbytes for x in self.tensors.values())

    @property
    def parameters(self) -> int:
        """The network's parameters, a packed weight's with its zeros."""
        packed = {inside(edit.layer, key) for edit in self.packs for key in ("values", "codes")}
        plain = [x.numel() for name, x in self.tensors.items() if name not in {*self.others, *packed}]
        return sum(plain) + sum(math.prod(edit.shape) for edit in self.packs)

    def weights(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Unpack the weights of two and four dimensions.

        Returns:
            By name, and of those that cannot be unpacked, why.
        """
        found, broken = dict[str, Tensor](), dict[str, str]()
        packed = {inside(edit.layer, key) for edit in self.packs for key in ("values", "codes")}
        for name, x in self.tensors.items():
            if x.ndim in (2, 4) and x.is_floating_point() and name not in {*self.others, *packed}:
                found[name] = x
        for edit in self.packs:
            name = inside(edit.layer, "weight")
            try:
                values, codes = (self.tensors[inside(edit.layer, key)] for key in ("values", "codes"))
                weight = Packed(values, codes, packable(edit.pattern), tuple(edit.shape))
                check(weight)
                found[name] = unpack(weight)
            except KeyError as error:
                broken[name] = f"there is no {error.args[0]}"
            except ValueError as error:
                broken[name] = str(error)
        return found, broken

    def kept(self) -> dict[str, str]:
        """Return a digest of the indices that were kept of each tensor, by name."""
        found = defaultdict[str, list[tuple[int, int, tuple[int, ...]]]](list)
        for edit in self.edits:
            for entry in edit.selections if isinstance(edit, Take) else ():
                for tensor, dim in entry.tensors:
                    found[tensor].append((dim, entry.size, entry.left))
        return {name: hashlib.sha256(json.dumps(x).encode()).hexdigest()[:16] for name, x in found.items()}

    @property
    def factors(self) -> set[str]:
        """The weights that stand for one of low rank."""
        thin = [edit.layer for edit in self.edits if isinstance(edit, Implant)]
        return {inside(layer, f"{part}.weight") for layer in thin for part in (0, 1)}

    def misfits(self) -> tuple[int, list[str]]:
        """Compare the sizes of tensors with what the edits leave of them.

        Returns:
            How many sizes were compared, and a sentence for each that differs.
        """
        shapes = {name: tuple(x.shape) for name, x in self.tensors.items()}
        shapes |= {inside(edit.layer, "weight"): tuple(edit.shape) for edit in self.packs}
        wanted = {key: size for key, size in self._sizes().items() if key[0] in shapes}
        problems = [
            f"{name} has {shapes[name][dim] if dim < len(shapes[name]) else 'no'} entries in dimension "
            f"{dim}, not {size}"
            for (name, dim), size in wanted.items()
            if dim >= len(shapes[name]) or shapes[name][dim] != size
        ]
        return len(wanted), problems

    def _sizes(self) -> dict[tuple[str, int], int]:
        """Return the sizes that cuts and low rank leave, by tensor and dimension."""
        sizes: dict[tuple[str, int], int] = {}
        for edit in self.edits:
            if isinstance(edit, Take):
                sizes |= {x: len(entry.left) for entry in edit.selections for x in entry.tensors}
            elif isinstance(edit, Implant):
                first, second = (inside(edit.layer, f"{part}.weight") for part in (0, 1))
                moved = {"weight": {0: second, 1: first}, "bias": {0: inside(edit.layer, "1.bias")}}
                for key, places in moved.items():
                    for dim, tensor in places.items():
                        if (size := sizes.pop((inside(edit.layer, key), dim), None)) is not None:
                            sizes[tensor, dim] = size
                sizes |= {(first, 0): edit.rank, (second, 1): edit.rank}
        return sizes


def others_in(net: nn.Module, tensors: Mapping[str, Tensor]) -> list[str]:
    """List the tensors of a network that are no parameters, or that are a parameter's second name."""
    own = {name for name, _ in net.named_parameters()}
    for name, module in net.named_modules():
        if isinstance(module, PackedLayer):
            own |= {inside(name, key) for key in ("values", "codes", "bias")}
    return sorted(set(tensors) - own)


def zeros_of(weight: Tensor) -> int:
    """Count the zeros of a weight."""
    return int((weight == 0).sum())


def pattern_of(weight: Tensor, wanted: str = "") -> str:
    """Name the N:M that a weight follows: the wanted one, else the sparsest usual one; empty for none."""
    if obeys(weight, wanted):
        return wanted
    try:
        found = find_pattern(weight)
    except ValueError:  # it has no zeros, or is of a type that is not packed
        return ""
    return str(found) if isinstance(found, NM) else ""


def obeys(weight: Tensor, pattern: str) -> bool:
    """Say whether every group of m has at most n entries that are not zero; False for what is no N:M."""
    try:
        wanted = parse_pattern(pattern)
    except ValueError:
        return False
    if not isinstance(wanted, NM) or wanted.m > weight[0].numel():
        return False
    kept = rows(weight != 0)
    groups = F.pad(kept, (0, -kept.shape[1] % wanted.m)).unflatten(1, (-1, wanted.m))
    return int(groups.sum(-1).max()) <= wanted.n
