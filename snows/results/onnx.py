"""Networks for other runtimes, as ONNX."""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from snows.networks.batches import Batch
from snows.results.exporting import any_number, cause, compared, refuse_packed


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
    refuse_packed(model, "ONNX has no operation for it: export the pruned network as it was before deploy")
    path, inputs = Path(path), Batch.of(example)
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
                dynamic_shapes=any_number(inputs),
            )
            session = onnxruntime.InferenceSession(str(temporary), providers=["CPUExecutionProvider"])
            feed = dict(
                zip(
                    [x.name for x in session.get_inputs()], [x.numpy() for x in inputs.tensors()], strict=True
                )
            )
            found = [torch.from_numpy(x) for x in session.run(None, feed)]
            worst = compared(found, output, "onnxruntime")
            temporary.replace(path)
    except OSError as error:
        raise ValueError(f"export: {path} could not be written ({error.strerror or error})") from error
    except torch.onnx.OnnxExporterError as error:
        raise ValueError(f"export: {path} could not be written ({cause(error)})") from error
    return worst
