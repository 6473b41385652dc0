"""BatchNorm's statistics after pruning, moved by as much as pruning moved what they describe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from snows import together
from snows.networks.attention import plain_forward
from snows.networks.batches import Batch


def recalibrate_statistics(
    sparse: nn.Module, dense: nn.Module, batches: Sequence[Batch], left: Mapping[str, Tensor] | None = None
) -> None:
    """Correct the statistics of every BatchNorm by how far pruning moved them, in place.

    Each BatchNorm's running mean moves by the difference of its input's means in the pruned and in the dense
    network, its variance by their ratio, both over all calibration images. So a network that was not pruned
    stays as it is, and images that differ from those of training (without their augmentation, say) do no
    harm; where they do not differ this is the usual re-estimation. One pass each; in the pruned network each
    BatchNorm normalises with what it sees.

    Args:
        sparse: the pruned network, in evaluation mode.
        dense: the dense network with the same BatchNorms.
        batches: the calibration batches; each travels to the network's device when it is used.
        left: of BatchNorms that lost channels, by name, which are left.
    """
    own = statistics_of(sparse)
    theirs: dict[str, Any] = {name: dense.get_submodule(name) for name in own}
    if not own:
        return
    device = next(sparse.parameters()).device
    totals = {name: [Moments(), Moments()] for name in own}
    kept = {name: x.to(device) for name, x in (left or {}).items()}
    origin = {name: statistics(m, kept.get(name)) for name, m in theirs.items()}
    seen: dict[str, list[Moments]] = {}
    own_share = True  # whether the batch's samples are this process's own

    def set_statistics(name: str, before: Moments, after: Moments) -> None:
        move_statistics(own[name], origin[name], before, after)

    def watch_dense(name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        found = Moments.of(_input(args, kwargs)).of_channels(kept.get(name))
        seen[name].append(found.times(own_share).pooled())

    def watch_sparse(name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        if not seen[name]:  # routing sent nothing here in the dense network
            return
        before, after = seen[name].pop(0), Moments.of(_input(args, kwargs)).times(own_share).pooled()
        set_statistics(name, before, after)  # what comes after is to see it as it will be
        totals[name][0].add(before)
        totals[name][1].add(after)

    hooks = [
        m.register_forward_pre_hook(partial(watch_dense, name), with_kwargs=True)
        for name, m in theirs.items()
    ]
    hooks += [
        m.register_forward_pre_hook(partial(watch_sparse, name), with_kwargs=True) for name, m in own.items()
    ]
    try:
        with torch.no_grad(), plain_forward():
            for x in (x.part().to(device) for x in batches):
                own_share = x.share > 0
                seen.update({name: [] for name in own})
                x.through(dense)
                x.through(sparse)
            for name, (before, after) in totals.items():
                if before.count:
                    set_statistics(name, before, after)
    finally:
        for hook in hooks:
            hook.remove()


def statistics(norm: _BatchNorm, left: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Copy a BatchNorm's running mean and variance, of all channels or of those that are left."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    found = (norm.running_mean, norm.running_var)
    mean, var = (x.clone() if left is None else x.index_select(0, left) for x in found)
    return mean, var


def move_statistics(norm: _BatchNorm, origin: tuple[Tensor, Tensor], before: Moments, after: Moments) -> None:
    """Set a BatchNorm's statistics to what they were, moved by how far its input moved.

    Args:
        norm: in evaluation mode; changed in place.
        origin: its mean and variance before.
        before: moments of its input then.
        after: moments of its input now.
    """
    (mean, var), eps = origin, norm.eps
    assert norm.running_mean is not None
    assert norm.running_var is not None
    norm.running_mean.copy_(mean + after.mean - before.mean)
    ratio = (after.var + eps) / (before.var + eps)
    varied = (before.var + eps > 0) & (after.var + eps > 0)  # with eps=0 a constant channel tells nothing
    norm.running_var.copy_(torch.where(varied, var * ratio, var))


def _input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    x: Tensor = args[0] if args else kwargs["input"]
    return x


def statistics_of(net: nn.Module) -> dict[str, _BatchNorm]:
    """Return the BatchNorms that keep statistics, by name."""
    return {
        name: m for name, m in net.named_modules() if isinstance(m, _BatchNorm) and m.running_mean is not None
    }


class Moments:
    """Pool mean and mean square per channel over batches, in float64."""

    def __init__(self) -> None:
        self.count, self.mean, self.square = 0, torch.zeros(()), torch.zeros(())

    @classmethod
    def of(cls, x: Tensor) -> Moments:
        """Measure a BatchNorm's input, (B, C, ...)."""
        moments, x = cls(), x.detach()
        corner = (slice(1), slice(None), *(slice(1) for _ in range(2, x.ndim)))
        origin = x[corner]  # subtracted, so that a constant channel varies by nothing
        mean, var = (m.double() for m in torch.ops.aten.batch_norm_update_stats(x - origin, None, None, 0.0))
        moments.count, moments.mean = x.numel() // x.shape[1], origin.flatten().double() + mean
        moments.square = var + moments.mean.square()
        return moments

    @property
    def var(self) -> Tensor:
        """The variance of each channel."""
        var = self.square - self.mean.square()
        return torch.where(var > 1e-12 * self.square, var, 0.0)  # what is less is rounding

    def of_channels(self, left: Tensor | None) -> Moments:
        """Return the moments of some channels; of all for None."""
        found = Moments()
        found.count, found.mean, found.square = self.count, self.mean, self.square
        if left is not None:
            found.mean, found.square = self.mean[left], self.square[left]
        return found

    def times(self, real: bool) -> Moments:
        """Return these moments, or none in their place, of as many channels."""
        found = self.of_channels(None)
        found.count = self.count if real else 0
        return found

    def pooled(self) -> Moments:
        """Pool with the moments of the same images' other parts, that other processes have."""
        count = self.mean.new_tensor([self.count])
        sums = together.total(torch.cat([count * self.mean, count * self.square, count]))
        found = Moments()
        found.count = int(sums[-1])
        found.mean, found.square = (sums[:-1] / max(found.count, 1)).chunk(2)
        return found if together.size() > 1 else self

    def add(self, other: Moments) -> None:
        """Pool with the moments of other images."""
        total = max(self.count + other.count, 1)
        self.mean = (self.count * self.mean + other.count * other.mean) / total
        self.square = (self.count * self.square + other.count * other.square) / total
        self.count = total
