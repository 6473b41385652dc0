"""Where a pruned network came from: digests of the dense network and of the calibration data, beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from snows.layers.base import PackedLayer
from snows.networks import products
from snows.networks.batches import Batch
from snows.networks.copies import working_copy
from snows.networks.layers import substitute
from snows.results.storage import digest

NOTE = "pruning_origin"  # of a network's own entries: builtin types alone


@dataclass(frozen=True)
class Input:
    """Describe one input of a network, for one sample.

    Attributes:
        name: the keyword, or the place among the positional inputs.
        dtype: of the tensor, such as "float32".
        shape: without the samples.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Origin:
    """Say what a network was pruned from.

    Attributes:
        architecture: digest of the classes and settings of the dense network's modules.
        tensors: digest of its parameters and buffers.
        data: digest of the calibration batches.
        sample: the network's inputs; empty where they are no tensors.
    """

    architecture: str = ""
    tensors: str = ""
    data: str = ""
    sample: list[Input] = field(default_factory=list)

    @classmethod
    def of(cls, model: nn.Module, batches: Sequence[Batch] = ()) -> Origin:
        """Take the digests of a dense network, and of calibration batches if there are any."""
        data = digest(*contents(batches)) if batches else ""
        sample = _inputs(batches[0]) if batches else []
        return cls(digest({}, architecture(model)), digest(tensors_in(model)), data, sample)

    def note(self, net: nn.Module) -> nn.Module:
        """Keep it beside a network, if anything is known, and return the network; copies have it too."""
        if self != Origin():
            net.__dict__[NOTE] = asdict(self)
        return net

    @classmethod
    def beside(cls, net: nn.Module) -> Origin:
        """Return what was kept beside a network; empty if nothing was."""
        known = net.__dict__.get(NOTE, {})
        return cls(**{**known, "sample": [Input(**x) for x in known.get("sample", [])]})


def fingerprint(model: nn.Module) -> str:
    """Return the SHA-256 of a network: its tensors, and the class and settings of every module."""
    return digest(tensors_in(model), architecture(model))


def architecture(model: nn.Module) -> str:
    """Describe what a network computes beside its tensors: the class and settings of every module."""
    lines = []
    for name, module in model.named_modules():
        kind = f"{type(module).__module__}.{type(module).__qualname__}"
        lines.append(f"{name} {kind} {module.extra_repr()}")
    return "\n".join(lines)


def tensors_in(model: nn.Module) -> dict[str, Tensor]:
    """Return all parameters and buffers of a network, by name."""
    return {**model.state_dict(), **dict(model.named_buffers())}


def contents(batches: Sequence[Batch]) -> tuple[dict[str, Tensor], str]:
    """Return all tensors of the batches, and how they stand in them, with what is no tensor."""
    tensors, texts = {}, []
    for i, batch in enumerate(batches):
        leaves, shape = tree_flatten(tuple(batch))
        texts.append(str(shape))
        for j, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor):
                tensors[f"{i}.{j}"] = leaf
            else:
                texts.append(f"{i}.{j} {leaf!r}")
    return tensors, "\n".join(texts)


def _inputs(batch: Batch) -> list[Input]:
    """Describe a batch's inputs; empty if one of them is no tensor of samples."""
    named: Mapping[str, Any] = {**{str(i): x for i, x in enumerate(batch.args)}, **batch.kwargs}
    if not all(isinstance(x, Tensor) and x.ndim and len(x) == batch.samples() for x in named.values()):
        return []
    return [Input(name, str(x.dtype).removeprefix("torch."), tuple(x.shape[1:])) for name, x in named.items()]


def macs(net: nn.Module, sample: Sequence[Input]) -> int:
    """Count the multiplications of one sample, with a weight's zeros, so that packing does not change them.

    Args:
        net: left as it was; one sample of zeros is run through a copy.
        sample: the network's inputs.

    Returns:
        Their number; 0 where they cannot be counted, because the inputs are not known for example.
    """
    with suppress(Exception):  # whatever a network raises for such an input
        if sample:
            found = products.count(_plain(net), _zeros(net, sample))
            return sum(found.weights.values()) + sum(found.products.values())
    return 0


def _plain(net: nn.Module) -> nn.Module:
    """Copy a network with dense layers, in single precision."""
    net, _ = working_copy(net)
    for module in list(net.modules()):
        if isinstance(module, PackedLayer):
            dense: nn.Module = module.unpack()  # type: ignore[operator]  # both kinds have it
            substitute(net, module, dense)
            net = dense if net is module else net
    return net.float().eval()


def _zeros(net: nn.Module, sample: Sequence[Input]) -> Batch:
    device = next((x.device for x in (*net.parameters(), *net.buffers())), torch.device("cpu"))
    args, kwargs = [], {}
    for entry in sample:
        x = torch.zeros(1, *entry.shape, dtype=getattr(torch, entry.dtype), device=device)
        x = x.float() if x.is_floating_point() else x
        if entry.name.isdigit():
            args.append(x)
        else:
            kwargs[entry.name] = x
    return Batch(tuple(args), kwargs)
