"""`snows export`: a run's network for other runtimes and libraries."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from snows.cli.runs import Data, Folder, Model, Trust, load_run, not_its_own
from snows.cli.terminal import say


def export(
    run: Folder,
    onnx: Annotated[
        Path | None, typer.Option(help="ONNX file: dense weights with their zeros, checked with onnxruntime")
    ] = None,
    program: Annotated[
        Path | None,
        typer.Option("--torch", help="program of torch.export, which runs without snows and is checked so"),
    ] = None,
    dense: Annotated[
        Path | None, typer.Option(help="safetensors with the keys of the network's own library")
    ] = None,
    trust: Trust = False,
    model: Model = None,
    data: Data = None,
) -> None:
    """Write a run's network for other runtimes and libraries."""
    from snows.results.onnx import export_onnx
    from snows.results.program import export_program
    from snows.results.storage import state, write_tensors

    if onnx is None and program is None and dense is None:
        raise ValueError("export: expected --onnx FILE, --torch FILE or --dense FILE, got none of them")
    for path in (onnx, program, dense):
        if path is not None:
            not_its_own(run, path)
    net, example, _ = load_run(run, 2, "cpu", trust, model, data)
    if dense is not None:
        write_tensors(dense, state(net), {})
        say(f"{dense}: {dense.stat().st_size / 1e6:.2f} MB")
    if onnx is not None:
        error = export_onnx(net, example, onnx)
        say(
            f"{onnx}: {onnx.stat().st_size / 1e6:.2f} MB; onnxruntime's outputs differ by {error:.1e} of the "
            "largest"
        )
    if program is not None:
        found = export_program(net, example, program)
        say(
            f"{program}: {program.stat().st_size / 1e6:.2f} MB; for "
            f"{'any number of' if found.dynamic else len(example)} images at a time; its outputs differ by "
            f"{found.difference:.1e} of the largest"
        )
