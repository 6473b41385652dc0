"""What `deploy` did, layer by layer."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

from rich.table import Table

from snows.results.claims import Timed
from snows.results.machine import Machine
from snows.results.report import Record
from snows.results.tables import add_row, named_table


@dataclass(frozen=True)
class DeployedLayer:
    """Record how one layer with zeros runs now.

    Attributes:
        name: of the layer.
        shape: of its weight.
        pattern: found in its zeros.
        kernel: what would run or runs it packed: "native", "cuSPARSELt", or "reference" (unpack and
            multiply); and the layout it is in.
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


@dataclass(frozen=True)
class DeployedRuntime:
    """Record the race of whole networks in one runtime.

    Attributes:
        runtime: "eager", "compile" or "cuda-graph".
        dense_ms: of the network with dense layers, its normalisations folded.
        packed_ms: of the fastest network with packed layers; NaN where none was raced.
        chosen: "dense" or "packed".
    """

    runtime: str
    dense_ms: float = float("nan")
    packed_ms: float = float("nan")
    chosen: str = ""


@dataclass
class Deployment(Record):
    """Record what `deploy` did. Times are medians on the example, sizes of all that a file would hold.

    Attributes:
        layers: those with zeros, in order of execution.
        processor, device, threads: of the `Machine` that was measured.
        samples: in the example.
        runtime: that the network was chosen for.
        runtimes: all in which networks were raced.
        dense_ms, sparse_ms: of the network as it came, and as it runs now, in that runtime.
        dense_bytes, sparse_bytes: of the two.
        dense_flops, sparse_flops: of Linear and Conv2d on the example, a multiplication and an addition being
            two; of packed layers those of the weights that are kept.
        difference: largest difference of an output from the network as it came, relative to the largest
            output; NaN where the network returns no floating-point tensor, so that nothing could be compared.
        folded: BatchNorms that are now in the convolution before them, and activations in the packed layer
            before them.
        notes: sentences that a reader should see.
    """

    rows: ClassVar[dict[str, type]] = {"layers": DeployedLayer, "runtimes": DeployedRuntime}
    layers: list[DeployedLayer] = field(default_factory=list)
    processor: str = ""
    device: str = ""
    threads: int = 0
    samples: int = 0
    runtime: str = "eager"
    runtimes: list[DeployedRuntime] = field(default_factory=list)
    dense_ms: float = float("nan")
    sparse_ms: float = float("nan")
    dense_bytes: int = 0
    sparse_bytes: int = 0
    dense_flops: int = 0
    sparse_flops: int = 0
    difference: float = float("nan")
    folded: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def machine(self) -> Machine:
        """The machine that was measured."""
        return Machine(self.processor, self.device, self.threads)

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

    def tables(self) -> list[Table]:
        """Make all tables: of layers, if there are any, and of runtimes other than eager alone."""
        eager = all(x.runtime == "eager" for x in self.runtimes)
        return [*super().tables(), *([] if eager else [self._races()])]

    def _races(self) -> Table:
        """Make the table of runtimes."""
        table = Table("runtime", pad_edge=False)
        for heading in ("dense ms", "packed ms"):
            table.add_column(heading, justify="right", no_wrap=True)
        table.add_column("chosen")
        for x in self.runtimes:
            best = ", the fastest" if len(self.runtimes) > 1 and x.runtime == self.runtime else ""
            times = (f"{ms:.2f}" if ms == ms else "" for ms in (x.dense_ms, x.packed_ms))
            add_row(table, x.runtime, *times, x.chosen + best)
        return table

    def timed(self) -> list[Timed]:
        """Return how long the network takes on this machine, if that was measured."""
        if not self.sparse_ms > 0:
            return []
        return [Timed.on(self.machine, self.sparse_ms, self.samples, self.runtime)]

    def summary(self) -> str:
        """Say in a sentence what came of it."""
        packed = sum(not x.reason for x in self.layers)
        zeros = (
            f"{packed} of {len(self.layers)} layers with zeros are packed"
            if self.layers
            else "no layer has zeros"
        )
        gained = bool(self.folded) and self.sparse_ms < GAINED * self.dense_ms
        runtime = _RUNTIMES.get(self.runtime, f", {self.runtime}")
        return (
            f"{zeros}; {self.dense_ms:.2f} ms before, "
            f"{self.sparse_ms:.2f} ms now ({_quotient(self.dense_ms, self.sparse_ms):.2f} times as fast, "
            f"{_quotient(1e3 * self.samples, self.sparse_ms):.0f} images/s; {self.samples} at a time on "
            f"{self.machine}{runtime}); {self.sparse_bytes / 1e6:.2f} of {self.dense_bytes / 1e6:.2f} MB, "
            f"{self.sparse_flops / 1e9:.3g} of {self.dense_flops / 1e9:.3g} GFLOP; "
            + (
                f"outputs differ by at most {self.difference:.1e} of the largest"
                if self.difference == self.difference
                else "nothing was compared, for the network returns no floating-point tensor"
            )
            + "; layers are timed alone, equal ones once"
            + ("; what is gained is from folded normalisations" if gained and not packed else "")
        )


GAINED = 0.98  # of the milliseconds before: what takes less has gained something
_RUNTIMES = {"eager": "", "compile": ", under torch.compile", "cuda-graph": ", in a CUDA graph"}


def _quotient(a: float, b: float) -> float:
    return a / b if b else math.nan
