"""How much memory there is, what the activations of a walk need, and what was taken at most."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch

from snows import together
from snows.amounts import said
from snows.networks.twins import Twins

BATCHES = 3  # that are at hand at a time: the one in use, the next, and the samples held back


class Rooms(NamedTuple):
    """Predict the bytes that the activations of a walk take.

    Attributes:
        most: of all batches, in both networks, at the layer where that is most.
        layer: that layer.
        least: of what is at hand at a time there, without which nothing can be computed.
    """

    most: int
    layer: str
    least: int

    @classmethod
    def of(cls, twins: Twins, layers: Iterable[str]) -> Rooms:
        """Predict them from what a sample's take, for a walk through some layers."""
        sizes = [math.ceil(x.samples() / together.size()) for x in twins.batches]
        sample, layer = max(((_sample(twins, name), name) for name in layers), default=(0, ""))
        return cls(2 * sample * sum(sizes), layer, 2 * sample * max(sizes) * BATCHES)


def bound(twins: Twins, memory: int | None, layers: Iterable[str], folder: Path | None) -> Rooms:
    """Bound the memory that activations take between layers; what has no room goes to a file.

    Args:
        twins: the networks and batches.
        memory: bytes on the networks' device; by default half of what is free there.
        layers: of the walk.
        folder: of the file; by default the system's for temporary files.

    Returns:
        What is predicted of them.

    Raises:
        ValueError: one layer needs more; the sentence says how much.
    """
    rooms, device = together.first(lambda: Rooms.of(twins, layers)), twins.device
    if memory is not None and memory < rooms.least:
        raise ValueError(
            f"memory: expected at least {said(rooms.least)}, which {BATCHES} batches take before "
            f"{rooms.layer}, got {said(memory)}; allow more, or use smaller batches"
        )
    host, here = _free(torch.device("cpu")), _free(device)
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", together.size()))  # of this machine; each has a GPU
    own = 1 if device.type == "cuda" else processes
    given = memory if memory is not None else float("inf") if here is None else here // (2 * own)
    pinned = float("inf") if host is None else host // (2 * processes)
    twins.store.bound(device, max(0, given - rooms.least), pinned, folder)
    return rooms


def peak(device: torch.device) -> int:
    """Return the most bytes that this process has taken so far, on a GPU what it took there; 0 if unknown."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    if found := _number("/proc/self/status", "VmHWM:", 1024):  # getrusage counts the parent's, until the exec
        return found
    with suppress(ImportError):
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * unit
    return 0


def taken(device: torch.device) -> int:
    """Return the bytes that this process takes now, on a GPU what it takes there; 0 if unknown."""
    if device.type == "cuda":
        return int(torch.cuda.memory_allocated(device))
    return _number("/proc/self/status", "VmRSS:", 1024) or 0


def _sample(twins: Twins, layer: str) -> int:
    """Return the bytes that the stream of a sample takes in front of a layer."""
    schedule = twins.schedules[1]
    if not schedule.whole:
        return schedule.rooms.get(layer, 0)
    use = twins.trace.layers.get(layer)  # nothing is remembered but the layer's input
    if use is None or not use.calls:
        return 0
    weight: Any = twins.sparse.get_submodule(layer).weight
    return int(use.calls[-1][0].numel() * weight.element_size() // max(twins.batches[0].part().samples(), 1))


def _free(device: torch.device) -> int | None:
    """Return the bytes that are free on a device, within this process's limits; None if unknown."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    found = [_number("/proc/meminfo", "MemAvailable:", 1024)]
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, kind, path = line.split(":", 2)
            if kind in ("", "memory"):
                top = Path("/sys/fs/cgroup", kind)
                own = top / path.lstrip("/")
                found += [_left(x, kind) for x in (own, *own.parents) if x.is_relative_to(top)]
    return min((x for x in found if x is not None), default=None)


def _left(group: Path, kind: str) -> int | None:
    """Return the bytes that a control group may still take; pages of files that can go count as free."""
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    limit, usage, files = names if kind else ("memory.max", "memory.current", "inactive_file")
    most, used = _number(group / limit), _number(group / usage)
    if most is None or used is None:
        return None
    return max(0, most - used + (_number(group / "memory.stat", files) or 0))


def _number(path: Path | str, name: str = "", unit: int = 1) -> int | None:
    """Read the number after a name in a file of the system's; None if there is none."""
    with suppress(OSError, ValueError):
        for line in Path(path).read_text().splitlines():
            words = line.split()
            if words[:-1][:1] == [name] or not name:
                return int(words[1 if name else 0]) * unit
    return None
