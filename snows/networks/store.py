"""Where the activations between layers lie: in memory up to a bound, beyond it in a file.

A walk comes back to every batch equally often, so the activations that found room in memory stay there, and
the others are read from the file each time, the next batch's while this one's are used.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from bisect import insort
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

PAGE = mmap.ALLOCATIONGRANULARITY
Slots = dict[int, "Slot"]  # by address of the bytes, for as long as they are held


class Slot:
    """Hold the bytes of one storage at a level of a store; the room is free again when nobody holds the slot.

    Attributes:
        size: bytes.
        data: the bytes, uint8; of a file's level None.
        at: where they begin in the file.
        coming: their copy on the device, which was asked for before it is needed, and when it is whole.
    """

    def __init__(self, level: Level, size: int, data: Tensor | None = None, at: int = 0) -> None:
        self.level, self.size, self.data, self.at = level, size, data, at
        self.coming: tuple[Tensor, torch.cuda.Event] | None = None
        level.taken(size)

    def __del__(self) -> None:
        self.level.freed(self)

    def load(self) -> Tensor:
        """Return the bytes on the device."""
        return self.level.load(self)


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


# ---------------------------------------------------------------- levels


class Level:
    """Hold storages where they are: on the network's device.

    Attributes:
        limit: bytes that it may hold.
        used: bytes that it holds.
    """

    def __init__(self, limit: float) -> None:
        self.limit, self.used = limit, 0

    def keep(self, data: Tensor) -> Slot:
        """Take the bytes of a storage."""
        return Slot(self, data.numel(), data)

    def load(self, slot: Slot) -> Tensor:
        """Return a slot's bytes on the device."""
        assert slot.data is not None
        return slot.data

    def expect(self, slot: Slot) -> None:
        """Be told that a slot will be loaded soon."""

    def close(self) -> None:
        """Let go of what is no memory."""

    def taken(self, size: int) -> None:
        """Be told that a slot is there."""
        self.used += size

    def freed(self, slot: Slot) -> None:
        """Be told that a slot is gone."""
        self.used -= slot.size


class Host(Level):
    """Hold storages of a GPU in pinned memory of the host."""

    def __init__(self, limit: float, device: torch.device) -> None:
        super().__init__(limit)
        self.device = device
        self.stream = torch.cuda.Stream(device)

    def keep(self, data: Tensor) -> Slot:
        """Copy bytes to the host."""
        host = torch.empty(data.shape, dtype=torch.uint8, pin_memory=True)
        return Slot(self, data.numel(), host.copy_(data))

    def load(self, slot: Slot) -> Tensor:
        """Return a slot's copy on the device, once it is whole."""
        if slot.coming is None:
            self.expect(slot)
        assert slot.coming is not None
        (data, whole), slot.coming = slot.coming, None
        current = torch.cuda.current_stream(self.device)
        current.wait_event(whole)
        data.record_stream(current)
        return data

    def expect(self, slot: Slot) -> None:
        """Begin to copy a slot's bytes to the device, beside what is computed there."""
        assert slot.data is not None
        if slot.coming is None:
            with torch.cuda.stream(self.stream):
                data = slot.data.to(self.device, non_blocking=True)
                slot.coming = data, self.stream.record_event()


class _Map(mmap.mmap):
    """Map a slot's bytes, and keep the slot for as long."""

    slot: Slot


class File(Level):
    """Hold storages in one file without a name, which is gone with the process, however that ends.

    What is read is mapped copy-on-write, so a change in place never reaches the file. It is written by calls
    that fail where the disk is full; a mapping would end the process.

    Args:
        folder: that the file is in; by default the system's for temporary files.
        device: of the network.
    """

    def __init__(self, folder: Path | None, device: torch.device) -> None:
        super().__init__(float("inf"))
        self.folder, self.device = folder, device
        self.file: BinaryIO | None = None
        self.end = 0
        self.gaps: list[tuple[int, int]] = []  # begin and size of what is free before the end, in order

    def keep(self, data: Tensor) -> Slot:
        """Write bytes where there is room for them.

        Raises:
            ValueError: the disk is full, or the file cannot be written for another reason.
        """
        at = self._place(_paged(data.numel()))
        try:
            if self.file is None:
                self.file = tempfile.TemporaryFile(buffering=0, dir=self.folder)  # noqa: SIM115 - until `close`
            self.file.seek(at)
            left = memoryview(data.cpu().numpy())  # type: ignore[arg-type]  # numpy's types do not say so
            while left:
                left = left[self.file.write(left) :]
        except OSError as error:
            folder = self.folder or tempfile.gettempdir()
            raise ValueError(
                f"memory: the activations that memory has no room for cannot be written to {folder} "
                f"({error.strerror}, after {self.end / 1e9:.3g} GB); make room there or raise memory, and go "
                "on with resume, where out names a folder"
            ) from error
        return Slot(self, data.numel(), at=at)

    def load(self, slot: Slot) -> Tensor:
        """Map a slot's bytes."""
        assert self.file is not None
        self.expect(slot)
        found = _Map(self.file.fileno(), slot.size, access=mmap.ACCESS_COPY, offset=slot.at)
        found.slot = slot
        return torch.frombuffer(found, dtype=torch.uint8).to(self.device)

    def expect(self, slot: Slot) -> None:
        """Let the system read a slot's bytes ahead."""
        if self.file is not None and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self.file.fileno(), slot.at, slot.size, os.POSIX_FADV_WILLNEED)

    def close(self) -> None:
        """Remove the file."""
        if self.file is not None:
            self.file.close()

    def freed(self, slot: Slot) -> None:
        """Note where the file has room again."""
        super().freed(slot)
        insort(self.gaps, (slot.at, _paged(slot.size)))
        joined: list[tuple[int, int]] = []
        for at, size in self.gaps:
            if joined and sum(joined[-1]) == at:
                at, size = joined[-1][0], joined.pop()[1] + size
            joined.append((at, size))
        self.gaps = joined

    def _place(self, size: int) -> int:
        """Return where so many bytes have room."""
        for i, (at, gap) in enumerate(self.gaps):
            if gap >= size:
                self.gaps[i : i + 1] = [(at + size, gap - size)] if gap > size else []
                return at
        self.end += size
        return self.end - size


def _paged(size: int) -> int:
    return -(-size // PAGE) * PAGE


# ---------------------------------------------------------------- the store


class Store:
    """Hold tensors that are needed again later: on the device up to a bound, on the host, or in a file.

    Results do not depend on where they lie: a tensor keeps its bytes, strides and what it shares with others.
    A context manager: at the end there is no file any more, and what was in it cannot be loaded again.
    """

    def __init__(self) -> None:
        self.levels: list[Level] = [Level(float("inf"))]

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
        return next(x for x in self.levels if x.used + data.numel() <= x.limit).keep(data)


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
