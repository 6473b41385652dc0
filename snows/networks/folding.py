"""Normalisations and activations that the layers before them can compute too, proved on an example."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from snows.networks.batches import Batch, difference, outputs
from snows.networks.edits import Fold
from snows.networks.layers import Layer, copied, is_stock
from snows.networks.masks import give_mask, kept_mask
from snows.networks.trace import Trace, Use
from snows.ops.precision import products_in

FOLDING_ERROR = 1e-5  # of an output's largest entry; edits that move an output by more are not made


def folds(trace: Trace) -> list[Fold]:
    """List each evaluated BatchNorm2d that can go into the convolution whose output it alone reads."""
    found = []
    for name, use in trace.layers.items():
        follower = trace.follower(use.value, (nn.BatchNorm2d,))
        if not follower or use.oddity or len(trace.readers(use.value)) != 1 or trace.called[name] != 1:
            continue
        norm = trace.net.get_submodule(follower[0])
        is_conv = isinstance(trace.net.get_submodule(name), nn.Conv2d)
        if is_conv and norm.running_mean is not None and follower[0] in trace.chains:
            found.append(Fold(name, follower[0]))
    return found


def activations(trace: Trace, folded: Iterable[Fold]) -> dict[str, str]:
    """Return, by layer, the ReLU or GELU module that alone reads its output.

    A folded normalisation may stand between.
    """
    norms = {edit.convolution for edit in folded}
    found = {}
    for name, use in trace.layers.items():
        value = use.value
        if name in norms:
            value = trace.readers(value)[0].makes[0]
        follower = trace.follower(value, (nn.ReLU, nn.GELU)) if trace.called[name] == 1 else None
        module = trace.net.get_submodule(follower[0]) if follower else None
        if (
            follower
            and type(module) in (nn.ReLU, nn.GELU)
            and getattr(module, "approximate", "none") == "none"
        ):
            found[name] = follower[0]
    return found


@products_in("float32")  # TF32's rounding would move outputs by more than the edits may
def proved(net: nn.Module, edits: list[Fold], batch: Batch) -> list[Fold]:
    """Return the edits that leave a network's outputs alone.

    They are tried together on a copy, and one by one where that fails.
    """
    before = outputs(net, batch)
    if not edits or not before:  # nothing to compare
        return []
    tolerance = max(
        [FOLDING_ERROR, *(8 * torch.finfo(x.dtype).eps for x in before if x.dtype != torch.float64)]
    )

    def leave_alone(tried: list[Fold]) -> bool:
        copy = copied(net)
        for edit in tried:
            edit.apply(copy)
        return difference(before, outputs(copy, batch)) <= tolerance

    if leave_alone(edits):
        return edits
    kept: list[Fold] = []
    for edit in edits:
        if leave_alone([*kept, edit]):
            kept.append(edit)
    return kept


def fold_normalisations(net: nn.Module, batch: Batch, trace: Trace) -> list[Fold]:
    """Fold each BatchNorm that can be into the convolution before it, in place; return the edits made."""
    made = proved(net, folds(trace), batch)
    for edit in made:
        edit.apply(net)
    return made


def stock(layer: Layer, use: Use) -> Layer:
    """Return a layer as one of PyTorch's own classes, over the same parameters and mask."""
    if is_stock(layer):
        return layer
    if isinstance(layer, nn.Linear):
        new: Layer = nn.Linear(
            layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta"
        )
    else:
        conv2d: Any = nn.Conv2d  # whose annotations ask for pairs
        new = conv2d(
            layer.in_channels,
            layer.out_channels,
            use.kernel,
            **use.settings,
            bias=layer.bias is not None,
            device="meta",
        )
    new.weight, new.bias = layer.weight, layer.bias
    give_mask(new, kept_mask(layer))
    return new.train(layer.training)
