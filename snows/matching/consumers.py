"""What the layers that read a group's units see of them: second moments, and what an error weighs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from snows import together
from snows.matching import moments
from snows.matching.metrics import Metric, OutputSensitivity
from snows.matching.statistics import factored
from snows.networks.attention import plain_forward
from snows.networks.batches import Batch
from snows.networks.channels import Group
from snows.networks.functions import known
from snows.networks.layers import Layer, groups_of, prunable
from snows.networks.watching import Call, Frame, Watch
from snows.sparsity import rows

MEMORY = 2**31  # bytes of second moments that one pass over the batches gathers


def readers(group: Group, layers: dict[str, Layer]) -> list[str]:
    """List the layers that read a group's units and mix them.

    A grouped convolution whose outputs are the units too, such as a depthwise one, is none of them.

    Args:
        group: of the network.
        layers: of the network, by name.
    """
    return [x for x in group.columns if x not in group.rows or groups_of(layers[x]) == 1]


@dataclass
class Consumer:
    """Hold the second moments of one layer's inputs in the dense network, all its calls together.

    Those of a grouped convolution are gathered group by group, and returned as one matrix with zeros between.

    Attributes:
        layer: the layer.
        operations: the names of its calls.
        gram: (groups, in, in), float64, the sum of ``x xᵀ`` over rows x of `moments.patches`.
        total: (groups, in), float64, the sum of rows.
        count: the rows seen.
        metrics: of its calls; empty where nothing is known of them.
    """

    layer: Layer
    operations: list[str] = field(default_factory=list)
    gram: Tensor | None = None
    total: Tensor | None = None
    count: int = 0
    metrics: list[Metric] = field(default_factory=list)

    def add(self, call: Call, real: bool) -> None:
        """Add the rows of one call, or nothing in their place where they are another process's."""
        gram, total = moments.gram(call), sum(x.sum(1).double() for x in moments.patches(call))
        assert isinstance(total, Tensor)
        if not real:
            gram, total = torch.zeros_like(gram), torch.zeros_like(total)
        self.gram = gram if self.gram is None else self.gram.add_(gram)
        self.total = total if self.total is None else self.total.add_(total)
        self.count += moments.positions(call) if real else 0

    def pool(self) -> None:
        """Add the rows that other processes have."""
        if self.gram is not None and self.total is not None:
            self.gram, self.total = together.total(self.gram), together.total(self.total)
            self.count = int(together.total(torch.tensor(self.count, device=self.gram.device)))

    @property
    def weight(self) -> Tensor:
        """(groups, out / groups, in): the layer's weight in the row view, float64."""
        weight = rows(self.layer.weight.detach()).double()
        return weight.view(groups_of(self.layer), -1, weight.shape[1])

    @property
    def covariance(self) -> Tensor:
        """(groups, in, in): the mean of ``x xᵀ`` without that of x, float64."""
        assert self.gram is not None
        assert self.total is not None
        mean = self.total / self.count
        return self.gram / self.count - mean[:, :, None] * mean[:, None, :]

    def inverse(self, damping: float) -> Tensor:
        """Return the inverse of the damped covariance: (inputs, inputs), float64.

        Args:
            damping: added to the diagonal, relative to its mean.
        """
        assert self.gram is not None
        factors, _ = factored(self.covariance, damping, self.gram / self.count, self.layer.weight.dtype)
        inverses = torch.cholesky_inverse(factors)
        whole: Tensor = torch.block_diag(*inverses)
        return whole

    def weighed(self) -> Tensor:
        """Return Y with ``Yᵀ Y = Wᵀ G W``, where G is the metric of the layer's output.

        Its shape is (any, inputs), its dtype float64. Where nothing is known of the metric, G measures an
        error by its share of the output's own variance.
        """
        weight, metrics = self.weight, self.metrics
        if not metrics:
            spread = torch.einsum("goi,gij,goj->", weight, self.covariance, weight)
            metrics = [Metric(1 / float(spread) if spread > 0 else 1.0)]
        parts = [sum(x.floor for x in metrics) ** 0.5 * weight]
        parts += [
            x.basis.to(weight).view(len(weight), weight.shape[1], -1).mT @ weight
            for x in metrics
            if x.basis is not None
        ]
        whole: Tensor = torch.block_diag(*torch.cat(parts, 1))
        return whole

    def inputs(self, columns: Tensor) -> Tensor:
        """Say which of the layer's inputs, as `inverse` numbers them, units feed.

        Args:
            columns: int64 (units, entries), input channels or features.

        Returns:
            int64 (units, entries times positions of the kernel).
        """
        width, size = self.layer.weight.shape[1], self.layer.weight[0].numel()
        lines = torch.arange(0, size, width)
        return (columns // width * size + columns % width).unsqueeze(-1).add(lines).flatten(1)


class Measured:
    """Measure what the layers of a network see of its units, some groups in each pass over the batches.

    Args:
        net: in evaluation mode, with open attention; left as it is.
        batches: on any device.
        sensitivity: of the network's output; None to weigh each layer's output by its own variance.
        memory: bytes of second moments that one pass gathers; a group alone may take more.
    """

    def __init__(
        self,
        net: nn.Module,
        batches: Sequence[Batch],
        sensitivity: OutputSensitivity | None = None,
        memory: int = MEMORY,
    ) -> None:
        self.net, self.batches, self.sensitivity, self.memory = net, batches, sensitivity, memory
        self.layers = prunable(net)
        self.device = next(net.parameters()).device

    def consumers(self, groups: Sequence[Group]) -> Iterator[tuple[Group, dict[str, Consumer]]]:
        """Give each group with the layers that read and mix its units, by name.

        Who lets go of them before asking for the next group has the second moments of one pass at a time.

        Args:
            groups: of the network, with units that can be taken out.
        """
        waiting = list(groups)
        while waiting:
            names: dict[str, None] = {}
            size, taken = 0, 0
            for group in waiting:
                new = [x for x in readers(group, self.layers) if x not in names]
                size += sum(
                    8 * groups_of(self.layers[x]) * self.layers[x].weight[0].numel() ** 2 for x in new
                )
                if taken and size > self.memory:
                    break
                names |= dict.fromkeys(new)
                taken += 1
            found = self._gathered(list(names))
            for group in waiting[:taken]:
                yield group, {x: found[x] for x in readers(group, self.layers) if found[x].count}
            waiting = waiting[taken:]
            del found  # before the next pass gathers as much again

    def _gathered(self, names: list[str]) -> dict[str, Consumer]:
        watch = _Gathering(self.net, {name: Consumer(self.layers[name]) for name in names})
        for batch in self.batches:
            own = batch.part()
            watch.begin(own.share > 0)
            with torch.no_grad(), plain_forward(), watch:
                own.to(self.device).through(self.net)
        for consumer in watch.consumers.values():
            consumer.pool()
            if self.sensitivity is not None:
                consumer.metrics = list(self.sensitivity.of(consumer.operations).values())
        return watch.consumers


class _Gathering(Watch):
    """Gather the second moments of some layers' inputs, and the names of their calls."""

    def __init__(self, net: nn.Module, consumers: dict[str, Consumer]) -> None:
        super().__init__(net)
        self.consumers, self.real = consumers, True

    def begin(self, real: bool) -> None:
        """Name operations as in the first pass; of a batch whose samples are this process's own, or not."""
        self.frames, self.real = [Frame()], real

    def layer(self, name: str, call: Call, args: Any, kwargs: Any) -> Any:
        operation = self.frame.operation(call.function)
        if (consumer := self.consumers.get(name)) is not None:
            consumer.add(call, self.real)
            if operation not in consumer.operations:
                consumer.operations.append(operation)
        return call.function(*args, **kwargs)

    def other(self, func: Any, args: Any, kwargs: Any) -> Any:
        if known(func).arguments:  # it counts in the names of layers' calls
            self.frame.operation(func)
        return func(*args, **kwargs)
