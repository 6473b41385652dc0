"""What `prune` and `deploy` are given, checked once before any work is done."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

from snows.layers import SparseConv2d, SparseLinear
from snows.networks.batches import Batch
from snows.networks.layers import prunable


def check_model(verb: str, model: Any) -> None:
    """Refuse what is no network in evaluation mode with dense weights that have values.

    Args:
        verb: "prune" or "deploy", for the sentence.
        model: what the caller passed.

    Raises:
        TypeError: it is no `nn.Module`.
        ValueError: it was compiled or scripted, is in training mode, packed, without parameters, or on the
            meta device.
    """
    if not isinstance(model, nn.Module):
        advice = (
            "; pass the nn.Module that it was exported from"
            if isinstance(model, torch.export.ExportedProgram)
            else ""
        )
        raise TypeError(f"{verb}: expected an nn.Module, got {type(model).__name__}{advice}")
    for name, module in model.named_modules():
        owner = name or "the model"
        if hasattr(module, "_orig_mod"):
            where = f"{name}._orig_mod in the place of {name}" if name else "model._orig_mod"
            raise ValueError(
                f"{verb}: expected a model as it was before torch.compile, but {owner} is compiled; pass "
                f"{where}, and compile what comes back"
            )
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError(
                f"{verb}: expected ordinary modules, but {owner} is TorchScript, whose operations cannot be "
                "watched; pass the nn.Module that it was made from"
            )
        if isinstance(module, torch.fx.GraphModule) and "_guards_fn" in dict(module.named_children()):
            raise ValueError(
                f"{verb}: expected ordinary modules, but {owner} was made by torch.export, which fixes "
                "shapes; pass the nn.Module that it was exported from"
            )
    for name, module in model.named_modules():
        if module.training:
            raise ValueError(
                f"{verb}: expected a model in evaluation mode, but {name or 'it'} is in training mode; call "
                "model.eval() first"
            )
        if isinstance(module, SparseLinear | SparseConv2d):
            raise ValueError(
                f"{verb}: expected a model that is not packed yet, but {name or 'it'} is packed already; "
                "take the network it was made from"
            )
    if next(model.parameters(), None) is None:
        raise ValueError(f"{verb}: expected a model with weights, got one without parameters")
    for name, p in model.named_parameters():
        if p.is_meta:
            raise ValueError(
                f"{verb}: expected weights with values, got {name} on the meta device; load the weights first"
            )


def check_numbers(model: nn.Module) -> None:
    """Refuse weights in 16 bits or not finite, and calls under `torch.inference_mode`."""
    if torch.is_inference_mode_enabled():
        raise ValueError(
            "prune: expected to be called outside torch.inference_mode(), where nothing can be differentiated"
        )
    for name, p in model.named_parameters():
        if p.dtype in (torch.float16, torch.bfloat16):
            raise ValueError(
                f"prune: expected float32 or float64 weights, got {name} in {p.dtype}; call model.float() "
                "first"
            )
        if not p.isfinite().all():
            raise ValueError(f"prune: expected finite weights, got NaN or infinity in {name}")


def shared_weights(net: nn.Module) -> dict[str, str]:
    """Say of each layer whose weight another module has too, which one that is."""
    owners: dict[int, list[tuple[str, nn.Module]]] = {}
    for name, module in net.named_modules():
        for p in module._parameters.values():
            if p is not None:
                owners.setdefault(id(p), []).append((name, module))
    found = {}
    for name, layer in prunable(net).items():
        others = [
            other
            for other, module in owners.get(id(layer._parameters.get("weight")), [])
            if module is not layer
        ]
        if others:
            found[name] = others[0]
    return found


def how_computed(module: nn.Module) -> str:
    """Say what computes a layer's weight and what to call first; empty if the weight is a parameter."""
    if isinstance(module._parameters.get("weight"), nn.Parameter):
        return ""
    if parametrize.is_parametrized(module, "weight"):
        return "a parametrisation; remove it first with torch.nn.utils.parametrize.remove_parametrizations"
    for hook in module._forward_pre_hooks.values():
        if type(hook).__name__ == "WeightNorm":
            return "weight normalisation; remove it first with torch.nn.utils.remove_weight_norm"
        if type(hook).__name__ == "SpectralNorm":
            return "spectral normalisation; remove it first with torch.nn.utils.remove_spectral_norm"
    return "its own module; make it a parameter first"


def read_batch(verb: str, model: nn.Module, batch: Any) -> Batch:
    """Read one batch, and refuse a pair of which the second part might be an input of the model.

    A pair is `(images, labels)` where the model takes one input, or where the second part can only be labels:
    whole numbers, or one number a sample.

    Args:
        verb: "prune" or "deploy", for the sentence.
        model: that the batch is for.
        batch: what the caller passed.

    Raises:
        TypeError: it is no batch.
        ValueError: the model takes several inputs, and the pair could be two of them.
    """
    if (
        isinstance(batch, list | tuple)
        and not isinstance(batch, Batch)
        and len(batch) > 1
        and isinstance(batch[0], Tensor)
    ):
        needed, taken = _inputs_of(model)
        second = batch[1]
        is_input = isinstance(second, Tensor) and second.is_floating_point() and second.ndim > 1
        if needed > 1 or (taken > 1 and is_input):
            raise ValueError(
                f"{verb}: expected a mapping of inputs by name for a model that takes {taken} inputs, got a "
                f"{type(batch).__name__} of {len(batch)}, of which only the first would be used; pass "
                f"{{{', '.join(f'{name!r}: ...' for name in _names_of(model)[:2])}}}"
            )
    return Batch.of(batch)


def _parameters(model: nn.Module) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(model.forward).parameters.values())
    except (TypeError, ValueError):  # of a forward in C
        return []


def _names_of(model: nn.Module) -> list[str]:
    return [p.name for p in _parameters(model) if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]


def _inputs_of(model: nn.Module) -> tuple[int, int]:
    """Count the inputs that a model's forward needs, and those that it takes by position."""
    names = set(_names_of(model))
    needed = sum(p.default is p.empty for p in _parameters(model) if p.name in names)
    any_number = any(p.kind is p.VAR_POSITIONAL for p in _parameters(model))
    return needed, len(names) + 2 * any_number


def read_batches(model: nn.Module, batches: Any) -> list[Batch]:
    """Read calibration batches once, and refuse those that are empty or not finite."""
    if isinstance(batches, Tensor | Mapping | str):
        raise ValueError(
            f"prune: expected an iterable of batches, got a {type(batches).__name__}; wrap one batch in a "
            "list"
        )
    found = [read_batch("prune", model, batch) for batch in batches]
    if not found:
        raise ValueError("prune: expected at least one batch of calibration images, got none")
    for i, x in enumerate(found):
        for tensor in x.tensors():
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise ValueError(f"prune: expected finite inputs, got NaN or infinity in batch {i}")
            if tensor.ndim == 0 or len(tensor) == 0:
                raise ValueError(
                    f"prune: expected batches of at least one sample, got an empty tensor in batch {i}"
                )
    return found


def other_kinds(net: nn.Module) -> dict[str, str]:
    """Return the modules whose weights are neither those of a Linear nor of a Conv2d, by name: their kinds.

    Normalisations and embeddings are not among them.
    """
    kinds = (_ConvNd, nn.Bilinear, nn.RNNBase)
    found = {name: module for name, module in net.named_modules() if isinstance(module, kinds)}
    return {name: type(x).__name__ for name, x in found.items() if not isinstance(x, nn.Conv2d)}


def check_outputs(first: list[Tensor], second: list[Tensor]) -> None:
    """Refuse a network whose outputs are not finite, or not the same twice.

    Args:
        first: floating-point outputs of a pass.
        second: of the same pass again.
    """
    for a, b in zip(first, second, strict=True):
        if not a.isfinite().all():
            raise ValueError(
                "prune: the dense network's output is not finite on the first batch; check weights and images"
            )
        atol = ROUNDING * a.abs().max().item() if a.numel() else 0.0
        if a.shape != b.shape or not torch.allclose(a, b, rtol=10 * ROUNDING, atol=atol):
            raise ValueError(
                "prune: expected a deterministic model, got two different outputs for the first batch; is "
                "dropout active, or something random in forward?"
            )


# of an output's largest entry: what other orders of adding move float32 by at most, two passes of dropout by
# more
ROUNDING = 1e-5


def autocast_off(model: Any) -> Any:
    """Compute in the weights' own precision, whatever is around the call."""
    first = next(iter(model.parameters()), None) if isinstance(model, nn.Module) else None
    return (
        torch.autocast(first.device.type, enabled=False)
        if first is not None and not first.is_meta
        else nullcontext()
    )
