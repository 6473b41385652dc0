"""One watched forward pass of a network, as named events; and what can be read off it."""

from __future__ import annotations

import math
import weakref
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from snows.networks.attention import plain_forward
from snows.networks.batches import Batch, output_of, tensors_in
from snows.networks.functions import LOOKS, Function, arguments, known
from snows.networks.layers import has_hooks, held_elsewhere, is_stock, prunable
from snows.networks.watching import Call, Watch


class Event(NamedTuple):
    """Describe one call of a torch function.

    Attributes:
        name: where it is called, see `watching`; the same in every copy of the network.
        function: what was called.
        module: the innermost open module call, by the module's name.
        reads: numbers of the values that it reads.
        makes: numbers of the values that it makes; one that it also reads was changed in place.
        shape: of the first value made.
        flops: of a layer, a multiplication and an addition being two; 0 for other functions.
        layer: the layer that it is a call of; empty for other functions.
    """

    name: str
    function: Function
    module: str
    reads: tuple[int, ...]
    makes: tuple[int, ...]
    shape: tuple[int, ...]
    flops: int
    layer: str = ""


@dataclass
class Use:
    """Describe how a network applies one layer.

    Attributes:
        calls: shape and stride of the input of each call.
        flops: of all calls.
        kernel: height and width of a convolution's kernel.
        settings: stride, padding, dilation and groups that a convolution was last called with.
        value: number of what the last call returned.
        oddity: why calling another module in its place would not be the same; empty if it would.
    """

    calls: list[tuple[torch.Size, tuple[int, ...]]] = field(default_factory=list)
    flops: int = 0
    kernel: tuple[int, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    value: int = -1
    oddity: str = ""


class Trace:
    """Hold what one forward pass shows of a network.

    Attributes:
        events: the functions called, in order.
        layers: how each layer is applied, in order of the first call; last those that only share or show
            their weight.
        start: the time of each layer's first call; times count events and returns of modules.
        last_read: by module, the time after which no code that a late start runs reads its output.
        called: how often each module was called.
        chains: modules that call one function, and then each of their children once, in order.
        returned: numbers of the values that the network returned.
        outputs: the tensors that the network returned.
        autocast: the first layer that ran under `torch.autocast`; empty if none did.
        bare: parameters that are the weight of a linear or a convolution, but of no Linear or Conv2d module:
            name to shape.
        tensors: numbers of the network's parameters and buffers, by all their names.
        held: ids of modules that attributes hold too, see `held_elsewhere`.
    """

    def __init__(self, net: nn.Module) -> None:
        self.net = net
        self.events: list[Event] = []
        self.layers: dict[str, Use] = {}
        self.start: dict[str, int] = {}
        self.last_read: dict[str, float] = {}
        self.called: Counter[str] = Counter()
        self.chains: set[str] = set()
        self.returned: set[int] = set()
        self.outputs: list[Tensor] = []
        self.autocast = ""
        self.bare: dict[str, tuple[int, ...]] = {}
        self.tensors: dict[str, int] = {}
        self.held = held_elsewhere(net)

    @classmethod
    def of(cls, net: nn.Module, batch: Batch) -> Trace:
        """Run a network once, and watch it.

        Args:
            net: in evaluation mode.
            batch: on the network's device.

        Raises:
            ValueError: the network cannot run the batch.
        """
        watch = _Tracing(net)
        with torch.no_grad(), plain_forward(), watch:
            watch.trace.outputs = tensors_in(output_of(net, batch))
        return watch.finished()

    @property
    def flops(self) -> int:
        """The operations of all layers."""
        return sum(use.flops for use in self.layers.values())

    def readers(self, value: int) -> list[Event]:
        """List the events that read a value, in order."""
        return [self.events[i] for i in self.reading.get(value, ())]

    def only_reader(self, value: int) -> Event | None:
        """Return the event that reads a value before anything else, if nothing else reads it as it is.

        What others read after a change in place is another value under the same number.
        """
        readers = self.readers(value)
        if not readers or (len(readers) + (value in self.returned) > 1 and value not in readers[0].makes):
            return None
        return readers[0]

    def follower(self, value: int, kinds: tuple[type[nn.Module], ...]) -> tuple[str, Event] | None:
        """Return the module of one of these kinds that alone reads a value, and its event.

        The module is called for nothing else.
        """
        event = self.only_reader(value)
        if event is None or not known(event.function).absorbed or self.called[event.module] != 1:
            return None
        module = self.net.get_submodule(event.module)
        fits = isinstance(module, kinds) and not has_hooks(module) and id(module) not in self.held
        return (event.module, event) if fits else None

    @property
    def reading(self) -> dict[int, list[int]]:
        """By value, which events read it, in order."""
        found: dict[int, list[int]] | None = self.__dict__.get("_read")
        if found is None:
            found = self.__dict__["_read"] = defaultdict(list)
            for i, event in enumerate(self.events):
                for value in dict.fromkeys(event.reads):
                    found[value].append(i)
        return found


class _Tracing(Watch):
    """Write a trace."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__(net)
        self.trace = Trace(net)
        self.time = 0
        self.values: dict[int, tuple[weakref.ref[Tensor], int]] = {}  # by id
        self.count = 0
        self.owners: dict[int, list[str]] = defaultdict(list)  # value -> modules that returned it
        self.reads: list[list[str]] = [[]]  # by open module call, the modules whose outputs its own code read
        self.parameters = {id(p): name for name, p in net.named_parameters()}
        for find in (net.named_parameters, net.named_buffers):
            for name, tensor in find(remove_duplicate=False):
                self.trace.tensors[name] = self.number(tensor)
        # by open module call: functions called, in others too; modules called
        self.inside: list[list[Any]] = [[0, []]]

    # ---------------------------------------------------------------- modules

    def enter(self, name: str) -> None:
        self.reads.append([])
        self.inside.append([0, []])

    def leave(self, name: str, output: Any) -> None:
        self.time += 1
        for owner in self.reads.pop():
            self.trace.last_read[owner] = max(self.trace.last_read.get(owner, 0), self.time)
        self.trace.last_read.setdefault(name, 0)
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor):
                self.owners[self.number(tensor)].append(name)
        functions, children = self.inside.pop()
        self.inside[-1][0] += functions
        self.inside[-1][1].append((name, functions))
        self.trace.called[name] += 1
        module = self.net.get_submodule(name)
        own = [f"{name}.{key}" for key, _ in module.named_children()]
        if [child for child, _ in children] == own and functions - sum(count for _, count in children) == 1:
            self.trace.chains.add(name)
        use = self.trace.layers.get(name)
        if use is not None and not is_stock(module):
            returned = isinstance(output, Tensor) and self.number(output) == use.value
            if functions != 1 or not returned:
                use.oddity = "its class does more than the layer's product"

    def abandon(self, name: str) -> None:
        self.time += 1
        for owner in self.reads.pop():  # whoever catches the error runs again, and calls it again
            self.trace.last_read[owner] = float("inf")
        functions, _ = self.inside.pop()
        self.inside[-1][0] += functions

    # ---------------------------------------------------------------- functions

    def layer(self, name: str, call: Call, args: Any, kwargs: Any) -> Any:
        use = self.trace.layers.setdefault(name, Use())
        if name not in self.trace.start:
            self.trace.start[name] = self.time + 1
        if not self.trace.autocast and torch.is_autocast_enabled(call.x.device.type):
            self.trace.autocast = name
        output = self.called(call.function, args, kwargs, own=name)
        module = self.net.get_submodule(name)
        use.calls.append((call.x.shape, call.x.stride()))
        use.flops += self.trace.events[-1].flops
        use.kernel, use.settings, use.value = call.kernel, call.settings, self.number(output)
        if self.frame.module != name:
            use.oddity = "its weight is used without calling it"
        elif has_hooks(module):
            use.oddity = "it has hooks"
        return output

    def other(self, func: Any, args: Any, kwargs: Any) -> Any:
        weight = (arguments(func, args, kwargs) or {}).get("weight")
        if (name := self.parameters.get(id(weight))) is not None:
            self.trace.bare[name] = tuple(weight.shape)  # type: ignore[union-attr]
        return self.called(func, args, kwargs)

    def called(self, func: Any, args: Any, kwargs: Any, own: str = "") -> Any:
        """Call a function, and write down the event unless it only looks at its arguments."""
        leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        for leaf in leaves:
            if (name := self.layers.get(id(leaf), own)) != own:
                self.trace.layers.setdefault(name, Use()).oddity = "its weight is read outside of it"
        if func in LOOKS:
            return func(*args, **kwargs)
        self.time += 1
        self.inside[-1][0] += 1
        reads = tuple(self.number(leaf) for leaf in leaves)
        for value in reads:
            self.reads[-1].extend(self.owners.get(value, ()))
        name, module = self.frame.operation(func), self.frame.module
        output = func(*args, **kwargs)
        made = [x for x in tree_leaves(output) if isinstance(x, Tensor)]
        flops = 2 * made[0].numel() * math.prod(self.net.get_submodule(own).weight.shape[1:]) if own else 0  # type: ignore
        shape = tuple(made[0].shape) if made else ()
        self.trace.events.append(
            Event(name, func, module, reads, tuple(map(self.number, made)), shape, flops, own)
        )
        return output

    def number(self, tensor: Tensor) -> int:
        """Return the number of a tensor: the same for the same tensor, and for no other."""
        found = self.values.get(id(tensor))
        if found is None or found[0]() is not tensor:
            found = self.values[id(tensor)] = (weakref.ref(tensor), self.count)
            self.count += 1
        return found[1]

    def finished(self) -> Trace:
        """Complete the trace after the pass."""
        trace = self.trace
        trace.returned = {self.number(x) for x in trace.outputs}
        for value in trace.returned:  # read by the network's caller
            self.reads[0].extend(self.owners.get(value, ()))
        for owner in self.reads[0]:  # read by the network's own code, which always runs
            trace.last_read[owner] = float("inf")
        trace.layers = {name: trace.layers[name] for name in dict.fromkeys((*trace.start, *trace.layers))}
        for name, module in prunable(self.net).items():
            if id(module) in trace.held and name in trace.layers:
                trace.layers[name].oddity = "an attribute of another module holds it too"
        owners = defaultdict(list)
        for name, module in prunable(self.net).items():
            owners[id(module.weight)].append(name)
        for names in owners.values():
            for name in names if len(names) > 1 else ():
                others = ", ".join(other for other in names if other != name)
                trace.layers.setdefault(name, Use()).oddity = f"it shares its weight with {others}"
        return trace
