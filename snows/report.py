"""What happened, layer by layer: prints as a table, saves as JSON and HTML."""

from __future__ import annotations

import html
import io
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


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
        return sum(layer.size for layer in self.layers if not layer.reason)

    @property
    def seconds(self) -> float:
        return sum(layer.seconds for layer in self.layers)

    def table(self) -> Table:
        table = Table(title=None, pad_edge=False)
        for heading, justify in (("layer", "left"), ("weight", "left"), ("pattern", "left"), ("kept", "right"),
                                 ("loss before", "right"), ("after", "right"), ("CG", "right"), ("seconds", "right")):
            table.add_column(heading, justify=justify)  # type: ignore[arg-type]
        for x in self.layers:
            shape = "x".join(map(str, x.shape))
            if x.reason:
                table.add_row(x.name, shape, f"dense: {x.reason}", "", "", "", "", "")
            else:
                table.add_row(x.name, shape, x.pattern, f"{100 * x.kept / x.size:.1f} %", f"{x.before:.4g}", f"{x.after:.4g}",
                              str(x.iterations), f"{x.seconds:.1f}")
        return table

    def summary(self) -> str:
        prunable, weights = max(self.prunable, 1), max(self.weights, 1)
        return (f"{self.zeros} zeros: {100 * self.zeros / prunable:.2f} % of the {self.prunable} prunable weights, "
                f"{100 * self.zeros / weights:.2f} % of all {self.weights}; {self.seconds:.1f} s")

    def __str__(self) -> str:
        return "\n".join([render(self.table()), self.summary(), *self.notes])

    def to_json(self) -> str:
        return json.dumps({**asdict(self), "layers": [asdict(x) for x in self.layers]}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Report:
        content = json.loads(text)
        layers = [LayerReport(**{**x, "shape": tuple(x["shape"])}) for x in content.pop("layers")]
        return cls(layers=layers, **content)

    def save(self, path: Path) -> None:
        """Write JSON, or a page with plots if `path` ends in .html."""
        path.write_text(self.to_html() if path.suffix == ".html" else self.to_json())

    def to_html(self, title: str = "snows", head: Sequence[Table] = ()) -> str:
        """A page that needs nothing else: the tables and a plot of each layer's loss before and after."""
        return page(title, [*head, self.table()], [self.summary(), *self.notes], [plot(self)])


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
