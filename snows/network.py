"""A network as pruning sees it: which layers can be pruned, in which order they run, and a forward pass that starts late.

Layers are recognised where they act: a call of ``F.linear`` or ``F.conv2d`` whose weight *is* a module's parameter. So
subclasses, modules that pad for themselves and functional use all look alike, and no architecture has a name here.
"""

from __future__ import annotations

import copy
import inspect
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map


class Inputs(NamedTuple):
    """One batch, ready to call a network with. Its samples are the entries of each tensor's first dimension, or of a list of tensors."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def to(self, device: torch.device) -> Inputs:
        return Inputs(*tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, tuple(self)))

    def tensors(self) -> list[Tensor]:
        return [x for x in tree_leaves(tuple(self)) if isinstance(x, Tensor)]

    def samples(self) -> int:
        """Count the samples, by the first tensor or list of tensors."""
        return next((len(x) for x in tree_leaves(tuple(self), is_leaf=_is_batched) if _is_batched(x)), 1)

    def split(self, size: int) -> list[Inputs]:
        """Divide a batch into parts of `size` samples; whole if its tensors do not agree on how many there are."""
        count = self.samples()
        if size < 1 or any(len(x) != count for x in tree_leaves(tuple(self), is_leaf=_is_batched) if _is_batched(x)):
            return [self]
        return [
            Inputs(*tree_map(lambda x, i=i: x[i : i + size] if _is_batched(x) else x, tuple(self), is_leaf=_is_batched))
            for i in range(0, count, size)
        ]


def _is_batched(x: Any) -> bool:
    """Whether this holds a sample an entry: a tensor, or a list of pictures, which may differ in size."""
    if isinstance(x, Tensor):
        return x.ndim > 0
    return isinstance(x, list) and bool(x) and all(isinstance(t, Tensor) for t in x)


LABELS = ("label", "labels")


def as_inputs(batch: Any) -> Inputs:
    """Read a batch: a tensor, a list of pictures, `(images, labels)` (labels ignored) or a mapping of keyword inputs (likewise).

    A list of pictures is a list of floating-point (C, H, W) tensors, of any sizes, as detection networks take it.

    Raises:
        TypeError: it is none of these.
    """
    if isinstance(batch, Tensor) or _is_pictures(batch):
        return Inputs((batch,), {})
    if isinstance(batch, Mapping):
        return Inputs((), {key: value for key, value in batch.items() if key not in LABELS})
    if isinstance(batch, list | tuple) and batch and (isinstance(batch[0], Tensor | Mapping) or _is_pictures(batch[0])):
        return as_inputs(batch[0])
    raise TypeError(
        f"batches: expected tensors, lists of pictures, (images, labels) pairs or mappings of keyword inputs, got {type(batch).__name__}"
    )


def labels_of(batch: Any) -> Tensor | None:
    """Read the class numbers of a batch, if it brings any: those of `(images, labels)`, or a mapping's.

    Raises:
        ValueError: what stands there are no numbers.
    """
    if isinstance(batch, Mapping):
        labels = next((batch[key] for key in LABELS if batch.get(key) is not None), None)
    elif isinstance(batch, list | tuple) and len(batch) > 1 and not _is_pictures(batch):
        labels = batch[1]
    else:
        labels = None
    try:
        return None if labels is None else torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"batches: expected labels to be class numbers, got {type(labels).__name__} ({first_line(error)})") from error


def _is_pictures(x: Any) -> bool:
    return isinstance(x, list) and bool(x) and all(isinstance(t, Tensor) and t.ndim == 3 and t.is_floating_point() for t in x)


def output_of(net: nn.Module, inputs: Inputs) -> Any:
    """What the network returns.

    Raises:
        ValueError: it cannot run these inputs, whatever it raises itself.
    """
    try:
        return net(*inputs.args, **inputs.kwargs)
    except Exception as error:
        got = ", ".join(f"{x.dtype} of {tuple(x.shape)}" for x in inputs.tensors())
        raise ValueError(f"the model cannot run a batch of {got} ({first_line(error)}); expected batches as the model takes them") from error


def first_line(error: BaseException) -> str:
    """Of what an exception says."""
    return (str(error) or type(error).__name__).strip().splitlines()[0]


def output_tensors(output: Any) -> list[Tensor]:
    """The floating-point tensors of a network's output, in order: a tensor, a tuple, a mapping or a dataclass."""
    return [x for x in tree_leaves(dict(output) if isinstance(output, Mapping) else output)
            if isinstance(x, Tensor) and x.is_floating_point()]


@contextmanager
def plain_forward() -> Iterator[None]:
    """Run `nn.MultiheadAttention` without its fast path, which skips hooks."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


# ---------------------------------------------------------------- layers


def copied(model: nn.Module) -> nn.Module:
    """Make a deep copy, also of a network under `torch.nn.utils.prune`, whose computed weights PyTorch refuses to copy.

    Raises:
        ValueError: something in it cannot be copied, or a module's forward was replaced by a function that holds on to the original.
    """
    for name, module in model.named_modules():
        _refuse_captured(model, name, module)
    computed = [(m, name, x) for m in model.modules() for name, x in m.__dict__.items() if isinstance(x, Tensor) and not x.is_leaf]
    for module, name, x in computed:
        module.__dict__[name] = x.detach()
    try:
        return copy.deepcopy(model)
    except Exception as error:  # whatever an attribute's own __deepcopy__ or __reduce__ raises
        raise ValueError(f"the model cannot be copied{_uncopyable(model)} ({first_line(error)}); remove the attribute first") from error
    finally:
        for module, name, x in computed:
            module.__dict__[name] = x


def _refuse_captured(model: nn.Module, name: str, module: nn.Module) -> None:
    """Refuse a forward whose copy would go on computing with the original's weights: a function that captured one of its modules."""
    forward = module.__dict__.get("forward")
    if not inspect.isfunction(forward):
        return
    held = inspect.getclosurevars(forward)
    for value in (*held.nonlocals.values(), *held.globals.values()):
        owner = getattr(value, "__self__", value)
        if isinstance(owner, nn.Module) and any(owner is m for m in model.modules()):
            raise ValueError(f"the forward of {name or 'the model'} was replaced by a function that holds on to its module, so that a copy would "
                             "compute with the original's weights; put it in a subclass, or bind it with types.MethodType")


def _uncopyable(model: nn.Module) -> str:
    """Name the first attribute that cannot be copied alone."""
    for name, module in model.named_modules():
        for key, value in module.__dict__.items():
            if key in ("_modules", "_parameters", "_buffers"):
                continue
            try:
                copy.deepcopy(value)
            except Exception:
                return f": {name}.{key} is a {type(value).__name__}" if name else f": its {key} is a {type(value).__name__}"
    return ""


Layer: TypeAlias = nn.Linear | nn.Conv2d


def prunable(model: nn.Module) -> dict[str, Layer]:
    """Every Linear and Conv2d (and subclass), by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}


def groups_of(module: nn.Module) -> int:
    """Groups of a convolution; 1 for a Linear."""
    return module.groups if isinstance(module, nn.Conv2d) else 1


class OpenAttention(nn.Module):
    """An `nn.MultiheadAttention` whose projections are plain Linear layers, over the same parameters.

    The same call and the same results as the closed module in evaluation (Vaswani et al. 2017).
    """

    def __init__(self, closed: nn.MultiheadAttention) -> None:
        super().__init__()
        self.closed = [closed]  # in a list: not a submodule
        self.heads, self.batch_first, self.training = closed.num_heads, closed.batch_first, closed.training
        self.in_proj_bias, self._qkv_same_embed_dim = None, False  # nn.TransformerEncoderLayer asks before its fast path
        if closed._qkv_same_embed_dim:
            self.in_proj = _linear(closed.in_proj_weight, closed.in_proj_bias)
        else:
            biases = [None] * 3 if closed.in_proj_bias is None else closed.in_proj_bias.chunk(3)
            self.q_proj = _linear(closed.q_proj_weight, biases[0])
            self.k_proj = _linear(closed.k_proj_weight, biases[1])
            self.v_proj = _linear(closed.v_proj_weight, biases[2])
        self.out_proj = _linear(closed.out_proj.weight, closed.out_proj.bias)

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        if not hasattr(self, "in_proj"):
            return self.q_proj(query), self.k_proj(key), self.v_proj(value)
        if query is key and key is value:
            return tuple(self.in_proj(query).chunk(3, dim=-1))
        # one call of the one layer: the three inputs side by side along the batch
        sizes = [x.shape[1] for x in (query, key, value)]
        width = query.shape[-1]
        q, k, v = self.in_proj(torch.cat([query, key, value], dim=1)).split(sizes, dim=1)
        return q[..., :width], k[..., width : 2 * width], v[..., 2 * width :]

    def forward(self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None = None,
                need_weights: bool = True, attn_mask: Tensor | None = None, average_attn_weights: bool = True,
                is_causal: bool = False) -> tuple[Tensor, Tensor | None]:
        same = query is key and key is value
        batched = query.ndim == 3
        if not batched:
            query, key, value = (x.unsqueeze(0) for x in (query, key, value))
        elif not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        if same:
            key = value = query
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in self._project(query, key, value))
        mask = self._mask(attn_mask, key_padding_mask, q, k)
        weights = None
        if need_weights:
            scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
            weights = (scores if mask is None else scores + mask).softmax(-1)
            attended = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if batched else weights.squeeze(0)
        else:
            attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        out = self.out_proj(attended.transpose(1, 2).flatten(2))
        if not batched:
            out = out.squeeze(0)
        elif not self.batch_first:
            out = out.transpose(0, 1)
        return out, weights

    @staticmethod
    def _mask(attn_mask: Tensor | None, padding: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
        """One additive mask that broadcasts to (batch, heads, queries, keys)."""

        def additive(mask: Tensor) -> Tensor:
            return q.new_zeros(mask.shape).masked_fill(mask, -torch.inf) if mask.dtype == torch.bool else mask.to(q)

        total = None
        if attn_mask is not None:
            total = additive(attn_mask)
            if total.ndim == 3:
                total = total.view(q.shape[0], q.shape[1], *total.shape[1:])
        if padding is not None:
            keys = additive(padding).view(q.shape[0], 1, 1, k.shape[2])
            total = keys if total is None else total + keys
        return total


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight)
    if bias is not None:
        linear.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias)
    return linear


def open_attention(model: nn.Module) -> None:
    """Replace each `nn.MultiheadAttention` that can be by an `OpenAttention` over the same parameters, in place."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.MultiheadAttention and child.bias_k is None and not child.add_zero_attn:
                setattr(parent, name, OpenAttention(child))


def close_attention(model: nn.Module) -> None:
    """Undo `open_attention`; what was written into the parameters stays. One whose projections were replaced stays open."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, OpenAttention) and all(isinstance(x, nn.Linear) for x in child.children()):
                setattr(parent, name, child.closed[0])
            elif isinstance(child, OpenAttention):
                child.closed.clear()


@dataclass(frozen=True)
class Carried:
    """A parametrisation of `torch.nn.utils.prune` that a network carries.

    Attributes:
        module: whose parameter it is, by name.
        parameter: its name there.
        original: the parameter before masking.
        mask: of its shape, bool.
    """

    module: str
    parameter: str
    original: Tensor
    mask: Tensor

    @property
    def layer(self) -> str:
        """The layer whose weight it is, in a network whose attention is open."""
        inside = self.parameter.removesuffix("_weight") if self.parameter.endswith("proj_weight") else ""
        return ".".join(x for x in (self.module, inside) if x)

    @property
    def is_weight(self) -> bool:
        return self.parameter == "weight" or self.parameter.endswith("proj_weight")

    def back(self, net: nn.Module, mask: Tensor) -> None:
        """Put the parametrisation back on a network's parameter, with this mask."""
        torch_prune.custom_from_mask(net.get_submodule(self.module), self.parameter, mask)


def take_masks_off(net: nn.Module) -> list[Carried]:
    """Make all parametrisations of `torch.nn.utils.prune` permanent, in place, and return what they were."""
    found = []
    for name, module in net.named_modules():
        for parameter in [key.removesuffix("_orig") for key in module._parameters if key.endswith("_orig")]:
            if f"{parameter}_mask" in module._buffers:
                original = module.get_parameter(f"{parameter}_orig").detach().clone()
                found.append(Carried(name, parameter, original, module.get_buffer(f"{parameter}_mask").bool()))
                torch_prune.remove(module, parameter)
    return found


# ---------------------------------------------------------------- the forward pass, watched


@dataclass
class Call:
    """One call of a layer: its input and how it was applied.

    Attributes:
        function: ``F.linear`` or ``F.conv2d``.
        x: the input, as the function got it (after any padding of the module's own).
        settings: kernel, stride, padding, dilation and groups of a convolution.
    """

    function: Callable[..., Tensor]
    x: Tensor
    settings: dict[str, Any]


_ARGUMENTS = {
    F.linear: ("input", "weight", "bias"),
    F.conv2d: ("input", "weight", "bias", "stride", "padding", "dilation", "groups"),
}


def arguments(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """The arguments of a call of ``F.linear`` or ``F.conv2d`` by name; None for any other function."""
    names = _ARGUMENTS.get(func)
    return dict(zip(names, args, strict=False)) | kwargs if names is not None else None


class Finished(Exception):  # noqa: N818 - not an error
    """Ends a forward pass whose rest is not needed."""


class Watch(TorchFunctionMode):
    """Sees every torch function a forward pass calls; subclasses say what to do at a layer."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.names: dict[int, str] = {}
        for name, module in prunable(net).items():
            if isinstance(module.weight, nn.Parameter):  # a computed one is another tensor at every pass
                self.names.setdefault(id(module.weight), name)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        bound = arguments(func, args, kwargs)
        if bound is not None and (name := self.names.get(id(bound["weight"]))) is not None:
            settings = {key: value for key, value in bound.items() if key not in ("input", "weight", "bias")}
            settings["kernel"] = tuple(bound["weight"].shape[2:])
            return self.layer(name, Call(func, bound["input"], settings), func, args, kwargs)
        return self.other(func, args, kwargs)

    def layer(self, name: str, call: Call, func: Any, args: Any, kwargs: Any) -> Any:
        return func(*args, **kwargs)

    def other(self, func: Any, args: Any, kwargs: Any) -> Any:
        return func(*args, **kwargs)


PEEKS = {
    getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "requires_grad", "is_cuda", "layout", "grad_fn")
} | {Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point, Tensor.stride, Tensor.is_contiguous, Tensor.__len__}


@dataclass
class Order:
    """What one watched forward pass taught about a network.

    Attributes:
        layers: names of the prunable layers that ran, in order of their first call.
        calls: how often each was called.
        shapes: of each layer's input at its first call.
        start: the moment of each layer's first call.
        death: by module, the moment after which nothing reads its output any more.
        entered: modules that were called.
        autocast: the first layer that ran under `torch.autocast`; empty if none did.
        output: what the network returned.
    """

    layers: list[str] = field(default_factory=list)
    calls: Counter[str] = field(default_factory=Counter)
    shapes: dict[str, torch.Size] = field(default_factory=dict)
    start: dict[str, int] = field(default_factory=dict)
    death: dict[str, float] = field(default_factory=dict)
    entered: set[str] = field(default_factory=set)
    autocast: str = ""
    output: Any = None


class _OrderWatch(Watch):
    """Learns the order of layers, and until when each module's output is read by code that a late start would run."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__(net)
        self.order = Order()
        self.moment = 0
        self.owners: dict[int, list[str]] = defaultdict(list)  # id of an output -> modules that returned it
        self.readers: list[list[str]] = [[]]  # per open module call: modules whose outputs it read
        self.kept: list[Any] = []  # so that no id is used twice

    def enter(self, name: str) -> None:
        self.readers.append([])
        self.order.entered.add(name)

    def leave(self, name: str, output: Any) -> None:
        self.moment += 1
        for owner in self.readers.pop():
            self.order.death[owner] = max(self.order.death.get(owner, 0), self.moment)
        self.kept.append(output)
        self.order.death.setdefault(name, 0)
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor):
                self.owners[id(tensor)].append(name)

    def layer(self, name: str, call: Call, func: Any, args: Any, kwargs: Any) -> Any:
        self.moment += 1
        if name not in self.order.start:
            self.order.layers.append(name)
            self.order.start[name] = self.moment
            self.order.shapes[name] = call.x.shape
        self.order.calls[name] += 1
        if not self.order.autocast and torch.is_autocast_enabled(call.x.device.type):
            self.order.autocast = name
        return self.other(func, args, kwargs)

    def other(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func not in PEEKS:
            for leaf in tree_leaves((args, kwargs)):
                if isinstance(leaf, Tensor):
                    self.readers[-1].extend(self.owners.get(id(leaf), ()))
        return func(*args, **kwargs)


@contextmanager
def listening(net: nn.Module, enter: Callable[[str], None], leave: Callable[[str, Any], None]) -> Iterator[None]:
    """Tell `enter` and `leave` of every module call inside `net`."""
    names = {id(module): name for name, module in net.named_modules() if name}

    def before(module: nn.Module, args: Any) -> None:
        if id(module) in names:
            enter(names[id(module)])

    def after(module: nn.Module, args: Any, output: Any) -> None:
        if id(module) in names:
            leave(names[id(module)], output)

    first = nn.modules.module.register_module_forward_pre_hook(before)
    second = nn.modules.module.register_module_forward_hook(after)
    try:
        yield
    finally:
        first.remove()
        second.remove()


def learn_order(net: nn.Module, inputs: Inputs) -> Order:
    """Run `net` once and say which prunable layers ran, in which order, and how long outputs are needed."""
    watch = _OrderWatch(net)
    with torch.no_grad(), plain_forward(), listening(net, watch.enter, watch.leave), watch:
        watch.order.output = output_of(net, inputs)
    for owner in watch.readers[0]:  # read by the network's own code, which always runs
        watch.order.death[owner] = float("inf")
    return watch.order


class _UntilLayer(Watch):
    def __init__(self, net: nn.Module, layer: str) -> None:
        super().__init__(net)
        self.target = layer
        self.call: Call | None = None

    def layer(self, name: str, call: Call, func: Any, args: Any, kwargs: Any) -> Any:
        if name == self.target:
            self.call = call
            raise Finished
        return func(*args, **kwargs)


class _Record:
    """What modules returned in a forward pass: of each call that was done, the outermost."""

    def __init__(self, copied: set[tuple[str, int]]) -> None:
        self.copied = copied
        self.frames: list[list[tuple[str, Any]]] = [[]]  # per open module call, the calls done inside it
        self.counts: Counter[str] = Counter()
        self.marks: list[tuple[str, int, Tensor, int]] = []

    def enter(self, name: str) -> None:
        self.frames.append([])

    def leave(self, name: str, output: Any) -> None:
        self.frames.pop()
        index = self.counts[name]
        self.counts[name] += 1
        if (name, index) in self.copied:
            output = _clone(output)
        self.marks.extend((name, index, x, x._version) for x in tree_leaves(output) if isinstance(x, Tensor))
        self.frames[-1].append((name, output))

    def changed_since(self) -> set[tuple[str, int]]:
        return {(name, index) for name, index, x, version in self.marks if x._version != version}

    def done(self) -> Iterator[tuple[str, Any]]:
        return (entry for frame in self.frames for entry in frame)


@dataclass
class Plan:
    """What all streams through one network share: its order, and which outputs are changed in place after they are returned.

    Attributes:
        reached: layers that a stream has reached, so that all changes on the way there are known.
    """

    net: nn.Module
    order: Order
    changed: set[tuple[str, int]] = field(default_factory=set)
    reached: set[str] = field(default_factory=set)


class Stream:
    """One batch on its way through a network that is pruned layer by layer.

    It remembers what the modules before the current layer returned, so that a forward pass can start there: modules
    that were done answer from memory, and only the code around them runs. Outputs that nothing will read again are
    dropped. The batch itself may stay on the host.
    """

    def __init__(self, plan: Plan, inputs: Inputs) -> None:
        self.plan, self.inputs = plan, inputs
        self.memory: dict[str, list[Any]] = {}
        self.call: Call | None = None

    def on_device(self) -> Stream:
        """The same stream with its batch on the network's device, for as long as it is held."""
        stream = copy.copy(self)
        stream.inputs = self.inputs.to(next(self.plan.net.parameters()).device)
        return stream

    def advance(self, layer: str) -> Call:
        """Run up to `layer`, remember what was done on the way, and return the layer's call.

        Raises:
            RuntimeError: the layer did not run.
        """
        inputs = self.on_device().inputs
        while True:
            record = _Record(self.plan.changed)
            watch = _UntilLayer(self.plan.net, layer)
            with torch.no_grad(), plain_forward(), self.answering(copies=layer not in self.plan.reached), \
                    listening(self.plan.net, record.enter, record.leave), watch, suppress(Finished):
                self.plan.net(*inputs.args, **inputs.kwargs)
            if watch.call is None:
                raise RuntimeError(f"{layer}: did not run on this batch although it ran on the first")
            changed = record.changed_since()
            if not changed:
                break
            self.plan.changed |= changed  # seen once for all batches: remember a copy of these
        self.plan.reached.add(layer)
        alive = self.plan.order.start[layer]
        self.memory = defaultdict(list)
        for name, output in record.done():
            dead = self.plan.order.death.get(name, float("inf")) <= alive
            self.memory[name].append(tree_map(_placeholder, output) if dead else output)
        self.call = watch.call
        return watch.call

    @contextmanager
    def answering(self, copies: bool = False) -> Iterator[None]:
        """Let the modules that are done answer from memory.

        Args:
            copies: give out copies, and note which of them the pass changes in place. Without it, only what was noted
                before is copied.
        """
        given: list[tuple[str, int, Tensor, int]] = []
        with ExitStack() as stack:
            for name, outputs in self.memory.items():
                stack.enter_context(_answer(self.plan, name, outputs, given if copies else None))
            yield
        self.plan.changed |= {(name, index) for name, index, x, version in given if x._version != version}


def _clone(output: Any) -> Any:
    return tree_map(lambda x: x.clone() if isinstance(x, Tensor) and not _is_placeholder(x) else x, output)


def _placeholder(x: Any) -> Any:
    """A tensor of the same shape that takes no room; NaN, so that reading it by mistake would show."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        return x
    return x.new_full((), torch.nan).expand(x.shape)


def _is_placeholder(x: Tensor) -> bool:
    return x.ndim > 0 and not any(x.stride())


@contextmanager
def _answer(plan: Plan, name: str, outputs: list[Any], given: list[tuple[str, int, Tensor, int]] | None) -> Iterator[None]:
    module = plan.net.get_submodule(name)
    previous = module.__dict__.get("forward")
    original, index = module.forward, 0

    def forward(*args: Any, **kwargs: Any) -> Any:
        nonlocal index
        if index >= len(outputs):
            return original(*args, **kwargs)
        output = outputs[index]
        if given is not None or (name, index) in plan.changed:
            output = _clone(output)
        if given is not None:
            given.extend((name, index, x, x._version) for x in tree_leaves(output) if isinstance(x, Tensor))
        index += 1
        return output

    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        del module.__dict__["forward"]
        if previous is not None:
            module.__dict__["forward"] = previous
