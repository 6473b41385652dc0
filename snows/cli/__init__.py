"""The command line: `snows prune`, `frontier`, `deploy`, `verify` and others; `snows --help` lists them.

A command's module declares its options, and imports torch when the command runs: `--help` answers at once.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

import snows
from snows.cli import exporting, judging, machine, measuring, pruning, runs, structure, verifying
from snows.cli.processes import RANK, refuse_several
from snows.cli.terminal import console, errors

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="One-shot pruning of vision networks by Hessian-free Newton steps.",
)


@app.callback(invoke_without_command=True)
def _version(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="print the version and stop")] = False,
) -> None:
    if version:
        console.print(f"snows {snows.__version__}", highlight=False)
        raise typer.Exit
    refuse_several(context.invoked_subcommand or "")


app.command()(pruning.prune)
app.command()(structure.groups)
app.command()(measuring.frontier)
app.command()(measuring.measure)
app.command("eval")(judging.evaluate)
app.command()(verifying.verify)
for _command in (runs.report, runs.deploy, runs.bench, exporting.export, machine.demo, machine.info):
    app.command()(_command)


def main() -> None:
    """Run the command line; a caller's mistake is one sentence and exit code 2."""
    try:
        app()
    except ValueError as error:
        said = f"process {RANK}: {error}" if RANK else str(error)
        errors.print(said, style="red", highlight=False, markup=False, soft_wrap=True)
        sys.exit(2)
