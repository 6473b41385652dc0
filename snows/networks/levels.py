"""Where bytes lie that are needed again later: on a device, in pinned memory of its host, or in a file."""

from __future__ import annotations

import mmap
import os
import tempfile
from bisect import insort
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

PAGE = mmap.ALLOCATIONGRANULARITY


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


class Level:
    """Hold storages where they are: on the network's device.

    Attributes:
        limit: bytes that it may hold.
        used: bytes that it holds.
    """

    def __init__(self, limit: float) -> None:
        self.limit, self.used = limit, 0

    def keep(self, data: Tensor) -> Slot | None:
        """Take the bytes of a storage, if there is room for them."""
        return Slot(self, data.numel(), data) if self.used + data.numel() <= self.limit else None

    def load(self, slot: Slot) -> Tensor:
        """Return a slot's bytes on the device."""
        assert slot.data is not None
        return slot.data

    def expect(self, slot: Slot) -> None:
        """Be told that a slot will be loaded soon."""

    def close(self) -> None:
        """Close the file, if there is one."""

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

    def keep(self, data: Tensor) -> Slot | None:
        """Copy bytes to the host, if there is room: a pinned block may be rounded up to a power of two."""
        if self.used + _power(data.numel()) > self.limit:
            return None
        try:
            host = torch.empty(data.shape, dtype=torch.uint8, pin_memory=True)
        except RuntimeError:  # the system pins no more
            self.limit = self.used
            return None
        return Slot(self, data.numel(), host.copy_(data))

    def taken(self, size: int) -> None:
        """Be told that a slot is there."""
        super().taken(_power(size))

    def freed(self, slot: Slot) -> None:
        """Be told that a slot is gone."""
        self.used -= _power(slot.size)

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
        self.free: list[tuple[int, int]] = []  # of what has become free since

    def keep(self, data: Tensor) -> Slot:
        """Write bytes where there is room for them.

        Raises:
            ValueError: the disk is full, or the file cannot be written for another reason.
        """
        at = self._place(_paged(data.numel()))
        try:
            if self.file is None:
                if self.folder is not None:  # which another process may have made on another machine alone
                    self.folder.mkdir(parents=True, exist_ok=True)
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
        try:
            found = _Map(self.file.fileno(), slot.size, access=mmap.ACCESS_COPY, offset=slot.at)
        except OSError:  # each has a file descriptor, of which a process has some hundreds at most
            read = bytearray(slot.size)
            self.file.seek(slot.at)
            if self.file.readinto(read) != slot.size:  # type: ignore[attr-defined]  # of what is not buffered
                raise
            return torch.frombuffer(read, dtype=torch.uint8).to(self.device)
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
        self.free.append((slot.at, _paged(slot.size)))  # alone: it may come in the middle of `_place`

    def _place(self, size: int) -> int:
        """Return where so many bytes have room."""
        while self.free:
            insort(self.gaps, self.free.pop())
        joined: list[tuple[int, int]] = []
        for at, gap in self.gaps:
            if joined and sum(joined[-1]) == at:
                at, gap = joined[-1][0], joined.pop()[1] + gap
            joined.append((at, gap))
        self.gaps = joined
        for i, (at, gap) in enumerate(joined):
            if gap >= size:
                joined[i : i + 1] = [(at + size, gap - size)] if gap > size else []
                return at
        self.end += size
        return self.end - size


def _paged(size: int) -> int:
    return -(-size // PAGE) * PAGE


def _power(size: int) -> int:
    """Round up to a power of two."""
    return 1 << max(size - 1, 0).bit_length()
