"""The loss of a layer: the mismatch of its horizon with the dense network's, batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor, nn

from snows.matching.horizon import Horizon, Outputs
from snows.matching.metrics import Metric, OutputSensitivity
from snows.networks.implants import LowRank, weight_of
from snows.networks.layers import groups_of
from snows.networks.sites import Pair, Site, in_turn
from snows.networks.stream import Stream
from snows.networks.twins import Twins
from snows.solving.operators import half_inner
from snows.sparsity import rows


@dataclass(frozen=True)
class Matching:
    """Set what is matched, and how a mismatch is measured.

    Attributes:
        horizon: operations matched after each layer; "end" matches up to and with the network's output.
        targets: "dense": what the dense network computes on its own; "local": what the layer's dense weight
            computes from the pruned network's features, as published.
        metric: how a matched output's mismatch is measured: "output": by how strongly the network's output
            depends on it, channel by channel (one backward pass of the dense network); "variance": divided by
            the target's variance; "none": as it is, as published.

    Raises:
        ValueError: a setting is none of these.
    """

    horizon: int | Literal["end"] = 3
    targets: Literal["dense", "local"] = "dense"
    metric: Literal["output", "variance", "none"] = "output"

    def __post_init__(self) -> None:
        if self.horizon != "end" and not (type(self.horizon) is int and self.horizon >= 0):
            raise ValueError(
                'Matching: expected horizon to be a whole number of at least 0, or "end", got '
                f"{self.horizon!r}"
            )
        for name, allowed in (("targets", ("dense", "local")), ("metric", ("output", "variance", "none"))):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"Matching: expected {name} to be one of {', '.join(allowed)}, got "
                    f"{getattr(self, name)!r}"
                )

    @classmethod
    def published(cls, horizon: int = 5) -> Matching:
        """Return the loss of the paper: local targets, every element alike (Lucas & Mazumder 2025)."""
        return cls(horizon, "local", "none")


class Objective:
    """Give each layer of a network its losses, all measured by one output sensitivity.

    Args:
        twins: the networks and batches.
        matching: settings.
        seed: of the noise that measures the output sensitivity.
        net: the network whose sensitivity that is, as it is when it is first asked for; by default the dense
            one. For a cut network it is its own: what is gone must weigh nothing.
    """

    def __init__(self, twins: Twins, matching: Matching, seed: int, net: nn.Module | None = None) -> None:
        self.twins, self.matching, self.seed = twins, matching, seed
        self.net = twins.dense if net is None else net

    @cached_property
    def sensitivity(self) -> OutputSensitivity:
        """How strongly the network's output depends on its operations, on a few dozen samples."""
        twins = self.twins
        found = OutputSensitivity(self.net, twins.probe, self.seed)
        if found.note:
            twins.notes.append(
                "The output sensitivity could not be measured, so that features are weighed by their "
                f"variance: {found.note}"
            )
        return found

    def at(self, site: Site) -> LayerLosses:
        """Return the losses of one layer."""
        return LayerLosses(self, site)


class LayerLosses:
    """Give one reconstruction loss a batch, all in the same metrics.

    Each makes its targets when it is used, and drops them.

    Args:
        objective: settings, networks and output sensitivity.
        site: the layer.
    """

    def __init__(self, objective: Objective, site: Site) -> None:
        self.objective, self.site = objective, site
        self._metrics: Mapping[str, Metric] | None = None

    @cached_property
    def horizon(self) -> Horizon:
        """The layer and the operations after it."""
        twins = self.objective.twins
        stream = self.site.training[0].sparse.on_device()
        return Horizon(twins.sparse, self.site.name, self.objective.matching.horizon, stream, twins.paired)

    def sensitivity(self) -> Tensor:
        """Return the output factor of the layer's curvature: (groups, out / groups, out / groups).

        It is the identity where the network's output does not depend on the layer. The first factor of an
        implant is seen through the second.
        """
        weight, groups, metric = self.site.weight, groups_of(self.site.layer), self.metric()
        implant = self.objective.twins.sparse.get_submodule(self.horizon.dense)
        if isinstance(implant, LowRank) and self.site.layer is implant[0]:
            second = rows(weight_of(implant[1]).detach())
            return second.T @ metric.matrix(len(second), like=second) @ second
        return metric.matrix(len(weight), groups, like=weight)

    def metric(self) -> Metric:
        """Return how a mismatch of the layer's own output, or its implant's, weighs in the network's."""
        own = self.objective.sensitivity.of([self.horizon.operations[0]])
        return next(iter(own.values()), Metric(1.0))

    @cached_property
    def held(self) -> Reconstruction:
        """The loss on the samples to judge by."""
        assert self.site.held is not None
        return self._loss(self.site.held)

    def _loss(self, pair: Pair) -> Reconstruction:
        matching = self.objective.matching
        with torch.no_grad():
            if matching.targets == "dense" and pair.calls[0] is pair.dense.call:
                found = self.horizon.outputs(self.site.target, pair.dense.on_device())
                left = {name: self.objective.twins.reduction.left(name, y) for name, y in found.items()}
                targets = {name: y for name, y in left.items() if y is not None}
            else:
                targets = self.horizon.outputs(self.site.weight, pair.sparse.on_device())
        if self._metrics is None:  # of the first batch that is asked for, so that all agree
            scaling: Literal["variance", "none"] = "none" if matching.metric == "none" else "variance"
            known = (
                self.objective.sensitivity.of(self.horizon.operations) if matching.metric == "output" else {}
            )
            self._metrics = {
                name: known[name] if name in known else Metric.plain(y, scaling, pair.sparse.batch.share)
                for name, y in targets.items()
            }
        return Reconstruction(self.horizon, pair.sparse.on_device(), targets, self._metrics)

    def begin_again(self, tolerant: bool = False) -> None:
        """Forget targets and metrics, because the horizon has changed.

        Args:
            tolerant: let the network change in place what a derivative needs.
        """
        self.horizon.tolerant |= tolerant
        self._metrics = None
        self.__dict__.pop("held", None)

    def undifferentiable(self, weight: Tensor) -> str:
        """End the horizon before the first operation without a second derivative; return its name, or ""."""
        return self.horizon.shorten(weight, self.site.training[0].sparse.on_device())

    def __len__(self) -> int:
        return len(self.site.training)

    def __iter__(self) -> Iterator[Reconstruction]:
        return map(self._loss, in_turn(self.site.training))


class Reconstruction:
    """Compute one batch's loss: the mismatch of a horizon with its targets, summed over the operations.

    Each term is the mean over images and positions of its metric; of several processes each computes its part
    of that mean. Without metrics it is
    ``Σ_k mean((f_k(W) - y_k)²) / var(y_k)``: every operation weighs alike whatever its scale and size.

    Args:
        horizon: f.
        x: the batch's stream, advanced to the layer.
        targets: y, as `Horizon.outputs` gives them; an operation that one network does not run is left out.
        metrics: by name; a term that weighs nothing is left out.
    """

    def __init__(
        self, horizon: Horizon, x: Stream, targets: Outputs, metrics: Mapping[str, Metric] | None = None
    ) -> None:
        self.horizon, self.x = horizon, x
        metrics = metrics if metrics is not None else {name: Metric.plain(y) for name, y in targets.items()}
        self.targets = {
            name: y for name, y in targets.items() if name in metrics and not metrics[name].is_zero
        }
        self._weighers = {name: _weigher(metrics[name], y, x.batch.share) for name, y in self.targets.items()}
        self._names: list[str] = []  # of the last residuals

    def __call__(self, weight: Tensor) -> Tensor:
        """Compute the loss of a weight."""
        residuals = self.residuals(weight)
        if not residuals:
            return torch.zeros((), dtype=weight.dtype, device=weight.device)
        return half_inner(residuals, self.weigh(residuals))

    def residuals(self, weight: Tensor) -> list[Tensor]:
        """Return ``f_k(W) - y_k`` for each operation."""
        outputs = self.horizon.outputs(weight, self.x)
        self._names = [
            name for name, y in self.targets.items() if name in outputs and outputs[name].shape == y.shape
        ]
        return [outputs[name] - self.targets[name] for name in self._names]

    def weigh(self, residuals: Sequence[Tensor]) -> list[Tensor]:
        """Return the derivative of the loss by its residuals, or the same map of what is shaped like them."""
        return [self._weighers[name](e) for name, e in zip(self._names, residuals, strict=True)]


def _weigher(metric: Metric, y: Tensor, part: float) -> Callable[[Tensor], Tensor]:
    """Return the derivative of a metric's mean over the positions of y, as a function of the mismatch.

    Args:
        metric: of the operation.
        y: its target.
        part: of all positions, those in y.
    """
    channel, width = metric.channel, y.shape[metric.channel]
    share = 2 * width * part / y.numel()  # of a position
    if metric.basis is None:
        return lambda e: e * (metric.floor * share)
    if 2 * metric.basis.shape[1] >= width:
        matrix = metric.matrix(width)[0] * share
        return lambda e: (e.movedim(channel, -1) @ matrix).movedim(-1, channel)
    basis, floor = metric.basis * share**0.5, metric.floor * share

    def weigh(e: Tensor) -> Tensor:
        e = e.movedim(channel, -1)
        flat = e.reshape(-1, width)
        return torch.addmm(flat, flat @ basis, basis.T, beta=floor).view(e.shape).movedim(-1, channel)

    return weigh
