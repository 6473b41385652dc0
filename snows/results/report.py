"""What the verbs did, layer by layer: reports that print as a table and are kept as JSON."""

from __future__ import annotations

import abc
import math
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, TypeVar

from rich.table import Table

from snows.results.records import read, to_json
from snows.results.tables import add_row, named_table, render

Own = TypeVar("Own", bound="Record")


class Record(abc.ABC):
    """Print what a verb did, layer by layer, and keep it as JSON; `Report` and `Deployment` are its kinds.

    Attributes:
        notes: sentences that a reader should see.
        row: the class of a layer's line.
    """

    notes: list[str]
    row: ClassVar[type]

    @abc.abstractmethod
    def table(self) -> Table:
        """Make the table of layers."""

    @abc.abstractmethod
    def summary(self) -> str:
        """Say in a sentence what came of it."""

    def __str__(self) -> str:
        return "\n".join([render(self.table(), width=160), self.summary(), *self.notes])

    def to_json(self) -> str:
        """Write the report as JSON."""
        return to_json(asdict(self))  # type: ignore[call-overload]  # each kind is a dataclass

    @classmethod
    def from_json(cls: type[Own], text: str) -> Own:
        """Read what `to_json` wrote.

        Raises:
            ValueError: it is no JSON, or its entries are not a report's.
        """
        return read(cls, cls.row, text)


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
    """

    row: ClassVar[type] = LayerReport
    layers: list[LayerReport] = field(default_factory=list)
    weights: int = 0
    settings: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def zeros(self) -> int:
        """The weights that are zero now."""
        return sum(layer.size - layer.kept for layer in self.layers)

    @property
    def prunable(self) -> int:
        """The weights of the layers that pruning could take from."""
        return sum(layer.size for layer in self.layers if layer.reason in ("", SPARED))

    @property
    def seconds(self) -> float:
        """The wall time of all layers."""
        return sum(layer.seconds for layer in self.layers)

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

    def summary(self) -> str:
        """Say in a sentence what came of it."""
        prunable, weights = max(self.prunable, 1), max(self.weights, 1)
        pruned = sum(layer.size - layer.kept for layer in self.layers if not layer.reason)
        return (
            f"{self.zeros} zeros: {100 * pruned / prunable:.2f} % of the {self.prunable} prunable weights, "
            f"{100 * self.zeros / weights:.2f} % of all {self.weights}; {self.seconds:.1f} s"
        )


@dataclass(frozen=True)
class DeployedLayer:
    """Record how one layer with zeros runs now.

    Attributes:
        name: of the layer.
        shape: of its weight.
        pattern: found in its zeros.
        kernel: what would run or runs it packed: "native", or "reference" (unpack and multiply); and the
            layout it is in.
        dense_ms, sparse_ms: median time of all its calls on the example, with the activation that both
            compute.
        dense_bytes, sparse_bytes: of weight and bias.
        reason: why it stayed dense; empty if it is packed.
    """

    name: str
    shape: tuple[int, ...]
    pattern: str = ""
    kernel: str = ""
    dense_ms: float = float("nan")
    sparse_ms: float = float("nan")
    dense_bytes: int = 0
    sparse_bytes: int = 0
    reason: str = ""


@dataclass
class Deployment(Record):
    """Record what `deploy` did. Times are medians on the example, sizes of all that a file would hold.

    Attributes:
        layers: those with zeros, in order of execution.
        device: that was measured, with its threads.
        samples: in the example.
        dense_ms, sparse_ms: of the network as it came, and as it runs now.
        dense_bytes, sparse_bytes: of the two.
        dense_flops, sparse_flops: of Linear and Conv2d on the example, a multiplication and an addition being
            two.
        difference: largest difference of an output from the network as it came, relative to the largest
            output; NaN where the network returns no floating-point tensor, so that nothing could be compared.
        folded: BatchNorms that are now in the convolution before them, and activations in the packed layer
            before them.
        notes: sentences that a reader should see.
    """

    row: ClassVar[type] = DeployedLayer
    layers: list[DeployedLayer] = field(default_factory=list)
    device: str = ""
    samples: int = 0
    dense_ms: float = float("nan")
    sparse_ms: float = float("nan")
    dense_bytes: int = 0
    sparse_bytes: int = 0
    dense_flops: int = 0
    sparse_flops: int = 0
    difference: float = float("nan")
    folded: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def table(self) -> Table:
        """Make the table of layers."""
        table = named_table(("weight", "pattern", "kernel"), ("dense ms", "sparse ms", "ratio", "bytes"))
        table.add_column("", overflow="fold")
        for x in self.layers:
            known = x.sparse_ms == x.sparse_ms
            add_row(
                table,
                x.name,
                "x".join(map(str, x.shape)),
                x.pattern,
                "dense" if x.reason else x.kernel,
                *(
                    (f"{x.dense_ms:.3f}", f"{x.sparse_ms:.3f}", f"{_quotient(x.dense_ms, x.sparse_ms):.2f}")
                    if known
                    else ("", "", "")
                ),
                f"{_quotient(100 * x.sparse_bytes, x.dense_bytes):.0f} %" if x.sparse_bytes else "",
                x.reason,
            )
        return table

    def summary(self) -> str:
        """Say in a sentence what came of it."""
        packed = sum(not x.reason for x in self.layers)
        return (
            f"{packed} of {len(self.layers)} layers with zeros are packed; {self.dense_ms:.2f} ms dense, "
            f"{self.sparse_ms:.2f} ms now ({_quotient(self.dense_ms, self.sparse_ms):.2f} times as fast, "
            f"{_quotient(1e3 * self.samples, self.sparse_ms):.0f} images/s; {self.samples} at a time on "
            f"{self.device}); {self.sparse_bytes / 1e6:.2f} of {self.dense_bytes / 1e6:.2f} MB, "
            f"{self.sparse_flops / 1e9:.3g} of {self.dense_flops / 1e9:.3g} GFLOP; "
            + (
                f"outputs differ by at most {self.difference:.1e} of the largest"
                if self.difference == self.difference
                else "nothing was compared, for the network returns no floating-point tensor"
            )
            + "; layers are timed alone, equal ones once"
            + ("; what is gained is from folded normalisations" if not packed and self.folded else "")
        )


def _quotient(a: float, b: float) -> float:
    return a / b if b else math.nan
