"""Folders of pictures, and how one picture is read."""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm"}
TRAINING, TESTING = (
    ("train", "training"),
    ("val", "validation", "valid", "test", "testing"),
)  # names of subfolders, in any case
Split = Literal["calibration", "test"]


class UnreadableError(Exception):
    """Says why a picture cannot be read."""


def open_picture(file: Any) -> Any:
    """Read a picture as Pillow's RGB, upright.

    A rotation that a camera wrote into it is applied, transparency and palettes become RGB, and 16 bits or
    floating-point numbers are scaled to 8 bits (Pillow's own conversion would cut them off).

    Args:
        file: a path, or a picture of Pillow.

    Raises:
        UnreadableError: it is damaged, of no known format, or of more pixels than Pillow reads.
    """
    image: Any = importlib.import_module("PIL.Image")
    try:
        picture = file if isinstance(file, image.Image) else image.open(file)
        with picture:
            picture = importlib.import_module("PIL.ImageOps").exif_transpose(picture)
            return _eight_bits(image, picture).convert("RGB")
    except image.DecompressionBombError as error:
        raise UnreadableError(f"too many pixels: {error}") from error
    except image.UnidentifiedImageError as error:
        raise UnreadableError("no picture of a known format") from error
    except Exception as error:  # whatever a damaged picture makes Pillow raise
        raise UnreadableError(f"broken: {error}") from error


def _eight_bits(image: Any, picture: Any) -> Any:
    """Scale a grey picture of 16 bits, or of floating-point numbers, to 8 bits."""
    if not (picture.mode.startswith("I") or picture.mode == "F"):
        return picture
    x = np.asarray(picture).astype(np.float64)
    if picture.mode == "F":
        x = x * 255 if x.size and x.min() >= 0 and x.max() <= 1 else x
    elif x.size and x.max() > 255:
        x = x / 257
    return image.fromarray(x.round().clip(0, 255).astype(np.uint8))


def split_folder(folder: Path, split: Split) -> Path:
    """Choose the subfolder of a split, in any case; else the folder itself.

    It is train for calibration, and val, validation, valid or test for the test.

    One such folder of pictures beside other folders of pictures is a class of that name: a train among cars
    and buses.
    """
    inner = {p.name.lower(): p for p in sorted(folder.iterdir()) if p.is_dir() and not _hidden(p.name)}
    found = [name for name in inner if name in (*TRAINING, *TESTING)]
    if (
        len(found) == 1
        and len(inner) > 1
        and all(any(x.suffix.lower() in SUFFIXES for x in p.iterdir()) for p in inner.values())
    ):
        found = []
    order = (*TRAINING, *TESTING) if split == "calibration" else (*TESTING, *TRAINING)
    return next((inner[name] for name in order if name in found), folder)


def find(folder: Path) -> tuple[list[Path], list[str], list[int]]:
    """Find the pictures below a folder, and their classes.

    Hidden files and folders are left out, symbolic links followed.

    Returns:
        The files in order of their names; the classes, which are the folder's own subfolders in alphabetical
        order, empty ones too, if any of them holds pictures; and the index of each file's class, -1 for files
        beside these subfolders.

    Raises:
        ValueError: there are no pictures.
    """
    files: list[Path] = []
    seen: set[str] = set()
    for where, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(where)
        folders[:] = (
            sorted(x for x in folders if not _hidden(x)) if real not in seen else []
        )  # a link may lead back up
        if real not in seen:
            files += [
                Path(where) / x
                for x in names
                if not _hidden(x) and Path(x).suffix.lower() in SUFFIXES and (Path(where) / x).is_file()
            ]
        seen.add(real)
    files.sort()
    if not files:
        raise ValueError(f"data: found no pictures below {folder} ({', '.join(sorted(SUFFIXES))})")
    try:
        importlib.import_module("PIL.Image")
    except ImportError as error:
        raise ValueError("data: reading pictures needs Pillow; pip install pillow") from error
    parts = [p.relative_to(folder).parts for p in files]
    classes = (
        sorted(p.name for p in folder.iterdir() if p.is_dir() and not _hidden(p.name))
        if any(len(x) > 1 for x in parts)
        else []
    )
    number = {name: i for i, name in enumerate(classes)}
    return files, classes, [number[x[0]] if len(x) > 1 else -1 for x in parts]


def _hidden(name: str) -> bool:
    return name.startswith((".", "__MACOSX"))


def read_labels(path: Path, files: Sequence[Path]) -> tuple[list[tuple[str, ...]], list[int]]:
    """Read the classes of pictures.

    There is a line a picture in the order of the files' names, or lines of a file's name and its class.

    Returns:
        The classes, each with what it is called (a number, a WordNet id or a name), and the index of each
        file's class.

    Raises:
        ValueError: the file cannot be read, its lines are not those of the pictures, or its numbers are
            ImageNet's from 1 to 1,000.
    """
    try:
        lines = [line.split() for line in path.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"labels: {path} cannot be read ({error})") from error
    if all(len(line) > 1 and Path(line[0]).suffix.lower() in SUFFIXES for line in lines):
        named = {Path(line[0]).name: " ".join(line[1:]) for line in lines}
        if missing := [file.name for file in files if file.name not in named]:
            raise ValueError(
                f"labels: {path} says nothing of "
                f"{', '.join(missing[:5])}{' and more' if len(missing) > 5 else ''}"
            )
        called = [named[file.name] for file in files]
    elif len(lines) == len(files):
        called = [" ".join(line) for line in lines]
    else:
        raise ValueError(
            f"labels: expected {path} to hold a line for each of {len(files)} pictures, got {len(lines)}"
        )
    if not all(x.isascii() and x.isdigit() for x in called):
        order = sorted(set(called))
        return [(x,) for x in order], [order.index(x) for x in called]
    numbers = [int(x) for x in called]
    if min(numbers) == 1 and max(numbers) == 1000:
        raise ValueError(
            f"labels: the numbers in {path} go from 1 to 1000 (ImageNet's ground truth counts in another "
            "order than networks do); expected numbers from 0 on as the network counts, WordNet ids or names"
        )
    return [(str(i),) for i in range(max(numbers) + 1)], numbers
