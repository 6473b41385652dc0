"""How a mismatch of features is measured: by the network's output sensitivity, or by their variance."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from snows import together
from snows.matching.horizon import Run, frozen, protected
from snows.networks.attention import plain_forward
from snows.networks.batches import Batch, first_line, output_tensors
from snows.networks.functions import channel_of, known
from snows.networks.watching import Call, Watch

ROUNDS = 5  # of subspace iteration: the directions that are kept stand well above the others
RANK = 64  # the most directions that are kept
SMALL = 0.3  # of the mean eigenvalue; what lies below is noise of a few dozen samples


class Metric(NamedTuple):
    """Measure a mismatch e of one operation's output by ``floor ‖e‖² + ‖e basis‖²`` at each position.

    Attributes:
        floor: the weight of every direction alike.
        basis: (channels, rank), directions that weigh more; None for none.
        channel: the dimension of an output that holds its channels; all others are positions.
    """

    floor: float
    basis: Tensor | None = None
    channel: int = -1

    @classmethod
    def plain(
        cls, y: Tensor, scaling: Literal["variance", "none"] = "variance", share: float | None = None
    ) -> Metric:
        """Take the mean over all elements, divided by the variance of the target `y`, or not.

        Args:
            y: the target, or this process's part of it.
            scaling: whether to divide.
            share: of the samples, those in y; None for all.
        """
        return cls(1.0 / (y.shape[-1] * (variance(y, share) if scaling == "variance" else 1.0)))

    @classmethod
    def from_gradients(
        cls,
        gradients: Tensor,
        channel: int,
        generator: torch.Generator | None = None,
        *,
        smoothing: float = 0.1,
        rank: int = RANK,
    ) -> Metric:
        """Take ``G = Σ g gᵀ`` over rows g, the output factor of K-FAC, with its small eigenvalues averaged.

        The larger ones are found by subspace iteration (Halko et al. 2011), so that a wide layer's G is never
        decomposed. Of several processes each has some of the rows; the sum is over all.

        Args:
            gradients: (positions, channels).
            channel: the dimension of an output that holds its channels.
            generator: source of the first subspace, on the CPU.
            smoothing: added to every eigenvalue, relative to their mean.
            rank: the most directions kept.
        """
        width = gradients.shape[1]
        sums = torch.stack([gradients.square().sum().double(), gradients.new_tensor(len(gradients)).double()])
        trace, count = together.total(sums).tolist()
        mean = trace / width
        gram = together.total(gradients.T @ gradients) if width <= count else None
        gradients = gradients if gram is not None else together.gathered(gradients)

        def largest() -> tuple[Tensor, Tensor]:
            Q = torch.randn(width, min(rank, width), generator=generator, dtype=gradients.dtype)
            Q = Q.to(gradients.device)
            for _ in range(ROUNDS):
                product = gram @ Q if gram is not None else gradients.T @ (gradients @ Q)
                last, Q = Q, torch.linalg.qr(product).Q
            values, vectors = torch.linalg.eigh(last.T @ product)
            keep = values > SMALL * mean
            return values[keep], last @ vectors[:, keep]

        values, vectors = together.first(largest)
        rest = max(trace - values.sum().item(), 0.0) / max(width - len(values), 1)
        return cls(rest + smoothing * mean, vectors * (values - rest).sqrt(), channel)

    @property
    def is_zero(self) -> bool:
        """Whether no mismatch weighs anything."""
        return self.floor == 0 and (self.basis is None or not self.basis.any())

    def matrix(self, channels: int, groups: int = 1, like: Tensor | None = None) -> Tensor:
        """Return the diagonal blocks of ``floor I + basis basisᵀ``.

        Their shape is (groups, channels / groups, channels / groups).

        Args:
            channels: of the output.
            groups: blocks.
            like: gives dtype and device where there is no basis.
        """
        width = channels // groups
        if self.basis is None:
            eye = torch.eye(width) if like is None else torch.eye(width, dtype=like.dtype, device=like.device)
            return (self.floor * eye).expand(groups, width, width)
        parts = self.basis.view(groups, width, -1)
        return parts @ parts.mT + self.floor * torch.eye(width, dtype=parts.dtype, device=parts.device)


class OutputSensitivity:
    """Measure how strongly a network's output depends on each of its operations.

    One forward and one backward pass serve for all; of several processes each does its part of the samples.

    Gaussian noise z takes the place of the output's error, divided by the square root of the output's
    variance and number of entries, and is pulled back to every operation: g = Jᵀ z. For a mismatch e at one
    position, the mean of (gᵀ e)² over z is the share of the output's variance that e makes up. Summed over
    positions, as if they erred independently, that is the metric of the operation.

    Attributes:
        note: why nothing could be measured; empty where it was.

    Args:
        net: in evaluation mode.
        batch: a few dozen samples, the same in all processes; memory grows with them as in training.
        seed: of the noise.
    """

    def __init__(self, net: nn.Module, batch: Batch, seed: int) -> None:
        self.note = ""
        self._metrics: dict[str, Metric | None] = {}
        for run in (
            _plain,
            partial(protected, _plain),
        ):  # the second for a network that changes in place what a derivative needs
            try:
                self._metrics, self.note = _measured(net, batch, seed, run), ""
                return
            except (RuntimeError, NotImplementedError) as error:
                self.note = first_line(error)
                if "allocate" in self.note and together.size() > 1:  # maybe this process's alone
                    raise

    def of(self, names: Iterable[str]) -> dict[str, Metric]:
        """Return the metrics of operations by name.

        It is empty if the output depends on none of them, or nothing was measured.

        Args:
            names: of operations; what is not known of one is left out.
        """
        if self.note:
            return {}
        found = {name: self._metrics[name] or Metric(0.0) for name in names if name in self._metrics}
        return {} if all(metric.is_zero for metric in found.values()) else found


def _plain(func: Any, args: Any, kwargs: Any) -> Any:
    return func(*args, **kwargs)


def _measured(net: nn.Module, batch: Batch, seed: int, run: Run) -> dict[str, Metric | None]:
    """Pull noise back from the output to every operation, and return the metrics by name.

    A metric is None where no gradient arrives.
    """
    generator = torch.Generator().manual_seed(seed)
    watch, own = _Measuring(net, generator, run), batch.part()
    with torch.enable_grad(), frozen(net), plain_forward():
        with watch:
            output = own.through(net)
        ends = [y for y in output_tensors(output) if y.requires_grad]
        noise = [_noise(y.detach(), batch, own, generator) for y in ends]
        if ends:
            torch.autograd.backward(ends, noise)
    return watch.metrics


def _noise(y: Tensor, batch: Batch, own: Batch, generator: torch.Generator) -> Tensor:
    """Return noise of one output's shape, divided by the square root of its variance and number of entries.

    Several processes draw it for all samples and take that of their own, so that it does not depend on how
    many they are; an output that has not one entry a sample gets the same in all.

    Args:
        y: of this process's samples.
        batch: all samples.
        own: those of this process; where their share is 0, the noise is too.
        generator: of the noise.
    """
    divided = own is not batch and y.ndim and len(y) == own.samples()
    shape = torch.Size([batch.samples(), *y.shape[1:]]) if divided else y.shape
    z = torch.randn(shape, generator=generator, dtype=y.dtype)
    if divided:
        (z,) = Batch.of(z).part().tensors()
    counts = bool(own.share)
    entries = together.total(torch.tensor(y.numel() * counts, device=y.device)).item()
    return z.to(y.device) * (counts / math.sqrt(entries * variance(y, own.share)))


class _Measuring(Watch):
    """Measure what gradient reaches the output of each operation."""

    def __init__(self, net: nn.Module, generator: torch.Generator, run: Run) -> None:
        super().__init__(net)
        self.generator, self.run = generator, run
        self.metrics: dict[str, Metric | None] = {}
        self.channels: dict[
            int, tuple[weakref.ref[Tensor], int]
        ] = {}  # by id: the dimension that holds a tensor's channels

    def layer(self, name: str, call: Call, args: Any, kwargs: Any) -> Any:
        return self.other(call.function, args, kwargs)

    def other(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func is torch._C._set_grad_enabled:  # as in a horizon
            return None
        counted = known(func).counted
        name = self.frame.operation(func) if counted else ""
        inputs = [
            (x, self.channels[id(x)][1])
            for x in tree_leaves((args, kwargs))
            if isinstance(x, Tensor) and id(x) in self.channels and self.channels[id(x)][0]() is x
        ]
        out = self.run(func, args, kwargs)
        if counted:
            first = out[0] if isinstance(out, tuple) else out
            measured = self.measured(name, first, channel_of(func, inputs, first))
            out = (measured, *out[1:]) if isinstance(out, tuple) else measured
        if inputs or known(func).channel is not None:
            for x in tree_leaves(out):
                if isinstance(x, Tensor) and x.ndim:
                    self.channels[id(x)] = weakref.ref(x), channel_of(func, inputs, x)
        return out

    def measured(self, name: str, out: Tensor, channel: int) -> Tensor:
        """Let an output's metric be made when its gradient is there; return what the network goes on with."""
        self.metrics[name] = None
        if not out.requires_grad:  # the first operation: gradients end here; others may change it in place
            out = out.detach().requires_grad_().clone()

        def measure(g: Tensor) -> None:
            self.metrics[name] = Metric.from_gradients(
                g.movedim(channel, -1).flatten(0, -2), channel, self.generator
            )

        out.register_hook(measure)
        return out


def variance(y: Tensor, share: float | None = None) -> float:
    """Return a tensor's variance over all elements; 1 where it is 0.

    Small tensors are summed in double precision, where that is cheap.

    Args:
        y: the tensor, or this process's part of one that several processes have.
        share: of the samples, those in this part; None where this process has all.
    """
    if share is not None and together.size() > 1:
        return together.variance(y, share)
    found = y.double().var(unbiased=False).item() if y.numel() < 2**16 else y.var(unbiased=False).item()
    return found if found > 0 else 1.0
