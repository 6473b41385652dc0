"""Implants: a layer replaced by two thin ones in a row, of which the second bears the layer's name.

A Linear becomes Linear(in, r), Linear(r, out); a Conv2d becomes a convolution to r channels with the same
kernel, and one of 1 x 1. Both are plain layers: they are fitted, pruned, packed, saved and exported like any
other. Only watching a pass knows them: the second factor's call is named as the dense layer's was, and the
first's is no operation of a horizon (see `watching` and `matching.horizon`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from snows.layers.base import PackedLayer
from snows.networks.checks import how_computed, shared_weights
from snows.networks.layers import LEFT, Layer, groups_of, has_hooks, is_stock, module_at, substitute
from snows.networks.masks import kept_mask
from snows.packing import unpack
from snows.sparsity import rows, unrows

if TYPE_CHECKING:
    from snows.networks.trace import Trace


class Factored(NamedTuple):
    """Hold the factors of a layer's weight.

    Attributes:
        first: (r, in) of a Linear, (r, in, height, width) of a Conv2d.
        second: (out, r) of a Linear, (out, r, 1, 1) of a Conv2d.
        intercept: (out,), to be added to the layer's bias; None for nothing.
    """

    first: Tensor
    second: Tensor
    intercept: Tensor | None = None


class LowRank(nn.Sequential):
    """Apply two layers in a row in the place of one."""

    # Networks ask a layer for its weight's dtype, and PyTorch's own fast path of a TransformerEncoderLayer
    # computes with weight and bias, which no traced pass shows.

    @property
    def weight(self) -> Tensor:
        """The weight of the one layer that computes the same."""
        first, second = map(weight_of, self)
        return unrows(rows(second) @ rows(first), torch.Size((len(second), *first.shape[1:])))

    @property
    def bias(self) -> Tensor | None:
        """The bias of the one layer that computes the same."""
        return self[1].bias  # type: ignore[return-value]


def weight_of(layer: nn.Module) -> Tensor:
    """Return the weight of a dense or packed layer."""
    weight: Tensor = unpack(layer.packed) if isinstance(layer, PackedLayer) else layer.weight  # type: ignore[assignment]
    return weight


@dataclass(frozen=True)
class Implant:
    """Replace a layer by two thin ones.

    Attributes:
        layer: the name of a Linear or an ungrouped Conv2d.
        rank: outputs of the first factor.
        factors: their weights; None takes the truncated singular value decomposition of the layer's weight.
            They are no part of the edit's description: in a file they stand among the tensors.

    Raises:
        ValueError: the rank is no whole number of at least 1.
    """

    layer: str
    rank: int
    factors: Factored | None = field(default=None, repr=False, compare=False)
    kind: ClassVar[str] = "implant"

    def __post_init__(self) -> None:
        if type(self.rank) is not int or self.rank < 1:
            raise ValueError(f"Implant: expected a rank of at least 1, got {self.rank!r} for {self.layer}")

    def apply(self, net: nn.Module) -> None:
        """Put the factors in the layer's place.

        Raises:
            ValueError: there is no such layer, two cannot stand for it, the rank is not below that of its
                weight, or the factors are of other shapes.
        """
        layer = self._layer(net)
        new, like = self._thin(layer), layer.weight.detach()
        first, second, intercept = self.factors or truncated(like, self.rank)
        for part, weight in zip(new, (first, second), strict=True):
            if weight.shape != weight_of(part).shape:
                raise ValueError(
                    f"{self.layer}: expected a factor of {tuple(weight_of(part).shape)}, got "
                    f"{tuple(weight.shape)}"
                )
            part.weight = _parameter(weight, layer)
        bias = None if layer.bias is None else layer.bias.detach()
        if intercept is not None:
            bias = intercept.to(like) + (0 if bias is None else bias)
        new[1].bias = None if bias is None else _parameter(bias, layer)  # type: ignore[assignment]
        substitute(net, layer, new)

    def rebuild(self, net: nn.Module, tensors: dict[str, Tensor]) -> None:
        """Put empty factors in the layer's place; their weights are loaded with the file's other tensors."""
        found = module_at(net, self.layer, "no Linear or Conv2d", (nn.Linear, nn.Conv2d, LowRank))
        if not isinstance(found, LowRank):  # else under another of its names already
            layer = self._layer(net)
            substitute(net, layer, self._thin(layer))

    def _layer(self, net: nn.Module) -> Layer:
        layer = module_at(net, self.layer, "no Linear or Conv2d", (nn.Linear, nn.Conv2d))
        assert isinstance(layer, nn.Linear | nn.Conv2d)
        if reason := _unfit(net, layer):
            raise ValueError(f"{self.layer} cannot be replaced by two layers: {reason}; leave it dense")
        if self.rank >= full_rank(layer.weight):
            raise ValueError(
                f"{self.layer}: expected a rank below {full_rank(layer.weight)}, got {self.rank}; leave it "
                "dense"
            )
        return layer

    def _thin(self, layer: Layer) -> LowRank:
        """Make the two layers, without numbers in them."""
        first: Layer
        second: Layer
        out, biased = len(layer.weight), layer.bias is not None
        if isinstance(layer, nn.Linear):
            first = nn.Linear(layer.in_features, self.rank, bias=False, device="meta")
            second = nn.Linear(self.rank, out, bias=biased, device="meta")
        else:
            kernel, settings = layer.kernel_size, (layer.stride, layer.padding, layer.dilation)
            first = nn.Conv2d(
                layer.in_channels,
                self.rank,
                kernel,  # type: ignore[arg-type]
                *settings,  # type: ignore[arg-type]
                bias=False,
                padding_mode=layer.padding_mode,
                device="meta",
            )
            second = nn.Conv2d(self.rank, out, 1, bias=biased, device="meta")
        return LowRank(first, second).to(layer.weight.dtype).train(layer.training)


def _parameter(numbers: Tensor, layer: Layer) -> nn.Parameter:
    """Make a parameter of the layer's dtype, on its device, trained if its weight is."""
    weight = layer.weight.detach()
    own = numbers.detach().to(weight).clone(memory_format=torch.contiguous_format)
    return nn.Parameter(own, layer.weight.requires_grad)


def full_rank(weight: Tensor) -> int:
    """Return the most rank that a weight of this shape can have."""
    return min(len(weight), weight[0].numel())


def truncated(weight: Tensor, rank: int) -> Factored:
    """Factor a weight by its largest singular values: what changes its numbers least.

    Args:
        weight: of a Linear or an ungrouped Conv2d.
        rank: of the product.

    Returns:
        The factors, in the weight's dtype.
    """
    left, values, right = torch.linalg.svd(rows(weight).double(), full_matrices=False)
    return shaped(right[:rank], left[:, :rank] * values[:rank], weight)


def shaped(first: Tensor, second: Tensor, weight: Tensor) -> Factored:
    """Bring two matrices to the shapes of an implant's weights.

    Each of the r directions gets the same norm in both, so that one step size suits both.

    Args:
        first: (r, in), in the row view.
        second: (out, r).
        weight: gives shape and dtype.
    """
    balance = (second.norm(dim=0) / first.norm(dim=1)).sqrt().nan_to_num(1, 1, 1).clamp_min(1e-6)
    first, second = first * balance[:, None], second / balance
    thin = torch.Size((len(first), *weight.shape[1:]))
    wide = torch.Size((*second.shape, *(1 for _ in weight.shape[2:])))
    return Factored(unrows(first, thin).to(weight.dtype), second.reshape(wide).to(weight.dtype))


def why_not(net: nn.Module, trace: Trace, layer: str) -> str:
    """Say why a layer cannot be replaced by two thin ones; empty if it can.

    Args:
        net: with open attention.
        trace: of it.
        layer: the name of a module.
    """
    module = dict(net.named_modules(remove_duplicate=False)).get(layer)
    if module is None:
        return "there is no such module"
    if reason := _unfit(net, module):
        return reason
    if other := shared_weights(net).get(layer):
        return f"it shares its weight with {other}"
    if id(module) in trace.held:
        return "an attribute of another module holds it too"
    if dense_name(net, layer) != layer:
        return "it is a factor of an implant"
    if kept_mask(module) is not None:
        return "it is pruned"
    use = trace.layers.get(layer)
    return "the example does not reach it" if use is None or not use.calls else use.oddity


def _unfit(net: nn.Module, module: nn.Module) -> str:
    """Say what of a module itself keeps two layers from standing for it; empty if nothing does."""
    if not isinstance(module, nn.Linear | nn.Conv2d):
        return f"it is a {type(module).__name__}, no Linear or Conv2d"
    if module is net:
        return "the network is this one layer"
    if groups_of(module) > 1:
        return f"its convolution has {groups_of(module)} groups"
    if computed := how_computed(module):
        return f"its weight is computed by {computed}"
    if not is_stock(module):
        return f"its class, {type(module).__name__}, computes something of its own"
    if has_hooks(module):
        return "it has hooks"
    return "its weight is one row or column" if full_rank(module.weight) < 2 else ""


def rank_of(implant: LowRank) -> int:
    """Return the outputs of an implant's first factor, which may be packed."""
    first: Any = implant[0]
    return len(first.weight) if not isinstance(first, PackedLayer) else first.shape[0]


def first_rank(implant: LowRank) -> int:
    """Return the outputs that an implant's first factor had before any of them were taken out."""
    before, _ = implant[0].__dict__.get(LEFT, {}).get("weight:0", (rank_of(implant), ()))
    return int(before)


def first_factors(net: nn.Module) -> set[str]:
    """Find the first factors of all implants, by name."""
    return {
        f"{name}.0"
        for name, module in net.named_modules(remove_duplicate=False)
        if isinstance(module, LowRank) and name
    }


def dense_name(net: nn.Module, layer: str) -> str:
    """Name the layer that stands in the dense network where one of this network's does.

    For a factor of an implant it is the implant's name, for any other layer its own.
    """
    implant, _, _ = layer.rpartition(".")
    return implant if implant and isinstance(net.get_submodule(implant), LowRank) else layer
