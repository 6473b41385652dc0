"""A page of results that needs nothing else: large numbers, charts, folded tables, and what was run."""

from __future__ import annotations

import html
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING

from snows.results.charts import Chart, Comparison, LayerBars, colours, draw, has_values
from snows.results.svg import printable

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["Comparison", "Figure", "Folded", "LayerBars", "page"]

MANY = 40  # rows above which a chart scrolls in a frame of its own; on paper the tables stand for it


@dataclass(frozen=True)
class Figure:
    """Hold one of the large numbers, dense beside now.

    Attributes:
        label: what it is, such as "accuracy".
        dense, now: of the network before and after; NaN where it was not measured. Without `now` the figure
            is left out.
        unit: of both.
        digits: after the decimal point.
        note: a few words below, such as "1.4 times as fast".
    """

    label: str
    dense: float
    now: float
    unit: str
    digits: int = 2
    note: str = ""


@dataclass(frozen=True)
class Folded:
    """Hold what a reader may open: tables and charts below one line.

    Attributes:
        title: the line.
        content: from top to bottom; charts that follow one another stand side by side where there is room.
    """

    title: str
    content: Sequence[Table | LayerBars | Comparison]


def page(
    title: str,
    *,
    lead: str = "",
    figures: Sequence[Figure] = (),
    comparisons: Sequence[Comparison] = (),
    layers: Sequence[LayerBars] = (),
    notes: Sequence[str] = (),
    folded: Sequence[Folded] = (),
    foot: Mapping[str, str] | None = None,
) -> str:
    """Make an HTML page that loads nothing and runs no script; each part may be missing.

    Args:
        title: of the page.
        lead: a sentence below the title.
        figures: the large numbers, three at best.
        comparisons: charts of methods.
        layers: charts of layers, side by side where there is room.
        notes: sentences that a reader should see.
        folded: tables and charts that are closed at first; open on paper.
        foot: what was run, by name: model, data, machine, date, settings, command.

    Returns:
        The page. The same arguments give the same text.
    """
    prefixes = (f"c{i}" for i in count(1))
    known = [figure for figure in figures if math.isfinite(figure.now)]
    parts = [
        f"<header><h1>{_text(title)}</h1>{_tag('p', lead, 'lead')}</header>",
        _section("Dense and pruned", "figures", [_figure(figure) for figure in known]),
        _section("Compared", "charts", _charts(comparisons, prefixes)),
        _section("Layer by layer", "charts", _charts(layers, prefixes)),
        _section("Notes", "notes", [_tag("p", note) for note in notes]),
        _section("In detail", "folded", [_folded(entry, prefixes) for entry in folded]),
        _foot(foot or {}),
    ]
    body = "\n".join(part for part in parts if part)
    return HEAD.format(title=_text(title), style=STYLE) + f"<body><main>\n{body}\n</main></body></html>\n"


def _text(text: object) -> str:
    return html.escape("\n".join(map(printable, str(text).split("\n"))))


def _tag(name: str, text: str, kind: str = "") -> str:
    return f"<{name}{f' class={kind}' if kind else ''}>{_text(text)}</{name}>" if text else ""


def _section(label: str, kind: str, parts: Sequence[str]) -> str:
    """Frame what there is; nothing makes no section. The label is for who cannot see it."""
    return f'<section class="{kind}" aria-label="{label}">' + "\n".join(parts) + "</section>" if parts else ""


def _figure(figure: Figure) -> str:
    dense, now = (f"{value:,.{figure.digits}f}" for value in (figure.dense, figure.now))
    was = f'<span class="was"><b>{dense}</b> dense</span>' if math.isfinite(figure.dense) else ""
    return (
        f'<div class="figure"><h2>{_text(figure.label)}</h2>'
        f'<p><span class="is"><b>{now}</b> {_text(figure.unit)}</span>{was}</p>'
        f"{_tag('p', figure.note, 'note')}</div>"
    )


def _charts(charts: Sequence[Chart], prefixes: Iterator[str]) -> list[str]:
    found = []
    for chart in charts:
        if not has_values(chart):
            continue
        keys = [
            f'<li><i style="background:var(--{colour})"></i>{_text(name)}</li>'
            for name, colour in zip(chart.series, colours(len(chart.series)), strict=True)
        ]
        unit = f" <small>{_text(chart.unit)}</small>" if chart.unit else ""
        frame = ' class="tall" tabindex="0"' if len(chart.rows) > MANY else ""
        found.append(
            f"<figure><figcaption><h2>{_text(chart.title)}{unit}</h2><ul>{''.join(keys)}</ul></figcaption>"
            f"<div{frame}>{draw(chart, next(prefixes))}</div></figure>"
        )
    return found


def _folded(entry: Folded, prefixes: Iterator[str]) -> str:
    parts, beside = [], []
    for item in entry.content:
        if isinstance(item, Comparison | LayerBars):
            beside += _charts([item], prefixes)
            continue
        parts += [_section(_text(entry.title), "charts", beside), _table(item)]
        beside = []
    parts.append(_section(_text(entry.title), "charts", beside))
    return f"<details><summary>{_text(entry.title)}</summary>{''.join(parts)}</details>"


def _table(table: Table) -> str:
    sides = [' class="right"' if column.justify == "right" else "" for column in table.columns]

    def line(kind: str, cells: Sequence[object]) -> str:
        row = (f"<{kind}{side}>{_text(cell)}</{kind}>" for cell, side in zip(cells, sides, strict=True))
        return f"<tr>{''.join(row)}</tr>"

    head = line("th", [column.header for column in table.columns])
    rows = zip(*(list(column.cells) for column in table.columns), strict=True)
    body = "\n".join(line("td", row) for row in rows)
    return (
        f'<div class="table" tabindex="0"><table><thead>{head}</thead>\n<tbody>{body}</tbody></table></div>'
    )


def _foot(foot: Mapping[str, str]) -> str:
    entries = [
        f"<div><dt>{_text(name)}</dt><dd>{_text(text)}</dd></div>" for name, text in foot.items() if text
    ]
    return f"<footer><dl>{''.join(entries)}</dl></footer>" if entries else ""


HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<link rel="icon" href="data:,">
<style>{style}</style></head>
"""

STYLE = """
:root{color-scheme:light dark;--paper:#fff;--card:#f5f6f8;--ink:#1b1f24;--quiet:#59616b;--line:#dde1e6;
--dense:#7b838d;--second:#d55e00;--third:#b0578d;--fourth:#00805d;--now:#0068b8}
@media(prefers-color-scheme:dark){:root{--paper:#14171b;--card:#1d2127;--ink:#e8ebef;--quiet:#a4adb8;--line:#343a42;
--dense:#8d97a3;--second:#f58b3c;--third:#df95c2;--fourth:#3fc49b;--now:#58b4f5}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:1140px;margin:0 auto;padding:32px 16px 48px}
h1,h2,p,ul,dl,dd,figure{margin:0;padding:0}
h1{font-size:26px;line-height:1.25;overflow-wrap:anywhere}
h2{font-size:15px;font-weight:600;overflow-wrap:anywhere}
h2 small{font-size:13px;font-weight:400;color:var(--quiet)}
.lead{margin-top:4px;color:var(--quiet);overflow-wrap:anywhere}
section,footer{margin-top:28px}
.figures{display:grid;gap:16px;grid-template-columns:repeat(auto-fit,minmax(min(100%,250px),1fr))}
.figure{background:var(--card);border-radius:10px;padding:16px 20px}
.figure h2{font-weight:400;color:var(--quiet)}
.figure p{display:flex;flex-wrap:wrap;align-items:baseline;gap:0 18px;line-height:1.25}
.is{font-size:18px;color:var(--now)}.is b{font-size:46px;letter-spacing:-.02em}
.was{font-size:15px;color:var(--quiet)}.was b{font-size:24px;font-weight:500}
.figure .note{font-size:14px;color:var(--quiet);margin-top:2px}
.charts{display:grid;gap:32px;grid-template-columns:repeat(auto-fit,minmax(min(100%,320px),1fr));align-items:start}
figure{min-width:0;max-width:440px}
figcaption{margin-bottom:8px}
figcaption ul{display:flex;flex-wrap:wrap;gap:0 14px;list-style:none;font-size:13px;color:var(--quiet)}
figcaption i{display:inline-block;width:10px;height:10px;border-radius:2px;margin-right:5px}
svg{display:block;height:auto;overflow:visible}
svg text{font-family:inherit!important;font-variant-numeric:tabular-nums;
paint-order:stroke;stroke:var(--paper);stroke-width:3px;stroke-linejoin:round}
.tall{max-height:640px;overflow-y:auto;padding-right:10px;border:solid var(--line);border-width:1px 0}
.notes p{border-left:3px solid var(--line);padding-left:12px;margin-top:8px;overflow-wrap:anywhere}
details{border-top:1px solid var(--line)}
details:last-child{border-bottom:1px solid var(--line)}
summary{padding:10px 0;cursor:pointer;font-weight:600;overflow-wrap:anywhere}
details section{margin:8px 0 20px}
.table{overflow-x:auto;margin-bottom:20px}
table{border-collapse:collapse;font-size:13px;font-variant-numeric:tabular-nums}
th,td{padding:4px 14px 4px 0;border-bottom:1px solid var(--line);text-align:left;vertical-align:top}
th{color:var(--quiet);font-weight:500;white-space:nowrap}
.right{text-align:right;white-space:nowrap}
footer{font-size:13px;color:var(--quiet);border-top:1px solid var(--line);padding-top:14px}
footer div{display:grid;grid-template-columns:90px minmax(0,1fr);gap:12px;padding:2px 0}
footer dd{color:var(--ink);overflow-wrap:anywhere;white-space:pre-wrap}
@media print{:root{color-scheme:light;--paper:#fff;--card:#fff;--ink:#000;--quiet:#444;--line:#ccc;
--dense:#7b838d;--second:#d55e00;--third:#b0578d;--fourth:#00805d;--now:#0068b8}
*{print-color-adjust:exact;-webkit-print-color-adjust:exact}
body{font-size:11px}main{padding:0;max-width:none}
.figures{grid-template-columns:repeat(3,1fr)}.figure{border:1px solid var(--line)}.is b{font-size:30px}
summary{break-after:avoid}.charts{grid-template-columns:repeat(3,1fr);gap:14px}.charts,figure{break-inside:avoid}
figure:has(.tall){display:none}
details::details-content{content-visibility:visible;block-size:auto}
.table{overflow:visible}table{font-size:9px}thead{display:table-header-group}tr,.figure{break-inside:avoid}}
"""
