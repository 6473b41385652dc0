"""What happened, layer by layer: prints as a table, saves as JSON and HTML."""

from __future__ import annotations

import html
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from rich.console import Console
from rich.table import Table
from rich.text import Text

SPARED = "the budget takes nothing from it"  # of a layer that is among those that a budget is spent over


@dataclass(frozen=True)
class LayerReport:
    """One layer's part in a run.

    Attributes:
        name: of the layer.
        shape: of its weight.
        pattern: that it follows, or "dense".
        kept: weights that stay.
        reason: why it stayed dense; empty otherwise.
        before, after: the reconstruction loss on the held-back samples, at the selector's weights and at the end.
        iterations: of conjugate gradients, over all steps.
        steps: Newton steps taken.
        stop: why the last conjugate gradients ended.
        seconds: wall time.
    """

    name: str
    shape: tuple[int, ...]
    pattern: str
    kept: int
    reason: str = ""
    before: float = float("nan")
    after: float = float("nan")
    iterations: int = 0
    steps: int = 0
    stop: str = ""
    seconds: float = 0.0

    @property
    def size(self) -> int:
        size = 1
        for n in self.shape:
            size *= n
        return size


@dataclass
class Report:
    """What `prune` did.

    Attributes:
        layers: in order of execution; layers that stayed dense with the reason.
        weights: of the whole network, biases and normalisation included.
        settings: of the run, by name.
        notes: sentences that a reader should see.
    """

    layers: list[LayerReport] = field(default_factory=list)
    weights: int = 0
    settings: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def zeros(self) -> int:
        return sum(layer.size - layer.kept for layer in self.layers)

    @property
    def prunable(self) -> int:
        return sum(layer.size for layer in self.layers if layer.reason in ("", SPARED))

    @property
    def seconds(self) -> float:
        return sum(layer.seconds for layer in self.layers)

    def table(self) -> Table:
        table = named_table(("weight", "pattern"), ("kept", "loss before", "after", "CG", "seconds"))
        for x in self.layers:
            shape = "x".join(map(str, x.shape))
            if x.reason:
                add_row(table, x.name, shape, f"dense: {x.reason}", f"{100 * x.kept / x.size:.1f} %" if x.kept < x.size else "")
            else:
                losses = (f"{x.before:.4g}", f"{x.after:.4g}", str(x.iterations)) if x.before == x.before else ("", "", "")
                add_row(table, x.name, shape, x.pattern, f"{100 * x.kept / x.size:.1f} %", *losses, f"{x.seconds:.1f}")
        return table

    def summary(self) -> str:
        prunable, weights = max(self.prunable, 1), max(self.weights, 1)
        pruned = sum(layer.size - layer.kept for layer in self.layers if not layer.reason)
        return (f"{self.zeros} zeros: {100 * pruned / prunable:.2f} % of the {self.prunable} prunable weights, "
                f"{100 * self.zeros / weights:.2f} % of all {self.weights}; {self.seconds:.1f} s")

    def __str__(self) -> str:
        return "\n".join([render(self.table()), self.summary(), *self.notes])

    def to_json(self) -> str:
        return to_json(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Report:
        """Read what `to_json` wrote.

        Raises:
            ValueError: it is no JSON, or its entries are not a report's.
        """
        return read(cls, LayerReport, text)

    def save(self, path: Path) -> None:
        """Write JSON, or a page with plots if `path` ends in .html."""
        path.write_text(self.to_html() if path.suffix == ".html" else self.to_json())

    def to_html(self, title: str = "snows", head: Sequence[Table] = ()) -> str:
        """A page that needs nothing else: the tables and a plot of each layer's loss before and after."""
        return page(title, [*head, self.table()], [self.summary(), *self.notes], [plot(self)])


Row = TypeVar("Row")
Whole = TypeVar("Whole")


def to_json(content: Any) -> str:
    """Write JSON that any reader takes: numbers that are not finite become null."""

    def finite(x: Any) -> Any:
        if isinstance(x, Mapping):
            return {key: finite(value) for key, value in x.items()}
        if isinstance(x, list | tuple):
            return [finite(value) for value in x]
        return None if isinstance(x, float) and not math.isfinite(x) else x

    return json.dumps(finite(content), indent=1, allow_nan=False)


def read(kind: type[Whole], row: type[Row], text: str) -> Whole:
    """Read a report, whose `layers` are of the kind `row`, from the JSON of its fields.

    Raises:
        ValueError: it is no JSON, or an entry is missing, unknown or of another type; the sentence names it.
    """
    content = json.loads(text)
    if not isinstance(content, dict) or not isinstance(content.get("layers"), list):
        raise ValueError("expected an object with a list of layers")
    layers = [_fields(row, x, f"layer {i}: ") for i, x in enumerate(content["layers"])]
    return _fields(kind, {**content, "layers": layers}, "")


def _fields(kind: type[Row], content: Any, where: str) -> Row:
    """One dataclass from JSON; null stands for a number that was not finite."""
    if not isinstance(content, dict):
        raise ValueError(f"{where}expected an object, got {content!r:.60}")
    hints, values = get_type_hints(kind), {}
    if unknown := [key for key in content if key not in hints]:
        raise ValueError(f"{where}there is no entry {unknown[0]!r:.60}")
    for entry in fields(kind):  # type: ignore[arg-type]  # of a dataclass
        name, hint = entry.name, getattr(hints[entry.name], "__origin__", hints[entry.name])
        if name not in content:
            continue
        value = content[name]
        value = tuple(value) if hint is tuple and isinstance(value, list) and all(type(x) is int and x > 0 for x in value) else value
        value = math.nan if hint is float and value is None else value
        if hint is list and name != "layers" and isinstance(value, list) and not all(isinstance(x, str) for x in value):
            raise ValueError(f"{where}expected {name} to be a list of texts, got {value!r:.60}")
        if not (type(value) is int if hint in (int, float) and not isinstance(value, float) else isinstance(value, hint)):
            raise ValueError(f"{where}expected {name} to be of type {hint.__name__}, got {value!r:.60}")
        values[name] = value
    try:
        return kind(**values)
    except TypeError as error:  # an entry without a default is missing
        raise ValueError(f"{where}{error}") from error


def named_table(left: Sequence[str], right: Sequence[str]) -> Table:
    """Begin a table of layers by name. A name is never cut, for its end is what tells: it goes on in the next line."""
    table = Table(pad_edge=False)
    table.add_column("layer", overflow="fold")
    for heading in left:
        table.add_column(heading, overflow="fold")
    for heading in right:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def add_row(table: Table, *cells: str) -> None:
    """Add cells as they are: a name like `[/red]` is no markup."""
    table.add_row(*(Text(printable(cell)) for cell in cells))


def printable(text: str) -> str:
    """Replace what a terminal would obey: names and notes are data, from a file that somebody sent too."""
    return "".join(x if x.isprintable() or x == "\n" else "\ufffd" for x in text)


def plot(report: Report) -> str:
    """Each layer's reconstruction loss before and after, on a logarithmic axis, as SVG."""
    done = [x for x in report.layers if not x.reason and x.before > 0 and x.after > 0]
    if not done:
        return ""
    width, height, left = 900, 260, 60
    values = [v for x in done for v in (x.before, x.after)]
    low, high = math.log10(min(values)) - 0.1, math.log10(max(values)) + 0.1

    def at(value: float) -> float:
        return height - 20 - (math.log10(value) - low) / (high - low) * (height - 40)

    def dot(x: float, value: float, colour: str, label: str) -> str:
        return f'<circle cx="{x:.1f}" cy="{at(value):.1f}" r="4" fill="{colour}"><title>{html.escape(label)} {value:.4g}</title></circle>'

    marks = []
    for e in range(math.ceil(low), math.floor(high) + 1):
        y = at(10.0**e)
        marks.append(f'<text x="4" y="{y:.1f}">1e{e}</text><line x1="{left - 8}" x2="{width}" y1="{y:.1f}" y2="{y:.1f}" stroke="#eee"/>')
    step = (width - left) / len(done)
    for i, x in enumerate(done):
        c = left + step * (i + 0.5)
        marks.append(f'<line x1="{c:.1f}" x2="{c:.1f}" y1="{at(x.before):.1f}" y2="{at(x.after):.1f}" stroke="#999"/>')
        marks += [dot(c, x.before, "#c33", f"{x.name} before"), dot(c, x.after, "#36c", f"{x.name} after")]
    return ('<p>Reconstruction loss by layer, <span style="color:#c33">before</span> and <span style="color:#36c">after</span></p>'
            f'<svg viewBox="0 0 {width} {height}" width="100%">{"".join(marks)}</svg>')


def render(table: Table, width: int = 140) -> str:
    """A table as plain text."""
    buffer = io.StringIO()
    Console(file=buffer, width=width, color_system=None).print(table)
    return "\n".join(line.rstrip() for line in buffer.getvalue().rstrip().split("\n"))


def page(title: str, tables: Sequence[Table], notes: Sequence[str], plots: Sequence[str]) -> str:
    """An HTML page from rich tables, sentences and SVG plots."""
    body = []
    for table in tables:
        if table.title:
            body.append(f"<h2>{html.escape(str(table.title))}</h2>")
        cells = [list(column.cells) for column in table.columns]
        head = "".join(f"<th>{html.escape(str(column.header))}</th>" for column in table.columns)
        lines = ["".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) for row in zip(*cells, strict=True)]
        body.append(f"<table><tr>{head}</tr>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>")
    body += [f"<p>{html.escape(note)}</p>" for note in notes] + list(plots)
    style = ("body{font:15px/1.5 system-ui,sans-serif;max-width:1000px;margin:2em auto;padding:0 1em}"
             "table{border-collapse:collapse;margin:1em 0}td,th{padding:.2em .8em;border-bottom:1px solid #ddd;text-align:left}"
             "text{font-size:11px;fill:#666}")
    return (f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title><style>{style}</style>'
            f"<h1>{html.escape(title)}</h1>" + "\n".join(body) + "</html>\n")
