"""Files that are whole or not there, and digests of tensors."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn


def state(net: nn.Module) -> dict[str, Tensor]:
    """Return a `state_dict` that safetensors can write: on the host, contiguous, nothing shared.

    What is so already is no copy. Entries that are no tensors are left out.
    """
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, x in net.state_dict().items():
        if isinstance(x, Tensor):
            x = x.detach().cpu().contiguous()
            found[name] = x.clone() if x.untyped_storage().data_ptr() in seen else x
            seen.add(x.untyped_storage().data_ptr())
    return found


def read_file(path: Path, key: str, asked: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a safetensors file.

    Args:
        path: of the file.
        key: of the metadata without which the tensors are not read.
        asked: the function that is to read it; the error begins with it.

    Returns:
        Tensors by name, in the names' order, and the metadata.

    Raises:
        ValueError: there is no such file, or it is no whole one.
    """
    if path.is_dir():
        raise ValueError(
            f"{asked}: expected a file, got the folder {path}; name model.safetensors or "
            "packed.safetensors in it"
        )
    if not path.is_file():
        raise ValueError(f"{asked}: there is no file {path}")
    try:
        with safe_open(path, "pt") as file:  # sees to it that the header claims no more than the file holds
            metadata = file.metadata() or {}
            names = sorted(file.keys()) if key in metadata else []
            return {name: file.get_tensor(name) for name in names}, metadata
    except (SafetensorError, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{asked}: {path} is not a whole safetensors file ({error})") from error


def write(path: Path, content: bytes, asked: str = "out") -> None:
    """Write a file whole or not at all.

    Args:
        path: of the file.
        content: all of it.
        asked: the argument that named the path, or the function; the error begins with it.

    Raises:
        ValueError: it cannot be written; what was there before stays.
    """
    with _whole(path, asked) as temporary:
        temporary.write_bytes(content)


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], asked: str = "out"
) -> None:
    """Write tensors and metadata as safetensors, whole or not at all, straight from where the tensors lie.

    The library orders the metadata anew each time; here they are put in order, so that the same content makes
    the same file.

    Args:
        path: of the file.
        tensors: by name; on the host, contiguous, none in another's memory.
        metadata: by name.
        asked: as for `write`.

    Raises:
        ValueError: it cannot be written; what was there before stays.
    """
    with _whole(path, asked) as temporary:
        save_file(dict(tensors), temporary, dict(metadata))
        if not metadata:
            return
        with open(temporary, "r+b") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
            header["__metadata__"] = dict(sorted(metadata.items()))
            text = json.dumps(header, separators=(",", ":"), ensure_ascii=False)  # as long as it was
            file.seek(8)
            file.write(text.encode().ljust(size))


@contextmanager
def _whole(path: Path, asked: str) -> Iterator[Path]:
    """Give another file to write, which takes the place of `path` where the block ends without an error."""
    temporary: Path | None = None
    try:
        # A name that nobody knows before: somebody else's folder may hold a link of any other, to a file that
        # is not to be written.
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(handle)
        temporary = Path(name)
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    except BaseException as error:  # a KeyboardInterrupt too
        if temporary is not None:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
        if isinstance(error, OSError | SafetensorError):
            reason = error.strerror if isinstance(error, OSError) else error
            raise ValueError(f"{asked}: {path} cannot be written ({reason})") from error
        raise


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
