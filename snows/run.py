"""A run on disk: what it was asked, and every finished layer, written so that no kill leaves half a file."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from snows.network import Inputs
from snows.report import LayerReport, Report
from snows.sparsity import MaskedWeight

VERSION = 1
SOURCE = "source.json"  # of the runs that the command line began
RESULTS = ("model.safetensors", "masks.safetensors", "report.json", "report.html", SOURCE)  # what a run writes when it is done


@dataclass(frozen=True)
class Source:
    """Where a run's network and images came from, and what was asked of their preparation: what the command line needs to find them again.

    Attributes:
        model, data: names, as `snows.sources` reads them.
        weights: file of the dense network's weights; None is the library's own.
        random_weights: whether the dense network had random ones.
        classes, labels: files that say what the data's classes are; None where there was none.
        crop, resize: in pixels; None is the network's own.
        mean, std: of three channels; None is the network's own.
    """

    model: str
    data: str
    weights: str | None = None
    random_weights: bool = False
    classes: str | None = None
    labels: str | None = None
    crop: int | None = None
    resize: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    def settings(self) -> tuple[int | None, int | None, tuple[float, ...] | None, tuple[float, ...] | None]:
        """Return what replaces the preparation's own settings: crop, resize, mean and std."""
        return self.crop, self.resize, self.mean, self.std

    def save(self, folder: Path) -> None:
        """Write it into a run's folder."""
        write(folder / SOURCE, (json.dumps(asdict(self), indent=1) + "\n").encode())

    @classmethod
    def read(cls, folder: Path) -> Source:
        """Read that of a run's folder.

        Raises:
            ValueError: it cannot be read, or an entry is missing, unknown or of another type.
        """
        path = folder / SOURCE
        try:
            content = json.loads(path.read_text())
            if not isinstance(content, dict) or set(content) != {entry.name for entry in fields(cls)}:
                raise ValueError(f"expected the entries {', '.join(entry.name for entry in fields(cls))}")
            for name, value in content.items():
                if name in ("model", "data"):
                    sound = isinstance(value, str)
                elif name in ("weights", "classes", "labels"):
                    sound = value is None or isinstance(value, str)
                elif name == "random_weights":
                    sound = isinstance(value, bool)
                elif name in ("crop", "resize"):
                    sound = value is None or (type(value) is int and value > 0)
                else:
                    sound = value is None or (isinstance(value, list) and all(type(x) in (int, float) for x in value))
                    content[name] = tuple(value) if sound and value is not None else None
                if not sound:
                    raise ValueError(f"{name} is {value!r:.60}")
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} is damaged ({error})") from error
        return cls(**content)


class Run:
    """One pruning run's folder: `run.json`, `layers/`, and at the end `model.safetensors`, `masks.safetensors`, `report.json`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def open(cls, folder: Path, settings: Mapping[str, Any], model: nn.Module, inputs: Sequence[Inputs],
             masks: Mapping[str, Tensor], starts: Mapping[str, Tensor], resume: bool) -> Run:
        """Begin a run in `folder`, or go on with the one that is there.

        Raises:
            ValueError: the folder holds another run, holds one although `resume` is off, or cannot be written.
        """
        run = cls(folder)
        wanted = {
            "version": VERSION,
            **settings,
            "model": digest(model.state_dict()),
            "data": digest({f"{i}.{j}": x for i, batch in enumerate(inputs) for j, x in enumerate(batch.tensors())}),
            "masks": digest({**{f"mask {k}": v for k, v in masks.items()}, **{f"start {k}": v for k, v in starts.items()}}),
        }
        wanted = json.loads(json.dumps(wanted))
        path = folder / "run.json"
        try:
            (folder / "layers").mkdir(parents=True, exist_ok=True)
            if path.exists():
                if not resume:
                    raise ValueError(f"out: {folder} already holds a run; resume it, or name another folder")
                try:
                    found = dict(json.loads(path.read_text()))
                except (ValueError, TypeError) as error:
                    raise ValueError(f"resume: {path} is damaged; name another folder") from error
                changed = [key for key in wanted if found.get(key) != wanted[key]]
                if changed:
                    raise ValueError(f"resume: {folder} holds a run with another {', '.join(changed)}; "
                                     "restore what was changed, or name another folder")
            elif others := [*(folder / "layers").iterdir(), *(folder / name for name in RESULTS if (folder / name).exists())]:
                raise ValueError(f"out: {folder} holds {others[0].relative_to(folder)}, which no run there has written; name another folder")
            else:
                write(path, (json.dumps(wanted, indent=1) + "\n").encode())
        except OSError as error:
            raise ValueError(f"out: {folder} cannot be written ({error.strerror})") from error
        return run

    def _layer(self, index: int) -> Path:
        return self.folder / "layers" / f"{index:04d}.safetensors"

    def finished(self, index: int, shape: torch.Size) -> tuple[MaskedWeight, LayerReport] | None:
        """The result of a layer whose weight has this shape, if it is on disk whole."""
        path = self._layer(index)
        if not path.exists():
            return None
        try:
            with safe_open(path, "pt") as file:
                report = json.loads(file.metadata()["report"])
                masked = MaskedWeight(file.get_tensor("weight"), file.get_tensor("mask"))
                found = LayerReport(**{**report, "shape": tuple(report["shape"])})
        except (SafetensorError, KeyError, TypeError, json.JSONDecodeError):
            return None
        return (masked, found) if masked.weight.shape == masked.mask.shape == shape else None

    def keep(self, index: int, masked: MaskedWeight, report: LayerReport) -> None:
        """Write a finished layer."""
        tensors = {"weight": masked.weight.cpu().contiguous(), "mask": masked.mask.cpu().contiguous()}
        write(self._layer(index), save(tensors, {"report": json.dumps(asdict(report))}))

    def finish(self, net: nn.Module, masks: Mapping[str, Tensor], report: Report) -> None:
        """Write the whole network, its masks and the report."""
        write(self.folder / "model.safetensors", save(state(net)))
        write(self.folder / "masks.safetensors", save({k: v.cpu().contiguous() for k, v in masks.items()}))
        write(self.folder / "report.json", report.to_json().encode())
        write(self.folder / "report.html", report.to_html().encode())


def state(net: nn.Module) -> dict[str, Tensor]:
    """A `state_dict` that safetensors can write: on the host, contiguous, nothing shared; entries that are no tensors are left out."""
    return {name: x.detach().cpu().clone().contiguous() for name, x in net.state_dict().items() if isinstance(x, Tensor)}


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
        # A name that nobody knows before: somebody else's folder may hold a link of any other, to a file that is not to be written.
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
    """SHA-256 of tensors, their names, dtypes and shapes, and of texts."""
    found = hashlib.sha256("\n".join(more).encode())
    for name, x in tensors.items():
        if not isinstance(x, Tensor):  # of `get_extra_state`
            continue
        found.update(f"{name} {x.dtype} {tuple(x.shape)}".encode())
        found.update(x.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
