"""Noise at a network's output, pulled back to the weights of its units and to gates on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from snows.matching.horizon import Run, frozen, protected
from snows.matching.metrics import variance
from snows.networks.attention import plain_forward
from snows.networks.batches import Batch, first_line, output_tensors
from snows.networks.watching import Call, Watch

Watched = TypeVar("Watched", bound=Watch)


def weight_gradients(
    net: nn.Module, batch: Batch, names: set[str], generator: torch.Generator
) -> dict[str, Tensor]:
    """Pull noise back from the output to the weights of layers.

    The noise is 1 or -1 with equal chances, divided by the square root of the output's variance and number
    of entries. The mean square of a gradient over the noise is then the diagonal of the Gauss-Newton matrix
    of the share of the output's variance that a change of the weights makes up.

    Args:
        net: in evaluation mode.
        batch: on the network's device.
        names: of layers.
        generator: source of the noise, on the CPU.

    Returns:
        By layer, of its weight's shape; a layer that the output does not depend on is left out.

    Raises:
        ValueError: the network cannot be differentiated.
    """
    watch = _pulled(net, batch, generator, partial(_Weights, net, names))
    return {name: x.grad for name, x in watch.leaves.items() if x.grad is not None}


def gate_derivatives(
    net: nn.Module, batch: Batch, names: set[str], generator: torch.Generator
) -> dict[str, Tensor]:
    """Pull noise back from the output to gates on the input channels of layers: factors that are 1.

    The noise is that of `weight_gradients`.

    Args:
        net: in evaluation mode.
        batch: on the network's device.
        names: of layers.
        generator: source of the noise, on the CPU.

    Returns:
        By layer, (samples, channels or features), all positions and calls together; with one row for all
        samples where a layer mixes them.

    Raises:
        ValueError: the network cannot be differentiated.
    """
    watch = _pulled(net, batch, generator, partial(_Gates, net, names, batch.samples()))
    return watch.sums


class _Weights(Watch):
    """Let the weights of some layers be leaves of the derivative."""

    def __init__(self, net: nn.Module, names: set[str], run: Run) -> None:
        super().__init__(net)
        self.names, self.run = names, run
        self.leaves: dict[str, Tensor] = {}

    def layer(self, name: str, call: Call, args: Any, kwargs: Any) -> Any:
        if name in self.names:
            if name not in self.leaves:
                weight: Any = self.net.get_submodule(name).weight
                self.leaves[name] = weight.detach().clone().requires_grad_()
            args, kwargs = _replaced(args, kwargs, 1, "weight", self.leaves[name])
        return self.run(call.function, args, kwargs)

    def other(self, func: Any, args: Any, kwargs: Any) -> Any:
        return None if func is torch._C._set_grad_enabled else self.run(func, args, kwargs)


class _Gates(Watch):
    """Sum input times derivative over the positions of some layers' inputs."""

    def __init__(self, net: nn.Module, names: set[str], samples: int, run: Run) -> None:
        super().__init__(net)
        self.names, self.samples, self.run = names, samples, run
        self.sums: dict[str, Tensor] = {}

    def layer(self, name: str, call: Call, args: Any, kwargs: Any) -> Any:
        if name in self.names:
            # a copy, for the network may change its own later
            x = call.x.clone() if call.x.requires_grad else call.x.detach().clone().requires_grad_()
            x.register_hook(partial(self.add, name, x.detach(), -3 if call.kernel else -1))
            args, kwargs = _replaced(args, kwargs, 0, "input", x)
        return self.run(call.function, args, kwargs)

    def other(self, func: Any, args: Any, kwargs: Any) -> Any:
        return None if func is torch._C._set_grad_enabled else self.run(func, args, kwargs)

    def add(self, name: str, x: Tensor, channel: int, g: Tensor) -> None:
        """Add one call's sums."""
        product = (x * g).movedim(channel, -1)
        samples = self.samples if len(product) % self.samples == 0 else 1
        found = product.reshape(samples, -1, product.shape[-1]).sum(1)
        self.sums[name] = by_sample(self.sums[name], found) if name in self.sums else found


def by_sample(one: Tensor, other: Tensor) -> Tensor:
    """Add what is known of each sample, (samples, any), or of all samples together where one has one row."""
    if len(one) != len(other):
        one, other = one.sum(0, keepdim=True), other.sum(0, keepdim=True)
    return one + other


def _replaced(args: Any, kwargs: Any, place: int, name: str, value: Tensor) -> tuple[Any, Any]:
    """Put a value in the place of an argument, wherever it was given."""
    if name in kwargs:
        return args, {**kwargs, name: value}
    return (*args[:place], value, *args[place + 1 :]), kwargs


def _pulled(
    net: nn.Module, batch: Batch, generator: torch.Generator, make: Callable[[Run], Watched]
) -> Watched:
    """Run a network under a watch, and pull noise back from its output."""
    state, note = generator.get_state(), ""
    for run in _runs():
        try:
            watch = make(run)
            with torch.enable_grad(), frozen(net), plain_forward():
                with watch:
                    output = batch.through(net)
                ends = [y for y in output_tensors(output) if y.requires_grad]
                if not ends:
                    raise RuntimeError("an output that depends on no layer of these by a derivative")
                torch.autograd.backward(ends, [_noise(y.detach(), generator) for y in ends])
            return watch
        except (RuntimeError, NotImplementedError) as error:
            generator.set_state(state)
            note = first_line(error)
    raise ValueError(
        f"expected a network that can be differentiated, got {note}; order its units by compensated or "
        "magnitude"
    )


def _runs() -> Iterator[Run]:
    """Give ways to call a function: as it is, and for networks that change in place what is needed later."""

    def plain(func: Any, args: Any, kwargs: Any) -> Any:
        return func(*args, **kwargs)

    yield plain
    yield partial(protected, plain)


def _noise(y: Tensor, generator: torch.Generator) -> Tensor:
    signs = torch.randint(0, 2, y.shape, generator=generator).to(y) * 2 - 1
    scale: float = (y.numel() * variance(y)) ** 0.5
    return signs / scale
