"""What the verbs did, layer by layer: reports that print as a table and are kept as JSON."""

from __future__ import annotations

import abc
import math
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, TypeVar

from rich.table import Table

from snows.results.records import read, to_json
from snows.results.structure import GroupReport, StageReport, group_table, stage_table
from snows.results.tables import add_row, named_table, render

Own = TypeVar("Own", bound="Record")


class Record(abc.ABC):
    """Print what a verb did, layer by layer, and keep it as JSON; `Report` and `Deployment` are its kinds.

    Attributes:
        notes: sentences that a reader should see.
        rows: by field, the class of a line.
    """

    notes: list[str]
    rows: ClassVar[dict[str, type]]

    @abc.abstractmethod
    def table(self) -> Table:
        """Make the table of layers."""

    def tables(self) -> list[Table]:
        """Make all tables that have a line, in order."""
        return [x for x in (self.table(),) if x.row_count]

    @abc.abstractmethod
    def summary(self) -> str:
        """Say in a sentence what came of it."""

    def __str__(self) -> str:
        return "\n".join([*(render(x, width=160) for x in self.tables()), self.summary(), *self.notes])

    def to_json(self) -> str:
        """Write the report as JSON."""
        return to_json(asdict(self))  # type: ignore[call-overload]  # each kind is a dataclass

    @classmethod
    def from_json(cls: type[Own], text: str) -> Own:
        """Read what `to_json` wrote.

        Raises:
            ValueError: it is no JSON, or its entries are not a report's.
        """
        return read(cls, cls.rows, text)


SPARED = "the budget takes nothing from it"  # of a layer that is among those that a budget is spent over


@dataclass(frozen=True)
class LayerReport:
    """Record what `prune` did with one layer.

    Attributes:
        name: of the layer.
        shape: of its weight.
        pattern: that it follows, or "dense".
        kept: weights that stay.
        reason: why it stayed dense; empty otherwise.
        before, after: the reconstruction loss on the held-back samples, at the selector's weights and at the
            end.
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
        """The weights of the dense layer."""
        return math.prod(self.shape)


@dataclass
class Report(Record):
    """Record what `prune` did.

    Attributes:
        layers: in order of execution; layers that stayed dense with the reason.
        weights: of the whole network, biases and normalisation included.
        settings: of the run, by name.
        notes: sentences that a reader should see.
        groups: units that were taken out, group by group.
        stages: of making the network smaller, in order.
        macs: multiplications of one sample, before and after; empty where nothing was taken out.
        parameters: before and after; empty where nothing was taken out.
        counted: what a budget of bytes or weights that are not zero was of, before and after; empty for
            other goals.
        unit: of that, as text.
        seconds: wall time of the call to `prune`; where a run was resumed, of the last one.
        dense_ms, small_ms: milliseconds before and after, where a share of them was asked for; else NaN.
        predicted_bytes, peak_bytes: of memory, at most, as it was predicted and as it was: the whole process
            since it started, on a GPU what it takes there; 0 where it is not known.
    """

    rows: ClassVar[dict[str, type]] = {"layers": LayerReport, "groups": GroupReport, "stages": StageReport}
    layers: list[LayerReport] = field(default_factory=list)
    weights: int = 0
    settings: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    groups: list[GroupReport] = field(default_factory=list)
    stages: list[StageReport] = field(default_factory=list)
    macs: tuple[int, ...] = ()
    parameters: tuple[int, ...] = ()
    counted: tuple[int, ...] = ()
    unit: str = ""
    seconds: float = 0.0
    dense_ms: float = math.nan
    small_ms: float = math.nan
    predicted_bytes: int = 0
    peak_bytes: int = 0

    @property
    def zeros(self) -> int:
        """The weights that are zero now."""
        return sum(layer.size - layer.kept for layer in self.layers)

    @property
    def prunable(self) -> int:
        """The weights of the layers that pruning could take from."""
        return sum(layer.size for layer in self.layers if layer.reason in ("", SPARED))

    def table(self) -> Table:
        """Make the table of layers."""
        table = named_table(("weight", "pattern"), ("kept", "loss before", "after", "CG", "seconds"))
        for x in self.layers:
            shape = "x".join(map(str, x.shape))
            if x.reason:
                add_row(
                    table,
                    x.name,
                    shape,
                    f"dense: {x.reason}",
                    f"{100 * x.kept / x.size:.1f} %" if x.kept < x.size else "",
                )
            else:
                losses = (
                    (f"{x.before:.4g}", f"{x.after:.4g}", str(x.iterations))
                    if x.before == x.before
                    else ("", "", "")
                )
                add_row(
                    table,
                    x.name,
                    shape,
                    x.pattern,
                    f"{100 * x.kept / x.size:.1f} %",
                    *losses,
                    f"{x.seconds:.1f}",
                )
        return table

    def tables(self) -> list[Table]:
        """Make all tables: of groups and stages, if there are any, and of layers."""
        found = [group_table(self.groups)] if self.groups else []
        return [*found, *([stage_table(self.stages)] if self.stages else []), *super().tables()]

    def summary(self) -> str:
        """Say in a sentence what came of it."""
        weights = max(self.parameters[1] if self.parameters else self.weights, 1)
        prunable = max(self.prunable, 1)
        pruned = sum(layer.size - layer.kept for layer in self.layers if not layer.reason)
        smaller = ""
        if self.macs:
            smaller = ", ".join(
                f"{now / 1e6:.4g} of {before / 1e6:.4g} million {what} ({100 * now / before:.1f} %)"
                for what, (before, now) in (("MACs", self.macs), ("parameters", self.parameters))
            )
        if self.counted:
            before, now = self.counted
            part = f"{100 * now / before:.1f} %"
            smaller = f"{now / 1e6:.4g} of {before / 1e6:.4g} million {self.unit} ({part}), {smaller}"
        if self.small_ms == self.small_ms:
            share = 100 * self.small_ms / self.dense_ms
            smaller = f"{self.small_ms:.3g} of {self.dense_ms:.3g} ms ({share:.1f} %), {smaller}"
        taken = f", {self.peak_bytes / 1e9:.3g} GB of memory at most" if self.peak_bytes else ""
        if smaller and not self.zeros:
            return f"{smaller}; {self.seconds:.1f} s{taken}"
        return (f"{smaller}; " if smaller else "") + (
            f"{self.zeros} zeros: {100 * pruned / prunable:.2f} % of the {self.prunable} prunable weights, "
            f"{100 * self.zeros / weights:.2f} % of all {weights}; {self.seconds:.1f} s{taken}"
        )
