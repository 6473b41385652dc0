"""What the commands share: the two consoles, the options, and how results are shown."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Protocol

import typer
from rich.console import Console

from snows.cli.processes import RANK, SIZE, own_gpu

if TYPE_CHECKING:
    import torch
    from rich.table import Table

    from snows.evaluation import Scores

console = Console(width=None if sys.stdout.isatty() else 160, quiet=RANK > 0)
errors = Console(stderr=True)

Model = Annotated[
    str,
    typer.Option(
        "--model",
        help="zoo:NAME, timm:NAME, torchvision:NAME[:WEIGHTS], hf:ID or hf:FOLDER, with trained weights; "
        "or package.module:callable",
    ),
]
Data = Annotated[
    str,
    typer.Option(
        "--data",
        help="a folder of pictures, zoo:fashion-mnist, cifar10:FOLDER, cifar100:FOLDER, "
        "torchvision:NAME[:FOLDER], hf:ID, hf:FOLDER, or package.module:callable, which returns batches",
    ),
]
Weights = Annotated[
    Path | None,
    typer.Option(
        "--weights",
        help="safetensors, or a pickled checkpoint (loaded without running code), instead of the library's",
    ),
]
RandomWeights = Annotated[bool, typer.Option("--random-weights", help="do not load trained weights")]
Device = Annotated[
    str, typer.Option("--device", help="auto, cpu, cuda or cuda:1; auto is CUDA where there is one")
]
Classes = Annotated[
    Path | None,
    typer.Option(
        "--classes", help="the network's classes in order, to judge folders by: a line each, or JSON"
    ),
]
Labels = Annotated[
    Path | None,
    typer.Option(
        "--labels", help="of a flat folder of pictures: a class a line, in the order of the files' names"
    ),
]
Crop = Annotated[int | None, typer.Option("--crop", min=1, help="pixels of the square that the network sees")]
Resize = Annotated[
    int | None, typer.Option("--resize", min=1, help="pixels of the shorter side before cropping")
]
Mean = Annotated[str | None, typer.Option("--mean", help="channel means in [0, 1], e.g. 0.485,0.456,0.406")]
Std = Annotated[str | None, typer.Option("--std", help="channel deviations, likewise")]


def numbers(text: str | None, name: str) -> tuple[float, ...] | None:
    """Read numbers with commas between; one number stands for three channels.

    Raises:
        ValueError: they are no numbers.
    """
    if text is None:
        return None
    try:
        values = tuple(float(x) for x in text.split(","))
    except ValueError:
        raise ValueError(f"--{name}: expected numbers with commas between, got {text!r}") from None
    return values * 3 if len(values) == 1 else values


def device_of(text: str) -> torch.device:
    """Find the device that `--device` names.

    Raises:
        ValueError: it is no name of a device, or this torch sees no such device.
    """
    import torch

    if SIZE > 1 and text.startswith("cuda:"):
        raise ValueError(f"--device: expected auto, cpu or cuda for {SIZE} processes, got {text}")
    if text == "auto" or (SIZE > 1 and text == "cuda" and torch.cuda.is_available()):
        found = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return found if SIZE == 1 or found.type == "cpu" else own_gpu()
    kind, _, index = text.partition(":")
    if (
        kind not in ("cpu", "cuda")
        or (index and not (index.isascii() and index.isdigit()))
        or text.endswith(":")
    ):
        raise ValueError(f"--device: expected auto, cpu, cuda or cuda:NUMBER, got {text!r}")
    count = torch.cuda.device_count() if kind == "cuda" else 1
    if int(index or 0) >= count:
        seen = f"{count} CUDA device{'s' if count > 1 else ''}" if count else "no CUDA device"
        raise ValueError(
            f"--device: expected one that is there, got {text}, but this torch ({torch.__version__}) sees "
            f"{seen}"
        )
    if index and kind == "cuda":
        torch.cuda.set_device(
            int(index)
        )  # what waits for the device, or launches a kernel, takes the current one
    return torch.device(text)


class Shown(Protocol):
    """Stand for a report of pruning or of deployment."""

    notes: list[str]

    def tables(self) -> list[Table]:
        """Make all tables, in order."""
        ...

    def summary(self) -> str:
        """Say in a sentence what came of it."""
        ...


def show(report: Shown, title: str = "") -> None:
    """Print a report's table, summary and notes; names in them are data."""
    tables = report.tables()
    if tables:
        tables[0].title = title or None
        console.print(*tables)
    elif title:
        say(title)
    say(report.summary(), *report.notes)


def say(*sentences: str) -> None:
    """Print sentences as they are, without markup."""
    from snows.results.tables import printable

    console.print(*map(printable, sentences), sep="\n", highlight=False, markup=False, soft_wrap=True)


def warn(sentence: str) -> None:
    """Print a sentence on the error stream; of several processes the first does."""
    if RANK:
        return
    from snows.results.tables import printable

    errors.print(printable(sentence), highlight=False, markup=False, soft_wrap=True)


def next_command(*words: object) -> None:
    """Print what can be typed next."""
    say(f"next: {shlex.join(map(str, words))}")


def show_scores(rows: Iterable[tuple[str, Scores]]) -> None:
    """Print one row of scores per network."""
    from rich.table import Table

    table = Table("", "images", "top-1", "top-5", "agreement", "divergence")
    for name, scores in rows:
        table.add_row(
            name,
            str(scores.images),
            *(f"{x:.2f} %" if x == x else "" for x in scores[1:4]),
            f"{scores.divergence:.5f}" if scores.divergence == scores.divergence else "",
        )
    console.print(table)
