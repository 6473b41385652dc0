"""Masks from elsewhere: by layer, or those of a network that is already pruned."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from snows.matching.statistics import LayerStatistics, Selector
from snows.networks.attention import open_attention
from snows.networks.checks import how_computed, shared_weights
from snows.networks.functions import known
from snows.networks.layers import copied, prunable
from snows.networks.masks import masks_in, take_masks_off
from snows.networks.twins import Twins
from snows.sparsity import MaskedWeight, Pattern

PatternChoice: TypeAlias = Pattern | Mapping[str, Pattern] | Callable[[str, nn.Module], Pattern | None] | None
Choosing: TypeAlias = Selector | Mapping[str, Tensor] | nn.Module
Only: TypeAlias = Callable[[str, nn.Module], bool]
LayerChoice: TypeAlias = Only | str | Sequence[str]


def ends(twins: Twins) -> dict[str, str]:
    """Name the layers that run first and last, also where their weights are shared or computed.

    Returns:
        By layer, "first layer" or "last layer"; nothing of a network with fewer than three layers.
    """
    layers = set(prunable(twins.sparse))
    events = [x for x in twins.trace.events if known(x.function).arguments]
    ran = [x for x in ({event.module, event.layer} & layers for event in events) if x]
    if len(set[str]().union(*ran)) < 3:
        return {}
    return dict.fromkeys(ran[-1], "last layer") | dict.fromkeys(ran[0], "first layer")


def unfit(twins: Twins) -> dict[str, str]:
    """Say of layers that cannot be pruned, whatever is asked, what prevents it."""
    shared, found = shared_weights(twins.dense) | shared_weights(twins.sparse), {}  # a cut ends sharing
    for name, layer in prunable(twins.sparse).items():
        if name in shared:
            found[name] = f"it shares its weight with {shared[name] or 'the network itself'}"
        elif how := how_computed(layer):
            found[name] = f"its weight is computed by {how}"
        elif (calls := twins.calls.get(name, 0)) > 1:
            found[name] = f"it is called {calls} times in one forward pass"
    return found


def selected(argument: str, asked: LayerChoice | None, model: nn.Module) -> Only | None:
    """Make a function of name and module out of names with `*`.

    Args:
        argument: whose value it is, for the error.
        asked: such names, a function already, or None.
        model: whose layers they are.

    Raises:
        TypeError: it is none of these.
        ValueError: no layer has such a name.
    """
    if asked is None or callable(asked):
        return asked
    names = (asked,) if isinstance(asked, str) else tuple(asked)
    if not all(isinstance(x, str) for x in names):
        raise TypeError(
            f"prune: expected {argument} to be a function or names such as 'blocks.*', got {asked!r}"
        )
    layers = list(prunable(model))
    if names and not any(fnmatchcase(name, x) for name in layers for x in names):
        raise ValueError(
            f"prune: expected {argument} to name layers such as {', '.join(layers[:3])}, got "
            f"{', '.join(names)}, which none has"
        )
    return lambda name, module: any(fnmatchcase(name, x) for x in names)


def excluded(name: str, module: nn.Module, only: Only | None, skip: Only | None) -> bool:
    """Say whether a layer is to be left alone.

    Args:
        name: of the layer.
        module: the layer.
        only: which layers to prune; None for all.
        skip: which of those to leave alone; None for none.
    """
    return (only is not None and not only(name, module)) or (skip is not None and skip(name, module))


def check_goal(pattern: Any, select: Any, cap: Any, needed: bool = True) -> None:
    """Refuse what is no goal, before any work is done.

    Args:
        pattern: what `prune` was given, or what a structured goal asks for afterwards.
        select: a rule, masks or a network.
        cap: largest share that a layer may lose.
        needed: whether there must be a pattern or masks.

    Raises:
        TypeError: `pattern` or `select` is of none of the classes that `prune` takes.
        ValueError: there is neither a pattern nor masks, or `cap` is out of range.
    """
    if pattern is not None and not (isinstance(pattern, Pattern | Mapping) or callable(pattern)):
        raise TypeError(
            f"prune: expected a pattern such as snows.NM(2, 4) or snows.Unstructured(0.7), got {pattern!r}; "
            "snows.parse_pattern reads texts"
        )
    if not isinstance(select, Mapping | nn.Module):
        if not callable(select):
            raise TypeError(
                "prune: expected select to be a rule, masks by layer name, or a pruned network, got "
                f"{type(select).__name__}"
            )
        if pattern is None and needed:
            raise ValueError(
                "prune: expected a pattern such as NM(2, 4) or Unstructured(0.7), got None without masks"
            )
    if not (isinstance(cap, int | float) and 0 < cap <= 1):
        raise ValueError(f"prune: expected cap to be above 0 and at most 1, got {cap!r}")


class Given:
    """Select the mask and the first weight that came from elsewhere, whatever the pattern.

    Args:
        start: the weight, zero off its mask.
    """

    def __init__(self, start: MaskedWeight) -> None:
        self.start = start

    def __call__(self, weight: Tensor, statistics: LayerStatistics, pattern: Pattern | None) -> MaskedWeight:
        """Return the given mask and weight, on the weight's device."""
        return MaskedWeight(*(x.to(weight.device) for x in self.start))


def given(twins: Twins, select: Choosing) -> dict[str, MaskedWeight]:
    """Read masks and first weights from elsewhere, by layer; empty where `select` is a rule.

    Args:
        twins: of the network to prune.
        select: a rule; masks by layer name (bool, or numbers that are all 0 or 1; under `layer` or
            `layer.weight`); or a pruned network, whose weights are taken too.

    Raises:
        ValueError: the masks are not of this network's layers, or there are none; or there is a rule, and the
            network carries masks of `torch.nn.utils.prune`.
    """
    layers = prunable(twins.sparse)
    if isinstance(select, nn.Module):
        closed = copied(select)
        carried = {x.layer: x.mask for x in take_masks_off(closed) if x.is_weight}
        open_attention(closed)
        sources = prunable(closed)
        if sources.keys() != layers.keys():
            raise ValueError(
                "prune: expected select to be a pruned copy of the model, got a network with other layers: "
                f"{sorted(sources.keys() ^ layers.keys())[:5]}"
            )
        weights = {name: layer.weight.detach() for name, layer in sources.items()}
        masks = {
            name: mask
            for name, mask in {**masks_in(closed), **carried}.items()
            if name in sources and not mask.all()
        }
        kept = {x for x in unfit(twins) if x in masks and _equal(layers[x].weight, weights[x])}
        masks = {x: mask for x, mask in masks.items() if x not in kept} or masks  # or it is said why
    elif isinstance(select, Mapping):
        masks = {_layer_of(key, layers): mask for key, mask in select.items()}
        if len(masks) < len(select):
            raise ValueError(
                "prune: expected one mask a layer, got two for one: under its name and under its weight's"
            )
        weights = {name: layers[name].weight.detach() for name in masks}
    else:
        if pruned := [x.layer for x in twins.carried if x.is_weight and x.layer in layers]:
            raise ValueError(
                f"prune: {pruned[0]} carries a mask of torch.nn.utils.prune; pass select=model to keep the "
                "masks, or remove them first (torch.nn.utils.prune.remove)"
            )
        return {}
    if not masks:
        raise ValueError(
            "prune: expected select to hold masks, got none; a pruned network needs zeros in its weights"
        )
    found = {}
    for name, mask in masks.items():
        mask = _as_mask(name, mask, layers[name].weight.shape)
        found[name] = MaskedWeight((weights[name] * mask.to(weights[name].device)).clone(), mask)
    return found


def _equal(own: Tensor, other: Tensor) -> bool:
    """Say whether two weights are the same, wherever they lie."""
    return own.shape == other.shape and torch.equal(own, other.to(own))


def _layer_of(key: Any, layers: Mapping[str, nn.Module]) -> str:
    """Find the layer that a mask's key names."""
    for name in (key, str(key).removesuffix(".weight")):
        if name in layers:
            return str(name)
    raise ValueError(
        f"prune: expected masks for layers of the model, got one for {key!r}; the layers are "
        f"{', '.join(list(layers)[:8])}, ..."
    )


def _as_mask(name: str, mask: Any, shape: torch.Size) -> Tensor:
    """Return a mask as bool of the weight's shape; numbers that are all 0 or 1 are read as such."""
    if (
        isinstance(mask, Tensor)
        and mask.dtype != torch.bool
        and not mask.is_complex()
        and ((mask == 0) | (mask == 1)).all()
    ):
        mask = mask.bool()
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != shape:
        got = f"{mask.dtype} of {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"prune: expected the mask of {name} to be torch.bool, or zeros and ones, of {tuple(shape)}, got "
            f"{got}"
        )
    return mask
