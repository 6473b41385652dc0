"""`deploy`: run a pruned network on packed layers wherever that is faster or smaller."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import nn

from snows.choosing.candidates import Winner, fastest
from snows.choosing.compiling import HOW, RUNTIMES, Runtime, there
from snows.choosing.measuring import Stopwatch
from snows.choosing.packing import nbytes
from snows.networks.batches import difference, outputs
from snows.networks.checks import autocast_off
from snows.networks.edits import Edit, Fold, Pack
from snows.networks.subject import Subject
from snows.results.deployment import Deployment
from snows.results.machine import Machine


@dataclass(frozen=True)
class Deployed:
    """Hold what `deploy` made; unpacks into network and report.

    Attributes:
        network: the copy with packed layers.
        report: what was measured and chosen, layer by layer.
        edits: that made the network, in order; `snows.save` writes them.
    """

    network: nn.Module
    report: Deployment
    edits: list[Edit]

    @property
    def runtime(self) -> str:
        """The runtime that the network was chosen for; the report says how to run it so."""
        return self.report.runtime

    def __iter__(self) -> Iterator[Any]:
        return iter((self.network, self.report))


def deploy(
    model: nn.Module,
    example: Any,
    *,
    objective: Literal["speed", "size"] = "speed",
    runtime: Runtime | Literal["fastest"] = "eager",
    dtype: torch.dtype | None = None,
    stopwatch: Stopwatch = Stopwatch(),
    progress: bool = True,
) -> Deployed:
    """Put the layers of a pruned network on packed weights.

    BatchNorm is folded into a convolution whose output goes to it alone. Then every layer with zeros is timed
    on the example, dense against packed, and the better one stays. With 8 images or a multiple of it (16 with
    AVX-512), the network is also tried with the images innermost in memory, a layout that convolutions hand
    on: there one without zeros is packed too, where moving what it reads and makes takes longer. The faster
    network stays. Whole networks are timed in the runtime that is asked for, because what is faster eagerly
    need not be under `torch.compile`. No layer is changed that the network uses in another way than by
    calling it. The result computes what the masked network computed, on any machine.

    Args:
        model: any module in evaluation mode with zeros in its weights, whoever pruned it; left as it was.
        example: one batch: a tensor, `(images, labels)` or a mapping of keyword inputs. Its shapes, device
            and layout are what the choice is made for; a few tenths of a second are spent on each layer.
        objective: "speed" keeps the faster of dense and packed; "size" packs whatever becomes smaller.
        runtime: that whole networks are raced in: "eager"; "compile", `torch.compile` with constant weights;
            "cuda-graph", on a CUDA device; or "fastest", all that this machine has. The network that comes
            back is not compiled or captured; the report says how it is.
        dtype: of the result's weights and inputs; None keeps the model's.
        stopwatch: how long layers and networks are timed.
        progress: show a progress bar.

    Returns:
        A copy with packed layers, the report and the edits; `network, report = deploy(...)` takes the first
        two.

    Raises:
        ValueError: the model is in training mode, has no zeros, holds NaN, or is packed already; cannot run
            the example, or not in that runtime.
    """
    if objective not in ("speed", "size"):
        raise ValueError(f'deploy: expected an objective of "speed" or "size", got {objective!r}')
    if runtime not in (*RUNTIMES, "fastest"):
        expected = ", ".join(f'"{x}"' for x in RUNTIMES)
        raise ValueError(f'deploy: expected a runtime of {expected} or "fastest", got {runtime!r}')
    with autocast_off(model):
        subject = Subject(model, example, dtype)
        runtimes = there(subject.given) if runtime == "fastest" else [runtime]
        winner = fastest(subject, objective, runtimes, stopwatch, progress)
        return Deployed(winner.candidate.network, _report(subject, winner), winner.candidate.edits)


def _report(subject: Subject, winner: Winner) -> Deployment:
    """Say what was measured and chosen."""
    candidate = winner.candidate
    dense_flops, sparse_flops = subject.flops({row.name for row in candidate.rows if not row.reason})
    folded = [edit.norm for edit in candidate.edits if isinstance(edit, Fold)]
    absorbed = [edit.absorbs for edit in candidate.edits if isinstance(edit, Pack) and edit.absorbs]
    found = outputs(candidate.network, subject.batch)
    return Deployment(
        layers=candidate.rows,
        **asdict(Machine.here(subject.device)),
        samples=subject.given.samples(),
        runtime=winner.runtime,
        runtimes=winner.raced,
        dense_ms=winner.model_ms,
        sparse_ms=winner.network_ms,
        dense_bytes=nbytes(subject.model),
        sparse_bytes=nbytes(candidate.network),
        dense_flops=dense_flops,
        sparse_flops=sparse_flops,
        difference=difference(subject.expected, found) if subject.expected else float("nan"),
        folded=folded + absorbed,
        notes=[*winner.notes, *filter(None, [HOW[winner.runtime]])],
    )
