"""Copies of a network to work on, and what becomes of them in the end."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from snows.networks.attention import close_attention, open_attention
from snows.networks.batches import Batch
from snows.networks.layers import copied, prunable
from snows.networks.masks import Carried, take_masks_off

CHECKPOINTING = (
    "grad_checkpointing",
    "gradient_checkpointing",
)  # of timm and transformers: nothing to save here


def working_copy(model: nn.Module) -> tuple[nn.Module, list[Carried]]:
    """Copy a network, with plain parameters and open attention.

    Returns:
        The copy, and the masks of `torch.nn.utils.prune` that came off; its layers' weights are what they
        were before masking.
    """
    net = copied(model)
    carried = take_masks_off(net)
    for entry in carried:
        if entry.is_weight:
            net.get_submodule(entry.module).get_parameter(entry.parameter).data.copy_(entry.original)
    open_attention(net)
    for module in net.modules():
        for key in CHECKPOINTING:
            if module.__dict__.get(key) is True:
                module.__dict__[key] = False
    return net, carried


def sharing(net: nn.Module) -> nn.Module:
    """Copy a network's modules, and none of its tensors."""
    return copy.deepcopy(net, {id(x): x for x in (*net.parameters(), *net.buffers())})


def as_it_came(
    net: nn.Module, model: nn.Module, carried: Sequence[Carried], masks: Mapping[str, Tensor]
) -> nn.Module:
    """Turn a working copy into a network like the model, in place.

    Attention is closed, memory formats and parametrisations are as they were.

    Args:
        net: the working copy.
        model: that it was made from.
        carried: masks of `torch.nn.utils.prune` that came off.
        masks: of the layers that were pruned, which take their place.
    """
    net.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    close_attention(net)
    layers = prunable(net)
    for name, layer in prunable(model).items():
        if name in layers:
            weight: Any = layers[name].weight
            if weight.shape == layer.weight.shape:
                weight.data = torch.empty_like(layer.weight).copy_(weight.data)
            elif weight.ndim == 4 and not layer.weight.is_contiguous():
                weight.data = weight.data.contiguous(memory_format=torch.channels_last)
    for entry in carried:
        new = masks.get(entry.layer) if entry.is_weight else None
        if new is None:
            net.get_submodule(entry.module).get_parameter(entry.parameter).data.copy_(entry.original)
        entry.back(net, entry.mask if new is None else new)
    modules = dict(net.named_modules())
    for name, original in model.named_modules():
        for key in CHECKPOINTING:
            if key in original.__dict__ and name in modules:
                modules[name].__dict__[key] = original.__dict__[key]
    return net


def hold_back(batches: Sequence[Batch]) -> tuple[list[Batch], Batch | None]:
    """Choose the batches to fit to, and the samples to judge by.

    Those are the last of the largest batches, or an eighth of the last with fewer than four batches.
    """
    if len(batches) >= 4:
        judge = max(range(len(batches)), key=lambda i: (batches[i].samples(), i))
        return [x for i, x in enumerate(batches) if i != judge], batches[judge]
    size = batches[-1].samples()
    parts = batches[-1].split(size - max(1, size // 8))
    return ([*batches[:-1], parts[0]], parts[1]) if len(parts) > 1 else (list(batches), None)
