"""What exports of a network to other runtimes share: their inputs, what is refused, and the comparison."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from snows.layers import SparseConv2d, SparseLinear
from snows.networks.batches import Batch, difference, first_line

TOLERANCE = 1e-4  # of an output's largest entry


def refuse_packed(model: nn.Module, reason: str) -> None:
    """Refuse a network with packed layers.

    Args:
        model: to be exported.
        reason: why it cannot be, and what to do.

    Raises:
        ValueError: it has packed layers.
    """
    for name, module in model.named_modules():
        if isinstance(module, SparseLinear | SparseConv2d):
            raise ValueError(
                f"export: expected a network without packed layers, but {name or 'it'} is one; {reason}"
            )


def any_number(inputs: Batch) -> Any:
    """Say that the first dimension of every input is the same number, any one.

    Returns:
        As `torch.export.export` takes it for `dynamic_shapes`.
    """
    batch = torch.export.Dim("batch")
    shapes = [{0: batch} if isinstance(x, Tensor) else None for x in (*inputs.args, *inputs.kwargs.values())]
    return dict(zip(inputs.kwargs, shapes, strict=True)) if inputs.kwargs else tuple(shapes)


def tensors_of(output: Any) -> list[Tensor]:
    """List the tensors that a network returned."""
    leaves = tree_leaves(dict(output) if isinstance(output, Mapping) else output)
    return [x for x in leaves if isinstance(x, Tensor)]


def compared(found: list[Tensor], output: Any, runtime: str) -> float:
    """Compare what a runtime returned with what the network did.

    Args:
        found: of the runtime.
        output: of the network.
        runtime: its name, for the sentence.

    Returns:
        The largest difference of floating-point outputs, relative to the largest of that output.

    Raises:
        ValueError: the outputs differ: floating-point numbers by more than 1e-4, others at all.
    """
    wanted = tensors_of(output)
    if len(found) != len(wanted):
        raise ValueError(
            f"export: expected {len(wanted)} outputs from {runtime}, got {len(found)}; nothing was written"
        )
    if not all(
        x.shape == y.shape and (y.is_floating_point() or torch.equal(x, y))
        for x, y in zip(found, wanted, strict=True)
    ):
        raise ValueError(
            f"export: {runtime}'s class numbers, or shapes, are others than the model's; nothing was written"
        )
    pairs = [(x, y) for x, y in zip(found, wanted, strict=True) if y.is_floating_point()]
    worst = difference([y for _, y in pairs], [x for x, _ in pairs]) if pairs else 0.0
    if not worst <= TOLERANCE:
        raise ValueError(
            f"export: {runtime}'s outputs differ by {worst:.1e} of the largest; nothing was written"
        )
    return worst


def cause(error: BaseException) -> str:
    """Say in a line what an exporter's error comes from, without its advice, graphs and colours."""
    while error.__cause__ is not None or error.__context__ is not None:
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    line = re.sub(r"\x1b\[[0-9;]*m", "", first_line(error)).strip()[:200]
    if "data-dependent" in line:
        return f"its forward decides by the numbers in a tensor, which a graph cannot: {line}"
    return f"{type(error).__name__}: {line}"
