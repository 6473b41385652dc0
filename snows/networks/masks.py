"""Masks beside their weights: of `prune`, of `torch.nn.utils.prune`, or read from a weight's zeros."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

# a buffer that is not in the state_dict, so that a pruned network keeps the keys of the dense one
MASK = "pruning_mask"


def give_mask(module: nn.Module, mask: Tensor | None, prefix: str = "") -> None:
    """Keep a mask beside a module's weight, or take it away.

    Args:
        module: a layer; or an `nn.MultiheadAttention`, whose projections are told apart by `prefix`, such as
            `in_proj_`.
        mask: bool, of the weight's shape; None for none.
        prefix: of the weight's name.
    """
    name = prefix + MASK
    if mask is not None:
        module.register_buffer(name, mask, persistent=False)
    elif name in module._buffers:
        delattr(module, name)


def kept_mask(module: nn.Module, prefix: str = "") -> Tensor | None:
    """Return the mask that `give_mask` put beside a weight, if there is one."""
    return module._buffers.get(prefix + MASK)


def mask_of(layer: nn.Module, name: str = "the layer", prefix: str = "") -> Tensor:
    """Return the mask of a layer's weight: the one that lies beside it, else where the weight is not zero.

    Args:
        layer: with a `weight`.
        name: of the layer, for the error.
        prefix: of the weight's name, as in `give_mask`.

    Returns:
        bool, weight.shape.

    Raises:
        ValueError: the weight is not zero off the mask beside it: it was changed after pruning.
    """
    weight: Tensor = getattr(layer, f"{prefix}weight").detach()
    mask = kept_mask(layer, prefix)
    if mask is None:
        return weight != 0
    if mask.shape != weight.shape or bool((weight.masked_fill(mask, 0) != 0).any()):
        raise ValueError(
            f"expected the weight of {name} to be zero off its mask, got other values there; it was changed "
            f"after pruning: multiply it by its {prefix}{MASK}, and train under snows.hold, or prune again"
        )
    return mask


@dataclass(frozen=True)
class Carried:
    """Describe a parametrisation of `torch.nn.utils.prune` that a network carries.

    Attributes:
        module: whose parameter it is, by name.
        parameter: its name there.
        original: the parameter before masking.
        mask: of its shape, bool.
    """

    module: str
    parameter: str
    original: Tensor
    mask: Tensor

    @property
    def layer(self) -> str:
        """The name of the layer whose weight it is, in a network whose attention is open."""
        inside = self.parameter.removesuffix("_weight") if self.parameter.endswith("proj_weight") else ""
        return ".".join(x for x in (self.module, inside) if x)

    @property
    def is_weight(self) -> bool:
        """Whether it masks a weight, and not a bias."""
        return self.parameter == "weight" or self.parameter.endswith("proj_weight")

    def back(self, net: nn.Module, mask: Tensor) -> None:
        """Put the parametrisation back on a network's parameter, with this mask."""
        torch_prune.custom_from_mask(net.get_submodule(self.module), self.parameter, mask)


def take_masks_off(net: nn.Module) -> list[Carried]:
    """Make all parametrisations of `torch.nn.utils.prune` permanent, in place, and return what they were."""
    found = []
    for name, module in net.named_modules():
        for parameter in [key.removesuffix("_orig") for key in module._parameters if key.endswith("_orig")]:
            if f"{parameter}_mask" in module._buffers:
                original = module.get_parameter(f"{parameter}_orig").detach().clone()
                found.append(
                    Carried(name, parameter, original, module.get_buffer(f"{parameter}_mask").bool())
                )
                torch_prune.remove(module, parameter)
    return found


def masks_in(net: nn.Module) -> dict[str, Tensor]:
    """Read the masks of a network's layers, by name: those beside weights, else where a weight has zeros.

    Args:
        net: with open attention and without parametrisations.
    """
    found = {}
    for name, module in net.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            mask = mask_of(module, name)
            if not bool(torch.all(mask)):
                found[name] = mask
    return found
