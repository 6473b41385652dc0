"""Several processes that prune one network: each has some of the samples of every batch.

Whatever is a sum over samples goes through `total` (all-reduce), whatever one process alone knows (files,
clocks, times) through `first` (broadcast from rank 0), so that all decide alike. Without an initialised
process group of `torch.distributed` there is one process, and nothing is sent.
"""

from __future__ import annotations

import functools
import io
import math
import os
import pickle
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Result = TypeVar("Result")
Given = ParamSpec("Given")


_alone = False


def size() -> int:
    """Return how many processes work together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() and not _alone else 1


@contextmanager
def alone() -> Iterator[None]:
    """Work as one process, whatever process group there is."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def rank() -> int:
    """Return the number of this process, from 0."""
    return dist.get_rank() if size() > 1 else 0


class LostError(ValueError):
    """Say that another process cannot be reached any more."""


MEETING = timedelta(minutes=5)  # the longest wait for all processes to begin
_group: dist.ProcessGroup | None = None  # of what is done together now; None for the default group


@contextmanager
def exchange() -> Iterator[None]:
    """Open a process group of its own for what all processes do together, and close it at the end.

    A process that fails closes its own, which ends the waits of the others at once; the default group, which
    is the caller's, stays as it was, unless the processes do not all come here.

    Raises:
        LostError: not all processes have come here within `MEETING` (where the backend is gloo).
    """
    global _group
    if size() == 1 or _group is not None:
        if started := _strangers():
            warnings.warn(started, stacklevel=4)
        yield
        return
    if dist.get_backend() == dist.Backend.GLOO:
        try:
            dist.monitored_barrier(timeout=MEETING)
        except RuntimeError as error:
            raise LostError(
                f"expected all {size()} processes to call prune, got some that have ended or have not called "
                f"it in {MEETING.seconds} seconds; call it in every process, or in one of them under "
                "snows.together.alone()"
            ) from error
    with _sending():
        _group = group = dist.new_group()
    try:
        yield
        with _sending():
            dist.barrier(group)
    finally:
        _group = None
        dist.destroy_process_group(group)


def _strangers() -> str:
    """Say what is amiss where torchrun started several processes that do not know of each other."""
    count = os.environ.get("WORLD_SIZE", "1")
    if count in ("", "1") or "TORCHELASTIC_RUN_ID" not in os.environ or _alone or dist.is_initialized():
        return ""
    return (
        f"prune: torchrun started {count} processes, which have no process group, so that each prunes by "
        'itself; to share the work, call torch.distributed.init_process_group first, with "gloo", or "nccl" '
        "on GPUs"
    )


@contextmanager
def _sending() -> Iterator[None]:
    """Say in a sentence what goes wrong while numbers are exchanged.

    Raises:
        LostError: they cannot be exchanged.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # dist.DistBackendError is one
        raise LostError(
            f"lost another of {size()} processes, which has ended or failed; what it said tells why. A run "
            "in a folder (out=, --out) goes on with resume=True (--resume), with any number of processes"
        ) from error


def total(x: Tensor) -> Tensor:
    """Sum a tensor over all processes (all-reduce); with one process this is the tensor itself."""
    if size() > 1:
        x = x.detach().clone(memory_format=torch.contiguous_format)
        with _sending():
            dist.all_reduce(x, group=_group)
    return x


def same(x: Tensor) -> Tensor:
    """Take the first process's tensor (broadcast from rank 0), which has the same shape in all processes."""
    if size() > 1:
        x = x.detach().clone(memory_format=torch.contiguous_format)
        with _sending():
            dist.broadcast(x, 0, group=_group)
    return x


def gathered(x: Tensor) -> Tensor:
    """Concatenate the rows that each process has (all-gather), which may be of another number in each."""
    if size() == 1:
        return x
    found: list[Any] = [None] * size()
    with _sending():
        dist.all_gather_object(found, _packed(x.detach()), group=_group)
    return torch.cat([_unpacked(part) for part in found])


WORTH = 1e9  # operations that are shared out: some 20 ms, of which an exchange of numbers takes about one


class Rows:
    """Share rows out among the processes, or leave all to each where there is little to do.

    Attributes:
        own: which of the rows this process works on: about as many each, in order.

    Args:
        count: of the rows.
        operations: multiplications between two exchanges, for all rows.
    """

    def __init__(self, count: int, operations: float) -> None:
        self.count, self.shared = count, size() > 1 and operations >= WORTH
        part, parts = (rank(), size()) if self.shared else (0, 1)
        self.own = slice(count * part // parts, count * (part + 1) // parts)

    def total(self, x: Tensor) -> Tensor:
        """Return the sum of what processes made of their rows."""
        return total(x) if self.shared else x

    def same(self, x: Tensor) -> Tensor:
        """Return what the first process has, so that all go on alike, where rows are shared out."""
        return same(x) if self.shared else x

    def joined(self, part: Tensor) -> Tensor:
        """Put (..., rows, columns) together of what each process made of its rows."""
        if not self.shared:
            return part
        whole = part.new_zeros(*part.shape[:-2], self.count, part.shape[-1])
        whole[..., self.own, :] = part
        return total(whole)


def first(work: Callable[[], Result]) -> Result:
    """Call a function in the first process, and return what it returns in all (broadcast from rank 0).

    Raises:
        Exception: what it raised there, in all processes.
    """
    if size() == 1:
        return work()
    found: list[Any] = [None, None]
    if rank() == 0:
        try:
            found[0] = _packed(work())
        except Exception as error:  # whatever it is, the others must not wait
            found[1] = _sendable(error)
    with _sending():
        dist.broadcast_object_list(found, 0, group=_group)
    if found[1] is not None:
        raise found[1]
    result: Result = _unpacked(found[0])
    return result


def _packed(result: Any) -> bytes:
    file = io.BytesIO()
    torch.save(result, file)
    return file.getvalue()


def _unpacked(content: bytes) -> Any:
    return torch.load(io.BytesIO(content), _here, weights_only=False)


def _here(storage: Any, location: str) -> Any:
    """Put what another process had on its GPU on this one's."""
    return storage.cuda() if location.startswith("cuda") else storage


def _sendable(error: Exception) -> Exception:
    """Return an error that arrives as it was sent, or a ValueError with its sentence."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # of a class with another constructor, for example
        return ValueError(str(error))
    return error


def by_first(method: Callable[Given, Result]) -> Callable[Given, Result]:
    """Let the first process alone call a function, and return to all what came of it, see `first`."""

    @functools.wraps(method)
    def told(*args: Given.args, **kwargs: Given.kwargs) -> Result:
        return first(lambda: method(*args, **kwargs))

    return told


def everywhere(known: bool) -> bool:
    """Say whether something holds in all processes (logical AND)."""
    if size() == 1:
        return known
    found: list[bool] = [False] * size()
    with _sending():
        dist.all_gather_object(found, known, group=_group)
    return all(found)


def agree(known: Mapping[str, str]) -> None:
    """Refuse processes that were given different things.

    Args:
        known: by name, what each was given, as text or a digest.

    Raises:
        ValueError: a process has something else than the first; all are told what.
    """
    if size() == 1:
        return
    found: list[Any] = [None] * size()
    with _sending():
        dist.all_gather_object(found, dict(known), group=_group)
    for i, other in enumerate(found):
        names = [x for x in {**found[0], **other} if other.get(x) != found[0].get(x)]
        if names:
            told = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise ValueError(
                f"expected the same {told} in all processes, got others in process {i} of {size()} than in "
                "the first; start all with the same command and files"
            )


def variance(y: Tensor, share: float) -> float:
    """Return the variance of all elements that all processes have; 1 where it is 0.

    Args:
        y: those of this process.
        share: of the batch, that this process has; those of 0 do not count.
    """
    own, count = (y.double(), y.numel()) if share else (y.double() * 0, 0)
    sums = total(torch.stack([own.sum(), own.new_tensor(count)]))
    mean = sums[0] / sums[1]
    found = total(((own - mean) * bool(share)).square().sum()) / sums[1]
    value = found.item()
    return value if value > 0 and math.isfinite(value) else 1.0
