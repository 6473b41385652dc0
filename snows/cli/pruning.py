"""`snows prune`: from a network and pictures, by name, to a pruned network."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from snows.amounts import check_seconds, read_bytes
from snows.cli import asking, terminal
from snows.cli.judging import compared, judge_networks
from snows.cli.loading import load_network, say_prepared, test_data
from snows.cli.pages import claim, claim_time, keep_scores, write_page
from snows.cli.processes import RANK, joined
from snows.cli.terminal import next_command, numbers, say, show, warn

if TYPE_CHECKING:
    from torch import Tensor


SAMPLES = 1024  # calibration images, unless another number is asked for
Rule = Literal[
    "alps",
    "magnitude",
    "wanda",
    "sparsegpt",
    "least-squares",
    "least-squares:sparsegpt",
    "least-squares:wanda",
]


def prune(
    model: terminal.Model,
    data: terminal.Data,
    out: Annotated[
        Path,
        typer.Option(
            help="folder for the pruned weights, masks and report; finished layers are saved at once"
        ),
    ],
    pattern: Annotated[
        str | None, typer.Option(help='"2:4" keeps two of four, "0.7" or "70%" removes that share')
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            help='"50%" of --of, "12ms" or "5MB": what stays, by units, ranks and zeros, whatever loses least'
        ),
    ] = None,
    structured: Annotated[
        str | None,
        typer.Option(help='"50%": as --budget, but no zeros; --pattern comes after, for all layers'),
    ] = None,
    frontier: Annotated[
        Path | None, typer.Option(help="a file of snows frontier, of which --point is taken up")
    ] = None,
    point: Annotated[int | None, typer.Option(min=0, help="of --frontier")] = None,
    of: asking.Of = None,
    runtime: asking.Runtime = "eager",
    at_a_time: asking.AtATime = None,
    latency: asking.Latency = None,
    using: asking.Using = None,
    order: asking.Ordering = "compensated",
    multiple: asking.Multiple = 8,
    only: Annotated[str | None, typer.Option(help='layers by name, such as "blocks.*", with commas')] = None,
    skip: Annotated[
        str | None, typer.Option(help="layers to leave alone (--budget, --structured: whose outputs stay)")
    ] = None,
    weights: terminal.Weights = None,
    random_weights: terminal.RandomWeights = False,
    select: Annotated[Rule, typer.Option(help="how each layer's mask and first weights are found")] = "alps",
    masks: Annotated[
        Path | None, typer.Option(help="safetensors of boolean masks by layer, instead of --select")
    ] = None,
    horizon: Annotated[str, typer.Option(help='operations matched after each layer, or "end"')] = "3",
    samples: Annotated[
        int | None,
        typer.Option(min=1, help="calibration images; by default 1,024, or all where there are fewer"),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="images a batch")] = 128,
    targets: Annotated[
        Literal["dense", "local"],
        typer.Option(help="features from the dense network's inputs, or from the pruned one's"),
    ] = "dense",
    metric: Annotated[
        Literal["output", "variance", "none"], typer.Option(help="how a mismatch of features is measured")
    ] = "output",
    passes: Annotated[int, typer.Option(min=1, help="over the calibration images, at most")] = 1,
    iterations: Annotated[int, typer.Option(min=1, help="conjugate-gradient iterations a step, at most")] = 5,
    precision: Annotated[
        Literal["float32", "tf32"],
        typer.Option(help="of the products of conjugate gradients on a CUDA device"),
    ] = "float32",
    cap: Annotated[float, typer.Option(help="largest share a layer may lose under a sparsity budget")] = 0.95,
    recalibrate: Annotated[bool, typer.Option(help="re-estimate BatchNorm statistics")] = True,
    minutes: Annotated[
        float | None, typer.Option(help="limit for pruning; the settings are then what is done at most")
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(help='"8GB": what activations may take between layers; others lie in a file in --out'),
    ] = None,
    judge: Annotated[
        int,
        typer.Option(
            min=0, help="test images that the result is compared with the dense network on; 0 for none"
        ),
    ] = 1000,
    resume: Annotated[bool, typer.Option("--resume", help="go on with the run in --out")] = False,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    device: terminal.Device = "auto",
    classes: terminal.Classes = None,
    labels: terminal.Labels = None,
    crop: terminal.Crop = None,
    resize: terminal.Resize = None,
    mean: terminal.Mean = None,
    std: terminal.Std = None,
) -> None:
    """Prune a trained network in one shot."""
    read_bytes(memory, "--memory")  # before torch is loaded, which takes seconds
    check_seconds(minutes, "--minutes: expected minutes")
    if not (horizon == "end" or (horizon.isascii() and horizon.isdigit())):
        raise ValueError(f'--horizon: expected a number or "end", got {horizon!r}')
    if RANK == 0 and (out / "run.json").exists() and not resume:
        raise ValueError(
            f"--out: {out} already holds a run; add --resume to go on with it, or name another folder"
        )

    import snows
    from snows import sources
    from snows.frontiers import Frontier
    from snows.heap import kept
    from snows.sources.source import Source
    from snows.together import alone

    options = asking.Options(of, using, order, multiple, runtime, at_a_time, latency)
    chosen = asking.goal(pattern, structured, budget, frontier, point, masks is not None, options)
    solver = snows.Newton(max_iterations=iterations, passes=passes, precision=precision)
    place = terminal.device_of(device)
    files = {"weights": weights, "classes": classes, "labels": labels}
    source = Source(
        model,
        data,
        **{name: str(path) if path else None for name, path in files.items()},
        random_weights=random_weights,
        crop=crop,
        resize=resize,
        mean=numbers(mean, "mean"),
        std=numbers(std, "std"),
    )
    network = load_network(model, weights, random_weights)
    if frontier is not None:
        Frontier.read(frontier).check(network.model)
    preparation = network.preparation.override(*source.settings())
    images = sources.load_data(data, network, "calibration", preparation=preparation)
    count = samples or images.available(SAMPLES, seed)
    batches = images.draw(count, batch_size, seed)
    say_prepared(images)
    if samples is None and count < SAMPLES:
        warn(f"{count} calibration images, all that {images.origin} has; {SAMPLES:,} are usual")
    test = test_data(data, network, preparation, classes, labels) if judge else None
    net = network.model.to(place)
    rule: Any = _read_masks(masks) if masks is not None else _rule(select)
    try:
        matching = snows.Matching("end" if horizon == "end" else int(horizon), targets, metric)
        with joined(), kept():
            sparse, report = snows.prune(
                net,
                batches,
                chosen,
                select=rule,
                solver=solver,
                matching=matching,
                cap=cap,
                only=asking.names(only),
                skip=asking.names(skip),
                recalibrate=recalibrate,
                seconds=None if minutes is None else 60 * minutes,
                memory=memory,
                out=out,
                resume=resume,
                seed=seed,
            )
    except KeyboardInterrupt:
        if not (out / "run.json").exists():
            warn("stopped before there was anything to keep")
        else:
            warn(f"stopped; finished layers are kept in {out}. Add --resume to the same command to go on.")
        raise typer.Exit(130) from None
    if RANK:  # what comes now the first process does alone
        return
    source.save(out)
    if not resume:  # a run that goes on may have been timed on another machine
        claim_time(out, report, chosen, batches[0], place.type)
    show(report)
    say(f"weights, masks and report are in {out}")
    if test is not None:
        used = images.drawn(count, seed) if test.origin == images.origin else None
        try:
            with alone():  # the other processes have ended
                others = compared(net, batches, chosen, cap, sparse)  # pruned when they are judged
                scores, judged = judge_networks(net, others, test, used, judge, batch_size)
            keep_scores(out, {name: x.top1 for name, x in scores.items()})
            claim(out, replace(judged, data=data, samples=len(used or ()), seed=seed))
        except ValueError as error:  # what was pruned is there all the same
            warn(f"not judged: {error}")
    write_page(out)
    code = sources.runs_code(model) or (sources.runs_code(data) and not Path(data).is_dir())
    next_command("snows", "deploy", out, *(["--trust"] if code else []))


def _rule(name: str) -> Any:
    """Find the selector of a name of `Rule`."""
    from snows import selectors

    named = {
        "alps": selectors.alps,
        "magnitude": selectors.magnitude,
        "wanda": selectors.wanda,
        "sparsegpt": selectors.sparsegpt,
        "least-squares": selectors.least_squares,
        "least-squares:sparsegpt": partial(selectors.least_squares, select=selectors.sparsegpt),
        "least-squares:wanda": partial(selectors.least_squares, select=selectors.wanda),
    }
    return named[name]


def _read_masks(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise ValueError(f"--masks: there is no file {path}")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"--masks: {path} is not a safetensors file ({error})") from error
