"""The demonstration: prune the zoo's networks, put them on packed layers, measure them, print two tables."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from safetensors.torch import save
from torch import Tensor, nn

from snows import build, memory, zoo
from snows.choosing.measuring import Stopwatch
from snows.deployment import deploy
from snows.evaluation import Scores, evaluate, logits_of
from snows.matching.normalisation import recalibrate_statistics
from snows.networks.batches import Batch
from snows.networks.folding import fold_normalisations
from snows.networks.layers import copied
from snows.networks.trace import Trace
from snows.pruning import prune
from snows.results import files
from snows.results.page import page, plot
from snows.results.report import Deployment, Report
from snows.results.storage import state, write
from snows.selectors import magnitude
from snows.sparsity import NM, Pattern, Unstructured

CASES: tuple[tuple[str, Pattern], ...] = (
    ("resnet20", NM(2, 4)),
    ("resnet20", NM(1, 4)),
    ("resnet20", Unstructured(0.9)),
    ("vit", NM(2, 4)),
)
SAMPLES, BATCH = 1024, 128
JUDGED = 4_000  # test images of the 10,000: thirteen passes over them in 40 seconds on two cores


def calibration(samples: int = SAMPLES, batch: int = BATCH, seed: int = 0) -> list[Tensor]:
    """Batches of the zoo's calibration images, drawn by `seed`."""
    images, _ = zoo.images("calibration")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:samples]
    return list(images[order].split(batch))


@memory.kept()
def run(
    out: Path,
    console: Console,
    judged: int = JUDGED,
    device: torch.device | None = None,
    *,
    cases: Sequence[tuple[str, Pattern]] = CASES,
    batches: Sequence[Tensor] | None = None,
    stopwatch: Stopwatch = Stopwatch(),
) -> list[dict[str, object]]:
    """Prune each case at the default settings, next to magnitude pruning, and deploy it.

    Weights and a page are left in `out`.

    Args:
        out: the folder.
        console: where the tables go.
        judged: how many of the zoo's 10,000 test images accuracy and divergence are measured on, from the
            first on.
        device: that the networks are pruned and measured on; by default the CPU.
        cases: networks of the zoo, and a pattern each.
        batches: calibration images; by default those of `calibration`.
        stopwatch: how long layers and networks are timed.
    """
    out.mkdir(parents=True, exist_ok=True)
    device = device or torch.device("cpu")
    images, labels = zoo.images("test")
    assert labels is not None
    images, labels = images[:judged], labels[:judged]
    test = list(
        zip(images.split(80), labels.split(80), strict=True)
    )  # small batches stay in the cache; 16 times a whole number
    batches = calibration() if batches is None else batches
    rows: list[dict[str, object]] = []
    reports: list[tuple[str, Report]] = []
    deployments: list[tuple[str, Deployment]] = []
    references: dict[str, list[Tensor]] = {}
    clock = {"pruning": 0.0, "deployment": 0.0, "evaluation": 0.0}

    @contextmanager
    def timed(share: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        clock[share] += time.perf_counter() - began

    def fast(net: nn.Module) -> nn.Module:
        """Copy a network to compute the same a little sooner: channels last, normalisation folded."""
        net = copied(net).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        example = Batch.of(test[0]).to(device)
        fold_normalisations(net, example, Trace.of(net, example))
        return net

    def measure(net: nn.Module, name: str) -> Scores:
        with timed("evaluation"):
            return evaluate(net, test, references[name])

    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("demo", total=len(cases))
        for name, pattern in cases:
            bar.update(task, description=f"{name} {pattern}")
            dense = zoo.load(name).to(device)
            if name not in references:
                with timed("evaluation"):
                    references[name] = [logits_of(net, x) for net in (fast(dense),) for x, _ in test]
            right = torch.cat(references[name]).argmax(1).cpu() == labels
            row: dict[str, object] = {
                "network": name,
                "pattern": str(pattern),
                "dense": 100 * right.double().mean().item(),
            }
            with timed("pruning"):
                net, _ = prune(
                    dense, batches, pattern, select=magnitude, solver=None, recalibrate=False, progress=False
                )
            row["magnitude"] = row["magnitude + statistics"] = measure(fast(net), name).top1
            if any(isinstance(m, nn.BatchNorm2d) for m in net.modules()):
                with timed("pruning"):
                    recalibrate_statistics(net, dense, [Batch.of(x) for x in batches])
                row["magnitude + statistics"] = measure(fast(net), name).top1
            began = time.perf_counter()
            with timed("pruning"):
                net, report = prune(dense, batches, pattern, progress=False)
            row["seconds"] = time.perf_counter() - began
            path = out / f"{name}-{str(pattern).replace(':', '-')}.safetensors"
            write(path, save(state(net)))
            with timed("deployment"):
                packed, found = deploy(net, test[0][0].to(device), stopwatch=stopwatch, progress=False)
            packed_path = path.with_suffix(".packed.safetensors")
            count = sum(not x.reason for x in found.layers)
            if count:
                files.save(packed, packed_path)
            scores = measure(packed, name)
            row |= {
                "snows": scores.top1,
                "divergence": scores.divergence,
                "packed": f"{count} of {len(found.layers)}",
                "dense ms": found.dense_ms,
                "packed ms": found.sparse_ms,
                "ratio": found.dense_ms / found.sparse_ms,
                "MB": path.stat().st_size / 1e6,
                "packed MB": packed_path.stat().st_size / 1e6 if count else "",
                "outputs": f"{found.difference:.0e}",
            }
            rows.append(row)
            reports.append((f"{name} {pattern}", report))
            deployments.append((f"{name} {pattern}", found))
            bar.advance(task)
    pruned, deployed = table(rows, PRUNED), table(rows, DEPLOYED)
    console.print(pruned, deployed)
    console.print(
        f"{SAMPLES:,} unlabelled images; accuracy in % on the first {len(images):,} test images, of snows "
        "through the packed layers, whose outputs differ from the masked network's by so much of the "
        f"largest; times of {len(test[0][0])} images; "
        f"{', '.join(f'{share} {seconds:.0f} s' for share, seconds in clock.items())}; weights and page in "
        f"{out}",
        highlight=False,
    )
    if build.outcome() == "none":
        console.print(
            f"packed layers are slower than dense ones here: {build.complaint()}",
            highlight=False,
            markup=False,
        )
    details = []
    for title, part in [(title, r.table()) for title, r in reports] + [
        (f"{title}, deployed", d.table()) for title, d in deployments
    ]:
        part.title = title
        details.append(part)
    write(
        out / "report.html",
        page(
            "snows demo",
            [pruned, deployed, *details],
            [r.summary() for _, r in reports] + [d.summary() for _, d in deployments],
            [f"<h2>{title}</h2>{plot(r)}" for title, r in reports],
        ).encode(),
    )
    return rows


PRUNED = (
    "network",
    "pattern",
    "dense",
    "magnitude",
    "magnitude + statistics",
    "snows",
    "divergence",
    "seconds",
)
DEPLOYED = ("network", "pattern", "packed", "dense ms", "packed ms", "ratio", "MB", "packed MB", "outputs")


def table(rows: list[dict[str, object]], columns: tuple[str, ...]) -> Table:
    """Make a table of one line a case."""
    result = Table(*columns)
    for row in rows:
        cells = []
        for column in columns:
            value = row[column]
            digits = {"divergence": 5, "seconds": 1}.get(column, 2)
            cells.append(f"{value:.{digits}f}" if isinstance(value, float) else str(value))
        result.add_row(*cells)
    return result
