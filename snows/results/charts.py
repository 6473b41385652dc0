"""Bars and dots of a page, drawn by matplotlib as SVG that takes its colours from the page."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from snows.results.svg import PAPER, SERIES, STYLE, for_page, printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

Row = tuple[str, Sequence[float]]

DASH = "–"  # stands where nothing was measured
BESIDE, ALONE = 38, 54  # letters of a name that fit beside its values, and on a line of their own
TOP, BOTTOM, LEFT = 4, 24, 4  # units around the rows; the axis is below them


@dataclass(frozen=True)
class Comparison:
    """Compare methods case by case: a few thick bars a case, each with its number.

    Attributes:
        title: of the chart.
        series: what is compared, such as dense, magnitude, snows; the first is grey, the last blue.
        rows: of each case its name and one value a series; NaN where there is none.
        unit: of the values; may be empty.
        digits: after the decimal point.
    """

    title: str
    series: Sequence[str]
    rows: Sequence[Row]
    unit: str = ""
    digits: int = 2


@dataclass(frozen=True)
class LayerBars:
    """Show one quantity layer by layer: thin bars under each name, or dots on a logarithmic axis.

    Attributes:
        title: of the chart.
        series: of one or two values a layer, such as dense and packed.
        rows: of each layer its name and one value a series; NaN where there is none.
        unit: of the values; may be empty.
        digits: after the decimal point on a linear scale; a logarithmic one shows three significant digits.
        scale: of the axis; what is not positive has no place on a logarithmic one.
    """

    title: str
    series: Sequence[str]
    rows: Sequence[Row]
    unit: str = ""
    digits: int = 2
    scale: Literal["linear", "log"] = "linear"


Chart = Comparison | LayerBars


def has_values(chart: Chart) -> bool:
    """Tell whether a chart has anything to draw."""
    return any(_drawable(chart, value) for _, values in chart.rows for value in values)


def colours(count: int) -> list[str]:
    """Name the page's colours for so many series: grey for the first of several, blue for the last."""
    names = list(SERIES)
    if count == 1:
        return ["now"]
    between = [names[1 + i % (len(names) - 2)] for i in range(count - 2)]
    return ["dense", *between, "now"]


def draw(chart: Chart, prefix: str) -> str:
    """Draw a chart.

    Args:
        chart: that `has_values`.
        prefix: that begins each id in the SVG, another one for each chart of a page.

    Returns:
        An `svg` element as wide as its container. The same chart and prefix give the same text.
    """
    from matplotlib import style  # imported here, for most commands draw nothing
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure as Canvas

    texts: list[tuple[str, str]] = []
    buffer = io.BytesIO()
    with style.context(["default", STYLE]):
        canvas = Canvas(dpi=72)
        FigureCanvasSVG(canvas)
        _Drawing(chart, canvas, texts).draw()
        canvas.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return for_page(buffer.getvalue(), f"{printable(chart.title)}: {_described(chart)}", texts, prefix)


class _Drawing:
    """Place one chart's rows, a unit being a point.

    matplotlib gets a number in place of each text (`texts` has what it stands for and the words of its
    tooltip): it would read `$` as mathematics, and warn of letters that its own font lacks, although the
    browser sets the text.
    """

    def __init__(self, chart: Chart, canvas: Canvas, texts: list[tuple[str, str]]) -> None:
        self.chart, self.canvas, self.texts = chart, canvas, texts
        thick = isinstance(chart, Comparison)
        self.width, self.right = (380, 56) if thick else (360, 8)
        self.head, self.bar, self.gap = (20, 16, 12) if thick else (15, 6, 9)
        self.two_lines = not thick and any(len(name) > BESIDE for name, _ in chart.rows)
        if self.two_lines:
            self.head += 13
        self.pitch = self.head + self.bar * len(chart.series) + self.gap

    def draw(self) -> None:
        """Draw the axis and all rows."""
        chart, rows = self.chart, self.pitch * len(self.chart.rows)
        height = TOP + rows + BOTTOM
        self.canvas.set_size_inches(self.width / 72, height / 72)
        across = 1 - (LEFT + self.right) / self.width
        ax = self.canvas.add_axes((LEFT / self.width, BOTTOM / height, across, rows / height))
        ax.set_ylim(rows, 0)
        self._axis(ax)
        for i, (name, values) in enumerate(chart.rows):
            self._name(ax, i * self.pitch + self.head - 5, name, values)
            top = i * self.pitch + self.head
            if isinstance(chart, LayerBars) and chart.scale == "log":
                self._dots(ax, top + self.bar, values)
            else:
                self._bars(ax, top, values)

    def _axis(self, ax: Axes) -> None:
        from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

        found = [v for _, values in self.chart.rows for v in values if _drawable(self.chart, v)]
        if isinstance(self.chart, LayerBars) and self.chart.scale == "log":
            ax.set_xscale("log")
            ax.set_xlim(min(found) / 1.6, max(found) * 1.6)
            ax.xaxis.set_major_locator(LogLocator(numticks=6))
        else:
            low, high = min(0.0, *found), max(0.0, *found)
            ax.set_xlim(low, high if high > low else low + 1)
            ax.xaxis.set_major_locator(MaxNLocator(4))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        ax.tick_params(axis="x", length=0, pad=5, labelsize=10, labelcolor=PAPER["quiet"])
        ax.yaxis.set_visible(False)
        for spine in ax.spines.values():
            spine.set_visible(False)
        ax.grid(axis="x", color=PAPER["line"], linewidth=1)
        ax.set_axisbelow(True)
        ax.margins(0)

    def _name(self, ax: Axes, y: float, name: str, values: Sequence[float]) -> None:
        shown = [_number(self.chart, value) for value in values]
        name = printable(name)
        pairs = zip(map(printable, self.chart.series), shown, strict=True)
        full = f"{name}: {', '.join(' '.join(pair) for pair in pairs)} {printable(self.chart.unit)}".rstrip()
        if isinstance(self.chart, Comparison):
            self._text(ax, 0, y, name, full, "ink", "left", 13)
            return
        if len(name) > ALONE:
            name = "…" + name[1 - ALONE :]  # the end of a name is what tells
        self._text(ax, 0, y - 13 if self.two_lines else y, name, full, "ink", "left", 11)
        self._text(ax, 1, y, " → ".join(shown), full, "quiet", "right", 10)

    def _bars(self, ax: Axes, top: float, values: Sequence[float]) -> None:
        for j, (value, colour) in enumerate(zip(values, colours(len(values)), strict=True)):
            y = top + self.bar * (j + 0.5)
            if math.isfinite(value):
                ax.barh(y, value, self.bar - 1, color=SERIES[colour], linewidth=0)
            if isinstance(self.chart, Comparison):
                ink = "ink" if j == len(values) - 1 else "quiet"
                text = self._key(_number(self.chart, value), "")
                end = max(value, 0) if math.isfinite(value) else 0
                ax.annotate(
                    text,
                    (end, y),
                    xytext=(6, -4),
                    textcoords="offset points",
                    ha="left",
                    va="baseline",
                    fontsize=11,
                    color=PAPER[ink],
                )

    def _dots(self, ax: Axes, y: float, values: Sequence[float]) -> None:
        known = [value for value in values if _drawable(self.chart, value)]
        if len(known) > 1:
            ax.plot([min(known), max(known)], [y, y], color=PAPER["line"], linewidth=3, solid_capstyle="butt")
        for value, colour in zip(values, colours(len(values)), strict=True):
            if _drawable(self.chart, value):
                ax.plot(
                    [value], [y], "o", color=SERIES[colour], markersize=8, markeredgewidth=0, clip_on=False
                )

    def _text(
        self,
        ax: Axes,
        x: float,
        y: float,
        text: str,
        title: str,
        colour: str,
        align: Literal["left", "right"],
        size: float,
    ) -> None:
        ax.text(
            x,
            y,
            self._key(text, title),
            transform=ax.get_yaxis_transform(),
            ha=align,
            va="baseline",
            fontsize=size,
            color=PAPER[colour],
        )

    def _key(self, text: str, title: str) -> str:
        self.texts.append((text, title))
        return f"@{len(self.texts) - 1}"


def _drawable(chart: Chart, value: float) -> bool:
    positive = isinstance(chart, Comparison) or chart.scale == "linear" or value > 0
    return math.isfinite(value) and positive


def _number(chart: Chart, value: float) -> str:
    if not math.isfinite(value):
        return DASH
    if isinstance(chart, LayerBars) and chart.scale == "log":
        return f"{value:.2e}" if 0 < abs(value) < 0.01 else f"{value:.3g}"
    return f"{value:,.{chart.digits}f}"


def _described(chart: Chart) -> str:
    """Say in words what a chart shows: all numbers where there are few, and otherwise what it is of."""
    unit = f" in {chart.unit}" if chart.unit else ""
    if isinstance(chart, LayerBars):
        return f"{' and '.join(map(printable, chart.series))}{unit} of {len(chart.rows)} layers"
    cases = []
    for name, values in chart.rows:
        numbers = ", ".join(
            f"{printable(series)} {_number(chart, value)}"
            for series, value in zip(chart.series, values, strict=True)
        )
        cases.append(f"{printable(name)}: {numbers}")
    return "; ".join(cases) + unit
