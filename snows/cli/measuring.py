"""`snows measure` and `snows frontier`: what a network takes here, and what it loses at many budgets."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from snows.amounts import read_bytes
from snows.cli import asking, terminal
from snows.cli.judging import judging_batches
from snows.cli.loading import example_of, load_network, say_prepared, test_data
from snows.cli.pages import claim, claim_time
from snows.cli.terminal import console, next_command, numbers, say, show_scores, warn

if TYPE_CHECKING:
    from torch import nn

    from snows.evaluation import Scores
    from snows.frontiers import Frontier
    from snows.sources.source import Source

SAMPLES = 256  # calibration images of a frontier, unless another number is asked for


def measure(
    model: terminal.Model,
    out: Annotated[Path, typer.Option(help="JSON for --latency of snows prune, here or elsewhere")],
    data: Annotated[
        str | None, typer.Option(help="where pictures come from, as for prune; by default they are noise")
    ] = None,
    runtime: asking.Runtime = "eager",
    at_a_time: Annotated[int, typer.Option("--at-a-time", min=1, help="images at a time")] = 8,
    weights: terminal.Weights = None,
    random_weights: terminal.RandomWeights = False,
    device: terminal.Device = "auto",
    crop: terminal.Crop = None,
    resize: terminal.Resize = None,
    mean: terminal.Mean = None,
    std: terminal.Std = None,
) -> None:
    """Measure what a network and its layers take here, for budgets in milliseconds on any machine."""
    import snows

    place = terminal.device_of(device)
    if out.is_dir():
        raise ValueError(f"--out: expected a file, got the folder {out}; name a file in it")
    _make(out.parent)
    network = load_network(model, weights, random_weights)
    preparation = network.preparation.override(crop, resize, numbers(mean, "mean"), numbers(std, "std"))
    example = example_of(model, data, network, preparation, at_a_time).to(place)
    with _stopped():
        table = snows.measure(network.model.to(place), example, runtime=runtime, images=at_a_time)
    table.save(out)
    say(
        f"{table.whole:.4g} ms for {table.images} images at a time, {table.runtime}, on {table.machine}; "
        f"{len(table.times.found)} kinds of layer are in {out}"
    )
    if table.warning:
        warn(table.warning)
    same = [] if runtime == "eager" else ["--runtime", runtime]
    goal = ["--budget", "50%", "--of", "latency", *same, "--latency", out]
    next_command("snows", "prune", "--model", model, *goal, "...")


def frontier(
    model: terminal.Model,
    data: terminal.Data,
    out: Annotated[Path, typer.Option(help="folder for frontier.json, its page, and points that are pruned")],
    budgets: Annotated[
        str, typer.Option(help="shares that stay, with commas between")
    ] = "90%,85%,80%,75%,70%,65%,60%,55%,50%,45%,40%,35%",
    prune: Annotated[
        int, typer.Option("--prune", min=0, help="points that are really pruned and judged, evenly spread")
    ] = 3,
    of: asking.Of = "latency",
    runtime: asking.Runtime = "eager",
    at_a_time: asking.AtATime = None,
    latency: asking.Latency = None,
    using: asking.Using = None,
    order: asking.Ordering = "compensated",
    multiple: asking.Multiple = 8,
    weights: terminal.Weights = None,
    random_weights: terminal.RandomWeights = False,
    samples: Annotated[int, typer.Option(min=1, help="calibration images")] = SAMPLES,
    batch_size: Annotated[int, typer.Option(min=1, help="images a batch")] = 128,
    judge: Annotated[
        int, typer.Option(min=0, help="test images that pruned points are judged on; 0 for none")
    ] = 1000,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="go on with the frontier in --out: its points stand, pruning ends"),
    ] = False,
    memory: Annotated[
        str | None, typer.Option(help='"8GB": what activations may take between layers, as for prune')
    ] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    device: terminal.Device = "auto",
    crop: terminal.Crop = None,
    resize: terminal.Resize = None,
    mean: terminal.Mean = None,
    std: terminal.Std = None,
) -> None:
    """Predict what a network loses at many budgets, and prune a few of them."""
    read_bytes(memory, "--memory")  # before torch is loaded, which takes seconds
    file = out / "frontier.json"
    if file.exists() and not resume:
        raise ValueError(f"--out: {file} is there; add --resume to go on with it, or name another folder")

    import snows
    from snows import evaluation, heap, sources
    from snows.frontiers import Frontier
    from snows.results.storage import write
    from snows.sources.source import Source
    from snows.verification import judgement

    place = terminal.device_of(device)
    shares = [asking.share(x.strip(), "budgets") for x in budgets.split(",") if x.strip()]
    goal = asking.Options(of, using, order, multiple, runtime, at_a_time, latency).budget("50%")
    network = load_network(model, weights, random_weights)
    preparation = network.preparation.override(crop, resize, numbers(mean, "mean"), numbers(std, "std"))
    images = sources.load_data(data, network, "calibration", preparation=preparation)
    count = min(samples, images.available(samples, seed))
    batches = images.draw(count, batch_size, seed)
    say_prepared(images)
    net = network.model.to(place)
    _make(out)
    with heap.kept():
        if file.exists():
            found = Frontier.read(file)
            found.check(net)
        else:
            with _stopped():
                found = snows.frontier(net, batches, goal, shares, memory=memory, seed=seed)
        found.save(file)
        write(out / "frontier.html", found.page().encode())
        console.print(found.table())
        for note in found.notes:
            warn(note)
        say("The predicted loss is before anything is fitted, and compares points with each other alone.")
        if prune:
            test = test_data(data, network, preparation, None, None) if judge else None
            source = Source(
                model,
                data,
                weights=str(weights) if weights else None,
                random_weights=random_weights,
                crop=crop,
                resize=resize,
                mean=numbers(mean, "mean"),
                std=numbers(std, "std"),
            )

            try:
                rows = _prune(found, prune, net, batches, source, out, place.type, memory)
            except KeyboardInterrupt:
                warn(f"stopped; the frontier is in {file}. Add --resume to the same command to go on.")
                raise typer.Exit(130) from None
            if test is not None:
                used = images.drawn(count, seed) if test.origin == images.origin else None
                scores: dict[str, Scores] = {}
                for i, pruned in rows:
                    seen = evaluation.Seen(judging_batches(test, used, judge, batch_size))
                    scores["dense"], own = evaluation.compare(net, pruned, seen)
                    scores[f"point {i}"] = own
                    judged = replace(judgement(test.origin, seen, scores["dense"], own), asked=judge)
                    claim(out / f"point-{i}", replace(judged, data=data, samples=len(used or ()), seed=seed))
                show_scores(list(scores.items()))
                if used is not None:
                    but = ", but not of these images" if len(test) > len(used) > 0 else ""
                    say(f"judged on the same data as the calibration images, which has no test split{but}")
    say(f"the frontier is in {file}, and its page beside it")
    same = ["--model", model, "--data", data, "--samples", count, "--batch-size", batch_size]
    next_command("snows", "prune", *same, "--frontier", file, "--point", "NUMBER", "--out", "FOLDER")


@contextmanager
def _stopped() -> Iterator[None]:
    """Say that nothing is kept of what is stopped."""
    try:
        yield
    except KeyboardInterrupt:
        warn("stopped before there was anything to keep")
        raise typer.Exit(130) from None


def _make(folder: Path) -> None:
    """Make a folder if there is none, before anything is measured.

    Raises:
        ValueError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out: {folder} cannot be made ({error.strerror})") from error


def _prune(
    found: Frontier,
    count: int,
    net: nn.Module,
    batches: list[Any],
    source: Source,
    out: Path,
    device: str,
    memory: str | None,
) -> list[tuple[int, nn.Module]]:
    """Prune a few points, each into a folder of its own; return their numbers and networks."""
    import snows
    from snows.results.tables import add_row

    last, timed = len(found.points) - 1, found.goal.of == "latency"
    places = [i / (count - 1) for i in range(count)] if count > 1 else [0.5]
    table, pruned = Table(pad_edge=False), list[tuple[int, "nn.Module"]]()
    for heading in ("point", "stays", *(("ms before", "ms") if timed else ()), "predicted loss", "folder"):
        table.add_column(heading, justify="right", no_wrap=True)
    for i in sorted({round(x * last) for x in places}):
        folder, point, goal = out / f"point-{i}", found.points[i], found.budget(i)
        resume = (folder / "run.json").exists()
        network, report = snows.prune(net, batches, goal, memory=memory, out=folder, resume=resume)
        source.save(folder)
        if not resume:  # a run that goes on may have been timed on another machine
            claim_time(folder, report, goal, batches[0], device)
        pruned.append((i, network))
        times = [f"{x:.4g}" if x == x else "" for x in (report.dense_ms, report.small_ms)] if timed else []
        add_row(table, str(i), f"{point.share:.1%}", *times, f"{point.loss:.3g}", str(folder))
    console.print(table)
    return pruned
