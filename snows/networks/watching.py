"""Watching a forward pass: calls of layers, calls of modules, and the names of operations.

Layers are recognised where they act: a call of ``F.linear`` or ``F.conv2d`` whose weight *is* a module's
parameter. So subclasses, modules that pad for themselves and functional use all look alike, and no
architecture has a name here.

An operation's name says where it is called: the open module calls, then the function, each with its number
where it is not the first of its kind there, such as ``layer1.0.relu#1:relu``. A name is made of what happens
in its own module call alone, so it is the same in every copy of a network, and in a pass that starts late.
Where an implant stands for a layer, its second factor's call is named as the layer's was, so that all that
follows pairs with the dense network; the first factor's call has a name of its own.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

from snows.networks.functions import Function, arguments
from snows.networks.implants import LowRank, first_factors
from snows.networks.layers import prunable
from snows.networks.store import Kept


@dataclass
class Call:
    """Describe one call of a layer.

    Attributes:
        function: ``F.linear`` or ``F.conv2d``.
        input: as the function got it (after any padding of the module's own), or where a store has it.
        kernel: height and width of a convolution's kernel; empty for a Linear.
        settings: stride, padding, dilation and groups of a convolution, as they were given.
    """

    function: Callable[..., Tensor]
    input: Tensor | Kept
    kernel: tuple[int, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def x(self) -> Tensor:
        """The input, on the network's device for as long as it is held."""
        return self.input.tensor() if isinstance(self.input, Kept) else self.input

    @property
    def shape(self) -> torch.Size:
        """The input's."""
        return self.input.shape


class Finished(Exception):  # noqa: N818 - not an error
    """Ends a forward pass whose rest is not needed."""


@dataclass
class Frame:
    """Describe one open module call.

    Attributes:
        module: the module's name; empty for the network itself.
        path: the open module calls up to this one.
        calls: how often each module was called inside.
        functions: how often each function was named inside.
    """

    module: str = ""
    path: str = ""
    calls: Counter[str] = field(default_factory=Counter)
    functions: Counter[str] = field(default_factory=Counter)

    def inside(self, module: str, alias: bool = False) -> Frame:
        """Open a module call in this one; operations of an alias are named as this call's own."""
        if alias:
            return Frame(module, self.path)
        count = self.calls[module]
        self.calls[module] += 1
        own = (
            module[len(self.module) :]
            if self.module and module.startswith(f"{self.module}.")
            else f"/{module}"
        )
        return Frame(module, (self.path + own).removeprefix("/") + (f"#{count}" if count else ""))

    def operation(self, function: Function) -> str:
        """Name a call of a function in this module call."""
        name = getattr(function, "__name__", str(function))
        count = self.functions[name]
        self.functions[name] += 1
        return f"{self.path}:{name}" + (f"#{count}" if count else "")


class Watch(TorchFunctionMode):
    """Watch every torch function and every module that a forward pass calls; subclasses say what to do.

    Args:
        net: the network.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.layers: dict[int, str] = {}  # by the id of the weight
        for name, module in prunable(net).items():
            if isinstance(module.weight, nn.Parameter):  # a computed one is another tensor at every pass
                self.layers.setdefault(id(module.weight), name)
        self._modules = {id(module): name for name, module in net.named_modules() if name}
        self.first_factors = first_factors(net)
        self._aliases = {id(module[1]) for module in net.modules() if isinstance(module, LowRank)}
        self.frames = [Frame()]
        self._hooks: list[Any] = []

    @property
    def frame(self) -> Frame:
        """The innermost open module call."""
        return self.frames[-1]

    def __enter__(self) -> Any:
        self._hooks = [
            register_module_forward_pre_hook(self._before),
            register_module_forward_hook(self._after, always_call=True),
        ]
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, value, trace)  # type: ignore[no-untyped-call]
        for hook in self._hooks:
            hook.remove()

    def _before(self, module: nn.Module, args: Any) -> None:
        if (name := self._modules.get(id(module))) is not None:
            self.frames.append(self.frame.inside(name, id(module) in self._aliases))
            self.enter(name)

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        if (name := self._modules.get(id(module))) is None:
            return
        if output is None and sys.exc_info()[0] is not None:  # it raised; whoever called it may go on
            self.abandon(name)
        else:
            self.leave(name, output)
        self.frames.pop()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        bound = arguments(func, args, kwargs)
        if bound is not None and (name := self.layers.get(id(bound["weight"]))) is not None:
            settings = {key: value for key, value in bound.items() if key not in ("input", "weight", "bias")}
            return self.layer(
                name, Call(func, bound["input"], tuple(bound["weight"].shape[2:]), settings), args, kwargs
            )
        return self.other(func, args, kwargs)

    def enter(self, name: str) -> None:
        """Be told that a module is called; its frame is open."""

    def leave(self, name: str, output: Any) -> None:
        """Be told what a module returned; its frame is still open."""

    def abandon(self, name: str) -> None:
        """Be told that a module raised; its frame is still open."""

    def layer(self, name: str, call: Call, args: Any, kwargs: Any) -> Any:
        """Apply a layer."""
        return self.other(call.function, args, kwargs)

    def other(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Call any other function."""
        return func(*args, **kwargs)
