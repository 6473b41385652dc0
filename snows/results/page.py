"""A run as a page that needs nothing else."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

from rich.table import Table

from snows.results.report import Report


def plot(report: Report) -> str:
    """Draw each layer's reconstruction loss before and after, on a logarithmic axis, as SVG."""
    done = [x for x in report.layers if not x.reason and x.before > 0 and x.after > 0]
    if not done:
        return ""
    width, height, left = 900, 260, 60
    values = [v for x in done for v in (x.before, x.after)]
    low, high = math.log10(min(values)) - 0.1, math.log10(max(values)) + 0.1

    def at(value: float) -> float:
        return height - 20 - (math.log10(value) - low) / (high - low) * (height - 40)

    def dot(x: float, value: float, colour: str, label: str) -> str:
        title = f"<title>{html.escape(label)} {value:.4g}</title>"
        return f'<circle cx="{x:.1f}" cy="{at(value):.1f}" r="4" fill="{colour}">{title}</circle>'

    marks = []
    for e in range(math.ceil(low), math.floor(high) + 1):
        y = at(10.0**e)
        marks.append(
            f'<text x="4" y="{y:.1f}">1e{e}</text><line x1="{left - 8}" x2="{width}" y1="{y:.1f}" '
            f'y2="{y:.1f}" stroke="#eee"/>'
        )
    step = (width - left) / len(done)
    for i, x in enumerate(done):
        c = left + step * (i + 0.5)
        marks.append(
            f'<line x1="{c:.1f}" x2="{c:.1f}" y1="{at(x.before):.1f}" y2="{at(x.after):.1f}" stroke="#999"/>'
        )
        marks += [dot(c, x.before, "#c33", f"{x.name} before"), dot(c, x.after, "#36c", f"{x.name} after")]
    return (
        '<p>Reconstruction loss by layer, <span style="color:#c33">before</span> and <span '
        'style="color:#36c">after</span></p>'
        f'<svg viewBox="0 0 {width} {height}" width="100%">{"".join(marks)}</svg>'
    )


def page(title: str, tables: Sequence[Table], notes: Sequence[str], plots: Sequence[str]) -> str:
    """Make an HTML page from rich tables, sentences and SVG plots."""
    body = []
    for table in tables:
        if table.title:
            body.append(f"<h2>{html.escape(str(table.title))}</h2>")
        cells = [list(column.cells) for column in table.columns]
        head = "".join(f"<th>{html.escape(str(column.header))}</th>" for column in table.columns)
        lines = [
            "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) for row in zip(*cells, strict=True)
        ]
        body.append(f"<table><tr>{head}</tr>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>")
    body += [f"<p>{html.escape(note)}</p>" for note in notes] + list(plots)
    style = (
        "body{font:15px/1.5 system-ui,sans-serif;max-width:1000px;margin:2em auto;padding:0 1em}"
        "table{border-collapse:collapse;margin:1em 0}td,th{padding:.2em .8em;border-bottom:1px solid "
        "#ddd;text-align:left}"
        "text{font-size:11px;fill:#666}"
    )
    return (
        '<!doctype html><html lang="en"><meta '
        f'charset="utf-8"><title>{html.escape(title)}</title><style>{style}</style>'
        f"<h1>{html.escape(title)}</h1>" + "\n".join(body) + "</html>\n"
    )


def run_page(report: Report) -> str:
    """Make the page of a run."""
    return page("snows", [report.table()], [report.summary(), *report.notes], [plot(report)])
