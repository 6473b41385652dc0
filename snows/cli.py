"""The command line: `snows prune`, `eval`, `report`, `deploy`, `bench`, `export`, `demo`, `info`."""

from __future__ import annotations

import json
import platform
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes

import snows
from snows import build, files, ops, selectors, sources
from snows import demo as demonstration
from snows.deployment import Deployment
from snows.evaluation import evaluate, logits_of
from snows.report import Report
from snows.run import RESULTS, SOURCE, state, write
from snows.sparsity import parse_pattern

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False,
                  help="One-shot pruning of vision networks by Hessian-free Newton steps.")
out_console, err_console = Console(width=None if sys.stdout.isatty() else 160), Console(stderr=True)

RULES = {
    "alps": selectors.alps, "magnitude": selectors.magnitude, "wanda": selectors.wanda, "sparsegpt": selectors.sparsegpt,
    "least-squares": selectors.least_squares, "least-squares:sparsegpt": partial(selectors.least_squares, select=selectors.sparsegpt),
    "least-squares:wanda": partial(selectors.least_squares, select=selectors.wanda),
}

ModelOption = Annotated[str, typer.Option("--model", help="zoo:NAME, torchvision:NAME, timm:NAME, hf:FOLDER or package.module:callable")]
WeightsOption = Annotated[Path | None, typer.Option("--weights", help="safetensors, or a pickled checkpoint (loaded without running code)")]
DataOption = Annotated[str, typer.Option("--data", help="zoo:fashion-mnist, cifar10:FOLDER, cifar100:FOLDER or a folder of pictures")]
CropOption = Annotated[int | None, typer.Option(help="pixels of the square that the network sees")]
ResizeOption = Annotated[int | None, typer.Option(help="pixels of the shorter side before cropping")]
MeanOption = Annotated[str | None, typer.Option(help="channel means in [0, 1], e.g. 0.485,0.456,0.406")]
StdOption = Annotated[str | None, typer.Option(help="channel deviations, likewise")]


def _numbers(text: str | None, name: str) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        values = tuple(float(x) for x in text.split(","))
    except ValueError:
        raise ValueError(f"--{name}: expected numbers with commas between, got {text!r}") from None
    return values * 3 if len(values) == 1 else values


def _processing(
    base: sources.Preprocessing, crop: int | None, resize: int | None, mean: str | None, std: str | None
) -> sources.Preprocessing:
    size = base.crop if crop is None else crop
    return sources.Preprocessing(size, round(size * base.resize / base.crop) if resize is None else resize,
                                 _numbers(mean, "mean") or base.mean, _numbers(std, "std") or base.std)


@app.command()
def prune(
    model: ModelOption,
    data: DataOption,
    out: Annotated[Path, typer.Option(help="folder for the pruned weights, masks and report; finished layers are saved at once")],
    pattern: Annotated[str | None, typer.Option(help='"2:4" keeps two of four, "0.7" or "70%" removes that share')] = None,
    weights: WeightsOption = None,
    select: Annotated[str, typer.Option(help=", ".join(RULES))] = "alps",
    masks: Annotated[Path | None, typer.Option(help="safetensors of boolean masks by layer, instead of --select")] = None,
    horizon: Annotated[str, typer.Option(help='operations matched after each layer, or "end"')] = "3",
    samples: Annotated[int, typer.Option(help="calibration images")] = 1024,
    batch_size: Annotated[int, typer.Option(help="images a batch")] = 128,
    targets: Annotated[str, typer.Option(help="dense or local")] = "dense",
    scaling: Annotated[str, typer.Option(help="output, variance or none")] = "output",
    passes: Annotated[int, typer.Option(help="over the calibration images, at most")] = 1,
    iterations: Annotated[int, typer.Option(help="conjugate-gradient iterations a step, at most")] = snows.Newton().max_iterations,
    cap: Annotated[float, typer.Option(help="largest share a layer may lose under a sparsity budget")] = 0.95,
    recalibrate: Annotated[bool, typer.Option(help="re-estimate BatchNorm statistics")] = True,
    resume: Annotated[bool, typer.Option("--resume", help="go on with the run in --out")] = False,
    seed: Annotated[int, typer.Option()] = 0,
    crop: CropOption = None, resize: ResizeOption = None, mean: MeanOption = None, std: StdOption = None,
) -> None:
    """Prune a trained network in one shot."""
    if pattern is None and masks is None:
        raise ValueError("--pattern: expected one such as 2:4 or 0.7, got none (only --masks can do without)")
    chosen = parse_pattern(pattern) if pattern is not None else None
    if select not in RULES:
        raise ValueError(f"--select: expected one of {', '.join(RULES)}, got {select!r}")
    if not (horizon == "end" or (horizon.isascii() and horizon.isdigit())):
        raise ValueError(f'--horizon: expected a number or "end", got {horizon!r}')
    for name, value, allowed in (("targets", targets, ("dense", "local")), ("scaling", scaling, ("output", "variance", "none"))):
        if value not in allowed:
            raise ValueError(f"--{name}: expected {' or '.join(allowed)}, got {value!r}")
    if samples < 1 or batch_size < 1:
        raise ValueError(f"--samples and --batch-size: expected at least 1, got {samples} and {batch_size}")
    if seed < 0:
        raise ValueError(f"--seed: expected at least 0, got {seed}")
    solver = snows.Newton(max_iterations=iterations, passes=passes)
    if (out / "run.json").exists() and not resume:
        raise ValueError(f"--out: {out} already holds a run; add --resume to go on with it, or name another folder")
    net, base = sources.load_model(model, weights)
    if weights is None and model.startswith(("torchvision:", "timm:")):
        err_console.print(f"{model} starts with random weights; --weights gives trained ones", highlight=False)
    processing = _processing(base, crop, resize, mean, std)
    images = sources.load_data(data, processing, "calibration")
    if samples > len(images):
        raise ValueError(f"--samples: asked for {samples} images, but {data} has {len(images)}")
    order = np.random.default_rng(seed).permutation(len(images))[:samples]
    batches = [x for x, _ in images.batches(batch_size, order)]
    _note_broken(images)
    rule: Any = _read_masks(masks) if masks is not None else RULES[select]
    try:
        _, report = snows.prune(
            net, batches, chosen, select=rule, solver=solver, horizon="end" if horizon == "end" else int(horizon),
            targets=cast(Literal["dense", "local"], targets), scaling=cast(Literal["output", "variance", "none"], scaling), cap=cap,
            recalibrate=recalibrate, out=out, resume=resume, seed=seed, progress=err_console.is_terminal,
        )
    except KeyboardInterrupt:
        err_console.print(f"stopped; finished layers are kept in {out}. Add --resume to the same command to go on.")
        raise typer.Exit(130) from None
    write(out / SOURCE, json.dumps({"model": model, "data": data, "processing": asdict(processing)}, indent=1).encode())
    out_console.print(report.table())
    out_console.print(report.summary(), *report.notes, sep="\n", highlight=False)
    out_console.print(f"weights, masks and report are in {out}", highlight=False)


def _read_masks(path: Path) -> dict[str, torch.Tensor]:
    if not path.is_file():
        raise ValueError(f"--masks: there is no file {path}")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"--masks: {path} is not a safetensors file ({error})") from error


def _note_broken(images: sources.Images) -> None:
    if images.broken:
        err_console.print(f"{len(images.broken)} broken pictures were left out: {', '.join(images.broken[:5])}"
                          f"{' and more' if len(images.broken) > 5 else ''}", highlight=False)


@app.command("eval")
def evaluate_command(
    model: ModelOption,
    data: DataOption,
    weights: WeightsOption = None,
    dense: Annotated[Path | None, typer.Option(help="weights of the dense network, to compare with (zoo: its own)")] = None,
    batch_size: Annotated[int, typer.Option(help="images a batch")] = 250,
    crop: CropOption = None, resize: ResizeOption = None, mean: MeanOption = None, std: StdOption = None,
) -> None:
    """Measure accuracy, and agreement and divergence against the dense network."""
    if batch_size < 1:
        raise ValueError(f"--batch-size: expected at least 1, got {batch_size}")
    net, base = sources.load_model(model, weights)
    images = sources.load_data(data, _processing(base, crop, resize, mean, std), "test")
    compare = dense is not None or (weights is not None and model.startswith(("zoo:", "hf:")))
    reference = sources.load_model(model, dense)[0] if compare else None
    others = (logits_of(reference, x) for x, _ in images.batches(batch_size)) if reference is not None else None
    scores = evaluate(net, images.batches(batch_size), others)
    _note_broken(images)
    if not scores.images:
        raise ValueError(f"--data: none of the pictures in {data} can be read")
    table = Table("images", "top-1", "top-5", "agreement", "divergence")
    table.add_row(str(scores.images), *(f"{x:.2f} %" if x == x else "" for x in scores[1:4]),
                  f"{scores.divergence:.5f}" if scores.divergence == scores.divergence else "")
    out_console.print(table)


@app.command()
def report(run: Annotated[Path, typer.Argument(help="the folder of a run")]) -> None:
    """Print a run's report again, and write it as a page."""
    path = run / "report.json"
    if not path.is_file():
        raise ValueError(f"report: {run} holds no report.json; was the run finished?")
    try:
        found = Report.from_json(path.read_text())
    except (json.JSONDecodeError, TypeError, KeyError) as error:
        raise ValueError(f"report: {path} is not a report ({error})") from error
    out_console.print(found.table())
    out_console.print(found.summary(), *found.notes, sep="\n", highlight=False)
    write(run / "report.html", found.to_html().encode())


RunArgument = Annotated[Path, typer.Argument(help="the folder of a run")]


def _not_its_own(run: Path, out: Path) -> None:
    """Refuse to write over what a run made."""
    if out.resolve() in {(run / name).resolve() for name in ("run.json", *RESULTS)}:
        raise ValueError(f"--out: {out} is a file of the run itself; name another")


def _load_run(run: Path, images: int) -> tuple[torch.nn.Module, torch.Tensor]:
    """A run's pruned network, and a batch of its images."""
    if not (run / SOURCE).is_file() or not (run / "model.safetensors").is_file():
        raise ValueError(f"{run} is not the folder of a finished run; expected {SOURCE} and model.safetensors there, from snows prune")
    if files.is_packed(run / "model.safetensors"):
        raise ValueError(f"{run / 'model.safetensors'} is packed; expected the pruned weights as snows prune wrote them there")
    try:
        source = json.loads((run / SOURCE).read_text())
        settings: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in source["processing"].items()}
        processing = sources.Preprocessing(**settings)
        net, _ = sources.load_model(source["model"], run / "model.safetensors")
        found = sources.load_data(source["data"], processing, "calibration")
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{run / SOURCE} is damaged ({error})") from error
    if images > len(found):
        raise ValueError(f"asked for a batch of {images} images, but {source['data']} has {len(found)}")
    batch = next(iter(found.batches(images)), None)
    if batch is None:
        raise ValueError(f"none of the pictures in {source['data']} can be read")
    return net, batch[0]


@app.command("deploy")
def deploy_command(
    run: RunArgument,
    out: Annotated[Path, typer.Option(help="safetensors file for the packed network")],
    objective: Annotated[str, typer.Option(help="speed keeps the faster of dense and packed; size packs what gets smaller")] = "speed",
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16")] = "float32",
    batch_size: Annotated[int, typer.Option(help="images at a time that layers are timed with")] = 8,
) -> None:
    """Put a run's network on packed layers, and say layer by layer what that gained."""
    dtypes = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    if dtype not in dtypes:
        raise ValueError(f"--dtype: expected {', '.join(dtypes)}, got {dtype!r}")
    if batch_size < 1:
        raise ValueError(f"--batch-size: expected at least 1, got {batch_size}")
    _not_its_own(run, out)
    net, example = _load_run(run, batch_size)
    deployed = snows.deploy(net, example, objective=cast(Literal["speed", "size"], objective), dtype=dtypes[dtype],
                            progress=err_console.is_terminal)
    found = cast(Deployment, deployed.report)
    out_console.print(found.table())
    out_console.print(found.summary(), *found.notes, sep="\n", highlight=False)
    if all(row.reason for row in found.layers):
        raise ValueError("deploy: no layer is packed, so there is nothing to write; --objective size packs whatever gets smaller")
    files.save(deployed, out)
    out_console.print(f"{out}: {out.stat().st_size / 1e6:.2f} MB", highlight=False)


@app.command()
def bench(
    run: RunArgument,
    batch_sizes: Annotated[str, typer.Option(help="images at a time, with commas between")] = "1,8,64",
    out: Annotated[Path | None, typer.Option(help="JSON file for the figures; by default bench.json in the run's folder")] = None,
) -> None:
    """Time a run's network, whole and layer by layer, packed against dense."""
    try:
        sizes = [int(x) for x in batch_sizes.split(",")]
    except ValueError:
        sizes = [0]
    if min(sizes) < 1:
        raise ValueError(f"--batch-sizes: expected numbers of at least 1 with commas between, got {batch_sizes!r}")
    path = out or run / "bench.json"
    _not_its_own(run, path)
    net, images = _load_run(run, max(sizes))
    rows = []
    for size in sizes:
        found = cast(Deployment, snows.deploy(net, images[:size], progress=err_console.is_terminal).report)
        table = found.table()
        table.title = f"{size} at a time"
        out_console.print(table)
        out_console.print(found.summary(), *found.notes, sep="\n", highlight=False)
        rows.append(asdict(found))
    write(path, (json.dumps({"torch": torch.__version__, "batches": rows}, indent=1) + "\n").encode())
    out_console.print(f"figures are in {path}", highlight=False)


@app.command()
def export(
    run: RunArgument,
    onnx: Annotated[Path | None, typer.Option(help="ONNX file: dense weights with their zeros, checked with onnxruntime")] = None,
    dense: Annotated[Path | None, typer.Option(help="safetensors with the keys of the network's own library")] = None,
) -> None:
    """Write a run's network for other runtimes and libraries."""
    if onnx is None and dense is None:
        raise ValueError("export: expected --onnx FILE or --dense FILE, got neither")
    for path in (onnx, dense):
        if path is not None:
            _not_its_own(run, path)
    net, example = _load_run(run, 2)
    if dense is not None:
        write(dense, to_bytes(state(net)))
        out_console.print(f"{dense}: {dense.stat().st_size / 1e6:.2f} MB", highlight=False)
    if onnx is not None:
        error = files.export_onnx(net, example, onnx)
        out_console.print(f"{onnx}: {onnx.stat().st_size / 1e6:.2f} MB; onnxruntime's outputs differ by {error:.1e} of the largest", highlight=False)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="folder for the pruned weights and the page")] = Path("runs/demo"),
    images: Annotated[int, typer.Option(min=1, max=10_000, help="how many of the 10,000 test images judge")] = demonstration.JUDGED,
) -> None:
    """Prune the two networks of the zoo, deploy them and print two tables."""
    demonstration.run(out, out_console, images)


@app.command()
def info() -> None:
    """Say what this machine runs on which implementation."""
    table = Table("", "", show_header=False)
    table.add_row("snows", snows.__version__)
    table.add_row("Python", platform.python_version())
    table.add_row("torch", f"{torch.__version__}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    table.add_row("CUDA", torch.cuda.get_device_name() if torch.cuda.is_available() else "none")
    table.add_row("native kernels", f"{ops.native}; built for: {build.outcome()}{' ' * bool(build.complaint())}{build.complaint()}")
    table.add_row("Triton kernels", ops.triton)
    for op in ops.OPS:
        devices = ("CPU", "CUDA") if torch.cuda.is_available() else ("CPU",)
        table.add_row(f"op {op}", ", ".join(f"{device}: {ops.implementation(op, device)}" for device in devices))
    out_console.print(table)


def main() -> None:
    """Run the command line; a caller's mistake is one sentence and exit code 2."""
    try:
        app()
    except ValueError as error:
        err_console.print(str(error), style="red", highlight=False, markup=False, soft_wrap=True)
        sys.exit(2)


