"""What the options of `snows prune` ask for: a pattern, a budget, or a point of a frontier."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from snows import Budget

Of = Annotated[
    Literal["macs", "params", "bytes", "nonzeros", "latency"] | None,
    typer.Option(
        help='the cost that a share is of; "latency" is milliseconds, measured here; by default macs'
    ),
]
Runtime = Annotated[
    Literal["eager", "compile", "cuda-graph"], typer.Option(help="what --of latency measures the network in")
]
AtATime = Annotated[
    int | None,
    typer.Option("--at-a-time", min=1, help="images that milliseconds are of; by default --batch-size"),
]
Using = Annotated[
    str | None,
    typer.Option(
        help="what may be done, with commas between: channels, heads, neurons, low-rank, nm, unstructured; "
        "by default all, with --structured the first four"
    ),
]
Ordering = Annotated[
    Literal["compensated", "hap", "fisher", "magnitude"],
    typer.Option(help="how it is found which units go first"),
]
Multiple = Annotated[int, typer.Option(min=1, help="widths are multiples of this")]
Latency = Annotated[
    Path | None,
    typer.Option(
        "--latency", help="a table of snows measure, of this or another machine, in place of measuring"
    ),
]


@dataclass(frozen=True)
class Options:
    """Hold the options that say how a cost is cut.

    Attributes:
        of, using, order, multiple, runtime, at_a_time, latency: as typed; None where nothing was.
    """

    of: Any = None
    using: str | None = None
    order: Any = "compensated"
    multiple: int = 8
    runtime: Any = "eager"
    at_a_time: int | None = None
    latency: Path | None = None

    def changed(self) -> str:
        """Return the name of an option that is not as usual; empty if all are."""
        usual = Options()
        other = [x.name for x in fields(self) if getattr(self, x.name) != getattr(usual, x.name)]
        return other[0].replace("_", "-") if other else ""

    def budget(self, text: str) -> Budget:
        """Read what `--budget` asks for: a share, milliseconds or megabytes."""
        import snows

        limit: dict[str, Any] = _limit(text)
        means = {"ms": "latency", "mb": "bytes"}.get(next(iter(limit)), self.of)
        if self.of not in (None, means):
            raise ValueError(
                f"--of: expected {means}, of which --budget {text} is, or nothing, got {self.of}"
            )
        return snows.Budget(**limit, **self._settings() | {"of": means or self._of()})

    def structured(self, text: str, then: Any) -> Budget:
        """Read what `--structured` asks for: a share."""
        import snows

        return snows.Structured(share(text, "structured"), then=then, **self._settings())

    def _of(self) -> Any:
        """Return the cost that was named, or that a table of milliseconds means."""
        return self.of or ("macs" if self.latency is None else "latency")

    def _settings(self) -> dict[str, Any]:
        using = {} if self.using is None else {"using": names(self.using)}
        if self.latency is not None and self.of not in (None, "latency"):
            raise ValueError(
                f"--latency: expected milliseconds (--of latency) to choose by, got --of {self.of}"
            )
        return using | {
            "of": self._of(),
            "order": self.order,
            "multiple": self.multiple,
            "runtime": self.runtime,
            "images": self.at_a_time,
            "times": self.latency,
        }


def goal(
    pattern: str | None,
    structured: str | None,
    budget: str | None,
    frontier: Path | None,
    point: int | None,
    masks: bool,
    options: Options,
) -> Any:
    """Read what is asked.

    Raises:
        ValueError: nothing is asked for, or two things that do not go together.
    """
    from snows.sparsity import parse_pattern

    asked = {"structured": structured, "budget": budget, "frontier": frontier}
    given = [name for name, x in asked.items() if x is not None]
    if len(given) > 1:
        raise ValueError(f"--{given[0]}: expected it alone, got --{given[1]} too; leave one of them out")
    if (point is None) != (frontier is None):
        raise ValueError("--point: expected --frontier with a file and --point with a number, got one")
    then = parse_pattern(pattern) if pattern is not None else None
    if structured is not None:
        return options.structured(structured, then)
    if pattern is not None and given:
        raise ValueError(f"--pattern: expected it alone or beside --structured, got --{given[0]}")
    if budget is not None:
        return options.budget(budget)
    if others := options.changed():
        raise ValueError(
            f"--{others}: expected --budget or --structured beside it; a "
            f"{'point of a frontier' if frontier else 'pattern alone'} does not use it"
        )
    if frontier is not None and point is not None:
        return _point(frontier, point)
    if then is None and not masks:
        raise ValueError(
            "--pattern: expected one such as 2:4 or 0.7, or --budget or --structured with a share, got none "
            "(only --masks can do without)"
        )
    return then


def _point(path: Path, index: int) -> Budget:
    from snows.frontiers import Frontier

    return Frontier.read(path).budget(index)


def _limit(text: str) -> dict[str, float]:
    """Read a share such as 0.5 or 50%, milliseconds such as 12ms, or megabytes such as 5MB."""
    found = re.fullmatch(r"(\d*\.?\d+)\s*(ms|mb)", text.strip().lower())
    return {found[2]: float(found[1])} if found else {"share": share(text, "budget")}


def share(text: str, option: str) -> float:
    """Read a share such as 0.5 or 50%."""
    try:
        return float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        more = ", 12ms or 5MB" if option == "budget" else ""
        raise ValueError(f"--{option}: expected a share such as 0.5 or 50%{more}, got {text}") from None


def names(text: str | None) -> tuple[str, ...] | None:
    """Read names with commas between."""
    return None if text is None else tuple(x.strip() for x in text.split(",") if x.strip())
