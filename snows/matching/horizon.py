"""A layer and the operations after it, as a function of the layer's weight.

An *operation* is one call, after the layer, of a convolution, linear, activation, LayerNorm or attention, as
a module or as a function, whose output depends on the layer's weight. Evaluated BatchNorm, dropout, flatten,
pooling and residual additions are not counted. An implant's two layers are one operation, its second's.
Operations are known by their names (see `networks.watching`), so that another copy of the network is asked
for the same ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from snows.networks.attention import plain_forward
from snows.networks.batches import Batch, output_tensors
from snows.networks.functions import known
from snows.networks.implants import LowRank, dense_name
from snows.networks.stream import Schedule, Stream
from snows.networks.trace import Trace
from snows.networks.watching import Call, Finished, Watch
from snows.ops.routes import reroute

Outputs = dict[str, Tensor]  # by name of the operation, the layer's own first
Run = Callable[[Any, Any, Any], Any]  # calls a function with positional and keyword arguments


class _Window(Watch):
    """Put a weight in place of the layer's own, and gather the operations after it."""

    def __init__(self, net: nn.Module, layer: str, weight: Tensor, run: Run) -> None:
        super().__init__(net)
        self.target, self.weight, self.run = layer, weight, run
        self.found: Outputs = {}
        self.reached = False

    def layer(self, name: str, call: Call, args: Any, kwargs: Any) -> Any:
        if name == self.target:
            self.reached = True
            if len(args) > 1:
                args = (args[0], self.weight, *args[2:])
            else:
                kwargs = {**kwargs, "weight": self.weight}
        if name in self.first_factors:
            return self.run(call.function, args, kwargs)
        return self.other(call.function, args, kwargs)

    def other(self, func: Any, args: Any, kwargs: Any) -> Any:
        if (
            func is torch._C._set_grad_enabled
        ):  # the network's own no_grad: lifted, or nothing could be fitted through it
            return None
        counted = known(func).counted
        name = (
            self.frame.operation(func) if counted else ""
        )  # before the layer runs too: numbers count from the call's start
        out = self.run(func, args, kwargs)
        if counted and self.reached:
            return self.operation(name, out)
        return out

    def operation(self, name: str, out: Any) -> Any:
        """Gather an operation's output, or the first of several."""
        if isinstance(out, tuple):
            return (self.gather(name, out[0]), *out[1:])
        return self.gather(name, out)

    def gather(self, name: str, out: Tensor) -> Tensor:
        """Note an output, and return what the network goes on with."""
        raise NotImplementedError


class _Learn(_Window):
    """Count an operation where its output needs the weight's gradient."""

    def __init__(
        self, net: nn.Module, layer: str, weight: Tensor, run: Run, k: float, counts: Callable[[str], bool]
    ) -> None:
        super().__init__(net, layer, weight, run)
        self.k, self.counts = k, counts
        self.versions: dict[str, int] = {}

    def gather(self, name: str, out: Tensor) -> Tensor:
        if self.found and not (out.requires_grad and self.counts(name)):
            return out
        self.found[name], self.versions[name] = out, out._version
        if len(self.found) > self.k:
            raise Finished
        return out


class _Follow(_Window):
    """Gather the operations that were counted, and end the pass after the last."""

    def __init__(self, net: nn.Module, layer: str, weight: Tensor, horizon: Horizon) -> None:
        super().__init__(
            net, layer, weight, partial(protected, horizon.run) if horizon.tolerant else horizon.run
        )
        self.horizon = horizon

    def gather(self, name: str, out: Tensor) -> Tensor:
        if name not in self.horizon.wanted:
            return out
        changed, own = name in self.horizon.changed, not self.found  # changed later, in place
        self.found[name] = out.clone() if changed and not own else out
        if (
            changed and own
        ):  # the layer's own output stays on the path of the gradients: the network gets the copy
            out = out.clone()
        if not self.horizon.to_end and name == self.horizon.operations[-1]:
            raise Finished
        return out


class Horizon:
    """Compute a layer and the `k` operations after it, as a function of the layer's weight.

    The forward pass is the network's own, from its input; modules that ran before the layer answer from the
    stream's memory. One pass over `sample` learns which operations depend on the weight.

    Attributes:
        operations: names of what is matched, the layer's own output first; of an implant's first factor the
            second's.
        dense: the layer's name in the dense network.

    Args:
        net: the network, in evaluation mode.
        layer: name of a Linear or Conv2d.
        k: operations to match after the layer's own output; "end" takes all and the network's output too.
        sample: a batch, or a stream that was advanced to the layer.
        counts: says of an operation's name whether it may be matched; by default all may.
        run: calls the network's functions; by default through ops that are cheap to differentiate twice.
    """

    def __init__(
        self,
        net: nn.Module,
        layer: str,
        k: int | Literal["end"],
        sample: Stream | Batch,
        counts: Callable[[str], bool] = lambda name: True,
        run: Run = reroute,
    ) -> None:
        self.net, self.name, self.run = net, layer, run
        self.dense = dense_name(net, layer)
        self.to_end = k == "end"
        self.parameter: nn.Parameter = net.get_submodule(layer).weight  # type: ignore[assignment]
        self.tolerant = False  # whether the network changes in place what a derivative needs
        stream = sample if isinstance(sample, Stream) else self.stream(sample)
        weight = self.parameter.detach().clone().requires_grad_()
        watch = _Learn(net, layer, weight, run, float("inf") if k == "end" else int(k), counts)
        output = None
        with (
            torch.enable_grad(),
            frozen(net),
            plain_forward(),
            stream.answering(copies=True),
            watch,
            suppress(Finished),
        ):
            output = stream.batch.through(net)
        self.operations = list(watch.found)
        self.wanted = set(self.operations)
        self.ends = [
            i for i, x in enumerate(output_tensors(output)) if x.requires_grad
        ]  # outputs that depend on the weight
        self.changed = {name for name, x in watch.found.items() if x._version != watch.versions[name]}

    def stream(self, batch: Batch) -> Stream:
        """Return a stream through this network, advanced to the layer."""
        stream = Stream(Schedule(self.net, Trace.of(self.net, batch)), batch)
        stream.advance(self.name)
        return stream

    def shorten(self, weight: Tensor, x: Stream) -> str:
        """Leave out the first operation that cannot be differentiated twice, and all after it.

        Args:
            weight: where to try.
            x: a stream advanced to the layer.

        Returns:
            The operation's name; empty if all can be.
        """
        with torch.enable_grad():
            at = weight.detach().clone().requires_grad_()
            found = self.outputs(at, x)
        for name in list(found)[1:]:  # the layer's own output is linear in the weight
            if not _twice_differentiable(found[name], at):
                self.operations = (
                    self.operations[: self.operations.index(name)] if name in self.wanted else self.operations
                )
                self.wanted, self.to_end, self.ends = set(self.operations), False, []
                return name
        return ""

    def outputs(self, weight: Tensor, x: Stream) -> Outputs:
        """Compute the layer's own output and those of the operations after it, for a weight in its place.

        Args:
            weight: the layer's shape; gradients flow to it alone.
            x: a stream advanced to the layer, through this network or through another copy of it. Where the
                layer is a factor of an implant, that may be the dense network: weight and stream are then of
                the layer that the implant stands for.

        Returns:
            By name of the operation; the network's outputs, if they are matched, as "output 0" and so on.
        """
        net = x.schedule.net
        implanted = isinstance(net.get_submodule(self.dense), LowRank)
        watch = _Follow(net, self.name if implanted else self.dense, weight, self)
        output = None
        with frozen(net), plain_forward(), x.answering(), watch, suppress(Finished):
            output = x.batch.through(net)
        found = watch.found
        if self.to_end:
            seen, tensors = {id(x) for x in found.values()}, output_tensors(output)
            found |= {
                f"output {i}": tensors[i]
                for i in self.ends
                if i < len(tensors) and id(tensors[i]) not in seen
            }
        return found


def protected(run: Run, func: Any, args: Any, kwargs: Any) -> Any:
    """Call a function on copies, and return a copy.

    So no later change in place reaches what a derivative needs.

    A function that changes its input, or returns a view of it, is called on the input itself.
    """
    copies: list[Tensor] = []

    def copied(x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.requires_grad:
            return x
        copies.append(x.clone())
        return copies[-1]

    out = run(func, *tree_map(copied, (args, kwargs)))
    storages = {x.untyped_storage().data_ptr() for x in copies}
    made = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
    if any(x._version for x in copies) or any(x.untyped_storage().data_ptr() in storages for x in made):
        return run(func, args, kwargs)
    return tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, out)


@contextmanager
def frozen(net: nn.Module) -> Iterator[None]:
    """Keep gradients from flowing to a network's own parameters."""
    parameters = [p for p in net.parameters() if p.requires_grad]
    for p in parameters:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in parameters:
            p.requires_grad_(True)


def _twice_differentiable(y: Tensor, at: Tensor) -> bool:
    """Say whether a Gauss-Newton product through an output can be computed.

    It takes the derivative of ``Jᵀ u`` by u.
    """
    try:
        with torch.enable_grad():
            u = torch.ones_like(y).requires_grad_()
            (pulled,) = torch.autograd.grad(y, at, u, create_graph=True)
            torch.autograd.grad(pulled, u, torch.ones_like(pulled), retain_graph=True)
    except (RuntimeError, NotImplementedError):
        return False
    return True
