"""Files that are whole or not there, and digests of tensors."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor, nn


def state(net: nn.Module) -> dict[str, Tensor]:
    """Return a `state_dict` that safetensors can write: on the host, contiguous, nothing shared.

    Entries that are no tensors are left out.
    """
    return {
        name: x.detach().cpu().clone().contiguous()
        for name, x in net.state_dict().items()
        if isinstance(x, Tensor)
    }


def write(path: Path, content: bytes, asked: str = "out") -> None:
    """Write a file whole or not at all.

    Args:
        path: of the file.
        content: all of it.
        asked: the argument that named the path, or the function; the error begins with it.

    Raises:
        ValueError: it cannot be written; what was there before stays.
    """
    temporary: Path | None = None
    try:
        # A name that nobody knows before: somebody else's folder may hold a link of any other, to a file that
        # is not to be written.
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        temporary = Path(name)
        with open(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(handle)
            os.fchmod(handle, 0o666 & ~_umask())
        temporary.replace(path)
    except OSError as error:
        if temporary is not None:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
        raise ValueError(f"{asked}: {path} cannot be written ({error.strerror})") from error


def _umask() -> int:
    """Read what new files may not be for others; there is no way to read it but to set it."""
    found = os.umask(0o022)
    os.umask(found)
    return found


def digest(tensors: Mapping[str, Tensor], *more: str) -> str:
    """Return the SHA-256 of tensors, their names, dtypes and shapes, and of texts."""
    found = hashlib.sha256("\n".join(more).encode())
    for name, x in tensors.items():
        if not isinstance(x, Tensor):  # of `get_extra_state`
            continue
        found.update(f"{name} {x.dtype} {tuple(x.shape)}".encode())
        found.update(x.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
