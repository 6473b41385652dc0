"""A run on disk: what was asked, and every finished layer, written so that no kill leaves half a file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from snows import together
from snows.networks.batches import Batch
from snows.results.files import write_network
from snows.results.origin import contents, fingerprint
from snows.results.report import LayerReport, Report
from snows.results.storage import digest, write, write_tensors
from snows.sparsity import MaskedWeight

VERSION = 2  # 1 had no digests of layers, and did not say how many threads there were
RESULTS = (
    "model.safetensors",
    "masks.safetensors",
    "report.json",
    "report.html",
    "source.json",
    "scores.json",
    "deployment.json",
)  # of a finished run
LOCK = "run.lock"
PLAN = "plan.json"  # of a structured run: what was taken out
TIMES = "times.json"  # what was timed to decide that
_CALLED = {
    "data": "set of calibration data (is it shuffled anew each time?)",
    "layers": "choice of layers (only, skip)",
}


class Run:
    """Keep one pruning run's folder: `run.json`, `layers/`, and at the end its results.

    A context manager: the folder is locked from `open` on, and free again when it is left. Of several
    processes the first reads and writes, and tells the others.

    Attributes:
        folder: the run's.
        threads: how many there were when the run began; results are bit-identical for the same number.
    """

    def __init__(self, folder: Path, lock: FileLock | None, threads: int) -> None:
        self.folder, self.threads, self._lock = folder, threads, lock

    @classmethod
    def open(
        cls,
        folder: Path,
        settings: Mapping[str, Any],
        model: nn.Module,
        batches: Sequence[Batch],
        starts: Mapping[str, MaskedWeight],
        resume: bool,
    ) -> Run:
        """Begin a run in `folder`, or go on with the one that is there.

        Args:
            folder: made where it is not there.
            settings: what was asked, as JSON; a run goes on with the same alone.
            model: the dense network.
            batches: calibration batches.
            starts: masks and first weights from elsewhere.
            resume: go on with what is there.

        Raises:
            ValueError: the folder holds another run, holds one although `resume` is off, is in use, or cannot
                be written.
        """
        locks = list[FileLock]()

        def begun() -> int:
            given = {
                f"{kind} {name}": x
                for name, start in starts.items()
                for kind, x in zip(("start", "mask"), start, strict=True)
            }
            asked = {
                "version": VERSION,
                **settings,
                "model": fingerprint(model),
                "data": digest(*contents(batches)),
                "masks": digest(given),
            }
            return cls._begun(folder, json.loads(json.dumps(asked)), resume, locks)

        threads = together.first(begun)
        return cls(folder, locks[0] if locks else None, threads)

    @staticmethod
    def _begun(folder: Path, wanted: Mapping[str, Any], resume: bool, locks: list[FileLock]) -> int:
        """Begin or go on in a folder, and lock it; return how many threads it began with."""
        threads = torch.get_num_threads()
        try:
            (folder / "layers").mkdir(parents=True, exist_ok=True)
            lock = _locked(folder)
        except OSError as error:
            raise ValueError(f"out: {folder} cannot be written ({error.strerror})") from error
        try:
            path = folder / "run.json"
            if path.exists():
                threads = _check(folder, wanted, resume, threads)
                for left in (folder / "layers").glob(".*.safetensors.*"):  # of a process that was killed
                    left.unlink(missing_ok=True)
            elif others := [
                *(folder / "layers").iterdir(),
                *(folder / x for x in RESULTS if (folder / x).exists()),
            ]:
                raise ValueError(
                    f"out: {folder} holds {others[0].relative_to(folder)}, which no run there has written; "
                    "name another folder"
                )
            else:
                write(path, (json.dumps({**wanted, "threads": threads}, indent=1) + "\n").encode())
        except BaseException:
            lock.release()
            raise
        locks.append(lock)
        return threads

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lock is None:
            return
        if kind is not None and not (self.folder / PLAN).exists():
            with suppress(OSError):  # there is a finished layer
                (self.folder / "layers").rmdir()
                (self.folder / "run.json").unlink()  # nothing was done: the folder is free for another try
                (self.folder / LOCK).unlink()
                self.folder.rmdir()  # if nothing else is in it
        self._lock.release()

    def _layer(self, key: str) -> Path:
        return self.folder / "layers" / f"{key}.safetensors"

    @together.by_first
    def held(self) -> set[str]:
        """Return the keys of the layers that are on disk, whole or not."""
        return {path.stem for path in (self.folder / "layers").iterdir()}

    @together.by_first
    def finished(
        self, key: str, name: str, like: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], LayerReport] | None:
        """Read the result of a layer, if it is on disk whole and as it was written.

        Args:
            key: of the stage, and the layer's place in it.
            name: of the layer.
            like: tensors of its shapes and dtypes, by name.
        """
        path = self._layer(key)
        if not path.is_file():
            return None
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in like}
                names = set(file.keys())
            if digest(tensors, metadata["report"]) != metadata["sha256"]:
                return None
            report = json.loads(metadata["report"])
            found = LayerReport(**{**report, "shape": tuple(report["shape"])})
        except (SafetensorError, OSError, KeyError, TypeError, json.JSONDecodeError, RecursionError):
            return None
        fits = all(tensors[key].shape == x.shape and tensors[key].dtype == x.dtype for key, x in like.items())
        return (tensors, found) if fits and names == set(like) and found.name == name else None

    @together.by_first
    def keep(self, key: str, tensors: Mapping[str, Tensor], report: LayerReport) -> None:
        """Write a finished layer."""
        found = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
        text = json.dumps(asdict(report))
        write_tensors(self._layer(key), found, {"report": text, "sha256": digest(found, text)})

    @together.by_first
    def decided(self) -> dict[str, Any] | None:
        """Read what was decided before anything was fitted, if it is on disk as it was written."""
        try:
            content = json.loads((self.folder / PLAN).read_text())
            text = json.dumps(content["plan"], sort_keys=True)
            return content["plan"] if digest({}, text) == content["sha256"] else None
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None

    @together.by_first
    def decide(self, plan: Mapping[str, Any]) -> None:
        """Write what was decided, so that a run that is resumed never decides again."""
        text = json.dumps(plan, sort_keys=True)
        content = {"plan": json.loads(text), "sha256": digest({}, text)}
        write(self.folder / PLAN, (json.dumps(content, indent=1) + "\n").encode())

    @together.by_first
    def finish(self, net: nn.Module, masks: Mapping[str, Tensor], report: Report, page: str) -> None:
        """Write the whole network, its masks, the report and its page."""
        kept = {name: mask.cpu().contiguous() for name, mask in masks.items()}
        write_network(self.folder / "model.safetensors", net, report)
        write_tensors(self.folder / "masks.safetensors", kept, {})
        write(self.folder / "report.json", report.to_json().encode())
        write(self.folder / "report.html", page.encode())


def _locked(folder: Path) -> FileLock:
    """Lock a run's folder for this process.

    Raises:
        ValueError: another process has it, or the lock's name is a link to somewhere else.
    """
    path = folder / LOCK
    if path.is_symlink():
        raise ValueError(f"out: {path} is a symbolic link; remove it, or name another folder")
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(
            f"out: {folder} is in use by another process; wait for it, or name another folder"
        ) from None
    return lock


def _check(folder: Path, wanted: Mapping[str, Any], resume: bool, threads: int) -> int:
    """Refuse to go on with a run that is not the one asked; return how many threads it began with."""
    path = folder / "run.json"
    if not resume:
        raise ValueError(f"out: {folder} already holds a run; resume it, or name another folder")
    try:
        found = dict(json.loads(path.read_text()))
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"resume: {path} is damaged; name another folder") from error
    if found.get("version") != VERSION:
        raise ValueError(
            f"resume: {folder} holds a run of another version of snows (format {found.get('version')!r:.20}, "
            f"this one writes {VERSION}); finish it with that version, or name another folder"
        )
    if changed := [_CALLED.get(key, key) for key in wanted if found.get(key) != wanted[key]]:
        raise ValueError(
            f"resume: {folder} holds a run with another {', '.join(changed)}; restore what was changed, or "
            "name another folder"
        )
    return found["threads"] if type(found.get("threads")) is int else threads
