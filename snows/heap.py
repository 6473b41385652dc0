"""The C library's heap: memory that is freed stays with the process, or goes back to the system."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # mallopt's names for them, malloc.h
_lock, _inside = threading.Lock(), 0
_LARGEST = 2**25  # the mmap threshold up to which glibc adapts on its own; it trims at twice that


@contextmanager
def kept() -> Iterator[None]:
    """Keep freed memory from going back to the system, and give it back at the end.

    By default glibc returns what is freed at the top of its heap, and every tensor of some megabytes is then
    mapped and cleared anew, page by page: half the time of a Gauss-Newton product of a small network. Does
    nothing where the C library is another one, or where the environment sets these thresholds. The last of
    several to end, in threads or one in another, gives back.
    """
    global _inside
    library = ctypes.CDLL(None) if os.name == "posix" else None
    mallopt = getattr(library, "mallopt", None)
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    chosen = any(
        f"MALLOC_{name.upper()}_THRESHOLD_" in os.environ or f"glibc.malloc.{name}_threshold" in tunables
        for name in ("trim", "mmap")
    )
    if mallopt is None or chosen:
        yield
        return
    with _lock:
        _inside += 1
        if not mallopt(_MMAP_THRESHOLD, 2**30):
            mallopt(_MMAP_THRESHOLD, _LARGEST)
        mallopt(_TRIM_THRESHOLD, 2**31 - 1)
    try:
        yield
    # what they were is not to be had; these are what glibc comes to in any process with large tensors
    finally:
        with _lock:
            _inside -= 1
            if not _inside:
                mallopt(_MMAP_THRESHOLD, _LARGEST)
                mallopt(_TRIM_THRESHOLD, 2 * _LARGEST)
                trim()


def trim() -> None:
    """Give back what is free inside the C library's heap, if it is glibc's.

    Between what lives for a layer and what lives for an operation the heap is left with holes, which grow to
    a third of the activations of ViT-B/16.
    """
    library = ctypes.CDLL(None) if os.name == "posix" else None
    if (give_back := getattr(library, "malloc_trim", None)) is not None:
        give_back(0)
