"""`snows report`, `deploy`, `bench` and `export`: what can be done with the folder of a run."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from snows.cli import terminal
from snows.cli.pages import keep_deployment, read_report, write_page
from snows.cli.terminal import next_command, say, show

if TYPE_CHECKING:
    from torch import Tensor, nn

    from snows.results.deployment import Deployment
    from snows.sources.source import Source

IMAGES = 8  # at a time, where nothing else was asked for
Folder = Annotated[Path, typer.Argument(help="the folder of a run")]
Trust = Annotated[
    bool, typer.Option("--trust", help="import and call the Python objects that the run's source.json names")
]
Model = Annotated[
    str | None, typer.Option("--model", help="the dense network, instead of the one that source.json names")
]
Data = Annotated[
    str | None, typer.Option("--data", help="where the example comes from, instead of what source.json names")
]
Runtime = Annotated[
    Literal["eager", "compile", "cuda-graph", "fastest"] | None,
    typer.Option(
        "--runtime",
        help="what whole networks are timed in; by default what prune --of latency measured in, or eager",
    ),
]


def report(run: Folder) -> None:
    """Print a run's report again, and write it as a page."""
    found = read_report(run)
    show(found)
    write_page(run)


def not_its_own(run: Path, out: Path) -> None:
    """Refuse to write over what a run made."""
    from snows.results.run import RESULTS

    if (
        out.resolve() in {(run / name).resolve() for name in ("run.json", *RESULTS)}
        or (run / "layers").resolve() in out.resolve().parents
    ):
        raise ValueError(f"--out: {out} is a file of the run itself; name another")


def refused(folder: Path, option: str, named: str, trust: bool) -> str:
    """Say why what a folder's source.json names is not opened; empty if it is."""
    from snows import sources
    from snows.sources.source import SOURCE

    is_folder = option == "data" and Path(named).is_dir()
    if trust or is_folder or not sources.runs_code(named):
        return ""
    return (
        f"{folder / SOURCE} names {named}, Python code that would be imported and called; add --trust "
        f"if you trust whoever made this folder, or say what to use instead with --{option}"
    )


def load_run(
    run: Path, images: int, device: str, trust: bool, model: str | None, data: str | None
) -> tuple[nn.Module, Tensor, Source]:
    """Load a run's pruned network, a batch of its images, both on the device, and where they come from."""
    from snows import sources
    from snows.networks.edits import Pack
    from snows.results import files
    from snows.sources.source import SOURCE, Source

    place, weights = terminal.device_of(device), run / "model.safetensors"
    if not (run / SOURCE).is_file() or not weights.is_file():
        raise ValueError(
            f"{run} is not the folder of a finished run; expected {SOURCE} and model.safetensors there, from "
            "snows prune"
        )
    if files.has_edits(weights, Pack):
        raise ValueError(f"{weights} is packed; expected the pruned weights as snows prune wrote them there")
    source = Source.read(run)
    for option, given, named in (("model", model, source.model), ("data", data, source.data)):
        if given is None and (sentence := refused(run, option, named, trust)):
            raise ValueError(sentence)
    source = replace(source, model=model or source.model, data=data or source.data)
    network = sources.load_model(source.model, weights)
    found = sources.load_data(
        source.data,
        network,
        "calibration",
        preparation=network.preparation.override(*source.settings()),
        fetch=trust or data is not None,
    )
    return network.model.to(place), found.first(images).to(place), source


def _asked(run: Path, runtime: Any, images: int | None, objective: Any) -> tuple[Any, int, Any]:
    """Return what was typed, else what the run's goal meant, else what is usual.

    Args:
        run: the folder.
        runtime: as typed; None where nothing was.
        images: at a time, likewise.
        objective: likewise.
    """
    from snows.choosing.compiling import RUNTIMES

    settings = read_report(run).settings if (run / "report.json").is_file() else {}
    found = runtime or settings.get("runtime", "eager")
    if found not in (*RUNTIMES, "fastest"):
        raise ValueError(f"{run / 'report.json'} names no runtime ({found!r:.40}); say which with --runtime")
    usual = settings.get("images", IMAGES)
    count = usual if type(usual) is int and usual > 0 else IMAGES
    return found, images or count, objective or ("size" if settings.get("objective") == "size" else "speed")


def _before(run: Path, deployed: Deployment) -> str:
    """Say what the network took before it was pruned, if that was measured in the same way."""
    if not (run / "report.json").is_file():
        return ""
    report = read_report(run)
    measured = report.settings.get("runtime"), report.settings.get("images")
    predicted = any(x.startswith("Milliseconds are predicted") for x in report.notes)
    if measured != (deployed.runtime, deployed.samples) or predicted or not report.dense_ms > 0:
        return ""
    return (
        f"before pruning the network took {report.dense_ms:.4g} ms, by the times that prune chose by: "
        f"{report.dense_ms / deployed.sparse_ms:.2f} times as long as now"
    )


def deploy(
    run: Folder,
    out: Annotated[
        Path | None,
        typer.Option(
            help="safetensors file for the packed network; by default packed.safetensors in the folder"
        ),
    ] = None,
    objective: Annotated[
        Literal["speed", "size"] | None,
        typer.Option(
            help="keep the faster of dense and packed, or pack what gets smaller; by default speed, or size "
            "where prune was asked for bytes"
        ),
    ] = None,
    dtype: Annotated[
        Literal["float32", "float16", "bfloat16"], typer.Option(help="of the packed network")
    ] = "float32",
    runtime: Runtime = None,
    batch_size: Annotated[
        int | None,
        typer.Option(min=1, help="images at a time; by default what prune --of latency measured with, or 8"),
    ] = None,
    device: terminal.Device = "auto",
    trust: Trust = False,
    model: Model = None,
    data: Data = None,
) -> None:
    """Put a run's network on packed layers, and say layer by layer what that gained."""
    import torch

    import snows
    from snows.results import files

    path = out or run / "packed.safetensors"
    not_its_own(run, path)
    where, images, chosen = _asked(run, runtime, batch_size, objective)
    net, example, source = load_run(run, images, device, trust, model, data)
    deployed = snows.deploy(
        net,
        example,
        objective=chosen,
        runtime=where,
        dtype=getattr(torch, dtype),
        progress=terminal.errors.is_terminal,
    )
    found = deployed.report
    show(found)
    if sentence := _before(run, found):
        say(sentence)
    if all(row.reason for row in found.layers) and not files.has_edits(run / "model.safetensors"):
        raise ValueError(
            "deploy: no layer is packed, so there is nothing to write; --objective size packs whatever gets "
            "smaller"
        )
    snows.save(deployed, path)
    keep_deployment(run, found)
    write_page(run)
    say(f"{path}: {path.stat().st_size / 1e6:.2f} MB with its header")
    settings = {
        "--dense": source.weights,
        "--classes": source.classes,
        "--labels": source.labels,
        "--crop": source.crop,
        "--resize": source.resize,
        "--mean": source.mean,
        "--std": source.std,
    }
    given = [
        x
        for name, value in settings.items()
        if value is not None
        for x in (name, ",".join(map(str, value)) if isinstance(value, tuple) else value)
    ]
    next_command("snows", "eval", "--model", source.model, "--data", source.data, "--weights", path, *given)


def bench(
    run: Folder,
    batch_sizes: Annotated[str, typer.Option(help="images at a time, with commas between")] = "1,8,64",
    out: Annotated[
        Path | None, typer.Option(help="JSON file for the figures; by default bench.json in the run's folder")
    ] = None,
    runtime: Runtime = None,
    device: terminal.Device = "auto",
    trust: Trust = False,
    model: Model = None,
    data: Data = None,
) -> None:
    """Time a run's network, whole and layer by layer, packed against dense."""
    import torch

    import snows
    from snows.results.records import to_json
    from snows.results.storage import write

    try:
        sizes = [int(x) for x in batch_sizes.split(",")]
    except ValueError:
        sizes = [0]
    if min(sizes) < 1:
        raise ValueError(
            f"--batch-sizes: expected numbers of at least 1 with commas between, got {batch_sizes!r}"
        )
    path = out or run / "bench.json"
    not_its_own(run, path)
    net, images, _ = load_run(run, max(sizes), device, trust, model, data)
    rows, (where, _, _) = [], _asked(run, runtime, None, None)
    for size in sizes:
        progress = terminal.errors.is_terminal
        found = snows.deploy(net, images[:size], runtime=where, progress=progress).report
        show(found, f"{size} at a time")
        rows.append(asdict(found))
    write(
        path,
        (
            to_json({"torch": torch.__version__, "device": str(images.device), "batches": rows}) + "\n"
        ).encode(),
    )
    say(f"figures are in {path}")
