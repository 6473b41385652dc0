"""The cut: units are taken out of a network by keeping entries of its tensors, and nothing else changes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from snows.networks.channels import Group
from snows.networks.layers import LEFT, groups_of
from snows.networks.masks import MASK


@dataclass(frozen=True)
class Selection:
    """Say which entries of some tensors stay, along one dimension each.

    Attributes:
        size: of the dimension, before.
        left: the entries that stay, ascending.
        tensors: names of parameters and buffers, each with the dimension.
    """

    size: int
    left: tuple[int, ...]
    tensors: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Take:
    """Take units out of a network.

    Attributes:
        selections: what stays of the tensors.
        sizes: attributes that hold a size: module, attribute, value before and after. A tuple's last entry is
            meant.
    """

    selections: tuple[Selection, ...]
    sizes: tuple[tuple[str, str, int, int], ...] = ()
    kind: ClassVar[str] = "take"

    @classmethod
    def of(
        cls,
        left: Mapping[tuple[str, int], tuple[int, tuple[int, ...]]],
        sizes: Iterable[tuple[str, str, int, int]],
    ) -> Take:
        """Write down what stays, tensors that keep the same entries together.

        Args:
            left: by tensor and dimension, the size before and the entries that stay.
            sizes: as the attribute.
        """
        together: dict[tuple[int, tuple[int, ...]], list[tuple[str, int]]] = {}
        for tensor, entries in left.items():
            together.setdefault(entries, []).append(tensor)
        found = (Selection(size, stay, tuple(x)) for (size, stay), x in together.items())
        return cls(tuple(found), tuple(sizes))

    @property
    def kept(self) -> dict[tuple[str, int], Tensor]:
        """The entries that stay, by tensor and dimension: int64, ascending."""
        return {x: torch.tensor(entry.left) for entry in self.selections for x in entry.tensors}

    def apply(self, net: nn.Module) -> None:
        """Keep what stays of each tensor, in place.

        Raises:
            ValueError: the network is another one; nothing was changed.
        """
        self._check(net)
        touched: dict[str, nn.Module] = {}
        for entry in self.selections:
            for tensor, dim in entry.tensors:
                name, _, key = tensor.rpartition(".")
                touched[name] = net.get_submodule(name)
                _keep(touched[name], key, dim, torch.tensor(entry.left))
                _remember(touched[name], f"{key}:{dim}", entry.size, entry.left)
        for name, attribute, before, after in self.sizes:
            module = net.get_submodule(name)
            value = getattr(module, attribute)
            setattr(module, attribute, after if isinstance(value, int) else (*value[:-1], after))
            _remember(module, attribute, before, after)
        for module in touched.values():
            _resize(module)

    def rebuild(self, net: nn.Module, tensors: dict[str, Tensor]) -> None:
        """Do the same to a bare architecture; what its tensors hold comes from a file."""
        self.apply(net)

    def _check(self, net: nn.Module) -> None:
        for entry in self.selections:
            for tensor, dim in entry.tensors:
                found = _tensor(net, tensor)
                if found is None or found.ndim <= dim or found.shape[dim] != entry.size:
                    what = "no such tensor" if found is None else f"one of {tuple(found.shape)}"
                    raise ValueError(
                        f"expected {tensor} to have {entry.size} entries in dimension {dim}, got {what}"
                    )
        for name, attribute, before, _ in self.sizes:
            try:
                value = _size(getattr(net.get_submodule(name), attribute))
            except AttributeError:
                raise ValueError(f"expected {name} to have an attribute {attribute}, got none") from None
            if value != before:
                raise ValueError(f"expected {name}.{attribute} to be {before}, got {value!r}")


def _tensor(net: nn.Module, tensor: str) -> Tensor | None:
    name, _, key = tensor.rpartition(".")
    try:
        module = net.get_submodule(name)
    except AttributeError:
        return None
    found = module._parameters.get(key)
    return module._buffers.get(key) if found is None else found


def _size(value: Any) -> Any:
    return value[-1] if isinstance(value, tuple) and value else value


def _keep(module: nn.Module, key: str, dim: int, left: Tensor) -> None:
    """Keep entries of a parameter or buffer, and of the mask beside a weight."""
    own = module._parameters if module._parameters.get(key) is not None else module._buffers
    old: Any = own[key]
    mask = module._buffers.get(MASK) if key == "weight" else None
    if mask is not None and mask.shape == old.shape:
        module._buffers[MASK] = mask.index_select(dim, left.to(mask.device))
    new = old.detach().index_select(dim, left.to(old.device))
    if old.ndim == 4 and not old.is_contiguous():
        new = new.contiguous(memory_format=torch.channels_last)
    if isinstance(old, nn.Parameter):
        new = nn.Parameter(new, old.requires_grad)
        new.__dict__.update(old.__dict__)
    own[key] = new


def _remember(module: nn.Module, key: str, before: int, left: Any) -> None:
    """Write down at a module what it has left of the network that it came from, over several cuts."""
    memory = module.__dict__.setdefault(LEFT, {})
    first, stood = memory.get(key, (before, range(before)))
    memory[key] = first, (left if isinstance(left, int) else tuple(stood[i] for i in left))


def _resize(module: nn.Module) -> None:
    """Set the sizes that PyTorch's own layers keep beside their tensors."""
    weight: Any = module._parameters.get("weight")
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = weight.shape
    elif isinstance(module, _ConvNd):
        first, second = weight.shape[0], weight.shape[1] * module.groups
        module.out_channels, module.in_channels = (second, first) if module.transposed else (first, second)
    elif isinstance(module, _NormBase):
        module.num_features = len(weight if module.running_mean is None else module.running_mean)
    elif isinstance(module, nn.GroupNorm):
        module.num_channels = len(weight)
    elif isinstance(module, nn.PReLU):
        module.num_parameters = len(weight)


def taken(net: nn.Module, of: Callable[[str], bool] = lambda name: True) -> Take | None:
    """Read off a network what was taken out of its modules, all cuts together; None for nothing.

    Args:
        net: the network.
        of: says of a module's name whether it is asked for.
    """
    left: dict[tuple[str, int], tuple[int, tuple[int, ...]]] = {}
    sizes = []
    for name, module in net.named_modules():
        for key, (before, after) in module.__dict__.get(LEFT, {}).items() if of(name) else ():
            own, _, dim = key.partition(":")
            if dim:
                left[f"{name}.{own}" if name else own, int(dim)] = before, tuple(after)
            else:
                sizes.append((name, own, before, after))
    return Take.of(left, sizes) if left or sizes else None


def take(net: nn.Module, groups: Iterable[Group], kept: Mapping[str, Tensor]) -> Take:
    """Write down the cut that leaves the given units.

    Args:
        net: the network.
        groups: of it.
        kept: by name of a group, int64 numbers of the units that stay.

    Raises:
        ValueError: the cut cannot be made: a normalisation's or a convolution's groups would not be whole, or
            an attribute would have to be two things.
    """
    stays: dict[tuple[str, int], Tensor] = {}
    sizes: dict[tuple[str, str], tuple[int, int]] = {}
    for group in groups:
        if group.name not in kept:
            continue
        goes = group.without(kept[group.name])
        for key, dim, entries in _entries(net, group):
            found: Any = _tensor(net, key)
            stay = stays.setdefault((key, dim), torch.ones(found.shape[dim], dtype=torch.bool))
            stay[entries[goes].flatten()] = False
        for follow in group.follows:
            new = group.units * follow.each, int((~goes).sum()) * follow.each
            if sizes.setdefault((follow.module, follow.attribute), new) != new:
                raise ValueError(f"{follow.module}.{follow.attribute} would have to hold two widths")
    for (tensor, dim), stay in stays.items():
        name, _, key = tensor.rpartition(".")
        module, number = net.get_submodule(name), int(stay.sum())
        counts = "num_groups" if isinstance(module, nn.GroupNorm) else "groups"
        count: int = getattr(module, counts) if isinstance(module, nn.GroupNorm | _ConvNd) else 1
        if key == "weight" and dim == 0 and count > 1:
            if count * number % len(stay):
                raise ValueError(f"{name} would not keep whole groups of its {count}")
            sizes[name, counts] = count, count * number // len(stay)
    left = {x: (len(stay), tuple(stay.nonzero().flatten().tolist())) for x, stay in stays.items()}
    return Take.of(left, ((*where, *values) for where, values in sizes.items()))


def _entries(net: nn.Module, group: Group) -> Iterator[tuple[str, int, Tensor]]:
    """List the tensors that a group's units have entries in, with dimension and entries."""
    for name, rows in group.rows.items():
        yield f"{name}.weight", 0, rows
        if getattr(net.get_submodule(name), "bias", None) is not None:
            yield f"{name}.bias", 0, rows
    for name, columns in group.columns.items():
        if groups_of(net.get_submodule(name)) == 1:
            yield f"{name}.weight", 1, columns
    for (tensor, dim), entries in group.entries.items():
        yield tensor, dim, entries
