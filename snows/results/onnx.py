"""Networks for other runtimes, as ONNX."""

from __future__ import annotations

import re
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from snows.layers import SparseConv2d, SparseLinear
from snows.networks.batches import Batch, difference, first_line


def export_onnx(model: nn.Module, example: Any, path: Path | str) -> float:
    """Write a network with dense weights, zeros among them, as ONNX; and run that once.

    It takes any number of images at a time.

    Args:
        model: in evaluation mode, without packed layers.
        example: one batch of at least two: a tensor, `(images, labels)` or a mapping of keyword inputs.
        path: of the file.

    Returns:
        The largest difference of onnxruntime's outputs from the model's, relative to the largest output.

    Raises:
        ValueError: the packages are missing, the model cannot be exported, or the outputs differ:
            floating-point numbers by more than 1e-4, others at all.
    """
    try:
        import onnxruntime  # type: ignore[import-not-found,import-untyped,unused-ignore]
        import onnxscript  # type: ignore[import-not-found,import-untyped,unused-ignore] # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"export: ONNX needs a package that is not installed ({error}); pip install '.[export]' in the "
            "clone of snows brings it"
        ) from error
    packed = [
        name for name, module in model.named_modules() if isinstance(module, SparseLinear | SparseConv2d)
    ]
    if packed:
        raise ValueError(
            f"export: expected a network without packed layers, but {packed[0] or 'it'} is one; ONNX has no "
            "operation for it: export the pruned network as it was before deploy"
        )
    path, inputs = Path(path), Batch.of(example)
    batch = torch.export.Dim("batch")
    shapes: Any = [
        {0: batch} if isinstance(x, Tensor) else None for x in (*inputs.args, *inputs.kwargs.values())
    ]
    shapes = dict(zip(inputs.kwargs, shapes, strict=True)) if inputs.kwargs else tuple(shapes)
    try:
        with (
            tempfile.TemporaryDirectory(dir=path.parent) as folder,
            torch.no_grad(),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")  # of PyTorch about itself
            temporary = Path(folder) / "network.onnx"
            output = model(*inputs.args, **inputs.kwargs)
            torch.onnx.export(
                model,
                inputs.args,
                str(temporary),
                kwargs=inputs.kwargs,
                dynamo=True,
                external_data=False,
                verbose=False,
                dynamic_shapes=shapes,
            )
            session = onnxruntime.InferenceSession(str(temporary), providers=["CPUExecutionProvider"])
            feed = dict(
                zip(
                    [x.name for x in session.get_inputs()], [x.numpy() for x in inputs.tensors()], strict=True
                )
            )
            worst = _compared([torch.from_numpy(x) for x in session.run(None, feed)], output)
            temporary.replace(path)
    except OSError as error:
        raise ValueError(f"export: {path} could not be written ({error.strerror or error})") from error
    except torch.onnx.OnnxExporterError as error:
        raise ValueError(f"export: {path} could not be written ({_cause(error)})") from error
    return worst


def _compared(found: list[Tensor], output: Any) -> float:
    """Return the largest relative difference of floating-point outputs."""
    wanted = [
        x
        for x in tree_leaves(dict(output) if isinstance(output, Mapping) else output)
        if isinstance(x, Tensor)
    ]
    if len(found) != len(wanted):
        raise ValueError(
            f"export: expected {len(wanted)} outputs from onnxruntime, got {len(found)}; nothing was written"
        )
    if not all(
        x.shape == y.shape and (y.is_floating_point() or torch.equal(x, y))
        for x, y in zip(found, wanted, strict=True)
    ):
        raise ValueError(
            "export: onnxruntime's class numbers, or shapes, are others than the model's; nothing was written"
        )
    pairs = [(x, y) for x, y in zip(found, wanted, strict=True) if y.is_floating_point()]
    worst = difference([y for _, y in pairs], [x for x, _ in pairs]) if pairs else 0.0
    if not worst <= 1e-4:
        raise ValueError(
            f"export: onnxruntime's outputs differ by {worst:.1e} of the largest; nothing was written"
        )
    return worst


def _cause(error: BaseException) -> str:
    """Say in a line what an exporter's error comes from, without its advice, graphs and colours."""
    while error.__cause__ is not None or error.__context__ is not None:
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    line = re.sub(r"\x1b\[[0-9;]*m", "", first_line(error)).strip()[:200]
    if "data-dependent" in line:
        return f"its forward decides by the numbers in a tensor, which a graph cannot: {line}"
    return f"{type(error).__name__}: {line}"
