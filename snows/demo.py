"""The demonstration: prune the zoo's networks, put them on packed layers, measure them, print two tables."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from safetensors.torch import save
from torch import Tensor, nn

from snows import build, memory, zoo
from snows.choosing.budgets import UNITS, Structured
from snows.choosing.compiling import frozen
from snows.choosing.cuts import Cut
from snows.choosing.measuring import Stopwatch
from snows.choosing.packing import nbytes
from snows.deployment import Deployed, deploy
from snows.evaluation import Scores, evaluate, logits_of
from snows.matching.normalisation import recalibrate_statistics
from snows.networks.batches import Batch
from snows.networks.folding import fold_normalisations
from snows.networks.layers import copied
from snows.networks.trace import Trace
from snows.pruning import prune
from snows.results import files
from snows.results.deployment import Deployment
from snows.results.report import Report
from snows.results.storage import state, write
from snows.results.story import demo_page
from snows.selectors import magnitude
from snows.sparsity import NM, Pattern, Unstructured

Goal = Pattern | Structured
CASES: tuple[tuple[str, Goal], ...] = (
    ("resnet20", NM(1, 4)),
    ("resnet20", Unstructured(0.9)),
    ("resnet20", Structured(0.5)),
    ("vit", NM(2, 4)),
    ("vit", Structured(0.5)),
)
JUDGED = 4_000  # test images of the 10,000: thirteen passes over them in 40 seconds on two cores
TOGETHER = 80  # images at a time: they stay in the cache, and are 16 times a whole number
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


@memory.kept()
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
    judge = _Judge(judged, device or torch.device("cpu"), stopwatch, compiled)
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
    if build.outcome() == "none":
        said = f"packed layers are slower than dense ones here: {build.complaint()}"
        console.print(said, highlight=False, markup=False)
    titles = [f"{row['network']} {row['pattern']}" for row in rows]
    reports = list(zip(titles, (report for _, report, _ in done), strict=True))
    tables = {"Pruned": pruned, "Deployed": deployed}
    page = demo_page(rows, reports, [found for _, _, found in done], tables, "snows demo")
    write(out / "report.html", page.encode())
    return rows


@dataclass
class _Judge:
    """Measure networks of the zoo on test images, and count where the time goes.

    Args:
        count: of test images.
        device: that networks run on.
        stopwatch: how long networks are timed.
        compiled: compile networks too.
    """

    count: int
    device: torch.device
    stopwatch: Stopwatch
    compiled: bool
    clock: dict[str, float] = field(
        default_factory=lambda: {"pruning": 0.0, "deployment": 0.0, "evaluation": 0.0}
    )

    def __post_init__(self) -> None:
        images, labels = zoo.images("test")
        assert labels is not None
        images, self.labels = images[: self.count], labels[: self.count]
        self.test = list(zip(images.split(TOGETHER), self.labels.split(TOGETHER), strict=True))
        self.references: dict[str, list[Tensor]] = {}
        self.frozen: dict[str, nn.Module | None] = {}

    @property
    def example(self) -> Tensor:
        """The first test images, on the device."""
        images: Tensor = self.test[0][0].to(self.device)
        return images

    @contextmanager
    def timed(self, share: str) -> Iterator[None]:
        """Count the time of what is done inside."""
        began = time.perf_counter()
        yield
        self.clock[share] += time.perf_counter() - began

    def fast(self, net: nn.Module) -> nn.Module:
        """Copy a network to compute the same a little sooner: channels last, normalisation folded."""
        net = copied(net).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        example = Batch.of(self.example)
        fold_normalisations(net, example, Trace.of(net, example))
        return net

    def dense(self, name: str, net: nn.Module) -> float:
        """Measure the dense network, once; return its accuracy in percent."""
        if name not in self.references:
            with self.timed("evaluation"):
                quick = self.fast(net)
                self.references[name] = [logits_of(quick, x) for x, _ in self.test]
        found = torch.cat(self.references[name]).argmax(1).cpu()
        return 100 * (found == self.labels).double().mean().item()

    def scores(self, name: str, net: nn.Module) -> Scores:
        """Measure a network next to the dense one."""
        with self.timed("evaluation"):
            return evaluate(net, self.test, self.references[name])

    def times(self, name: str, dense: nn.Module, deployed: Deployed, smaller: bool) -> Row:
        """Time a network beside the dense one in turns, a smaller one compiled too."""
        with self.timed("deployment"):
            if name not in self.frozen:
                self.frozen[name] = frozen(dense, self.example) if self.compiled else None
            compiled = frozen(deployed.network, self.example) if self.compiled and smaller else None
            networks = {
                "dense ms": dense,
                "snows ms": deployed.network,
                "dense, compiled": self.frozen[name],
                "snows, compiled": compiled,
            }
            runs = {key: partial(_run, net, self.example) for key, net in networks.items() if net is not None}
            found = dict(zip(runs, self.stopwatch.network(list(runs.values())).medians, strict=True))
        row: Row = {key: found.get(key, "") for key in networks}
        return row | {"ratio": found["dense ms"] / found["snows ms"]}


def _run(net: nn.Module, example: Tensor) -> object:
    with torch.no_grad():
        return net(example)


def _label(goal: Goal) -> str:
    """Name a goal in the tables."""
    return f"{goal.share:.0%} of MACs" if isinstance(goal, Structured) else str(goal)


def _case(
    name: str, goal: Goal, batches: Sequence[Tensor], judge: _Judge, out: Path
) -> tuple[Row, Report, Deployment]:
    """Prune and deploy one network; return its line of both tables, and the reports."""
    dense = zoo.load(name).to(judge.device)
    row: Row = {"network": name, "pattern": _label(goal), "dense": judge.dense(name, dense)}
    row |= _by_magnitude(name, dense, goal, batches, judge)
    began = time.perf_counter()
    with judge.timed("pruning"):
        net, report = prune(dense, batches, goal, progress=False)
    row["seconds"] = time.perf_counter() - began
    path = out / f"{name}-{_label(goal).replace(':', '-').replace(' ', '-')}.safetensors"
    write(path, files.encoded(net))
    with judge.timed("deployment"):
        deployed = deploy(net, judge.example, stopwatch=judge.stopwatch, progress=False)
    scores = judge.scores(name, deployed.network)
    row |= {"snows": scores.top1, "divergence": scores.divergence}
    row |= judge.times(name, dense, deployed, isinstance(goal, Structured))
    found = replace(  # beside the dense network, and not the one that deploy was given
        deployed.report, dense_ms=row["dense ms"], sparse_ms=row["snows ms"], dense_bytes=nbytes(dense)
    )
    return row | _deployed(deployed, dense, path), report, found


def _by_magnitude(name: str, dense: nn.Module, goal: Goal, batches: Sequence[Tensor], judge: _Judge) -> Row:
    """Measure what magnitude pruning gives, and what its corrected statistics give.

    Of a smaller network that is the same share of every width, units by their magnitude.
    """
    left: dict[str, Tensor] = {}
    with judge.timed("pruning"):
        if isinstance(goal, Structured):
            goal = replace(goal, using=UNITS, order="magnitude", uniform=True, refit=False)
        given = prune(dense, batches, goal, select=magnitude, solver=None, recalibrate=False, progress=False)
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
