"""What was taken out of a network, group by group, and what each stage left of the loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table

from snows.results.tables import add_row


@dataclass(frozen=True)
class GroupReport:
    """Record what became of one group of units, or how one layer was treated.

    Attributes:
        name: of the group, by its first layer; of the layer that got low rank or zeros.
        kind: "channels", "heads", "neurons" or "low-rank"; of zeros their pattern.
        units: that there were; the full rank; the weights of the layer.
        kept: units that stay; the rank; the weights that are not made zero.
        predicted: share of the output's variance that removal is predicted to cost, after the rest is fitted;
            comparable between groups, too small or too large as a whole.
        error: standard error of the scores that the order was found by, relative to them, where it is known.
        reason: why it stayed whole; empty where it was asked.
    """

    name: str
    kind: str
    units: int
    kept: int
    predicted: float = float("nan")
    error: float = float("nan")
    reason: str = ""


@dataclass(frozen=True)
class StageReport:
    """Record one stage of making a network smaller.

    Attributes:
        name: of the stage.
        loss: squared mismatch of the network's output on the held-back samples, as a share of the dense
            output's variance.
        taken: whether the network went on with what the stage gave.
        seconds: wall time.
    """

    name: str
    loss: float
    taken: bool
    seconds: float


def group_table(groups: Sequence[GroupReport]) -> Table:
    """Make the table of groups."""
    table = Table(pad_edge=False)
    table.add_column("group", overflow="fold")
    table.add_column("kind")
    for heading in ("units", "kept", "predicted loss"):
        table.add_column(heading, justify="right", no_wrap=True)
    if any(x.reason or x.error == x.error for x in groups):
        table.add_column("", overflow="fold")
    for x in groups:
        predicted = f"{x.predicted:.3g}" if x.predicted == x.predicted else ""
        error = f"standard error {100 * x.error:.0f} %" if x.error == x.error else ""
        cells = (x.name, x.kind, str(x.units), str(x.kept), predicted, x.reason or error)
        add_row(table, *cells[: len(table.columns)])
    return table


def stage_table(stages: Sequence[StageReport]) -> Table:
    """Make the table of stages."""
    table = Table(pad_edge=False)
    table.add_column("stage")
    for heading in ("held-back loss", "seconds"):
        table.add_column(heading, justify="right", no_wrap=True)
    if not all(x.taken for x in stages):
        table.add_column("")
    for x in stages:
        cells = (x.name, f"{x.loss:.4g}", f"{x.seconds:.1f}", "not taken")
        add_row(table, *cells[: 3 + (not x.taken)])
    return table
