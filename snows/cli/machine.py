"""`snows demo` and `snows info`: what this machine has, and what it can do."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Annotated

import typer

from snows.cli.terminal import Device, console, device_of


def demo(
    out: Annotated[Path, typer.Option(help="folder for the pruned weights and the page")] = Path("runs/demo"),
    images: Annotated[
        int, typer.Option(min=1, max=10_000, help="how many of the 10,000 test images judge")
    ] = 4_000,
    device: Device = "auto",
) -> None:
    """Prune the two networks of the zoo, deploy them and print two tables."""
    from snows import demo as demonstration

    demonstration.run(out, console, images, device_of(device))


def info() -> None:
    """Say what this machine runs on which implementation."""
    import torch
    from rich.table import Table

    import snows
    from snows import build, ops

    table = Table("", "", show_header=False)
    table.add_row("snows", snows.__version__)
    table.add_row("Python", platform.python_version())
    table.add_row(
        "torch",
        f"{torch.__version__}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}",
    )
    table.add_row("CUDA", torch.cuda.get_device_name() if torch.cuda.is_available() else "none")
    table.add_row(
        "native kernels",
        f"{ops.native}; built for: {build.outcome()}{' ' * bool(build.complaint())}{build.complaint()}",
    )
    table.add_row("Triton kernels", ops.triton)
    for op in ops.OPS:
        devices = ("CPU", "CUDA") if torch.cuda.is_available() else ("CPU",)
        table.add_row(
            f"op {op}", ", ".join(f"{device}: {ops.implementation(op, device)}" for device in devices)
        )
    if ops.native.startswith("loaded") and hasattr(torch.ops.snows, "packed_kernels"):
        many, few, images = torch.ops.snows.packed_kernels()
        table.add_row("packed layers", many)
        table.add_row("packed layers, few tokens", few)
        table.add_row("packed layers, images innermost", images)
    console.print(table)
