"""The demonstration: prune the zoo's networks, measure them, print one table."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from safetensors.torch import save
from torch import Tensor, nn

from snows import zoo
from snows.evaluation import Scores, evaluate, logits_of
from snows.network import as_inputs
from snows.pruning import prune, recalibrate_statistics
from snows.report import Report, page, plot
from snows.run import state, write
from snows.selectors import magnitude
from snows.sparsity import NM, Pattern, Unstructured

CASES: tuple[tuple[str, Pattern], ...] = (
    ("resnet20", NM(2, 4)), ("resnet20", NM(1, 4)), ("resnet20", Unstructured(0.9)), ("vit", NM(2, 4)),
)
SAMPLES, BATCH = 1024, 128


def calibration(samples: int = SAMPLES, batch: int = BATCH, seed: int = 0) -> list[Tensor]:
    """Batches of the zoo's calibration images, drawn by `seed`."""
    images, _ = zoo.images("calibration")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:samples]
    return list(images[order].split(batch))


def run(out: Path, console: Console) -> list[dict[str, object]]:
    """Prune each case at the default settings, next to magnitude pruning, and leave weights and a page in `out`."""
    out.mkdir(parents=True, exist_ok=True)
    images, labels = zoo.images("test")
    assert labels is not None
    test = list(zip(images.split(100), labels.split(100), strict=True))  # small batches stay in the cache
    batches = calibration()
    rows: list[dict[str, object]] = []
    reports: list[tuple[str, Report]] = []
    references: dict[str, list[Tensor]] = {}
    clock = {"pruning": 0.0, "evaluation": 0.0}

    @contextmanager
    def timed(share: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        clock[share] += time.perf_counter() - began

    def measure(net: nn.Module, name: str) -> Scores:
        with timed("evaluation"):
            return evaluate(net.to(memory_format=torch.channels_last), test, references[name])  # type: ignore[call-overload]

    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("demo", total=len(CASES))
        for name, pattern in CASES:
            bar.update(task, description=f"{name} {pattern}")
            dense = zoo.load(name).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            if name not in references:
                with timed("evaluation"):
                    references[name] = [logits_of(dense, x) for x, _ in test]
            right = torch.cat(references[name]).argmax(1) == labels
            row: dict[str, object] = {"network": name, "pattern": str(pattern), "dense": 100 * right.double().mean().item()}
            with timed("pruning"):
                net, _ = prune(dense, batches, pattern, select=magnitude, solver=None, recalibrate=False, progress=False)
            row["magnitude"] = row["magnitude + statistics"] = measure(net, name).top1
            if any(isinstance(m, nn.BatchNorm2d) for m in net.modules()):
                with timed("pruning"):
                    recalibrate_statistics(net, dense, [as_inputs(x) for x in batches])
                row["magnitude + statistics"] = measure(net, name).top1
            began = time.perf_counter()
            with timed("pruning"):
                net, report = prune(dense, batches, pattern, progress=False)
            row["seconds"] = time.perf_counter() - began
            scores = measure(net, name)
            row |= {"snows": scores.top1, "divergence": scores.divergence}
            rows.append(row)
            reports.append((f"{name} {pattern}", report))
            write(out / f"{name}-{str(pattern).replace(':', '-')}.safetensors", save(state(net)))
            bar.advance(task)
    result = table(rows)
    console.print(result)
    console.print(f"{SAMPLES} unlabelled images; accuracy in % on {len(images)} test images; pruning {clock['pruning']:.0f} s, "
                  f"evaluation {clock['evaluation']:.0f} s; weights and page in {out}", highlight=False)
    details = []
    for title, report in reports:
        part = report.table()
        part.title = title
        details.append(part)
    write(out / "report.html", page("snows demo", [result, *details], [r.summary() for _, r in reports],
                                    [f"<h2>{title}</h2>{plot(r)}" for title, r in reports]).encode())
    return rows


def table(rows: list[dict[str, object]]) -> Table:
    """Network, pattern, accuracies, divergence, seconds."""
    columns = ("network", "pattern", "dense", "magnitude", "magnitude + statistics", "snows", "divergence", "seconds")
    result = Table(*columns)
    for row in rows:
        cells = []
        for column in columns:
            value = row[column]
            digits = {"divergence": 5, "seconds": 1}.get(column, 2)
            cells.append(f"{value:.{digits}f}" if isinstance(value, float) else str(value))
        result.add_row(*cells)
    return result
