"""A forward pass that starts late: modules that ran before a layer answer with what they returned.

The invariant: a module's output is remembered as it was when the module returned it. If code that runs later
changes it in place, that is noticed once, and from then on copies are remembered and given out.
"""

from __future__ import annotations

import copy
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from snows.networks.attention import plain_forward
from snows.networks.batches import Batch, output_tensors
from snows.networks.store import Slots, Store, addresses, size
from snows.networks.trace import Trace
from snows.networks.watching import Call, Finished, Watch

Output = tuple[str, int]  # a module, and which of its calls
ROUNDING = 1e-5  # of the largest entry: sums in float32 on a device that adds in any order


@dataclass
class Schedule:
    """Hold what all streams through one network share.

    Attributes:
        net: the network.
        trace: of one pass.
        changed: outputs that later code changes in place; shared by a network and its twin.
        reached: layers that a stream has reached, so that all changes on the way there are known.
        whole: whether every pass runs from the front, because the network's state or its routes would make a
            late start wrong.
        store: has what the streams remember.
        rooms: by layer, the bytes that a sample's stream takes there, as far as they are known.
    """

    net: nn.Module
    trace: Trace
    changed: set[Output] = field(default_factory=set)
    reached: set[str] = field(default_factory=set)
    whole: bool = False
    store: Store = field(default_factory=Store)
    rooms: dict[str, int] = field(default_factory=dict)


class Stream:
    """Take one batch through a network that is pruned layer by layer.

    Outputs that nothing will read again are dropped. The batch itself may stay on the host.

    Attributes:
        call: the last layer's, None where the batch does not reach it.
        memory: by module, what its calls returned, in the schedule's store.
        slots: of a stream on the device, whose memory is tensors: where the store has these, by address.
    """

    def __init__(self, schedule: Schedule, batch: Batch) -> None:
        self.schedule, self.batch = schedule, batch
        self.memory: dict[str, list[Any]] = {}
        self.slots: Slots | None = None
        self.call: Call | None = None

    def on_device(self) -> Stream:
        """Return the same stream with batch and memory on the network's device, for as long as it is held."""
        if self.slots is not None:
            return self
        stream = copy.copy(self)
        stream.batch = self.batch.to(next(self.schedule.net.parameters()).device)
        stream.memory, stream.slots = self.schedule.store.take(self.memory)
        return stream

    def expect(self) -> None:
        """Fetch what is remembered, because the stream is used next."""
        self.schedule.store.expect(self.memory)

    @property
    def room(self) -> int:
        """The bytes that the stream takes."""
        return size((self.memory, None if self.call is None else self.call.input))

    def advance(self, layer: str) -> Call | None:
        """Run up to a layer, remember what was done on the way, and return the layer's call, if it runs."""
        schedule, here = self.schedule, self.on_device()
        while True:
            record = _Recording(schedule.net, layer, schedule.changed)
            with (
                torch.no_grad(),
                plain_forward(),
                here.answering(copies=layer not in schedule.reached),
                record,
                suppress(Finished),
            ):
                here.batch.through(schedule.net)
            if record.call is None or schedule.whole:
                return self._keep(record.call, here.memory, here)
            changed = record.changed_since()
            if not changed:
                break
            schedule.changed |= changed  # noticed once for all batches: remember a copy of these
        schedule.reached.add(layer)
        now = schedule.trace.start[layer]
        memory: dict[str, list[Any]] = defaultdict(list)
        for name, output in record.done():
            dead = schedule.trace.last_read.get(name, float("inf")) <= now
            memory[name].append(tree_map(_placeholder, output) if dead else output)
        return self._keep(record.call, memory, here)

    def _keep(self, call: Call | None, memory: dict[str, list[Any]], here: Stream) -> Call | None:
        """Put the layer's call and what is remembered from now on into the store; return the call itself."""
        net, store, before = self.schedule.net, self.schedule.store, here.slots or {}
        value = (memory, None if call is None else call.input)
        slots = {at: before[at] for at in addresses(tree_leaves(value)) & before.keys()}
        here.memory, here.slots, self.memory, self.call = {}, None, {}, None
        here.call, before = None, {}  # what was held before is let go, so that there is room for what is new
        own = addresses((*net.parameters(), *net.buffers(), *self.batch.tensors()))
        self.memory, kept = store.put(value, slots, own)
        self.call = None if call is None else replace(call, input=kept)
        return call

    @contextmanager
    def answering(self, copies: bool = False) -> Iterator[None]:
        """Let the modules that are done answer from memory.

        Args:
            copies: give out copies, and note which of them the pass changes in place. Without it, only what
                was noted before is copied.
        """
        given: list[_Mark] | None = [] if copies else None
        with ExitStack() as stack:
            for name, outputs in self.on_device().memory.items():
                stack.enter_context(_answer(self.schedule, name, outputs, given))
            yield
        self.schedule.changed |= _changed(given or ())


_Mark = tuple[Output, Tensor, int]  # an output, one of its tensors, and that tensor's version


def _marks(output: Output, value: Any) -> Iterator[_Mark]:
    return ((output, x, x._version) for x in tree_leaves(value) if isinstance(x, Tensor))


def _changed(marks: Sequence[_Mark]) -> set[Output]:
    return {output for output, x, version in marks if x._version != version}


class _Recording(Watch):
    """Remember what modules return, of nested calls the outermost, until a layer is called."""

    def __init__(self, net: nn.Module, layer: str, copied: set[Output]) -> None:
        super().__init__(net)
        self.target, self.copied = layer, copied
        self.call: Call | None = None
        self.finished: list[list[tuple[str, Any]]] = [
            []
        ]  # by open module call, the calls that ended inside it
        self.counts: Counter[str] = Counter()
        self.marks: list[_Mark] = []

    def layer(self, name: str, call: Call, args: Any, kwargs: Any) -> Any:
        if name == self.target:
            self.call = call
            raise Finished
        return self.other(call.function, args, kwargs)

    def enter(self, name: str) -> None:
        self.finished.append([])

    def leave(self, name: str, output: Any) -> None:
        self.finished.pop()
        which = (name, self.counts[name])
        self.counts[name] += 1
        if which in self.copied:
            output = _clone(output)
        self.marks.extend(_marks(which, output))
        self.finished[-1].append((name, output))

    def abandon(self, name: str) -> None:
        inside = self.finished.pop()
        self.finished[-1].extend(inside)  # what ended inside answers when it is called again

    def changed_since(self) -> set[Output]:
        """Say which outputs were changed in place after they were returned."""
        return _changed(self.marks)

    def done(self) -> Iterator[tuple[str, Any]]:
        """Give every remembered call, in order."""
        return (entry for frame in self.finished for entry in frame)


def _clone(output: Any) -> Any:
    return tree_map(lambda x: x.clone() if isinstance(x, Tensor) and not _is_placeholder(x) else x, output)


def _placeholder(x: Any) -> Any:
    """Make a tensor of the same shape that takes no room; NaN, so that reading it by mistake would show."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        return x
    return x.new_full((), torch.nan).expand(x.shape)


def _is_placeholder(x: Tensor) -> bool:
    return x.ndim > 0 and not any(x.stride())


@contextmanager
def _answer(schedule: Schedule, name: str, outputs: list[Any], given: list[_Mark] | None) -> Iterator[None]:
    """Give a module's remembered outputs out, one a call; later calls run."""
    module = schedule.net.get_submodule(name)
    previous = module.__dict__.get("forward")
    original, index = module.forward, 0

    def forward(*args: Any, **kwargs: Any) -> Any:
        nonlocal index
        if index >= len(outputs):
            return original(*args, **kwargs)
        output = outputs[index]
        if given is not None or (name, index) in schedule.changed:
            output = _clone(output)
        if given is not None:
            given.extend(_marks((name, index), output))
        index += 1
        return output

    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        del module.__dict__["forward"]
        if previous is not None:
            module.__dict__["forward"] = previous


# ---------------------------------------------------------------- where a late start would be wrong


class _Route(Watch):
    """List the layers that a pass calls, in order."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__(net)
        self.layers_called: list[str] = []

    def layer(self, name: str, call: Call, args: Any, kwargs: Any) -> Any:
        self.layers_called.append(name)
        return self.other(call.function, args, kwargs)


def route(net: nn.Module, batch: Batch) -> list[str]:
    """Run a network once, and list the layers that it calls, in order."""
    watch = _Route(net)
    with torch.no_grad(), plain_forward(), watch:
        batch.through(net)
    return watch.layers_called


def keeps_state(schedule: Schedule, one: Batch, other: Batch) -> bool:
    """Say whether a late start of one batch would use state that another batch left in the network's modules.

    Every layer is reached with both batches in turn, and the rest of the pass compared with a whole pass. The
    schedule learns what a sample takes.

    Args:
        schedule: of the network.
        one: a sample.
        other: another one, of the same shapes.
    """
    first, second = Stream(schedule, one), Stream(schedule, other)
    with torch.no_grad(), plain_forward():
        wanted = output_tensors(first.on_device().batch.through(schedule.net))
        for layer in schedule.trace.start:
            first.advance(layer)
            second.advance(layer)
            schedule.rooms[layer] = second.room  # the first one's are copies, which share nothing
            try:
                with first.answering(copies=True):
                    found = output_tensors(first.on_device().batch.through(schedule.net))
            except Exception:  # state of other shapes, for example
                return True
            if len(found) != len(wanted) or not all(map(_close, found, wanted)):
                return True
    return False


def _close(a: Tensor, b: Tensor) -> bool:
    """Say whether two outputs of the same operations on the same numbers are equal but for rounding."""
    if a.shape != b.shape or not b.numel():
        return a.shape == b.shape
    return bool((a - b).abs().max() <= ROUNDING * b.abs().max())
