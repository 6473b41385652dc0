"""How far a run is: a bar in a terminal or notebook, a line a stage and a layer elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from snows import together
from snows.results.report import LayerReport
from snows.results.tables import printable
from snows.solving.newton import Step


class Tell:
    """Say what is being done.

    Args:
        bar: where to show it.
        lines: whether to print lines, where there is no terminal to draw a bar in.
    """

    def __init__(self, bar: Progress, lines: bool) -> None:
        self._bar, self._lines = bar, lines
        self._task: TaskID = bar.add_task("", total=None)
        self._name, self._steps = "", 0

    def doing(self, what: str) -> None:
        """Say what is done next with the network."""
        self.at(what)
        if self._lines:
            self._print(printable(what))

    def at(self, what: str) -> None:
        """Say what is done next with one layer of many; a line follows when it is done."""
        self._bar.update(self._task, description=printable(what))

    def note(self, what: str) -> None:
        """Say what stays to be read."""
        if self._lines or not self._bar.disable:
            self._bar.console.print(printable(what), highlight=False, markup=False, soft_wrap=True)

    def layers(self, count: int) -> None:
        """Say how many layers there are."""
        self._bar.update(self._task, total=count)

    def step(self, name: str, step: Step) -> None:
        """Say how a Newton step went."""
        self._steps = self._steps + 1 if name == self._name else 1
        self._name = name
        self.at(f"{name} step {self._steps}: loss {step.before:.4g} -> {step.after:.4g}")

    def done(self, row: LayerReport) -> None:
        """Say that a layer is finished."""
        self._bar.update(self._task, advance=1, description=printable(row.name))
        if self._lines:
            task = self._bar.tasks[0]
            loss = f", loss {row.before:.4g} -> {row.after:.4g}" if row.before == row.before else ""
            self._print(
                f"{int(task.completed)}/{int(task.total or 0)} {printable(row.name)}: {row.pattern}{loss}, "
                f"{row.seconds:.1f} s"
            )

    def _print(self, line: str) -> None:
        self._bar.console.print(line, highlight=False, markup=False, soft_wrap=True)


@contextmanager
def shown(show: bool) -> Iterator[Tell]:
    """Show progress on the error stream while something is done; of several processes the first does.

    Args:
        show: whether to.
    """
    show &= together.rank() == 0
    console = Console(stderr=True)
    drawn = console.is_terminal or console.is_jupyter
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not (show and drawn), transient=True) as bar:
        yield Tell(bar, show and not drawn)
