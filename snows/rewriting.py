"""Changes to a network that leave what it computes alone: who reads a layer's output, folding what follows, replacing modules."""

from __future__ import annotations

import weakref
from collections import Counter, OrderedDict, defaultdict
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from snows import network
from snows.network import PEEKS, Call, Inputs, Layer, Watch

FOLDING_ERROR = 1e-5  # of an output's largest entry; folding that moves an output by more is undone


class Use(NamedTuple):
    """A function that read a tensor: which one, inside which module, and what it made of it (itself, if in place)."""

    function: Any
    module: str
    made: Made | None


@dataclass
class Made:
    """A tensor that a layer or a function after it made, and all that read it afterwards."""

    tensor: weakref.ref[Tensor]
    uses: list[Use] = field(default_factory=list)

    def only_use(self) -> Use | None:
        """What reads it before anything else, if nothing else reads it as it is."""
        if self.uses and (len(self.uses) == 1 or self.uses[0].made is self):
            return self.uses[0]
        return None


@dataclass
class Site:
    """How the network applies one layer.

    Attributes:
        inputs: shape and stride of the input of each call.
        outputs: entries that each call returned.
        settings: stride, padding, dilation and groups that a convolution was last called with.
        made: what the last call returned.
        oddity: why calling another module in its place would not be the same; empty if it would.
    """

    inputs: list[tuple[torch.Size, tuple[int, ...]]] = field(default_factory=list)
    outputs: list[int] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    made: Made | None = None
    oddity: str = ""


class Trace(Watch):
    """What one forward pass shows of each layer: how it is applied, and who reads what it returns."""

    FOLLOWED = (F.batch_norm, F.relu, F.gelu)  # what they make is watched too

    def __init__(self, net: nn.Module, inputs: Inputs) -> None:
        super().__init__(net)
        self.net = net
        self.sites: dict[str, Site] = defaultdict(Site)
        self.called: Counter[str] = Counter()
        self.frames: list[list[Any]] = [["", 0, []]]  # open module calls: functions called, inside others too; and modules called
        self.chains: set[str] = set()  # modules that call one function, and then each of their children once, in order
        self.known: dict[int, Made] = {}
        with torch.no_grad(), network.plain_forward(), network.listening(net, self.enter, self.leave), self:
            output = net(*inputs.args, **inputs.kwargs)
        for leaf in tree_leaves(dict(output) if isinstance(output, dict) else output):
            if isinstance(leaf, Tensor) and (made := self.find(leaf)):
                made.uses.append(Use(None, "", None))
        self._refuse_shared_weights()

    def enter(self, name: str) -> None:
        self.frames.append([name, 0, []])

    def leave(self, name: str, output: Any) -> None:
        _, functions, inside = self.frames.pop()
        self.frames[-1][1] += functions
        self.frames[-1][2].append((name, functions))
        self.called[name] += 1
        children = [f"{name}.{key}" for key, _ in self.net.get_submodule(name).named_children()]
        if [child for child, _ in inside] == children and functions - sum(count for _, count in inside) == 1:
            self.chains.add(name)
        if name in self.sites and not _stock(self.net.get_submodule(name)):
            made = self.sites[name].made
            if functions != 1 or made is None or made.tensor() is not output:
                self.sites[name].oddity = "its class does more than the layer's product"

    def layer(self, name: str, call: Call, func: Any, args: Any, kwargs: Any) -> Any:
        site, module = self.sites[name], self.net.get_submodule(name)
        output = self.other(func, args, kwargs, own=name)
        site.inputs.append((call.x.shape, call.x.stride()))
        site.outputs.append(output.numel())
        site.settings = call.settings
        site.made = self.remember(output)
        if self.frames[-1][0] != name:
            site.oddity = "its weight is used without calling it"
        elif module._forward_hooks or module._forward_pre_hooks:
            site.oddity = "it has hooks"
        return output

    def other(self, func: Any, args: Any, kwargs: Any, own: str = "") -> Any:
        leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        for leaf in leaves:
            if (name := self.names.get(id(leaf), own)) != own:
                self.sites[name].oddity = "its weight is read outside of it"
        output = func(*args, **kwargs)
        if func not in PEEKS:
            self.frames[-1][1] += 1
            read = [made for leaf in leaves if (made := self.find(leaf))]
            made = self.remember(output) if read and func in self.FOLLOWED else None
            for x in read:
                x.uses.append(Use(func, self.frames[-1][0], made))
        return output

    def find(self, tensor: Tensor) -> Made | None:
        made = self.known.get(id(tensor))
        return made if made is not None and made.tensor() is tensor else None

    def remember(self, tensor: Tensor) -> Made:
        made = self.find(tensor)
        if made is None:
            made = self.known[id(tensor)] = Made(weakref.ref(tensor))
        return made

    def follower(self, made: Made | None, kinds: tuple[type[nn.Module], ...]) -> tuple[str, Use] | None:
        """The module of one of these kinds that alone reads a tensor, and is called for nothing else."""
        use = made.only_use() if made is not None else None
        if use is None or use.function not in self.FOLLOWED or self.called[use.module] != 1:
            return None
        return (use.module, use) if isinstance(self.net.get_submodule(use.module), kinds) else None

    def _refuse_shared_weights(self) -> None:
        owners = defaultdict(list)
        for name, module in network.prunable(self.net).items():
            owners[id(module.weight)].append(name)
        for names in owners.values():
            for name in names if len(names) > 1 else ():
                self.sites[name].oddity = f"it shares its weight with {', '.join(n for n in names if n != name)}"


def _stock(module: nn.Module) -> bool:
    """Whether it computes as PyTorch's own Linear or Conv2d does."""
    return type(module).forward in (nn.Linear.forward, nn.Conv2d.forward) and (
        not isinstance(module, nn.Conv2d) or type(module)._conv_forward is nn.Conv2d._conv_forward)


def plain(module: Layer, site: Site) -> Layer:
    """The layer as one of PyTorch's own classes, over the same parameters."""
    if _stock(module):
        return module
    if isinstance(module, nn.Linear):
        layer: Layer = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None, device="meta")
    else:
        settings = {key: value for key, value in site.settings.items() if key != "kernel"}
        layer = nn.Conv2d(module.in_channels, module.out_channels, site.settings["kernel"], **settings,
                          bias=module.bias is not None, device="meta")
    layer.weight, layer.bias = module.weight, module.bias
    return layer.train(module.training)


def substitute(net: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put a module in the place of another, under all its names."""
    for parent in list(net.modules()):
        for key, child in parent._modules.items():
            if child is old:
                parent._modules[key] = new


def activations(trace: Trace, folded: dict[str, str]) -> dict[str, str]:
    """Layer -> the ReLU or GELU module that alone reads its output, through a folded normalisation if there is one."""
    found = {}
    for name, site in trace.sites.items():
        made = site.made
        if made is not None and name in folded:
            made = made.uses[0].made
        follower = trace.follower(made, (nn.ReLU, nn.GELU)) if trace.called[name] == 1 else None
        module = trace.net.get_submodule(follower[0]) if follower else None
        if follower and type(module) in (nn.ReLU, nn.GELU) and getattr(module, "approximate", "none") == "none":
            found[name] = follower[0]
    return found


class Remainder(nn.Sequential):
    """What a normalisation of a subclass does behind its product, which a convolution computes now: its children, in order."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__(OrderedDict(norm.named_children()))


def fold_normalisations(net: nn.Module, inputs: Inputs, trace: Trace) -> dict[str, str]:
    """Fold each evaluated BatchNorm2d into the convolution whose output goes to it alone, in place.

    All folds are checked together on the example, and one by one where that fails. Of a subclass its children stay, in order: an
    activation, say, that it applies after normalising.

    Returns:
        Convolution -> the BatchNorm that is now in it, and whose place an Identity or a `Remainder` has.
    """
    pairs = {}
    for name, site in trace.sites.items():
        follower = trace.follower(site.made, (nn.BatchNorm2d,))
        if not follower or site.oddity or site.made is None or len(site.made.uses) != 1 or trace.called[name] != 1:
            continue
        module = net.get_submodule(follower[0])
        if isinstance(net.get_submodule(name), nn.Conv2d) and module.running_mean is not None and follower[0] in trace.chains:
            pairs[name] = follower[0]
    if not pairs:
        return {}
    before = outputs(net, inputs)
    if not before:  # nothing to check a fold by
        return {}
    undo = [_fold(net, conv, norm) for conv, norm in pairs.items()]
    if difference(before, outputs(net, inputs)) <= _tolerance(before):
        return pairs
    for back in undo:
        back()
    kept = {}
    for conv, norm in pairs.items():
        back = _fold(net, conv, norm)
        if difference(before, outputs(net, inputs)) <= _tolerance(before):
            kept[conv] = norm
        else:
            back()
    return kept


def _fold(net: nn.Module, conv_name: str, norm_name: str) -> Any:
    """Fold one pair, and return what undoes it."""
    conv, norm = net.get_submodule(conv_name), net.get_submodule(norm_name)
    assert isinstance(conv, nn.Conv2d)
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    weight, bias = conv.weight, conv.bias
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.detach().double()
    shift = -norm.running_mean.double() * scale
    if bias is not None:
        shift = shift + bias.detach().double() * scale
    if norm.bias is not None:
        shift = shift + norm.bias.detach().double()
    conv.weight = nn.Parameter((weight.detach() * scale[:, None, None, None]).to(weight.dtype), weight.requires_grad)
    conv.bias = nn.Parameter(shift.to(weight.dtype), weight.requires_grad)
    rest = Remainder(norm).eval() if len(list(norm.children())) else nn.Identity().eval()
    substitute(net, norm, rest)

    def back() -> None:
        conv.weight, conv.bias = weight, bias
        substitute(net, rest, norm)

    return back


def outputs(net: nn.Module, inputs: Inputs) -> list[Tensor]:
    """The floating-point tensors that a network returns."""
    with torch.inference_mode():
        return network.output_tensors(network.output_of(net, inputs))


def difference(expected: list[Tensor], got: list[Tensor]) -> float:
    """The largest difference of an output, relative to its largest entry; NaN counts as infinite."""
    worst = 0.0
    for a, b in zip(expected, got, strict=True):
        a, b = a.double(), b.double()
        error = float((a - b).abs().max() / a.abs().max().clamp_min(1e-30)) if a.numel() else 0.0
        worst = max(worst, error if error == error else float("inf"))
    return worst


def _tolerance(tensors: list[Tensor]) -> float:
    return max([FOLDING_ERROR, *(8 * torch.finfo(x.dtype).eps for x in tensors if x.dtype != torch.float64)])
