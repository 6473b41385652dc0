"""Networks with packed layers, and smaller ones, on disk.

Such a network is one safetensors file: its tensors as they are, and as metadata the edits that made it from
the dense architecture, one JSON text under the key ``snows`` with the format's version. ``sha256`` is over
that text and all tensors. `load` replays the edits on a dense network. Nothing in a file is executed. Beside
them is the file's certificate.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from snows.networks.attention import close_attention
from snows.networks.edits import CONVOLUTION, SMALLER, Edit, Pack, described, edits_of, inside
from snows.networks.layers import copied, module_at, prunable
from snows.results.certificate import origin_in, write_certified
from snows.results.claims import Timed
from snows.results.deployment import Deployment
from snows.results.formats import VERSION, edits_in
from snows.results.storage import digest, read_file, state

MAKES = (Pack, *SMALLER)  # edits without which a state_dict would not load
ACTIVATIONS: dict[str | None, tuple[type[nn.Module], ...]] = {"relu": (nn.ReLU,), "gelu": (nn.GELU,)}


def save(network: Any, path: Path | str) -> None:
    """Write a network with packed layers, or one that was made smaller, whole or not at all.

    Args:
        network: what `prune` or `deploy` returned, its network, or one with packed layers put in by hand.
        path: of the safetensors file.

    Raises:
        ValueError: a dense network of the same architecture loads the network's state_dict, which is all that
            is needed; or the file cannot be written.
    """
    model = network if isinstance(network, nn.Module) else getattr(network, "network", None)
    if not isinstance(model, nn.Module):
        raise TypeError(f"save: expected what deploy returned, or a network, got {type(network).__name__}")
    if not any(isinstance(edit, MAKES) for edit in edits_of(model)):
        raise ValueError(
            "save: expected a model with packed layers, or one that was made smaller, got none; deploy "
            "it first, or save its state_dict as it is"
        )
    write_network(Path(path), model, getattr(network, "report", None), "save")


def write_network(path: Path, model: nn.Module, report: Any = None, asked: str = "out") -> None:
    """Write the safetensors of a network: the edits that made it, if it needs them, and a certificate.

    Args:
        path: of the file, which is written whole or not at all.
        model: the network.
        report: of what made it, for patterns that layers were asked to follow, and milliseconds.
        asked: the argument that named the path, or the function; the error begins with it.

    Raises:
        ValueError: the file cannot be written.
    """
    tensors, edits = state(model), edits_of(model)
    metadata = {}
    if any(isinstance(edit, MAKES) for edit in edits):
        text = json.dumps({"version": VERSION, "edits": [described(x) for x in edits]}, sort_keys=True)
        metadata = {"snows": text, "sha256": digest(dict(sorted(tensors.items())), text)}
    else:
        edits = []
    patterns, timed = _told(report, tensors)
    write_certified(path, model, tensors, edits, metadata, patterns, timed, asked)


def _told(report: Any, tensors: Mapping[str, Tensor]) -> tuple[dict[str, str], list[Timed]]:
    """Read off a report the patterns of weights, by name, and what was timed."""
    layers = getattr(report, "layers", [])
    patterns = {_weight_of(x.name, tensors): x.pattern for x in layers if not x.reason}
    return patterns, report.timed() if isinstance(report, Deployment) else []


def _weight_of(layer: str, tensors: Mapping[str, Tensor]) -> str:
    """Name a layer's weight; that of a projection is a parameter of its attention where that is closed."""
    closed = f"{layer}_weight"
    return closed if closed in tensors else inside(layer, "weight")


def load(path: Path | str, model: nn.Module) -> nn.Module:
    """Read a network that `save` wrote.

    Args:
        path: of the file.
        model: the dense network that was pruned, or another of the same architecture; left as it was. Its
            weights do not matter, its device does: the result is there (on the CPU for the meta device).

    Returns:
        A copy with the file's layers and weights, in evaluation mode.

    Raises:
        ValueError: it is not such a file, it is damaged, of a newer format, or of another architecture.
    """
    path = Path(path)
    tensors, metadata = read_file(path, "sha256", "load")
    if "snows" not in metadata or "sha256" not in metadata:
        raise ValueError(
            f"load: {path} was not written by snows.save; weights of a dense network load with "
            "load_state_dict"
        )
    if digest(tensors, metadata["snows"]) != metadata["sha256"]:
        raise ValueError(
            f"load: {path} is damaged: its content does not have the checksum that it was saved with"
        )
    edits = edits_in(path, metadata["snows"])
    packs = [edit for edit in edits if isinstance(edit, Pack)]
    net = copied(model).eval()
    try:
        for edit in edits:
            if not isinstance(edit, Pack):
                edit.rebuild(net, tensors)
        _give_biases(net, tensors)
        _compare(net, packs, tensors)
    except ValueError as error:
        raise ValueError(f"load: {path} does not match the model: {error}") from error
    device = next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))
    try:
        network = _filled(net, packs, {name: x.to(device) for name, x in tensors.items()})
    except ValueError as error:
        raise ValueError(f"load: {path}: {error}") from error
    return origin_in(path, tensors, metadata).note(network)


def has_edits(path: Path, kinds: type[Edit] | None = None) -> bool:
    """Say whether a file brings the edits that made its network, as `save` writes them.

    Args:
        path: of any file.
        kinds: count edits of this class alone.
    """
    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get("snows")
        return text is not None and (kinds is None or any(isinstance(x, kinds) for x in edits_in(path, text)))
    except (SafetensorError, OSError, UnicodeDecodeError, ValueError):
        return False


def _give_biases(net: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Give layers the biases that folding a normalisation made."""
    for name, module in prunable(net).items():
        if module.bias is None and inside(name, "bias") in tensors:
            module.bias = nn.Parameter(torch.empty(len(module.weight), device="meta"))


def _compare(net: nn.Module, packs: list[Pack], tensors: dict[str, Tensor]) -> None:
    """Compare names, shapes and kinds of all tensors with the model's.

    What is in a packed weight, the layer itself checks.
    """
    own = {name: x for name, x in net.state_dict().items() if isinstance(x, Tensor)}
    expected: dict[str, tuple[int, ...] | None] = {name: tuple(x.shape) for name, x in own.items()}
    problems = []
    for edit in packs:
        name = edit.layer
        try:
            module = net.get_submodule(name)
        except AttributeError:
            raise ValueError(f"there is no module {name}") from None
        if edit.absorbs:
            module_at(net, edit.absorbs, f"no {edit.activation}", ACTIVATIONS.get(edit.activation, ()))
        weight = expected.pop(inside(name, "weight"), None)
        if not isinstance(module, nn.Linear | nn.Conv2d) or weight != tuple(edit.shape):
            problems.append(f"{name} has a weight of {weight}, the file one of {tuple(edit.shape)}")
        elif type(module).forward is nn.Conv2d.forward:
            problems += [
                f"{name} has the {key} {getattr(module, key)}, the file {edit.settings[key]}"
                for key in CONVOLUTION
                if getattr(module, key) != _as_pair(edit.settings[key])
            ]
        expected |= {inside(name, "values"): None, inside(name, "codes"): None}
    problems += [f"missing {name}" for name in expected if name not in tensors]
    problems += [f"unexpected {name}" for name in tensors if name not in expected]
    for name, x in tensors.items():
        if expected.get(name) not in (None, tuple(x.shape)):
            problems.append(f"{name} is {expected[name]}, in the file {tuple(x.shape)}")
        elif x.is_floating_point() != (
            own[name].is_floating_point() if name in own else not name.endswith("codes")
        ):
            problems.append(f"{name} is {x.dtype} in the file")
        elif not x.isfinite().all():
            problems.append(f"{name} is not finite in the file")
    problems += _mixed(own, tensors)
    if problems:
        raise ValueError(f"{'; '.join(problems[:5])}{' and more' if len(problems) > 5 else ''}")


def _as_pair(setting: Any) -> Any:
    return setting if isinstance(setting, str) else tuple(setting)


def _mixed(own: dict[str, Tensor], tensors: dict[str, Tensor]) -> list[str]:
    """Say where a file holds tensors of one of the model's types in several."""
    dtypes: dict[torch.dtype, set[torch.dtype]] = {}  # of the model: of the file
    for name, x in tensors.items():
        like = own.get(name, own.get(inside(name.rpartition(".")[0], "weight")))
        if x.is_floating_point() and like is not None:
            dtypes.setdefault(like.dtype, set()).add(x.dtype)
    return [
        f"its {like} is of several types in the file: {', '.join(sorted(map(str, found)))}"
        for like, found in dtypes.items()
        if len(found) > 1
    ]


def _filled(net: nn.Module, packs: list[Pack], tensors: dict[str, Tensor]) -> nn.Module:
    """Build the packed layers, and load all other tensors."""
    for edit in packs:
        packed = edit.rebuild(net, tensors)
        if not edit.layer:
            return packed
    kept = {
        name for name, x in net.state_dict().items() if not isinstance(x, Tensor)
    }  # state of other kinds is the model's own
    layers = {edit.layer for edit in packs}
    missing, unexpected = net.load_state_dict(_tied(net, tensors), strict=False, assign=True)
    lost = [name for name in missing if name not in kept and name.rpartition(".")[0] not in layers]
    if lost or unexpected:
        raise ValueError(
            f"expected every tensor to have its place, got {', '.join([*lost, *unexpected][:5])}"
        )
    close_attention(net)
    return net


def _tied(net: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Give all names of one parameter of a network one parameter too, if the file's tensors are equal."""
    found, first = dict(tensors), dict[int, str]()
    for name, own in net.named_parameters(remove_duplicate=False):
        one = first.setdefault(id(own), name)
        if one != name and one in found and name in found and torch.equal(found[one], found[name]):
            found[one] = found[name] = nn.Parameter(found[one], own.requires_grad)
    return found
