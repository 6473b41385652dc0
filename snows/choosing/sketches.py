"""Networks with zeros chosen by magnitude, to find out what they take before any weight is fitted."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from snows.choosing.options import Zeros
from snows.choosing.packing import Terms, packed_ways
from snows.layers.conv2d import INNERMOST, SparseConv2d
from snows.networks.attention import close_attention
from snows.networks.batches import Batch, outputs
from snows.networks.edits import Pack
from snows.networks.folding import fold_normalisations, stock
from snows.networks.layers import copied, groups_of, prunable
from snows.networks.masks import give_mask, mask_of
from snows.networks.subject import Subject
from snows.networks.trace import Trace


def masked(net: nn.Module, patterns: Mapping[str, Zeros]) -> dict[str, Tensor]:
    """Make the smallest weights of layers zero, in place, and return the masks.

    Args:
        net: with open attention.
        patterns: by layer.
    """
    layers, masks = prunable(net), {}
    for name, pattern in patterns.items():
        layer = layers[name]
        masks[name] = pattern.mask(layer.weight.detach().abs())
        with torch.no_grad():
            layer.weight.mul_(masks[name])
        give_mask(layer, masks[name])
    return masks


def folded(net: nn.Module, example: Batch) -> nn.Module:
    """Copy a network with its normalisations folded, as `deploy` would leave it without zeros.

    Args:
        net: in evaluation mode.
        example: that folding is proved on.
    """
    net = copied(net)
    fold_normalisations(net, example, Trace.of(net, example.map(torch.clone)))
    return net


def folded_and_packed(net: nn.Module, example: Batch, layers: Collection[str]) -> tuple[nn.Module, nn.Module]:
    """Copy a network twice, as `deploy` would leave it: with dense layers, and with packed ones.

    Args:
        net: with masks beside its weights.
        example: that it is run on.
        layers: that are packed, but for those that `deploy` cannot pack; others stay dense, whatever zeros
            they came with.
    """
    subject = Subject(net, example, None)
    dense, _ = subject.dense()
    terms = Terms(innermost=subject.on_cpu and example.samples() % INNERMOST == 0)
    for name, (layer, use) in subject.layers().items():
        if name not in layers or use.oddity or groups_of(layer) > 1:
            continue
        own, activation = stock(layer, use), subject.activation(name)
        packed = packed_ways(own, mask_of(own, name), activation, terms)[0]
        Pack.of(name, packed, activation[0] if activation is not None else "").put(subject.network, packed)
    close_attention(subject.network)
    if terms.innermost and not _runs(subject.network, example):
        for module in subject.network.modules():
            if isinstance(module, SparseConv2d):
                module.innermost = False
    return dense, subject.network


def _runs(net: nn.Module, example: Batch) -> bool:
    """Say whether a network runs: its forward may take views that images innermost do not allow."""
    try:
        outputs(net, example)
    except ValueError:
        return False
    return True
