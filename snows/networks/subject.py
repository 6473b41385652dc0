"""A pruned network made ready to be packed: copied, its attention opened, its normalisations folded."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from snows.networks.attention import close_attention
from snows.networks.batches import Batch, outputs
from snows.networks.checks import check_model, read_batch
from snows.networks.edits import SMALLER, Edit, Fold, edits_of, openings
from snows.networks.folding import activations, fold_normalisations
from snows.networks.layers import Layer, copied, prunable
from snows.networks.masks import mask_of, take_masks_off
from snows.networks.trace import Trace, Use


class Subject:
    """Hold a pruned network ready to be packed, and the example that it is measured on.

    Attributes:
        model: the network as it came; left as it was.
        given: the example, on the model's device and in the precision of its first layer.
        batch: the example in the precision of the result.
        expected: the floating-point tensors that the model returns for it.
        network: a copy with open attention and folded normalisations, in the precision of the result.
        edits: that made it.
        trace: of it.

    Args:
        model: in evaluation mode, with zeros in its weights, or smaller than it was.
        example: one batch, as `deploy` takes it.
        dtype: of the result; None keeps the model's.

    Raises:
        ValueError: the model cannot be deployed or cannot run the example; the sentence says why.
    """

    def __init__(self, model: nn.Module, example: Any, dtype: torch.dtype | None) -> None:
        check_model("deploy", model)
        _check_finite(model)
        self.model = model
        self.given = _like(model, read_batch("deploy", model, example))
        if not all(x.isfinite().all() for x in self.given.tensors() if x.is_floating_point()):
            raise ValueError("deploy: expected a finite example, got NaN or infinity in it")
        self.expected: list[Tensor] = outputs(model, self.given)
        self.network = copied(model)
        take_masks_off(self.network)
        self.edits: list[Edit] = openings(self.network)
        for edit in self.edits:
            edit.apply(self.network)
        whole = all(mask_of(layer, name).all() for name, layer in prunable(self.network).items())
        if whole and not any(isinstance(edit, SMALLER) for edit in edits_of(self.network)):
            raise ValueError(
                "deploy: expected a model with zeros in its Linear or Conv2d weights, got none; "
                "prune it first"
            )
        self.trace = Trace.of(self.network, self.given.map(torch.clone))
        self.trace.outputs = []
        folded = fold_normalisations(self.network, self.given, self.trace)
        self.edits += folded
        self._activations = activations(self.trace, folded)
        self.batch = self.given
        if dtype is not None:
            self.network.to(dtype)
            self.batch = self.given.map(lambda x: x.to(dtype) if x.is_floating_point() else x)

    @property
    def on_cpu(self) -> bool:
        """Whether the network runs on the CPU."""
        return self.device == "cpu"

    def layers(self, convolutions: bool = False) -> dict[str, tuple[Layer, Use]]:
        """Return layers and how the network applies them, in order of execution.

        Args:
            convolutions: with those that have no zeros; other layers are returned if they have.
        """
        layers = prunable(self.network)
        return {
            name: (layers[name], use)
            for name, use in self.trace.layers.items()
            if (convolutions and isinstance(layers[name], nn.Conv2d)) or not mask_of(layers[name], name).all()
        }

    def activation(self, layer: str) -> tuple[str, nn.Module] | None:
        """Return name and module of the activation that alone reads a layer's output, if there is one."""
        name = self._activations.get(layer)
        return None if name is None else (name, self.network.get_submodule(name))

    def dense(self) -> tuple[nn.Module, list[Edit]]:
        """Copy the network as it runs with dense layers; return the copy and its edits."""
        net = copied(self.network)
        close_attention(net)
        return net, [edit for edit in self.edits if isinstance(edit, Fold)]

    def flops(self, packed: Collection[str]) -> tuple[int, int]:
        """Count the operations of the layers: of all weights, and of packed layers those that are kept.

        Args:
            packed: names of layers.
        """
        layers, kept = prunable(self.network), 0
        for name, use in self.trace.layers.items():
            share = float(mask_of(layers[name], name).double().mean()) if name in packed else 1.0
            kept += round(use.flops * share)
        return self.trace.flops, kept

    @property
    def device(self) -> str:
        """The type of the device that is measured."""
        return self.given.tensors()[0].device.type


def _check_finite(model: nn.Module) -> None:
    for name, p in model.named_parameters():
        if not p.isfinite().all():
            raise ValueError(f"deploy: expected finite weights, got NaN or infinity in {name}")


def _like(model: nn.Module, batch: Batch) -> Batch:
    """Bring a batch to the model's device, in the precision of its first layer.

    Other parameters, the first of all too, may have a precision of their own.
    """
    like = next((layer.weight for layer in prunable(model).values()), next(model.parameters()))
    return batch.map(lambda x: x.to(like.device, like.dtype if x.is_floating_point() else None))
