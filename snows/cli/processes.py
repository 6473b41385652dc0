"""`torchrun -m snows prune`: several processes prune one network."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isascii() and text.isdigit() else default


JOINING = timedelta(minutes=5)  # the longest wait for the other processes
SIZE = _number("WORLD_SIZE", 1)
RANK = _number("RANK", 0) if SIZE > 1 else 0


def refuse_several(command: str) -> None:
    """Refuse a command that one process does alone.

    Raises:
        ValueError: torchrun started several.
    """
    if SIZE > 1 and command != "prune":
        raise ValueError(f"{command}: expected one process, got {SIZE}; prune alone is done by several")


def own_gpu() -> torch.device:
    """Take the GPU of this process's number on this machine.

    Raises:
        ValueError: there are fewer GPUs than processes.
    """
    import torch

    index, count, wanted = _number("LOCAL_RANK", 0), torch.cuda.device_count(), _number("LOCAL_WORLD_SIZE", 1)
    if wanted > count:
        raise ValueError(
            f"--nproc-per-node: expected at most as many processes as GPUs, {count}, got {wanted}; start "
            "fewer, or add --device cpu"
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


@contextmanager
def joined() -> Iterator[None]:
    """Join the processes that torchrun started, if it did, and leave them at the end.

    Raises:
        ValueError: they cannot be found.
        KeyboardInterrupt: torchrun ends them all, because one of them has ended.
    """
    if SIZE == 1:
        yield
        return
    import torch.distributed as dist

    # Python's own handler of Ctrl-C waits until the others are found
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    text = f"waiting for all {SIZE} processes, {JOINING} at most"
    notice = threading.Timer(10, print, [text], {"file": sys.stderr})
    notice.daemon = True
    notice.start()
    try:
        _join()
    except (ValueError, RuntimeError) as error:  # dist.DistError is one
        raise ValueError(
            f"expected {SIZE} processes, as WORLD_SIZE says, got no connection to them "
            f"({str(error).splitlines()[0]}); start all by torchrun, or unset WORLD_SIZE"
        ) from error
    finally:
        notice.cancel()
        signal.signal(signal.SIGINT, before)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        dist.destroy_process_group()


def _join() -> None:
    """Find the other processes as torchrun's environment variables say, within `JOINING`."""
    import torch
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    store, rank, size = next(rendezvous("env://", timeout=JOINING))
    store.set_timeout(dist.default_pg_timeout)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)
