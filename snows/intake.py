"""What `prune` and `deploy` are given: checked once, before any work is done; and the copy that is worked on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from snows import network
from snows.layers import SparseConv2d, SparseLinear
from snows.network import Carried, Inputs, Order
from snows.sparsity import Pattern


def check_model(verb: str, model: Any) -> None:
    """Refuse what is no network in evaluation mode with dense weights that have values.

    Args:
        verb: "prune" or "deploy", for the sentence.
        model: what the caller passed.

    Raises:
        TypeError: it is no `nn.Module`.
        ValueError: it was compiled or scripted, is in training mode, packed, without parameters, or on the meta device.
    """
    if not isinstance(model, nn.Module):
        advice = "; pass the nn.Module that it was exported from" if isinstance(model, torch.export.ExportedProgram) else ""
        raise TypeError(f"{verb}: expected an nn.Module, got {type(model).__name__}{advice}")
    for name, module in model.named_modules():
        owner = name or "the model"
        if hasattr(module, "_orig_mod"):
            where = f"{name}._orig_mod in the place of {name}" if name else "model._orig_mod"
            raise ValueError(f"{verb}: expected a model as it was before torch.compile, but {owner} is compiled; pass {where}, and compile "
                             "what comes back")
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError(f"{verb}: expected ordinary modules, but {owner} is TorchScript, whose operations cannot be watched; pass the "
                             "nn.Module that it was made from")
        if isinstance(module, torch.fx.GraphModule) and "_guards_fn" in dict(module.named_children()):
            raise ValueError(f"{verb}: expected ordinary modules, but {owner} was made by torch.export, which fixes shapes; pass the nn.Module "
                             "that it was exported from")
    for name, module in model.named_modules():
        if module.training:
            raise ValueError(f"{verb}: expected a model in evaluation mode, but {name or 'it'} is in training mode; call model.eval() first")
        if isinstance(module, SparseLinear | SparseConv2d):
            raise ValueError(f"{verb}: expected a model that is not packed yet, but {name or 'it'} is packed already; take the network it was "
                             "made from")
    if next(model.parameters(), None) is None:
        raise ValueError(f"{verb}: expected a model with weights, got one without parameters")
    for name, p in model.named_parameters():
        if p.is_meta:
            raise ValueError(f"{verb}: expected weights with values, got {name} on the meta device; load the weights first")


def check_numbers(model: nn.Module) -> None:
    """Refuse weights in 16 bits or not finite, and calls under `torch.inference_mode`."""
    if torch.is_inference_mode_enabled():
        raise ValueError("prune: expected to be called outside torch.inference_mode(), where nothing can be differentiated")
    for name, p in model.named_parameters():
        if p.dtype in (torch.float16, torch.bfloat16):
            raise ValueError(f"prune: expected float32 or float64 weights, got {name} in {p.dtype}; call model.float() first")
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
    for name, layer in network.prunable(net).items():
        others = [other for other, module in owners.get(id(layer._parameters.get("weight")), []) if module is not layer]
        if others:
            found[name] = others[0]
    return found


def how_computed(module: nn.Module) -> str:
    """Say what to call before pruning a layer whose weight is computed from other parameters; empty if its weight is a parameter."""
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


def read_batches(batches: Any) -> list[Inputs]:
    """Read calibration batches once, and refuse those that are empty or not finite."""
    if isinstance(batches, Tensor | Mapping | str):
        raise ValueError(f"prune: expected an iterable of batches, got a {type(batches).__name__}; wrap one batch in a list")
    inputs = [network.as_inputs(batch) for batch in batches]
    if not inputs:
        raise ValueError("prune: expected at least one batch of calibration images, got none")
    for i, x in enumerate(inputs):
        for tensor in x.tensors():
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise ValueError(f"prune: expected finite inputs, got NaN or infinity in batch {i}")
            if tensor.ndim == 0 or len(tensor) == 0:
                raise ValueError(f"prune: expected batches of at least one sample, got an empty tensor in batch {i}")
    return inputs


def check_forward(net: nn.Module, inputs: Sequence[Inputs], order: Order, device: torch.device) -> None:
    """Refuse a network whose output is not finite or not the same twice, that casts for itself, or cannot run all kinds of batches."""
    if order.autocast:
        raise ValueError(f"prune: expected a model that computes in its weights' precision, but {order.autocast} runs under torch.autocast "
                         "inside the model's forward; remove that, and use autocast around the pruned network")
    first = network.output_tensors(order.output)
    with torch.no_grad(), network.plain_forward():
        second = network.output_tensors(network.output_of(net, inputs[0].to(device)))
    for a, b in zip(first, second, strict=True):
        if not a.isfinite().all():
            raise ValueError("prune: the dense network's output is not finite on the first batch; check weights and images")
        if a.shape != b.shape or not torch.allclose(a, b, rtol=1e-4, atol=1e-5 * a.abs().max().item() if a.numel() else 0.0):
            raise ValueError("prune: expected a deterministic model, got two different outputs for the first batch; is "
                             "dropout active, or something random in forward?")
    seen: set[tuple[tuple[torch.dtype, torch.Size], ...]] = set()
    for x in inputs:  # of each kind one
        kind = tuple((t.dtype, t.shape[1:]) for t in x.tensors())
        if kind not in seen and seen:
            with torch.no_grad(), network.plain_forward():
                network.output_of(net, x.to(device))
        seen.add(kind)


def working_copy(model: nn.Module) -> tuple[nn.Module, list[Carried]]:
    """Copy a network, with plain parameters and open attention.

    Returns:
        The copy, and the masks of `torch.nn.utils.prune` that came off; the weights of its layers are what they were before masking.
    """
    net = network.copied(model)
    carried = network.take_masks_off(net)
    for entry in carried:
        if entry.is_weight:
            net.get_submodule(entry.module).get_parameter(entry.parameter).data.copy_(entry.original)
    network.open_attention(net)
    return net, carried


def prefer_channels_last(nets: Sequence[nn.Module], inputs: Inputs) -> None:
    """Lay convolutions out channels-last, up to three times faster on a CPU, unless the network cannot run that way."""
    try:
        for net in nets:
            net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        with torch.no_grad():
            nets[0](*inputs.args, **inputs.kwargs)
    except RuntimeError:  # a view that needs the other layout
        for net in nets:
            net.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]


def given_masks(model: nn.Module, select: Any, pattern: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Read masks and start weights from elsewhere, by layer; empty when `select` is a rule.

    Args:
        model: the network to prune.
        select: a rule, masks by layer name (bool, or numbers that are all 0 or 1; `layer` or `layer.weight`), or a pruned network.
        pattern: as `prune` got it.
    """
    if pattern is not None and not (isinstance(pattern, Pattern | Mapping) or callable(pattern)):
        raise TypeError(f"prune: expected a pattern such as snows.NM(2, 4) or snows.Unstructured(0.7), got {pattern!r}; "
                        "snows.parse_pattern reads texts")
    opened, carried = working_copy(model)
    layers = network.prunable(opened)
    if not isinstance(select, Mapping | nn.Module):
        if not callable(select):
            raise TypeError(f"prune: expected select to be a rule, masks by layer name, or a pruned network, got {type(select).__name__}")
        if pruned := [x.layer for x in carried if x.is_weight and x.layer in layers]:
            raise ValueError(f"prune: {pruned[0]} carries a mask of torch.nn.utils.prune; pass select=model to keep the masks, "
                             "or remove them first (torch.nn.utils.prune.remove)")
        if pattern is None:
            raise ValueError("prune: expected a pattern such as NM(2, 4) or Unstructured(0.7), got None without masks")
        return {}, {}
    if isinstance(select, nn.Module):
        closed = network.copied(select)
        masks = {x.layer: x.mask for x in network.take_masks_off(closed) if x.is_weight}
        network.open_attention(closed)
        sources = network.prunable(closed)
        if sources.keys() != layers.keys():
            raise ValueError("prune: expected select to be a pruned copy of the model, got a network with other layers: "
                             f"{sorted(sources.keys() ^ layers.keys())[:5]}")
        for name, module in sources.items():
            masks.setdefault(name, module.weight.detach() != 0)
        masks = {name: mask for name, mask in masks.items() if name in sources and not mask.all()}
        starts = {name: sources[name].weight.detach() for name in masks}
    else:
        masks = {_layer_of(key, layers): mask for key, mask in select.items()}
        starts = {name: layers[name].weight.detach() for name in masks}
    for name, mask in masks.items():
        masks[name] = _as_mask(name, mask, layers[name].weight.shape)
        starts[name] = (starts[name] * masks[name].to(starts[name].device)).clone()
    if not masks:
        raise ValueError("prune: expected select to hold masks, got none; a pruned network needs zeros in its weights")
    return masks, starts


def _layer_of(key: Any, layers: Mapping[str, nn.Module]) -> str:
    """The layer that a mask's key names."""
    for name in (key, str(key).removesuffix(".weight")):
        if name in layers:
            return str(name)
    raise ValueError(f"prune: expected masks for layers of the model, got one for {key!r}; the layers are {', '.join(list(layers)[:8])}, ...")


def _as_mask(name: str, mask: Any, shape: torch.Size) -> Tensor:
    """A mask as bool of the weight's shape; numbers that are all 0 or 1 are read as such."""
    if isinstance(mask, Tensor) and mask.dtype != torch.bool and not mask.is_complex() and ((mask == 0) | (mask == 1)).all():
        mask = mask.bool()
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != shape:
        got = f"{mask.dtype} of {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"prune: expected the mask of {name} to be torch.bool, or zeros and ones, of {tuple(shape)}, got {got}")
    return mask
