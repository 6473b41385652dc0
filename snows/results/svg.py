"""What matplotlib wrote as SVG, made part of a page: its colours, its own ids, its texts."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from xml.dom import minidom

# Each colour stands for one of the page's: matplotlib knows no CSS variables.
SERIES = {"dense": "#0000a0", "second": "#0000a1", "third": "#0000a2", "fourth": "#0000a3", "now": "#0000a4"}
PAPER = {"ink": "#0000b0", "quiet": "#0000b1", "line": "#0000b2"}
VARIABLES = {colour: f"var(--{name})" for name, colour in (SERIES | PAPER).items()}
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "snows", "path.simplify": False}


def printable(text: str) -> str:
    """Replace what has no place in XML or in a line: names are data."""
    return "".join(x if x.isprintable() else "\ufffd" for x in text)


def _elements(node: minidom.Node) -> Iterator[minidom.Element]:
    for child in list(node.childNodes):
        if isinstance(child, minidom.Element):
            yield child
            yield from _elements(child)


def for_page(written: bytes, label: str, texts: Sequence[tuple[str, str]], prefix: str) -> str:
    """Put texts and the page's colours in, make ids the chart's own, and drop what a page does not need."""
    document = minidom.parseString(written)
    svg = document.documentElement
    assert svg is not None
    for element in list(_elements(svg)):
        if element.tagName == "metadata" and element.parentNode is not None:
            element.parentNode.removeChild(element)
    source = svg.toxml()
    referenced = set(re.findall(r"""(?:url\(#|href="#)([^")]+)""", source))
    for element in [svg, *_elements(svg)]:
        for name, value in list(element.attributes.items()):
            if name == "id" and value not in referenced:
                element.removeAttribute(name)
            elif name == "id":
                element.setAttribute(name, f"{prefix}-{value}")
            elif name == "xlink:href":
                element.setAttribute(name, f"#{prefix}-{value[1:]}")
            else:
                value = re.sub(r"url\(#([^)]+)\)", rf"url(#{prefix}-\1)", value)
                value = re.sub("#0000[ab][0-9]", lambda found: VARIABLES[found[0]], value)
                element.setAttribute(name, value)
        if element.tagName == "text":
            _set_text(document, element, texts)
    for name in ("width", "height", "version"):
        svg.removeAttribute(name)
    for name, value in (("width", "100%"), ("role", "img"), ("aria-label", label)):
        svg.setAttribute(name, value)
    return re.sub(r">\s*\n\s*<", ">\n<", str(svg.toxml()))


def _set_text(document: minidom.Document, element: minidom.Element, texts: Sequence[tuple[str, str]]) -> None:
    """Put a text in the place of its number, and its tooltip before it."""
    written = "".join(child.data for child in element.childNodes if isinstance(child, minidom.Text))
    if not (found := re.fullmatch(r"\s*@(\d+)\s*", written)):
        return
    text, title = texts[int(found[1])]
    for child in list(element.childNodes):
        element.removeChild(child)
    if title:
        tooltip = document.createElement("title")
        tooltip.appendChild(document.createTextNode(title))
        element.appendChild(tooltip)
    element.appendChild(document.createTextNode(text))
