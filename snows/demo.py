"""The demonstration: prune the zoo's networks, put them on packed layers, measure them, print two tables."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from safetensors.torch import save
from torch import Tensor, nn

from snows import build, heap, zoo
from snows.choosing.budgets import UNITS, Budget, Structured
from snows.choosing.costs import WORDS
from snows.choosing.cuts import Cut
from snows.choosing.measuring import Stopwatch
from snows.choosing.packing import nbytes
from snows.deployment import Deployed, deploy
from snows.judge import TOGETHER, Judge
from snows.matching.normalisation import recalibrate_statistics
from snows.networks.batches import Batch
from snows.networks.layers import copied
from snows.pruning import prune
from snows.results import files
from snows.results.deployment import Deployment
from snows.results.report import Report
from snows.results.storage import state, write
from snows.results.story import demo_page
from snows.selectors import alps, magnitude
from snows.sparsity import NM, Pattern, Unstructured

Goal = Pattern | Budget
CASES: tuple[tuple[str, Goal], ...] = (
    ("resnet20", NM(1, 4)),
    ("resnet20", Unstructured(0.9)),
    ("resnet20", Structured(0.5)),
    ("vit", NM(2, 4)),
    ("vit", Structured(0.5)),
)
JUDGED = 4_000  # test images of the 10,000: thirteen passes over them in 40 seconds on two cores
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
DEPLOYED = (
    "network",
    "pattern",
    "packed",
    "dense ms",
    "snows ms",
    "ratio",
    "dense, compiled",
    "snows, compiled",
    "MB",
    "snows MB",
    "outputs",
)
Row = dict[str, Any]


@heap.kept()
def run(
    out: Path,
    console: Console,
    judged: int = JUDGED,
    device: torch.device | None = None,
    *,
    cases: Sequence[tuple[str, Goal]] = CASES,
    batches: Sequence[Tensor] | None = None,
    stopwatch: Stopwatch = Stopwatch(),
    compiled: bool = True,
) -> list[Row]:
    """Prune each case at the default settings, next to magnitude pruning, and deploy it.

    Weights and a page are left in `out`.

    Args:
        out: the folder.
        console: where the tables go.
        judged: how many of the zoo's 10,000 test images accuracy and divergence are measured on, from the
            first on.
        device: that the networks are pruned and measured on; by default the CPU.
        cases: networks of the zoo, and a pattern or structured goal each.
        batches: calibration images; by default those of `zoo.calibration`.
        stopwatch: how long layers and networks are timed.
        compiled: time dense and smaller networks under a frozen `torch.compile` too.
    """
    out.mkdir(parents=True, exist_ok=True)
    judge = Judge(judged, device or torch.device("cpu"), stopwatch, compiled)
    batches = zoo.calibration() if batches is None else batches
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("demo", total=len(cases))
        done = []
        for name, goal in cases:
            bar.update(task, description=f"{name} {_label(goal)}")
            done.append(_case(name, goal, batches, judge, out))
            bar.advance(task)
    rows = [row for row, _, _ in done]
    pruned, deployed = _table(rows, PRUNED), _table(rows, DEPLOYED)
    console.print(pruned, deployed)
    shares = ", ".join(f"{share} {seconds:.0f} s" for share, seconds in judge.clock.items())
    console.print(
        f"{sum(map(len, batches)):,} unlabelled images; accuracy in % on the first {len(judge.labels):,} "
        "test images, of snows through the packed layers, whose outputs differ from the masked network's by "
        f"so much of the largest; milliseconds of {TOGETHER} images, eager and under a frozen "
        f"torch.compile; {shares}; weights and page in {out}",
        highlight=False,
    )
    for row in rows:
        if row["smaller"]:
            console.print(_ending(row), highlight=False, markup=False)
    if build.outcome() == "none":
        said = f"packed layers are slower than dense ones here: {build.complaint()}"
        console.print(said, highlight=False, markup=False)
    titles = [f"{row['network']} {row['pattern']}" for row in rows]
    reports = list(zip(titles, (report for _, report, _ in done), strict=True))
    tables = {"Pruned": pruned, "Deployed": deployed}
    page = demo_page(rows, reports, [found for _, _, found in done], tables, "snows demo")
    write(out / "report.html", page.encode())
    return rows


def _label(goal: Goal) -> str:
    """Name a goal in the tables."""
    if not isinstance(goal, Budget):
        return str(goal)
    assert isinstance(goal.share, float)
    return (
        f"{1 / goal.share:.3g} times as fast"
        if goal.of == "latency"
        else f"{goal.share:.0%} of {WORDS[goal.of]}"
    )


def _ending(row: Row) -> str:
    """Say in a sentence what a budget gave."""
    compiled = bool(row["snows, compiled"])
    dense, snows = (row[f"{who}, compiled" if compiled else f"{who} ms"] for who in ("dense", "snows"))
    return (
        f"{row['network']}: {dense / snows:.2f} times as fast{' under torch.compile' if compiled else ''}, "
        f"{row['dense'] - row['snows']:.2f} points lost, "
        f"{100 * row['snows MB'] / row['MB']:.0f} % of the bytes"
    )


def _case(
    name: str, goal: Goal, batches: Sequence[Tensor], judge: Judge, out: Path
) -> tuple[Row, Report, Deployment]:
    """Prune and deploy one network; return its line of both tables, and the reports."""
    dense, smaller = zoo.load(name).to(judge.device), isinstance(goal, Budget)
    if isinstance(goal, Budget) and goal.of == "latency" and not judge.compiles(name, dense):
        goal = replace(goal, runtime="eager")
    row: Row = {
        "network": name,
        "pattern": _label(goal),
        "dense": judge.dense(name, dense),
        "smaller": smaller,
    }
    began = time.perf_counter()
    with judge.timed("pruning"):
        net, report = prune(dense, batches, goal, progress=False)
    row["seconds"] = time.perf_counter() - began
    row |= _by_magnitude(name, dense, goal, batches, judge, report.macs)
    path = out / f"{name}-{_label(goal).replace(':', '-').replace(' ', '-')}.safetensors"
    files.write_network(path, net)
    runtime = goal.runtime if isinstance(goal, Budget) else "eager"
    with judge.timed("deployment"):
        deployed = deploy(net, judge.example, runtime=runtime, stopwatch=judge.stopwatch, progress=False)
    scores = judge.scores(name, deployed.network)
    row |= {"snows": scores.top1, "divergence": scores.divergence}
    row |= judge.times(name, dense, deployed, smaller)
    found = replace(  # beside the dense network, and not the one that deploy was given
        deployed.report, dense_ms=row["dense ms"], sparse_ms=row["snows ms"], dense_bytes=nbytes(dense)
    )
    return row | _deployed(deployed, dense, path), report, found


def _by_magnitude(
    name: str, dense: nn.Module, goal: Goal, batches: Sequence[Tensor], judge: Judge, macs: Sequence[int]
) -> Row:
    """Measure what magnitude pruning gives, and what its corrected statistics give.

    Of a budget that is the same share of every width, units by their magnitude, for as many multiplications.
    """
    left: dict[str, Tensor] = {}
    with judge.timed("pruning"):
        if isinstance(goal, Budget):
            goal = Structured(macs[1] / macs[0], using=UNITS, order="magnitude", uniform=True, refit=False)
        rule = alps if isinstance(goal, Structured) else magnitude  # a Structured asks for no masks
        given = prune(dense, batches, goal, select=rule, solver=None, recalibrate=False, progress=False)
        net = given.network
        if given.edits:  # as it is cut, without the intercepts that are fitted to it
            net, left = copied(dense), Cut(given.edits).left_of_norms()
            for edit in given.edits:
                edit.apply(net)
    first = second = judge.scores(name, judge.fast(net)).top1
    if any(isinstance(m, nn.BatchNorm2d) for m in net.modules()):
        with judge.timed("pruning"):
            recalibrate_statistics(net, dense, [Batch.of(x) for x in batches], left)
        second = judge.scores(name, judge.fast(net)).top1
    return {"magnitude": first, "magnitude + statistics": second}


def _deployed(deployed: Deployed, dense: nn.Module, path: Path) -> Row:
    """Write a packed network beside the pruned one, and say what it weighs."""
    report, packed = deployed.report, path.with_suffix(".packed.safetensors")
    count = sum(not x.reason for x in report.layers)
    if count:
        files.save(deployed, packed)
    return {
        "packed": f"{count} of {len(report.layers)}" if report.layers else "",
        "MB": len(save(state(dense))) / 1e6,
        "snows MB": (packed if count else path).stat().st_size / 1e6,
        "outputs": f"{report.difference:.0e}",
    }


def _table(rows: Sequence[Row], columns: tuple[str, ...]) -> Table:
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
