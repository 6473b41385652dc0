"""Datasets by name: torchvision's, Hugging Face's, and CIFAR's published files."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from snows.networks.batches import first_line
from snows.sources import classes as naming
from snows.sources.pictures import TESTING, TRAINING, Split, open_picture


class Found(NamedTuple):
    """Labelled pictures.

    Attributes:
        origin: where they come from; two splits of one origin are the same pictures.
        open: returns the picture with the given index, as Pillow's.
        labels: index of each picture's class, int64; -1 for none.
        classes: in order, each with all that it is called; empty if there are none.
        files: what the pictures are called; empty if they have no names.
    """

    origin: str
    open: Callable[[int], Any]
    labels: NDArray[np.int64]
    classes: Sequence[Sequence[str]] = ()
    files: Sequence[str] = ()


def of_torchvision(name: str, rest: str, split: Split, fetch: bool) -> Found:
    """Open a dataset of torchvision: what lies in the folder, else, if that is allowed, fetched into it."""
    kind, _, root = rest.partition(":")
    try:
        datasets: Any = importlib.import_module("torchvision.datasets")
    except ImportError as error:
        raise ValueError(
            f"data: {name} needs torchvision ({first_line(error)}); pip install '.[models]' in the clone of "
            "snows brings it"
        ) from error
    make: Any = getattr(datasets, kind, None)
    if kind.startswith("_") or not isinstance(make, type):
        raise ValueError(f"data: torchvision has no dataset {kind!r}")
    accepted = inspect.signature(make).parameters
    if "train" in accepted:
        choices: list[dict[str, Any]] = [{"train": split == "calibration"}]
    elif "split" in accepted:
        choices = [{"split": x} for x in ((*TRAINING, "trainval") if split == "calibration" else TESTING)]
    else:
        choices = [{}]
    where = str(Path(root or "data").expanduser())
    tries = [
        {**choice, **more}
        for more in ({}, *([{"download": True}] if "download" in accepted and fetch else []))
        for choice in choices
    ]
    dataset: Any = None
    errors = []
    opened: dict[str, Any] = {}
    for arguments in tries:
        try:
            with _fetching(where) if "download" in arguments else nullcontext():
                dataset, opened = cast("Any", make)(where, **arguments), arguments
            break
        except Exception as error:  # a split of another name, or no files
            errors.append(first_line(error))
    if dataset is None:
        cause = errors[-len(choices)]  # of the first split, the last time
        raise ValueError(
            f"data: {name} could not be opened in {where} ({cause}); expected its files there"
            f"{', or a connection to fetch them' if fetch else ''}"
        )

    kept = next(
        (
            x
            for x in (getattr(dataset, name, None) for name in ("targets", "labels", "_labels"))
            if x is not None and len(x)
        ),
        None,
    )
    labels = [int(x) for x in kept] if kept is not None else [int(dataset[i][1]) for i in range(len(dataset))]
    names = getattr(dataset, "classes", None) or range(max(labels, default=-1) + 1)
    wordnet = getattr(dataset, "wnids", None) or [None] * len(names)
    named = [
        ((w,) if w else ()) + (tuple(map(str, x)) if isinstance(x, tuple) else (str(x),))
        for w, x in zip(wordnet, names, strict=True)
    ]
    part = next(
        (f" {opened[key]}" for key in ("split", "train") if key in opened), ""
    )  # without one, both splits are the same pictures
    return Found(f"{name}{part}", lambda i: open_picture(dataset[i][0]), np.array(labels, np.int64), named)


def _fetching(folder: str) -> FileLock:
    """Let one of a user's processes at a time fetch files into a folder; the others then find them there."""
    name = hashlib.sha256(f"{Path(folder).resolve()} {Path.home()}".encode()).hexdigest()[:16]
    return FileLock(Path(tempfile.gettempdir()) / f"snows-{name}.lock")


def of_datasets(name: str, rest: str, split: Split, fetch: bool) -> Found:
    """Open a dataset of Hugging Face: by its id on the hub, or a folder that it lies in."""
    try:
        datasets: Any = importlib.import_module("datasets")
    except ImportError as error:
        raise ValueError(
            f"data: {name} needs the package datasets ({first_line(error)}); pip install '.[data]' in the "
            "clone of snows brings it"
        ) from error
    try:
        folder = Path(rest).expanduser()
        found = (
            datasets.load_from_disk(str(folder))
            if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()
            else datasets.load_dataset(
                str(folder) if folder.is_dir() else rest,
                download_config=datasets.DownloadConfig(local_files_only=not fetch),
            )
        )
    except Exception as error:  # whatever it raises: no such dataset, no connection
        raise ValueError(
            f"data: {name} could not be opened ({first_line(error)}); expected a dataset in the cache, or a "
            "connection"
        ) from error
    part = ""
    if isinstance(found, dict):
        order = (*TRAINING, *TESTING) if split == "calibration" else (*TESTING, *TRAINING)
        part = next((x for x in order if x in found), next(iter(found)))
        found = found[part]
    image = next((key for key, kind in found.features.items() if isinstance(kind, datasets.Image)), None)
    label = next((key for key, kind in found.features.items() if isinstance(kind, datasets.ClassLabel)), None)
    if image is None:
        raise ValueError(f"data: expected {name} to have a column of images, got {', '.join(found.features)}")
    numbers = np.array(found[label], np.int64) if label is not None else np.full(len(found), -1)
    names = [(*naming.synonyms(x), x) for x in found.features[label].names] if label is not None else []
    return Found(f"{name} {part}".strip(), lambda i: open_picture(found[i][image]), numbers, names)


def of_cifar(name: str, kind: str, folder: Path, split: Split) -> Found:
    """Read the published binary files of CIFAR."""
    names = {
        ("cifar10", "calibration"): [f"data_batch_{i}.bin" for i in range(1, 6)],
        ("cifar10", "test"): ["test_batch.bin"],
        ("cifar100", "calibration"): ["train.bin"],
        ("cifar100", "test"): ["test.bin"],
    }[kind, split]
    head = 1 if kind == "cifar10" else 2  # CIFAR-100: coarse label, then fine
    records = []
    for file in names:
        found = next((p for p in (folder / file, *sorted(folder.glob(f"*/{file}"))) if p.is_file()), None)
        if found is None:
            raise ValueError(f"data: expected {file} in {folder} (the published binary version of {kind})")
        raw = np.fromfile(found, np.uint8)
        if len(raw) == 0 or len(raw) % (head + 3072):
            raise ValueError(
                f"data: {found} is not a binary file of {kind}: {len(raw)} bytes are not whole records of "
                f"{head + 3072}"
            )
        records.append(raw.reshape(-1, head + 3072))
    table = np.concatenate(records)
    pixels = table[:, head:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    image: Any = importlib.import_module("PIL.Image")
    return Found(
        f"{name} {split}",
        lambda i: image.fromarray(np.ascontiguousarray(pixels[i])),
        table[:, head - 1].astype(np.int64),
        [(f"class {i}",) for i in range(10 if kind == "cifar10" else 100)],
    )
