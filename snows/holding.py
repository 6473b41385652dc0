"""`hold`: the zeros of a pruned network stay zero while it is trained further.

Two hooks do it. One masks the gradient of each held weight when it has been accumulated, so that norms which
clip it and averages which an optimizer keeps are those of the pruned network. The other masks the weights
again after every step of an optimizer that moves them, because momentum from before, noise, or a compressed
sum over processes may change a weight whose gradient is zero. Both look up weight and mask when they run:
these may have been moved to another device since.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from snows.layers.base import PackedLayer
from snows.networks.attention import PROJECTIONS
from snows.networks.checks import how_computed
from snows.networks.implants import LowRank
from snows.networks.layers import LEFT
from snows.networks.masks import give_mask, kept_mask, mask_of

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes

# by module and prefix of a weight: how many handles need the mask that was read from its zeros
_readers: weakref.WeakKeyDictionary[nn.Module, Counter[str]] = weakref.WeakKeyDictionary()


class Held:
    """Keep zeros at zero until `remove` is called, or to the end of a `with` block.

    A copy of a handle, and a copy of a network, hold nothing.

    Attributes:
        weights: the names of the parameters that are held.

    Args:
        found: the module and the prefix of each weight, by the parameter's name.
        read: names of those whose mask was read from their zeros; the last `remove` takes it away again.
    """

    def __init__(self, found: Mapping[str, tuple[nn.Module, str]], read: Collection[str] = ()) -> None:
        self.weights = tuple(found)
        self._read = [(weakref.ref(found[name][0]), found[name][1]) for name in read]
        for name in read:
            module, prefix = found[name]
            _readers.setdefault(module, Counter())[prefix] += 1
        # weak, because PyTorch keeps the hook of all optimizers as long as the process lives
        held: weakref.WeakKeyDictionary[nn.Module, list[str]] = weakref.WeakKeyDictionary()
        for layer, prefix in found.values():
            held.setdefault(layer, []).append(prefix)
        self._hooks = [register_optimizer_step_post_hook(_after_step(held))] if held else []
        for layer, prefix in found.values():
            weight = layer.get_parameter(f"{prefix}weight")
            trained = weight.requires_grad
            weight.requires_grad_(True)  # what is frozen takes no hook, and may be trained later
            self._hooks.append(weight.register_post_accumulate_grad_hook(_after_gradient(layer, prefix)))
            weight.requires_grad_(trained)

    def remove(self) -> None:
        """Let go: from now on an optimizer may change every weight."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        for layer, prefix in self._read:
            if (module := layer()) is not None:
                _readers[module][prefix] -= 1
                if not _readers[module][prefix]:
                    give_mask(module, None, prefix)
        self._read.clear()

    def __enter__(self) -> Held:
        return self

    def __exit__(self, *raised: object) -> None:
        self.remove()

    def __reduce__(self) -> tuple[type[Held], tuple[dict[str, Any]]]:
        return Held, ({},)

    def __repr__(self) -> str:
        state = ", removed" if self.weights and not self._hooks else ""
        return f"Held({len(self.weights)} weights{state})"


def hold(network: nn.Module) -> Held:
    """Keep every pruned weight of a network at zero in training, with any optimizer, until told otherwise.

    The optimizer may be made before or after, and the network wrapped or compiled before or after. Keys of
    the `state_dict` do not change. A weight without a mask beside it that has zeros gets its mask from them,
    as `mask_of` reads it, unless it is zero throughout: then it was initialised, and not pruned.

    Args:
        network: what `prune` returned, or another network with zeros in the weights of its Linear and Conv2d
            layers and its attention; also in a `DistributedDataParallel` or compiled by `torch.compile`. One
            whose units were taken out, or that masks itself by `torch.nn.utils.prune`, needs nothing, and
            gets a handle that does nothing.

    Returns:
        A handle: `handle.remove()` ends it, as does the end of `with snows.hold(network):`.

    Raises:
        ValueError: there is nothing to hold; a layer is packed; a weight is not zero off its mask, computed
            by a parametrisation, or spread over processes.
    """
    network = getattr(network, "network", network) if not isinstance(network, nn.Module) else network
    if not isinstance(network, nn.Module):
        raise TypeError(f"hold: expected a network, got {type(network).__name__}")
    found: dict[str, tuple[nn.Module, str]] = {}
    read: dict[str, Tensor] = {}
    needs_nothing = False
    for name, module in network.named_modules():
        if isinstance(module, PackedLayer):
            raise ValueError(
                f"hold: expected layers with weights to train, got {name or 'the network'}, which is packed; "
                "hold and train the pruned network, then deploy it"
            )
        needs_nothing |= LEFT in module.__dict__ or isinstance(module, LowRank)
        for prefix in _prefixes(module):
            weight = f"{name}.{prefix}weight".lstrip(".")
            if f"{prefix}weight_mask" in module._buffers:  # torch.nn.utils.prune masks in every pass
                needs_nothing = True
            elif (mask := _zeros(module, prefix, weight)) is not None:
                found[weight] = module, prefix
                if kept_mask(module, prefix) is None or _readers.get(module, Counter())[prefix]:
                    read[weight] = mask
    if not found and not needs_nothing:
        raise ValueError(
            "hold: expected a pruned network, got one without masks and without zeros in its layers; prune "
            "it first, or train it as it is"
        )
    for weight, mask in read.items():  # all layers are in order
        module, prefix = found[weight]
        give_mask(module, mask, prefix)
    return Held(found, read)


def _prefixes(module: nn.Module) -> Iterator[str]:
    """Say what stands before `weight` in the names of a module's prunable weights."""
    if isinstance(module, nn.Linear | nn.Conv2d):
        yield ""
    elif isinstance(module, nn.MultiheadAttention):
        yield from (f"{part}_" for part in PROJECTIONS)


def _zeros(module: nn.Module, prefix: str, name: str) -> Tensor | None:
    """Return the mask of a weight that has zeros to hold; None where it has none."""
    weight, kept = module._parameters.get(f"{prefix}weight"), kept_mask(module, prefix)
    layer = name.removesuffix("weight").rstrip("._") or "the network"
    if weight is None:
        if kept is not None:
            raise ValueError(f"hold: the weight of {layer} is computed by {how_computed(module)}")
        return None
    if type(weight.detach()) is not Tensor:
        raise ValueError(
            f"hold: expected the weight of {layer} to lie whole on one device, got a "
            f"{type(weight.detach()).__name__}; hold a network that is not sharded"
        )
    mask = mask_of(module, layer, prefix)
    if kept is None and (bool(mask.all()) or not bool(mask.any())):
        return None
    return mask


def _after_gradient(layer: nn.Module, prefix: str) -> Callable[[Tensor], None]:
    """Make the hook that masks a weight's gradient."""
    held = weakref.ref(layer)  # a hook that held the layer would keep its weight, which holds the hook, alive

    def hook(weight: Tensor) -> None:
        layer = held()
        mask = None if layer is None else kept_mask(layer, prefix)
        if mask is not None and weight.grad is not None:  # an earlier hook may have stepped and let it go
            _clear(weight.grad, mask)

    return hook


def _after_step(
    held: weakref.WeakKeyDictionary[nn.Module, list[str]],
) -> Callable[[Optimizer, Any, Any], None]:
    """Make the hook that masks the weights which an optimizer has moved."""

    @torch.no_grad()
    def hook(optimizer: Optimizer, *_: Any) -> None:
        # Others are left alone: their graph may be waiting for a backward pass, as a generator's does.
        moved = {id(x) for group in optimizer.param_groups for x in group["params"]}
        for layer, prefixes in held.items():
            for prefix in prefixes:
                weight, mask = layer._parameters.get(f"{prefix}weight"), kept_mask(layer, prefix)
                if weight is not None and mask is not None and id(weight) in moved:
                    _clear(weight, mask)

    return hook


def _clear(x: Tensor, mask: Tensor) -> None:
    """Set entries to zero where the mask is False, whatever they were, in place.

    A product of their bits, as whole numbers, takes a seventh of the time of `masked_fill_`, and clears NaN
    too.
    """
    if x.element_size() in _INTEGERS:
        x.detach().view(_INTEGERS[x.element_size()]).mul_(mask)
    else:  # complex128
        x.detach().masked_fill_(~mask, 0)
