"""Tables of layers for a terminal, or as plain text."""

from __future__ import annotations

import io
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text


def named_table(left: Sequence[str], right: Sequence[str]) -> Table:
    """Begin a table of layers by name.

    A name is never cut, for its end is what tells: it goes on in the next line.
    """
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


def render(table: Table, width: int = 140) -> str:
    """Render a table as plain text."""
    buffer = io.StringIO()
    Console(file=buffer, width=width, color_system=None).print(table)
    return "\n".join(line.rstrip() for line in buffer.getvalue().rstrip().split("\n"))
