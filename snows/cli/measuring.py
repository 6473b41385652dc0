"""`snows measure` and `snows frontier`: what a network takes here, and what it loses at many budgets."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from snows.cli import asking, terminal
from snows.cli.judging import judging_batches
from snows.cli.loading import example_of, load_network, say_prepared, test_data
from snows.cli.terminal import console, next_command, numbers, say, show_scores, warn

if TYPE_CHECKING:
    from collections.abc import Callable

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
    table = snows.measure(network.model.to(place), example, runtime=runtime, images=at_a_time)
    table.save(out)
    say(
        f"{table.whole:.4g} ms for {table.images} images at a time, {table.runtime}, on {table.machine}; "
        f"{len(table.times.found)} kinds of layer are in {out}"
    )
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
    batch_size: Annotated[int, typer.Option(min=1, help="images a batch")] = 64,
    judge: Annotated[int, typer.Option(min=1, help="test images that pruned points are judged on")] = 1000,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="go on with the frontier in --out: its points stand, pruning ends"),
    ] = False,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    device: terminal.Device = "auto",
    crop: terminal.Crop = None,
    resize: terminal.Resize = None,
    mean: terminal.Mean = None,
    std: terminal.Std = None,
) -> None:
    """Predict what a network loses at many budgets, and prune a few of them."""
    import snows
    from snows import evaluation, memory, sources
    from snows.frontiers import Frontier
    from snows.results.storage import write
    from snows.sources.source import Source

    place = terminal.device_of(device)
    shares = [asking.share(x.strip(), "budgets") for x in budgets.split(",") if x.strip()]
    goal = asking.Options(of, using, order, multiple, runtime, at_a_time, latency).budget("50%")
    file = out / "frontier.json"
    if file.exists() and not resume:
        raise ValueError(f"--out: {file} is there; add --resume to go on with it, or name another folder")
    network = load_network(model, weights, random_weights)
    preparation = network.preparation.override(crop, resize, numbers(mean, "mean"), numbers(std, "std"))
    images = sources.load_data(data, network, "calibration", preparation=preparation)
    count = min(samples, images.available(samples, seed))
    batches = images.draw(count, batch_size, seed)
    say_prepared(images)
    net = network.model.to(place)
    _make(out)
    with memory.kept():
        if file.exists():
            found = Frontier.read(file)
            found.check(net)
        else:
            found = snows.frontier(net, batches, goal, shares, seed=seed)
        found.save(file)
        write(out / "frontier.html", found.page().encode())
        console.print(found.table())
        for note in found.notes:
            warn(note)
        test = test_data(data, network, preparation, None, None) if prune else None
        if test is not None:
            used = images.drawn(count, seed) if test.origin == images.origin else None
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

            def judging(pruned: nn.Module) -> tuple[Scores, Scores]:
                return evaluation.compare(net, pruned, judging_batches(test, used, judge, batch_size))

            try:
                _prune(found, prune, net, batches, source, out, judging)
            except KeyboardInterrupt:
                warn(f"stopped; the frontier is in {file}. Add --resume to the same command to go on.")
                raise typer.Exit(130) from None
            if used is not None:
                but = ", but not of these images" if len(test) > len(used) > 0 else ""
                say(f"judged on the same data as the calibration images, which has no test split{but}")
    say(f"the frontier is in {file}, and its page beside it")
    next_command("snows", "prune", "--frontier", file, "--point", "NUMBER", "...")


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
    judging: Callable[[nn.Module], tuple[Scores, Scores]],
) -> None:
    """Prune a few points, each into a folder of its own, and judge them next to the dense network."""
    import snows
    from snows.results.tables import add_row

    last = len(found.points) - 1
    chosen = sorted({round(i * last / max(count - 1, 1)) for i in range(min(count, last + 1))})
    table = Table(pad_edge=False)
    rows: dict[str, Scores] = {}
    for heading in ("point", "stays", "ms before", "ms", "predicted loss", "folder"):
        table.add_column(heading, justify="right", no_wrap=True)
    for i in chosen:
        folder, point = out / f"point-{i}", found.points[i]
        resume = (folder / "run.json").exists()
        pruned = snows.prune(net, batches, found.budget(i), out=folder, resume=resume)
        source.save(folder)
        rows["dense"], rows[f"point {i}"] = judging(pruned.network)
        report = pruned.report
        times = [f"{x:.4g}" if x == x else "" for x in (report.dense_ms, report.small_ms)]
        add_row(table, str(i), f"{point.share:.1%}", *times, f"{point.loss:.3g}", str(folder))
    console.print(table)
    show_scores(list(rows.items()))
