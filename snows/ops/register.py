"""The register: a schema and a reference for every op, and the kernels that run in the reference's place.

The reference serves every device and is its own fake kernel; native kernels are registered over it for the
devices they serve, and PyTorch's dispatcher chooses. `SNOWS_REFERENCE=1`, set before the import, leaves the
kernels out.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sysconfig
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from snows import reference
from snows.ops.derivatives import OPS as DECLARED
from snows.ops.derivatives import register

_library = torch.library.Library("snows", "DEF")

OPS = tuple(op.name for op in DECLARED)

for _op in DECLARED:
    _library.define(_op.schema)
    _library.impl(_op.name, getattr(reference, _op.name), "CompositeExplicitAutograd")
    register(_library, _op)


def _autocast(op: str, device: str) -> Callable[..., Tensor]:
    """Under autocast a packed layer computes in its own precision and rounds its output to autocast's."""
    key = getattr(torch._C.DispatchKey, f"Autocast{device}")

    def cast(input: Tensor, values: Tensor, *rest: Any, **named: Any) -> Tensor:
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
            output: Tensor = getattr(torch.ops.snows, op)(input.to(values.dtype), values, *rest, **named)
            return (
                output
                if values.dtype == torch.float64
                else output.to(torch.get_autocast_dtype(device.lower()))
            )

    return cast


for _name in ("sparse_linear", "sparse_conv2d"):
    for _device in ("CPU", "CUDA"):
        _library.impl(_name, _autocast(_name, _device), f"Autocast{_device}")


def _load_native() -> str:
    """Load the compiled kernels if they were built; say in one phrase what happened."""
    if os.environ.get("SNOWS_REFERENCE") == "1":
        return "left out by SNOWS_REFERENCE=1"
    path = (
        Path(__file__).parents[1] / f"_native{sysconfig.get_config_var('EXT_SUFFIX')}"
    )  # a source tree may hold other Pythons' too
    if path.exists():
        try:
            torch.ops.load_library(str(path))
        except OSError as error:
            warnings.warn(
                f"snows: the native kernels in {path.name} do not load ({error}); "
                "the reference runs instead. Reinstall snows with the torch in use.",
                stacklevel=3,
            )
            return "built, but does not load"
        return "loaded"
    return "not built"


native = _load_native()

TRITON = {  # file in kernels/ -> the ops in it
    "masked": ("masked",),
    "unpack": ("unpack",),
    "gelu": ("gelu", "gelu_curve"),
    "affine_relu": ("affine_relu_grad",),
    "layer_norm": ("layer_norm", "layer_norm_grad", "layer_norm_curve"),
    "attention": ("attention", "attention_grad", "attention_tangent"),
}


def from_triton(file: str, name: str) -> Callable[..., Any]:
    """Return the op's launcher, imported when it is first called.

    The reference takes what the kernel does not.
    """

    def call(*args: Any) -> Any:
        kernel = importlib.import_module(f"snows.kernels.{file}")
        old = torch.cuda.get_device_capability(args[0].device) < (8, 0)
        large = any(isinstance(x, Tensor) and x.numel() >= 2**31 for x in args)
        run = reference if old or large or not kernel.takes(*args) else kernel
        with torch.cuda.device_of(args[0]):
            return getattr(run, name)(*args)

    return call


def _register_triton() -> str:
    """Register the Triton kernels for CUDA where both are there; say in one phrase what happened."""
    if os.environ.get("SNOWS_REFERENCE") == "1":
        return "left out by SNOWS_REFERENCE=1"
    if torch.version.cuda is None:
        return "not for this build of torch"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    for file, names in TRITON.items():
        for name in names:
            if not torch._C._dispatch_has_kernel_for_dispatch_key(f"snows::{name}", "CUDA"):
                _library.impl(name, from_triton(file, name), "CUDA")
    return "registered"


triton = _register_triton()


def implementation(op: str, device: str = "CPU") -> str:
    """Name what runs `op` on `device`: "native", "triton" or "reference"."""
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"snows::{op}", device):
        return "reference"
    ours = device == "CUDA" and triton == "registered" and any(op in names for names in TRITON.values())
    return "triton" if ours else "native"
