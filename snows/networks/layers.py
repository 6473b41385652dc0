"""Layers of a network: which can be pruned, copies, and putting one module in another's place."""

from __future__ import annotations

import copy
import inspect
from typing import Any, TypeAlias

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from snows.networks.batches import first_line

Layer: TypeAlias = nn.Linear | nn.Conv2d

# An attribute of a module that units were taken out of, in builtin types alone, so that a whole network
# pickles without snows: by "weight:0" (tensor and dimension) the size that was and the entries that stay, by
# "num_heads" (an attribute) the number that was and the one that is.
LEFT = "units_left"


def prunable(model: nn.Module) -> dict[str, Layer]:
    """Return every Linear and Conv2d (and subclass), by name."""
    return {
        name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)
    }


def groups_of(module: nn.Module) -> int:
    """Return the groups of a convolution; 1 for a Linear."""
    return module.groups if isinstance(module, nn.Conv2d) else 1


def is_stock(module: nn.Module) -> bool:
    """Say whether a layer computes as PyTorch's own Linear or Conv2d does."""
    return type(module).forward in (nn.Linear.forward, nn.Conv2d.forward) and (
        not isinstance(module, nn.Conv2d) or type(module)._conv_forward is nn.Conv2d._conv_forward
    )


def has_hooks(module: nn.Module) -> bool:
    """Say whether hooks or a replaced forward make calling a module more than its class says."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks
    return bool(hooks) or "forward" in module.__dict__


def held_elsewhere(net: nn.Module) -> set[int]:
    """Find modules that an attribute holds too, in a list or dict that PyTorch does not know of.

    Another module put in their place would not be called through that attribute.

    Returns:
        The ids of the modules.
    """
    own, found = {id(m) for m in net.modules()}, set()
    for module in net.modules():
        for key, value in module.__dict__.items():
            if key not in ("_modules", "_parameters", "_buffers"):
                leaves = tree_leaves(value) if isinstance(value, list | tuple | dict) else [value]
                found |= {id(x) for x in leaves if isinstance(x, nn.Module) and id(x) in own}
    return found


def module_at(net: nn.Module, name: str, expected: str, allowed: tuple[type[nn.Module], ...]) -> nn.Module:
    """Find a module of one of several classes.

    Raises:
        ValueError: there is none of this name, or it is of none of the allowed classes.
    """
    try:
        module = net.get_submodule(name)
    except AttributeError:
        raise ValueError(f"there is no module {name}") from None
    if not isinstance(module, allowed):
        raise ValueError(f"{name} is a {type(module).__name__}, {expected}")
    return module


def substitute(net: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put a module in the place of another, under all its names; what that had left of its units is noted."""
    if LEFT in old.__dict__:
        new.__dict__[LEFT] = old.__dict__[LEFT]
    for parent in list(net.modules()):
        for key, child in parent._modules.items():
            if child is old:
                parent._modules[key] = new


def copied(model: nn.Module) -> nn.Module:
    """Make a deep copy, also of a network under `torch.nn.utils.prune`.

    PyTorch refuses to copy the weights that such a network has computed.

    Raises:
        ValueError: something in it cannot be copied, or a module's forward was replaced by a function that
            holds on to the original.
    """
    for name, module in model.named_modules():
        _refuse_captured(model, name, module)
    computed = [
        (m, name, x)
        for m in model.modules()
        for name, x in m.__dict__.items()
        if isinstance(x, Tensor) and not x.is_leaf
    ]
    for module, name, x in computed:
        module.__dict__[name] = x.detach()
    try:
        return copy.deepcopy(model)
    except Exception as error:  # whatever an attribute's own __deepcopy__ or __reduce__ raises
        raise ValueError(
            f"the model cannot be copied{_uncopyable(model)} ({first_line(error)}); remove the attribute "
            "first"
        ) from error
    finally:
        for module, name, x in computed:
            module.__dict__[name] = x


def _refuse_captured(model: nn.Module, name: str, module: nn.Module) -> None:
    """Refuse a forward that captured one of its modules.

    Its copy would go on computing with the original's weights.
    """
    for key, function in module.__dict__.items():
        if not inspect.isfunction(function):
            continue
        held = inspect.getclosurevars(function)
        for value in (*held.nonlocals.values(), *held.globals.values()):
            owner: Any = getattr(value, "__self__", value)
            if isinstance(owner, nn.Module) and any(owner is m for m in model.modules()):
                what = f"the {key} of {name or 'the model'}"
                was = "was replaced by" if key == "forward" else "is"
                raise ValueError(
                    f"{what} {was} a function that holds on to its module, so that a copy would compute with "
                    "the original's weights; put it in a subclass, or bind it with types.MethodType"
                )


def _uncopyable(model: nn.Module) -> str:
    """Name the first attribute that cannot be copied alone."""
    for name, module in model.named_modules():
        for key, value in module.__dict__.items():
            if key in ("_modules", "_parameters", "_buffers"):
                continue
            try:
                copy.deepcopy(value)
            except Exception:
                return (
                    f": {name}.{key} is a {type(value).__name__}"
                    if name
                    else f": its {key} is a {type(value).__name__}"
                )
    return ""
