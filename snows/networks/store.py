"""Where the activations between layers lie: in memory up to a bound, beyond it in a file.

A walk comes back to every batch equally often, so the activations that found room in memory stay there, and
the others are read from the file each time, the next batch's while this one's are used.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from snows.heap import trim
from snows.networks.levels import File, Host, Level, Slot

TRIM = 2**28  # bytes that are kept from one time that the heap is trimmed to the next
Slots = dict[int, Slot]  # by address of the bytes, for as long as they are held


@dataclass(frozen=True)
class Kept:
    """Stand for a tensor whose bytes are in a store.

    Attributes:
        slot: the bytes of its storage, which several tensors may share.
        shape, stride, offset: where its entries are in the storage.
    """

    slot: Slot
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int

    def tensor(self, data: Tensor | None = None) -> Tensor:
        """Return the tensor, on the device.

        Args:
            data: the storage's bytes, if they are at hand.
        """
        storage = (self.slot.load() if data is None else data).untyped_storage()
        empty = torch.empty(0, dtype=self.dtype, device=storage.device)
        return empty.set_(storage, self.offset, self.shape, self.stride)


class Store:
    """Hold tensors that are needed again later: on the device up to a bound, on the host, or in a file.

    Results do not depend on where they lie: a tensor keeps its bytes, strides and what it shares with others.
    A context manager: at the end there is no file any more, and what was in it cannot be loaded again.
    """

    def __init__(self) -> None:
        self.levels: list[Level] = [Level(float("inf"))]
        self._since = 0  # bytes that were kept since the heap was trimmed

    def bound(self, device: torch.device, limit: float, host: float, folder: Path | None) -> None:
        """Bound what stays in memory; what lies there already counts.

        Args:
            device: of the network.
            limit: bytes on the device.
            host: bytes on the host, of what a GPU has no room for.
            folder: of the file; by default the system's for temporary files.
        """
        self.levels[0].limit = limit
        pinned = [Host(host, device)] if device.type == "cuda" else []
        self.levels = [self.levels[0], *pinned, File(folder, device)]

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *error: object) -> None:
        for level in self.levels:
            level.close()

    def put(self, value: Any, slots: Slots, own: Collection[int] = ()) -> Any:
        """Keep all tensors of a value, and return it with `Kept` in their places.

        Args:
            value: tuples, lists and mappings of tensors.
            slots: of storages that are kept already, by address; those that are kept now are added.
            own: addresses of storages that are held elsewhere, whose tensors stay as they are.
        """

        def kept(x: Any) -> Any:
            if not _is_plain(x) or (at := x.untyped_storage().data_ptr()) in own:
                return x
            if at not in slots:
                slots[at] = self._keep(x)
            return Kept(slots[at], x.dtype, x.shape, x.stride(), x.storage_offset())

        return tree_map(kept, value)

    def take(self, value: Any) -> tuple[Any, Slots]:
        """Return a value with its tensors on the device, and the slots of their storages by address."""
        found = {x.slot for x in tree_leaves(value) if isinstance(x, Kept)}
        loaded = {slot: slot.load() for slot in found}
        tensors = tree_map(lambda x: x.tensor(loaded[x.slot]) if isinstance(x, Kept) else x, value)
        return tensors, {x.untyped_storage().data_ptr(): slot for slot, x in loaded.items()}

    def expect(self, value: Any) -> None:
        """Fetch what a value needs, because it will be taken next."""
        if len(self.levels) > 1:
            for slot in {x.slot for x in tree_leaves(value) if isinstance(x, Kept)}:
                slot.level.expect(slot)

    def _keep(self, x: Tensor) -> Slot:
        storage = x.untyped_storage()
        data = torch.empty(0, dtype=torch.uint8, device=x.device).set_(storage)
        self._since += data.numel()
        if self._since >= TRIM:
            self._since = 0
            trim()
        return next(slot for level in self.levels if (slot := level.keep(data)) is not None)


def size(value: Any) -> int:
    """Return the bytes that a value holds in a store."""
    return sum(slot.size for slot in {x.slot for x in tree_leaves(value) if isinstance(x, Kept)})


def addresses(values: Iterable[Any]) -> set[int]:
    """Return where the storages of all tensors among some values begin."""
    tensors = (x for x in values if type(x) in (Tensor, nn.Parameter) and x.layout is torch.strided)
    return {x.untyped_storage().data_ptr() for x in tensors}


def _is_plain(x: Any) -> bool:
    """Say whether a value is a tensor that its bytes and strides tell all of, and that takes room."""
    return (
        type(x) is Tensor
        and x.layout is torch.strided
        and not (x.requires_grad or x.is_quantized or x.is_conj() or x.is_neg() or x.is_inference())
        and x.numel() > 0
        and (x.ndim == 0 or any(x.stride()) or x.numel() == 1)
    )
