"""Weights from files as people have them: nested, with prefixes, with other things beside the tensors."""

from __future__ import annotations

import argparse
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

NESTED = (
    "state_dict_ema",
    "model_ema",
    "params_ema",
    "ema_state_dict",
    "state_dict",
    "model_state_dict",
    "model_state",
    "model",
    "params",
    "network",
    "net",
    "module",
    "ema",
    "weights",
)  # averaged weights first, as timm takes them
PREFIXES = (
    "module.",
    "model.",
    "net.",
    "network.",
    "ema.",
    "ema_model.",
    "model_ema.",
    "student.",
    "encoder_q.",
    "_orig_mod.",
)
MULTIARRAY: Any = getattr(np, "_core", None) or np.core
NUMPY = [
    (
        getattr(MULTIARRAY.multiarray, name),
        f"numpy.{core}.multiarray.{name}",
    )  # where NumPy 2 and NumPy 1 have them
    for name in ("scalar", "_reconstruct")
    for core in ("_core", "core")
]
DTYPES = {type(np.dtype(x)) for x in ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "?", "U1")}
HARMLESS: list[Any] = [*NUMPY, *DTYPES, np.dtype, np.ndarray, argparse.Namespace]


class MismatchError(ValueError):
    """Says which weights of a file do not fit the network that they are for."""

    def __init__(self, path: Path, **problems: list[str]) -> None:
        found = [
            f"{kind.replace('_', ' ')} {', '.join(names[:5])}{' and more' if len(names) > 5 else ''}"
            for kind, names in problems.items()
            if names
        ]
        super().__init__(f"weights: {path} does not match the model: {'; '.join(found)}")


def load_weights(net: nn.Module, path: Path) -> None:
    """Load a checkpoint into a network of the same architecture.

    Args:
        net: whose weights are written.
        path: safetensors, or a pickled checkpoint, of which tensors, numbers and containers alone are read
            and nothing is executed. The weights may be nested (under `state_dict` or `model`, say; averaged
            ones are preferred, as timm does) and have a wrapper's prefix.

    Raises:
        ValueError: the file is no checkpoint, holds tensors of a kind that cannot be loaded, or names or
            shapes do not match; the network is as it was then.
    """
    state = _matching(_tensors(path, _read(path)), net)
    own = net.state_dict()
    problems = {
        "missing": [
            k
            for k in own
            if k not in state and not k.endswith("num_batches_tracked") and isinstance(own[k], Tensor)
        ],
        "unexpected": [k for k in state if k not in own],
        "of_another_shape": [
            k for k in state if k in own and isinstance(own[k], Tensor) and state[k].shape != own[k].shape
        ],
    }
    if any(problems.values()):
        raise MismatchError(path, **problems)
    net.load_state_dict({**own, **state})


def _read(path: Path) -> Any:
    if not path.is_file():
        raise ValueError(f"weights: there is no file {path}")
    try:
        return load_file(path)
    except SafetensorError:
        pass
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(HARMLESS):
            warnings.simplefilter("ignore")  # of other pickle protocols: it loads, or it does not
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged file makes it raise
        if found := re.search(r"GLOBAL ([\w.]+) was not an allowed global", str(error)):
            raise ValueError(
                f"weights: {path} holds a {found[1]} beside its tensors, which would run code when it is "
                "read; save its state_dict alone"
            ) from error
        if "TorchScript" in str(error):
            raise ValueError(
                f"weights: {path} is a TorchScript program; expected a checkpoint: save its state_dict"
            ) from error
        raise ValueError(
            f"weights: {path} is neither safetensors nor a whole checkpoint of tensors alone (one that "
            "would run code is not loaded)"
        ) from error


def _tensors(path: Path, content: Any) -> dict[str, Tensor]:
    """Find the mapping from names to tensors in what a file holds."""
    while isinstance(content, Mapping):
        inner = next((content[key] for key in NESTED if isinstance(content.get(key), Mapping)), None)
        if inner is None or any(isinstance(x, Tensor) and x.ndim for x in content.values()):
            break
        content = inner
    if isinstance(content, nn.Module):
        content = content.state_dict()
    if not isinstance(content, Mapping) or not any(isinstance(x, Tensor) for x in content.values()):
        raise ValueError(
            f"weights: expected {path} to hold a state_dict of tensors, got {type(content).__name__}"
            f"{f' of {sorted(map(str, content))[:5]}' if isinstance(content, Mapping) else ''}"
        )
    found = {}
    for name, x in content.items():
        if not isinstance(x, Tensor):
            continue  # epochs and settings beside the weights
        if not isinstance(name, str):
            raise ValueError(
                f"weights: expected {path} to hold names and tensors, got the key {name!r} of type "
                f"{type(name).__name__}"
            )
        kind = (
            "quantised"
            if x.is_quantized
            else "sparse"
            if x.layout != torch.strided
            else "complex"
            if x.is_complex()
            else "without content (on the meta device)"
            if x.is_meta
            else ""
        )
        if kind:
            raise ValueError(
                f"weights: expected {path} to hold ordinary tensors, but {name} is {kind}; convert it and "
                "save again"
            )
        found[name] = x
    return found


def _matching(state: dict[str, Tensor], net: nn.Module) -> dict[str, Tensor]:
    """Take off what wrappers put before the names."""
    own = {k for k, v in net.state_dict().items() if isinstance(v, Tensor)}
    needed = {k for k in own if not k.endswith("num_batches_tracked")}
    if not any("_orig_mod." in k for k in own):
        state = {k.replace("_orig_mod.", ""): v for k, v in state.items()}
    for _ in range(4):  # wrappers in wrappers
        if needed <= set(state):
            break
        inner = {p: {k.removeprefix(p): v for k, v in state.items() if k.startswith(p)} for p in PREFIXES}
        whole = next(
            (part for part in inner.values() if needed <= set(part)), None
        )  # beside it: of a loss, or of a second network
        if whole is not None:
            return whole
        alone = next((part for part in inner.values() if len(part) == len(state)), None)
        if alone is None or len(own & set(state)) >= len(own & set(alone)) > 0 or own & set(state):
            break
        state = alone
    return state
