"""Least squares with an intercept, layer by layer, through a network that units were taken out of.

What a layer of the cut network computes from its own inputs is fitted to what is left of the dense layer's
output on the dense network's inputs. The intercept is the layer's bias, or the statistics of the BatchNorm
that alone reads it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from snows import together
from snows.matching import moments
from snows.matching.low_rank import InputMoments, low_rank
from snows.matching.normalisation import Moments, move_statistics, statistics
from snows.matching.statistics import DAMPING, LayerStatistics, factored
from snows.networks.implants import LowRank, rank_of
from snows.networks.layers import groups_of
from snows.networks.masks import kept_mask
from snows.networks.sites import Site
from snows.networks.twins import Twins
from snows.solving.cg import batched_cg, tolerance
from snows.sparsity import rows, unrows


@dataclass(frozen=True)
class Intercept:
    """Say where a layer's intercept goes.

    Attributes:
        layer: that is fitted.
        bias: the dense layer's, of the outputs that are left; None where the layer has none.
        norm: the BatchNorm that alone reads a layer without bias; None for none.
        origin: that BatchNorm's mean and variance in the dense network.
    """

    layer: nn.Linear | nn.Conv2d
    bias: Tensor | None = None
    norm: _BatchNorm | None = None
    origin: tuple[Tensor, Tensor] | None = None

    @classmethod
    def of(cls, twins: Twins, name: str) -> Intercept:
        """Find where a layer's intercept goes in the working copy."""
        layer: Any = twins.sparse.get_submodule(name)
        source = twins.reduction.source(name)
        dense: Any = twins.dense.get_submodule(source)
        left = twins.reduction.outputs.get(source)
        left = None if left is None else left.to(layer.weight.device)
        if dense.bias is not None:
            bias = dense.bias.detach() if left is None else dense.bias.detach().index_select(0, left)
            return cls(layer, bias)
        found = twins.trace.follower(twins.trace.layers[name].value, (_BatchNorm,))
        norm: Any = twins.sparse.get_submodule(found[0]) if found is not None else None
        if found is None or norm.running_mean is None:
            return cls(layer)
        origin: Any = twins.dense.get_submodule(found[0])
        return cls(layer, None, norm, statistics(origin, left))

    @property
    def exists(self) -> bool:
        """Whether the layer can have one."""
        return self.bias is not None or self.norm is not None

    def write(self, shift: Tensor, wanted: Moments, given: Moments) -> None:
        """Put an intercept in its place.

        Args:
            shift: of each output.
            wanted: moments of what the layer should return.
            given: moments of what it returns without the intercept.
        """
        with torch.no_grad():
            if self.bias is not None:
                self.layer.bias.copy_(self.bias + shift.to(self.bias))  # type: ignore[union-attr]
            elif self.norm is not None and self.origin is not None:
                move_statistics(self.norm, self.origin, wanted, given)

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that hold it, by name; they are the network's own."""
        if self.bias is not None:
            return {"bias": self.layer.bias.detach()}  # type: ignore[union-attr]
        if self.norm is not None:
            return {"mean": self.norm.running_mean, "variance": self.norm.running_var}  # type: ignore[dict-item]
        return {}


def compensate(site: Site, seen: LayerStatistics, intercept: Intercept, weights: bool = True) -> None:
    """Fit a layer of the working copy to what is left of the dense layer's output, in place.

    Row by row, ``min ‖w (X - x̄) - (y - ȳ)‖² + λ‖w - w₀‖²`` over w on its mask, then the intercept ȳ - w x̄; a
    layer that can have no intercept is fitted without the means.

    Args:
        site: the layer.
        seen: statistics of its inputs.
        intercept: where that goes.
        weights: fit them; else the intercept alone.
    """
    weight, groups = site.weight, groups_of(site.layer)
    wanted, cross = targets(seen, weight)
    shape = (groups, len(weight) // groups, -1)
    mean, level = seen.mean.double(), wanted.mean.to(weight.device).view(groups, -1)
    centred = intercept.exists
    if weights:
        gram = seen.gram.double()
        if centred:
            gram = gram - mean[:, :, None] * mean[:, None, :]
            cross = cross - level[:, :, None] * mean[:, None, :]
        fitted = _ridge(gram, cross, rows(weight).reshape(shape).double(), kept_mask(site.layer), seen.gram)
        weight = unrows(fitted.flatten(0, 1).to(weight.dtype), weight.shape)
        with torch.no_grad():
            site.layer.weight.copy_(weight)
    if centred:
        given = Moments()
        if intercept.norm is not None:
            for pair in site.training:
                own = Moments.of(channels_first(moments.output(pair.calls[1], weight), site))
                given.add(own.times(pair.sparse.batch.share > 0))
            given = given.pooled()
        now = (rows(weight).reshape(shape).double() @ mean[:, :, None]).squeeze(-1)
        intercept.write((level - now).flatten(), wanted, given)


def compensate_thin(seen: LayerStatistics, implant: LowRank, sensitivity: Tensor, centred: bool) -> None:
    """Fit both factors of an implant to what is left of the dense layer's output, in place.

    The product is the best of its rank for the second moment of the inputs and the output sensitivity, see
    `low_rank`; the intercept is left to `compensate` of the second factor.

    Args:
        seen: statistics of the first factor's inputs.
        implant: both factors.
        sensitivity: of the implant's outputs, (out, out).
        centred: fit with an intercept.
    """
    weight = implant.weight.detach()
    inputs = InputMoments.of(seen, weight)
    found = low_rank(weight, inputs if centred else inputs._replace(mean=None), sensitivity, rank_of(implant))
    with torch.no_grad():
        implant[0].weight.copy_(found.first)  # type: ignore[operator]
        implant[1].weight.copy_(found.second)  # type: ignore[operator]


def unchanged(site: Site) -> bool:
    """Say whether a layer sees what the dense one sees, and is whole, so that there is nothing to fit."""
    if site.left is not None or site.weight.shape != site.target.shape:
        return False
    if not torch.equal(site.weight, site.target):
        return False
    pairs = [pair.calls for pair in site.training]
    same = all(dense is not sparse and torch.equal(dense.x, sparse.x) for dense, sparse in pairs)
    return together.everywhere(same)


def targets(seen: LayerStatistics, weight: Tensor) -> tuple[Moments, Tensor]:
    """Return the moments of what a layer should return, and the mean of ``y xᵀ``, (groups, out / groups, in).

    Both are in float64.
    """
    wanted = Moments()

    def crosses() -> Iterator[Tensor]:
        for call, y, real in zip(seen.calls, seen.wanted(weight), seen.counts, strict=True):
            wanted.add(Moments.of(y if call.kernel else y.flatten(0, -2)).times(real))
            yield moments.cross(call, y)

    cross = seen.total(crosses()) / seen.count
    return wanted.pooled(), cross


def channels_first(y: Tensor, site: Site) -> Tensor:
    """View a layer's output as (images or tokens, channels, ...)."""
    return y if isinstance(site.layer, nn.Conv2d) else y.flatten(0, -2)


def _ridge(gram: Tensor, cross: Tensor, start: Tensor, mask: Tensor | None, whole: Tensor) -> Tensor:
    """Solve ``w (A + λ) = C + λ w₀`` on a mask: (groups, out / groups, in), float64.

    `whole` are the second moments of which A may be what is left without means.
    """
    if mask is not None:
        mean = gram.diagonal(dim1=-2, dim2=-1).mean(-1)
        shift = DAMPING * torch.where(mean > 0, mean, 1.0)
        right = cross + shift[:, None, None] * start
        kept = rows(mask).reshape(right.shape)
        return batched_cg(gram, right, kept, damping=DAMPING, rtol=tolerance(whole.dtype))
    factor, added = factored(gram, DAMPING, whole, whole.dtype)
    return torch.cholesky_solve((cross + added[:, None, None] * start).mT, factor).mT
