"""Edits: the one way in which a network is changed, replayable on another copy and described in a file.

`apply` changes a network by the weights that it holds; `rebuild` makes the same change on a bare
architecture, whose weights come from a file. `deploy` makes a list of edits, `save` writes it, `load` replays
it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar, Literal, Protocol, TypeAlias

from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from snows.layers import SparseConv2d, SparseLinear
from snows.networks.absorbed import Absorbed, Remainder
from snows.networks.attention import OpenAttention, can_open
from snows.networks.implants import Implant, LowRank, first_rank
from snows.networks.layers import held_elsewhere, module_at, substitute
from snows.networks.masks import mask_of
from snows.networks.taking import Take, taken
from snows.packing import Packed, packable

CONVOLUTION = (
    "stride",
    "padding",
    "dilation",
    "padding_mode",
)  # a convolution's settings, as they stand in a file
SMALLER = (Take, Implant)  # edits after which a network has other weights than its architecture says
Tensors: TypeAlias = dict[str, Tensor]


class Edit(Protocol):
    """Change a network in a way that can be replayed."""

    kind: ClassVar[str]

    def apply(self, net: nn.Module) -> None:
        """Change a network in place, by its own weights."""
        ...

    def rebuild(self, net: nn.Module, tensors: Tensors) -> object:
        """Change an architecture in place, and take the weights that the change needs out of `tensors`.

        Raises:
            ValueError: the architecture is another one, or the tensors do not belong together.
        """
        ...


def described(edit: Edit) -> dict[str, Any]:
    """Describe an edit as JSON: by all that makes two edits equal."""
    content = asdict(edit)  # type: ignore[call-overload]
    return {"kind": edit.kind} | {x.name: content[x.name] for x in fields(edit) if x.compare}  # type: ignore[arg-type]


# ---------------------------------------------------------------- opening attention


@dataclass(frozen=True)
class Open:
    """Open an `nn.MultiheadAttention` into plain Linear layers."""

    module: str
    kind: ClassVar[str] = "open"

    def apply(self, net: nn.Module) -> None:
        """Put an `OpenAttention` over the same parameters in its place."""
        closed = module_at(net, self.module, "no MultiheadAttention", (nn.MultiheadAttention, OpenAttention))
        if isinstance(closed, nn.MultiheadAttention):
            if not can_open(closed):
                raise ValueError(
                    f"{self.module} is a {type(closed).__name__}, no MultiheadAttention that can be opened"
                )
            substitute(net, closed, OpenAttention(closed).eval())

    def rebuild(self, net: nn.Module, tensors: Tensors) -> None:
        """Do the same: nothing of it is in the weights."""
        self.apply(net)


# ---------------------------------------------------------------- what another layer computes


@dataclass(frozen=True)
class Fold:
    """Fold an evaluated BatchNorm2d into the convolution before it.

    Attributes:
        convolution: its name; empty in files of format 1 and 2, which did not say.
        norm: the normalisation's name. Of a subclass its children stay, in order: an activation that it
            applies, say.
    """

    convolution: str
    norm: str
    kind: ClassVar[str] = "fold"

    def apply(self, net: nn.Module) -> None:
        """Fold the statistics into weight and bias, in double precision."""
        conv, norm = net.get_submodule(self.convolution), net.get_submodule(self.norm)
        assert isinstance(conv, nn.Conv2d)
        assert isinstance(norm, nn.BatchNorm2d)
        known = (conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.weight, norm.bias)
        weight, bias, mean, var, scale, shift = (None if x is None else x.detach().double() for x in known)
        fused, offset = fuse_conv_bn_weights(weight, bias, mean, var, norm.eps, scale, shift)  # type: ignore[arg-type]
        wanted = conv.weight.requires_grad
        conv.weight, conv.bias = (
            nn.Parameter(x.detach().to(conv.weight.dtype), wanted) for x in (fused, offset)
        )
        substitute(net, norm, self._rest(norm))

    def rebuild(self, net: nn.Module, tensors: Tensors) -> None:
        """Take the normalisation out; the folded weight is in the file."""
        norm = module_at(net, self.norm, "no BatchNorm2d", (nn.BatchNorm2d, Remainder, Absorbed))
        if isinstance(norm, nn.BatchNorm2d):  # else under another of its names already
            substitute(net, norm, self._rest(norm))

    def _rest(self, norm: nn.Module) -> nn.Module:
        kind = (
            Remainder(norm, self.convolution)
            if len(list(norm.children()))
            else Absorbed(self.convolution, "norm")
        )
        return kind.eval()


@dataclass(frozen=True)
class Drop:
    """Take out a module that a layer before it computes.

    It is of a network that was put together by hand or by an older snows.
    """

    module: str
    kind: ClassVar[str] = "drop"

    def apply(self, net: nn.Module) -> None:
        """Put an identity in its place."""
        allowed = (nn.BatchNorm2d, nn.ReLU, nn.GELU, nn.Identity)
        module = module_at(net, self.module, "which no layer computes", allowed)
        if not isinstance(module, nn.Identity):
            substitute(net, module, Absorbed().eval())

    def rebuild(self, net: nn.Module, tensors: Tensors) -> None:
        """Do the same: nothing of it is in the weights."""
        self.apply(net)


# ---------------------------------------------------------------- packing


@dataclass(frozen=True)
class Pack:
    """Put a layer with zeros on packed weights.

    Attributes:
        layer: its name.
        pattern: of its weight, as `packable` reads it; empty to look for it in the mask.
        shape: of its weight.
        activation: that it computes too, or None.
        absorbs: the module of that activation, whose place is left empty; empty for none.
        settings: a convolution's stride, padding, dilation and padding mode, and whether images lie
            innermost; of a linear layer that cuSPARSELt multiplies where it can, that alone.
    """

    layer: str
    pattern: str
    shape: tuple[int, ...]
    activation: Literal["relu", "gelu"] | None = None
    absorbs: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    kind: ClassVar[str] = "pack"

    @classmethod
    def of(cls, name: str, layer: SparseLinear | SparseConv2d, absorbs: str = "") -> Pack:
        """Describe a packed layer."""
        settings: dict[str, Any] = {}
        if isinstance(layer, SparseConv2d):
            settings = {
                key: value if isinstance(value := getattr(layer, key), str) else list(value)
                for key in CONVOLUTION
            }
            settings["innermost"] = layer.innermost
        elif layer.cusparselt:
            settings["cusparselt"] = True
        return cls(name, str(layer.pattern), tuple(layer.shape), layer.activation, absorbs, settings)

    def apply(self, net: nn.Module) -> None:
        """Pack the layer's weight by the mask beside it."""
        layer: Any = net.get_submodule(self.layer)
        kind: Any = SparseLinear if len(self.shape) == 2 else SparseConv2d
        packed = kind.from_dense(
            layer,
            packable(self.pattern) if self.pattern else None,
            mask_of(layer, self.layer),
            self.activation,
        )
        self.put(net, kind(packed.packed, packed.bias, activation=self.activation, **self._settings()))

    def rebuild(self, net: nn.Module, tensors: Tensors) -> nn.Module:
        """Build the packed layer from a file's tensors, and return it."""
        values, codes, bias = (
            tensors.pop(inside(self.layer, key), None) for key in ("values", "codes", "bias")
        )
        if values is None or codes is None:
            raise ValueError(f"{self.layer}: expected values and codes, got none")
        packed = Packed(values, codes, packable(self.pattern), tuple(self.shape))
        kind: Any = SparseLinear if len(self.shape) == 2 else SparseConv2d
        try:
            new: SparseLinear | SparseConv2d = kind(
                packed, bias, activation=self.activation, **self._settings()
            )
        except (ValueError, RuntimeError, TypeError) as error:
            raise ValueError(f"{self.layer}: {error}") from error
        self.put(net, new)
        return new

    def _settings(self) -> dict[str, Any]:
        return {
            key: tuple(value) if isinstance(value, list) else value for key, value in self.settings.items()
        }

    def put(self, net: nn.Module, packed: SparseLinear | SparseConv2d) -> None:
        """Put a packed layer in the layer's place, and nothing in that of the activation that it computes."""
        packed.eval()
        if self.layer:
            parent, _, key = self.layer.rpartition(".")
            old = net.get_submodule(self.layer)
            net.get_submodule(parent)._modules[key] = packed
            substitute(net, old, packed)
        if self.absorbs:
            substitute(net, net.get_submodule(self.absorbs), Absorbed(self.layer, "activation").eval())


def inside(name: str, key: str) -> str:
    """Name a module's entry; in a network that is one layer the module has no name."""
    return f"{name}.{key}" if name else key


# ---------------------------------------------------------------- which edits


def edits_of(net: nn.Module) -> list[Edit]:
    """Read off a network the edits that made it, whoever made them."""
    opened: list[Edit] = []
    implanted: list[Edit] = []
    folded: list[Edit] = []
    packed: list[Edit] = []
    activations = {
        m.into: name for name, m in net.named_modules() if isinstance(m, Absorbed) and m.role == "activation"
    }
    for name, module in net.named_modules(remove_duplicate=False):
        if isinstance(module, SparseLinear | SparseConv2d):
            packed.append(Pack.of(name, module, activations.get(name, "")))
        elif isinstance(module, OpenAttention):
            opened.append(Open(name))
        elif isinstance(module, LowRank):
            implanted.append(Implant(name, first_rank(module)))
        elif isinstance(module, Remainder) or (isinstance(module, Absorbed) and module.role == "norm"):
            folded.append(Fold(module.into, name))
        elif isinstance(module, nn.Identity) and not getattr(module, "role", ""):
            folded.append(Drop(name))
    factors = {f"{edit.layer}.{part}" for edit in implanted for part in (0, 1) if isinstance(edit, Implant)}
    cut = [taken(net, lambda name: name not in factors), taken(net, factors.__contains__)]
    before, after = ([] if x is None else [x] for x in cut)  # the implants
    return [*opened, *before, *implanted, *after, *folded, *packed]


def openings(net: nn.Module) -> list[Edit]:
    """List the attention that can be opened."""
    held = held_elsewhere(net)
    return [Open(x) for x, module in net.named_modules() if x and can_open(module) and id(module) not in held]
