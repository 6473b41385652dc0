"""Networks as programs of `torch.export`, which run without this package."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from snows.networks.attention import plain_forward
from snows.networks.batches import Batch
from snows.results.exporting import any_number, cause, compared, refuse_packed

# runs a program where this package cannot be imported
ALONE = """
import sys
sys.modules["snows"] = None
import torch
from torch.utils._pytree import tree_leaves
program, inputs, outputs = sys.argv[1:]
args, kwargs = torch.load(inputs)
with torch.no_grad():
    found = torch.export.load(program).module()(*args, **kwargs)
torch.save([x.cpu() for x in tree_leaves(found) if isinstance(x, torch.Tensor)], outputs)
"""


class Exported(NamedTuple):
    """Say what came of an export.

    Attributes:
        difference: the largest of the program's outputs from the model's, relative to the largest output.
        dynamic: whether the program takes any number of images; else the example's.
    """

    difference: float
    dynamic: bool


def export_program(model: nn.Module, example: Any, path: Path | str) -> Exported:
    """Write a network with dense weights, zeros among them, as a program; and run that in another process.

    `torch.export.load` reads it, with no other package than those whose operations the network calls.

    Args:
        model: in evaluation mode, without packed layers.
        example: one batch of at least two, for a program that takes any number: a tensor, `(images, labels)`
            or a mapping of keyword inputs.
        path: of the file; torch wants it to end with .pt2.

    Raises:
        ValueError: the model cannot be exported, the program cannot be run without this package, or the
            outputs differ: floating-point numbers by more than 1e-4, others at all.
    """
    refuse_packed(
        model,
        "a program would need the operations of snows to run it: export the pruned network as it was before "
        "deploy",
    )
    path, inputs = Path(path), Batch.of(example)
    try:
        with (
            tempfile.TemporaryDirectory(dir=path.parent) as folder,
            torch.no_grad(),
            plain_forward(),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")  # of PyTorch about itself
            temporary = Path(folder) / "network.pt2"
            output = model(*inputs.args, **inputs.kwargs)
            with _plain_mapping(model, output):
                program, dynamic = _program(model, inputs)
            torch.export.save(program, temporary)
            worst = compared(_run_alone(temporary, inputs), output, "the program")
            temporary.replace(path)
    except OSError as error:
        raise ValueError(f"export: {path} could not be written ({error.strerror or error})") from error
    return Exported(worst, dynamic)


@contextmanager
def _plain_mapping(model: nn.Module, output: Any) -> Iterator[None]:
    """Let a network return a mapping as a dict, so that no program holds a class of another package."""
    hook = None
    if isinstance(output, Mapping) and type(output) is not dict:
        hook = model.register_forward_hook(lambda module, args, found: dict(found))
    try:
        yield
    finally:
        if hook is not None:
            hook.remove()


def _program(model: nn.Module, inputs: Batch) -> tuple[torch.export.ExportedProgram, bool]:
    """Export for any number of images if that can be, else for as many as there are."""
    try:
        shapes = any_number(inputs)
        return torch.export.export(model, inputs.args, inputs.kwargs, dynamic_shapes=shapes), True
    except Exception:  # torch.export raises of all kinds; without numbers to leave open it tells the cause
        try:
            return torch.export.export(model, inputs.args, inputs.kwargs), False
        except Exception as error:
            raise ValueError(f"export: torch.export cannot take the network ({cause(error)})") from error


def _run_alone(program: Path, inputs: Batch) -> list[Tensor]:
    """Run a program in a process that cannot import this package, and return its outputs."""
    batch, outputs = program.with_name("inputs.pt"), program.with_name("outputs.pt")
    torch.save((tuple(inputs.args), dict(inputs.kwargs)), batch)
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(program), str(batch), str(outputs)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise ValueError(f"export: the program does not run by itself ({lines[-1][:200]})")
    found: list[Tensor] = torch.load(outputs)
    return found
