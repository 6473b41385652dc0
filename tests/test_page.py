"""A page shows its numbers and names, whatever they are, and needs nothing else; a browser can show it."""

import html
import math
import os
import re
import shutil
import subprocess
from xml.dom import minidom

import pytest
from rich.table import Table

from snows.results.page import Comparison, Figure, Folded, LayerBars, page

NAN = math.nan
CHROMIUM = os.environ.get("CHROMIUM") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
METHODS = ("dense", "magnitude", "magnitude + statistics", "snows")
HOSTILE = (
    "<script>alert(1)</script>",
    "a & b",
    "\"quoted\" 'twice'",
    "$x^2$",
    "[/red]",
    "層.卷积",
    "nul\0bell\a",
    "@0",
    "&amp;",
    "line\nbreak",
    "\ud800",
    "]]>",
    "<!--",
)


def table(*names):
    found = Table()
    found.add_column("layer", overflow="fold")
    found.add_column("kept", justify="right")
    for i, name in enumerate(names):
        found.add_row(name, str(i))
    return found


def whole(names=("features.0.conv", "features.1.conv", "head"), title="resnet20 2:4"):
    times = [(name, (1.25 + i, 0.5 + i)) for i, name in enumerate(names)]
    losses = [(name, (0.5, 0.0025)) for name in names[:-1]] + [(names[-1], (NAN, NAN))]
    cases = [("2:4", (94.5, 89.06, 93.88, 94.38)), ("1:4", (94.5, 13.75, NAN, 93.56))]
    again = LayerBars("Again", ("kept",), [(name, (25.0,)) for name in names])
    return page(
        title,
        lead="A sentence.",
        figures=[
            Figure("accuracy", 94.5, 93.375, "%", 3),
            Figure("size", 1110.25, 0.59, "MB"),
            Figure("time", 55.5, 48.25, "ms"),
        ],
        comparisons=[Comparison("Accuracy", METHODS, cases, "%")],
        layers=[
            LayerBars("Time", ("dense", "packed"), times, "ms"),
            LayerBars("Kept", ("kept",), [(name, (50.0,)) for name in names], "%"),
            LayerBars("Loss", ("before", "after"), losses, scale="log"),
        ],
        notes=["A note."],
        folded=[Folded("Tables", [table(*names), again])],
        foot={"command": "snows prune", "machine": "CPU", "empty": ""},
    )


def svgs(text):
    found = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    return [minidom.parseString(svg).documentElement for svg in found]


def texts(svg):
    """The texts of a drawing, without their tooltips."""
    return [
        "".join(child.data for child in text.childNodes if isinstance(child, minidom.Text))
        for text in svg.getElementsByTagName("text")
    ]


def bars(svg, variable):
    """The lengths of the bars of one colour, from their outlines."""
    found = []
    for path in svg.getElementsByTagName("path"):
        outline = path.getAttribute("d").strip()
        if f"fill: var(--{variable})" in path.getAttribute("style") and outline.endswith("z"):
            across = [float(x) for x in re.findall(r"[ML] (\S+) ", outline)]
            found.append(max(across) - min(across))
    return found


def test_numbers_and_names_are_shown():
    text = whole()
    compared, times, kept, losses, again = svgs(text)
    numbers = ["94.50", "89.06", "93.88", "94.38", "94.50", "13.75", "–", "93.56"]
    assert [x for x in texts(compared) if x == "–" or re.fullmatch(r"\d\d\.\d\d", x)] == numbers
    assert {"2:4", "1:4"} <= set(texts(compared))
    assert {"features.0.conv", "1.25 → 0.50", "head", "3.25 → 2.50"} <= set(texts(times))
    assert texts(kept).count("50.00") == texts(again).count("25.00") == 3
    assert {"0.5 → 2.50e-03", "– → –"} <= set(texts(losses))
    for shown in (
        "<b>93.375</b> %",
        "<b>94.500</b> dense",
        "<b>1,110.25</b> dense",
        "A sentence.",
        "A note.",
        "snows prune",
    ):
        assert shown in text
    assert "<dt>empty" not in text
    assert '<td>head</td><td class="right">2</td>' in text


def test_a_bar_is_as_long_as_its_value():
    compared, times, *_ = svgs(whole())
    values = {"dense": (94.5, 94.5), "second": (89.06, 13.75), "third": (93.88,), "now": (94.38, 93.56)}
    unit = bars(compared, "dense")[0] / 94.5
    for name, expected in values.items():
        assert bars(compared, name) == pytest.approx([unit * x for x in expected], rel=1e-5)
    unit = bars(times, "dense")[-1] / 3.25
    assert bars(times, "now") == pytest.approx([unit * x for x in (0.5, 1.5, 2.5)], rel=1e-5)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_is_text(name):
    text = whole((name, "b", "c"), title=name)
    shown = "".join(x if x.isprintable() else "\ufffd" for x in name)
    assert "<script" not in text
    assert "<!--" not in text
    assert shown in texts(svgs(text)[1])
    assert f"<td>{html.escape(shown if chr(10) not in name else name)}</td>" in text
    assert len(svgs(text)) == 5
    text.encode()


def test_a_long_name_keeps_its_end_and_is_whole_in_the_tooltip():
    name = "model." + "stage." * 20 + "attention.query"
    svg = svgs(whole((name, "b", "c")))[1]
    cut = next(x for x in texts(svg) if x.startswith("…"))
    assert name.endswith(cut[1:])
    assert len(cut) == 54
    titles = [x.firstChild.data for x in svg.getElementsByTagName("title")]
    assert titles[0] == f"{name}: dense 1.25, packed 0.50 ms"


def test_any_part_may_be_missing():
    assert "<section" not in page("empty")
    assert "<footer" not in page("empty")
    nothing = page(
        "x",
        figures=[Figure("accuracy", 90.0, NAN, "%")],
        comparisons=[Comparison("A", METHODS, [("case", (NAN,) * 4)])],
        layers=[LayerBars("L", ("a", "b"), []), LayerBars("M", ("a",), [("x", (0.0,))], scale="log")],
    )
    assert "<section" not in nothing
    assert "accuracy" not in nothing
    only = page("x", figures=[Figure("size", NAN, 2.0, "MB")])
    assert "<b>2.00</b> MB" in only
    assert "dense</span>" not in only
    zeros = page("x", layers=[LayerBars("L", ("a", "b"), [("x", (0.0, 0.0)), ("y", (math.inf, -1.0))])])
    assert {"0.00 → 0.00", "– → -1.00"} <= set(texts(svgs(zeros)[0]))


def test_the_same_arguments_give_the_same_page():
    import matplotlib

    before = dict(matplotlib.rcParams)
    first = whole()
    assert dict(matplotlib.rcParams) == before
    with matplotlib.rc_context({"axes.grid": True, "font.size": 30, "svg.fonttype": "path"}):
        assert whole() == first


def test_ids_do_not_clash_and_references_hold():
    text = whole()
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids)) > 0
    referenced = re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', text)
    assert {a or b for a, b in referenced} == set(ids)


def test_nothing_is_fetched():
    text = whole()
    assert set(re.findall(r"\w+://[^\"'\s<]+", text)) == {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    assert all(found.startswith("xmlns") for found in re.findall(r"([\w:]+)=\"http", text))
    assert not re.search(r"<script|@import|\bsrc=|url\((?!#)", text)


def test_colours_are_the_pages():
    for svg in svgs(whole()):
        assert "var(--" in svg.toxml()
        assert "#0000" not in svg.toxml()
        assert svg.getAttribute("role") == "img"
        assert svg.getAttribute("aria-label")
        assert svg.getAttribute("width") == "100%"
        assert len(svg.getAttribute("viewBox").split()) == 4
        assert not svg.hasAttribute("height")


def luminance(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", ["light", "dark", "print"])
def test_contrast(scheme):
    """WCAG: 4.5 for text, 3 for graphics."""
    blocks = re.findall(r":root\{[^}]*\}", whole())
    assert len(blocks) == 3
    block = blocks[["light", "dark", "print"].index(scheme)]
    found = {
        name: colour if len(colour) == 7 else "#" + "".join(2 * x for x in colour[1:])
        for name, colour in re.findall(r"--(\w+):(#\w+)", block)
    }
    for name in ("ink", "quiet", "dense", "second", "third", "fourth", "now"):
        least = 4.5 if name in ("ink", "quiet", "now") else 3
        for ground in ("paper", "card"):
            low, high = sorted(luminance(found[x]) for x in (name, ground))
            assert (high + 0.05) / (low + 0.05) >= least, (name, ground)


# ---------------------------------------------------------------- in a browser

PROBE = """<!doctype html><link rel="icon" href="data:,">
<style>iframe{width:WIDTHpx;height:3000px;border:0}</style>
<iframe srcdoc="PAGE" onload="const w = this.contentWindow, d = w.document; document.body.dataset.found =
[d.scrollingElement.scrollWidth, w.innerWidth, d.querySelectorAll('svg text').length].join(' ')"></iframe>"""


def browse(text, width, folder):
    """Load a page, all folded parts open, in a frame so wide; a window has a least width, a frame has none.

    Returns:
        The page's width, the frame's, how many texts are drawn, and the lines of the console.
    """
    path = folder / "probe.html"
    text = text.replace("<details>", "<details open>")
    path.write_text(PROBE.replace("WIDTH", str(width)).replace("PAGE", html.escape(text)), encoding="utf-8")
    options = (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--enable-logging=stderr",
        f"--user-data-dir={folder / 'profile'}",
    )
    ran = subprocess.run([CHROMIUM, *options, "--dump-dom", path.as_uri()], capture_output=True, timeout=120)
    found = re.search(r'data-found="([\d ]+)"', ran.stdout.decode())
    assert found, ran.stderr.decode()[-2000:]
    console = [line for line in ran.stderr.decode().splitlines() if "CONSOLE" in line]
    return *map(int, found[1].split()), console


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here; CHROMIUM names one")
@pytest.mark.parametrize("width", [400, 1200])
def test_a_browser_shows_it(width, tmp_path):
    names = [f"vision_model.encoder.layer.{i}.attention.attention.query_projection" for i in range(200)]
    wide, inner, count, console = browse(whole([*HOSTILE, *names], title="x" * 300), width, tmp_path)
    assert inner == width
    assert wide <= inner
    assert count > 4 * 2 * 200
    assert console == []


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here; CHROMIUM names one")
def test_the_browser_would_tell(tmp_path):
    """What the other test looks for is found where it is."""
    broken = '<!doctype html><p style="width:900px">wide</p><script>console.error("told")</script>'
    wide, inner, _, console = browse(broken, 400, tmp_path)
    assert wide > inner
    assert any("told" in line for line in console)
