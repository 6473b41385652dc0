"""Deployed networks on disk.

A deployed network is one safetensors file: the packed tensors as they are, and metadata that says how to build the layers.
That is one JSON text under the key ``snows``: the format's version, each packed layer with its pattern, shape, activation
and a convolution's settings, the modules that became an Identity because a layer computes them too, the normalisations of which
only what follows them remains, and the attention that was opened into its projections. ``sha256`` is over that text and all
tensors. Nothing in a file is executed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from snows import network
from snows.layers import SparseConv2d, SparseLinear
from snows.network import OpenAttention
from snows.packing import Packed
from snows.rewriting import Remainder, substitute
from snows.run import digest, state, write
from snows.sparsity import parse_pattern

VERSION = 2  # 1 had no remainders
COMPUTED_ELSEWHERE = (nn.BatchNorm2d, nn.ReLU, nn.GELU, nn.Identity)  # what an Identity may stand for
CONVOLUTION = ("stride", "padding", "dilation", "padding_mode")


def save(model: nn.Module, path: Path | str) -> None:
    """Write a network with packed layers to a safetensors file, whole or not at all.

    Args:
        model: from `deploy`, or with packed layers put in by hand.
        path: of the file.

    Raises:
        ValueError: there is nothing packed in the model, or the file cannot be written.
    """
    packed, identities, remainders, opened = {}, [], [], []
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, SparseLinear | SparseConv2d):
            packed[name] = _described(module)
        elif isinstance(module, nn.Identity):
            identities.append(name)
        elif isinstance(module, Remainder):
            remainders.append(name)
        elif isinstance(module, OpenAttention):
            opened.append(name)
    if not packed:
        raise ValueError("save: expected a model with packed layers, got none; deploy it first, or save its state_dict as it is")
    tensors = state(model)
    content = {"version": VERSION, "layers": packed, "identities": identities, "remainders": remainders, "opened": opened}
    text = json.dumps(content, sort_keys=True)
    write(Path(path), to_bytes(tensors, {"snows": text, "sha256": digest(dict(sorted(tensors.items())), text)}), "save")


def load(path: Path | str, model: nn.Module) -> nn.Module:
    """Read a network that `save` wrote.

    Args:
        path: of the file.
        model: the dense network that was pruned, or another of the same architecture; left as it was. Its weights do not
            matter, its device does: the result is there (on the CPU for the meta device).

    Returns:
        A copy with the file's packed layers and weights, in evaluation mode.

    Raises:
        ValueError: it is not such a file, it is damaged, of a newer format, or of another architecture.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"load: there is no file {path}")
    try:
        with safe_open(path, "pt") as file:  # has seen to it that the header claims no more than the file holds
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in sorted(file.keys())} if "sha256" in metadata else {}
    except (SafetensorError, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"load: {path} is not a whole safetensors file ({error})") from error
    if "snows" not in metadata or "sha256" not in metadata:
        raise ValueError(f"load: {path} was not written by snows.save; weights of a dense network load with load_state_dict")
    if digest(tensors, metadata["snows"]) != metadata["sha256"]:
        raise ValueError(f"load: {path} is damaged: its content does not have the checksum that it was saved with")
    content = _content(path, metadata["snows"])
    net = network.copied(model).eval()
    _shape_like(net, content, tensors, path)
    _compare(net, content["layers"], tensors, path)
    device = next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))
    return _filled(net, content["layers"], {name: x.to(device) for name, x in tensors.items()}, path)


def _inside(name: str, key: str) -> str:
    """Name a module's entry; of a network that is one layer the module has no name."""
    return f"{name}.{key}" if name else key


def is_packed(path: Path) -> bool:
    """Whether `save` wrote this file."""
    try:
        with safe_open(path, "pt") as file:
            return "snows" in (file.metadata() or {})
    except (SafetensorError, OSError, UnicodeDecodeError):
        return False


def _described(module: SparseLinear | SparseConv2d) -> dict[str, Any]:
    entry: dict[str, Any] = {"pattern": str(module.pattern), "shape": list(module.shape), "activation": module.activation}
    if isinstance(module, SparseConv2d):
        entry |= {key: value if isinstance(value := getattr(module, key), str) else list(value) for key in CONVOLUTION}
        entry["innermost"] = module.innermost
    return entry


def _content(path: Path, text: str) -> dict[str, Any]:
    """The metadata, of this format and complete."""
    try:
        content = json.loads(text)
        version = content["version"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"load: the metadata of {path} is damaged ({type(error).__name__}: {error})") from error
    if type(version) is int and version > VERSION:  # whatever is in it
        raise ValueError(f"load: {path} has format {version}, this snows reads up to {VERSION}; install a newer one")
    content = {"remainders": [], **content} if version == 1 else content
    problem = "" if type(version) is int and version > 0 else f"version is {version!r:.60}"
    for key in ("identities", "remainders", "opened"):
        if not isinstance(content.get(key), list) or not all(isinstance(name, str) for name in content[key]):
            problem = problem or f"{key} is {content.get(key)!r:.60}"
    if not isinstance(content.get("layers"), dict):
        problem = problem or f"layers is {content.get('layers')!r:.60}"
    for name, entry in content["layers"].items() if not problem else ():
        if field := _unsound(entry):
            problem = f"{field} of {name} is {entry.get(field) if isinstance(entry, dict) else entry!r:.60}"
    if problem:
        raise ValueError(f"load: the metadata of {path} is damaged ({problem})")
    return cast("dict[str, Any]", content)


def _unsound(entry: Any) -> str:
    """Which field of a packed layer is none that `save` writes; empty if all are."""
    def whole(x: Any, least: int, count: int) -> bool:
        return isinstance(x, list) and len(x) == count and all(type(n) is int and least <= n < 2**31 for n in x)

    if not isinstance(entry, dict):
        return "entry"
    shape = entry.get("shape", [])
    if not whole(shape, 1, 2) and not whole(shape, 1, 4):
        return "shape"
    try:
        parse_pattern(entry["pattern"])
    except (KeyError, ValueError, TypeError, AttributeError):
        return "pattern"
    if "activation" not in entry or entry["activation"] not in (None, "relu", "gelu"):
        return "activation"
    if len(shape) == 2:
        return ""
    for key, least in (("stride", 1), ("padding", 0), ("dilation", 1)):
        if not whole(entry.get(key), least, 2) and not (key == "padding" and entry.get(key) in ("same", "valid")):
            return key
    if entry.get("padding_mode") not in ("zeros", "reflect", "replicate", "circular"):
        return "padding_mode"
    return "" if type(entry.get("innermost", False)) is bool else "innermost"


def _shape_like(net: nn.Module, content: dict[str, Any], tensors: dict[str, Tensor], path: Path) -> None:
    """Open attention, put in identities and biases, as the saved network has them."""
    for name in content["opened"]:
        closed = _module(net, name, path)
        if type(closed) is not nn.MultiheadAttention:
            raise ValueError(f"load: {path} does not match the model: {name} is a {type(closed).__name__}, no MultiheadAttention")
        substitute(net, closed, OpenAttention(closed).eval())
    for name in content["remainders"]:
        norm = _module(net, name, path)
        if not isinstance(norm, nn.BatchNorm2d | Remainder):
            raise ValueError(f"load: {path} does not match the model: {name} is a {type(norm).__name__}, no BatchNorm2d")
        if not isinstance(norm, Remainder):  # under another of its names already
            substitute(net, norm, Remainder(norm).eval())
    for name in content["identities"]:
        module = _module(net, name, path)
        if not isinstance(module, COMPUTED_ELSEWHERE):
            raise ValueError(f"load: {path} does not match the model: {name} is a {type(module).__name__}, which no layer computes")
        if not isinstance(module, nn.Identity):
            substitute(net, module, nn.Identity().eval())
    for name, module in network.prunable(net).items():
        if module.bias is None and _inside(name, "bias") in tensors:  # of a normalisation that was folded
            module.bias = nn.Parameter(torch.empty(len(module.weight), device="meta"))


def _module(net: nn.Module, name: str, path: Path) -> nn.Module:
    try:
        return net.get_submodule(name)
    except AttributeError:
        raise ValueError(f"load: {path} does not match the model: there is no module {name}") from None


def _compare(net: nn.Module, layers: dict[str, Any], tensors: dict[str, Tensor], path: Path) -> None:
    """Names, shapes and kinds of all tensors against the model's. What is in a packed weight, the layer itself checks."""
    own = {name: x for name, x in net.state_dict().items() if isinstance(x, Tensor)}
    expected: dict[str, tuple[int, ...] | None] = {name: tuple(x.shape) for name, x in own.items()}
    problems = []
    for name, entry in layers.items():
        module = _module(net, name, path)
        weight = expected.pop(_inside(name, "weight"), None)
        if not isinstance(module, nn.Linear | nn.Conv2d) or weight != tuple(entry["shape"]):
            problems.append(f"{name} has a weight of {weight}, the file one of {tuple(entry['shape'])}")
        elif type(module).forward is nn.Conv2d.forward:
            problems += [f"{name} has the {key} {getattr(module, key)}, the file {entry[key]}" for key in CONVOLUTION
                         if getattr(module, key) != (entry[key] if isinstance(entry[key], str) else tuple(entry[key]))]
        expected |= {_inside(name, "values"): None, _inside(name, "codes"): None}
    problems += [f"missing {name}" for name in expected if name not in tensors]
    problems += [f"unexpected {name}" for name in tensors if name not in expected]
    for name, x in tensors.items():
        if expected.get(name) not in (None, tuple(x.shape)):
            problems.append(f"{name} is {expected[name]}, in the file {tuple(x.shape)}")
        elif x.is_floating_point() != (own[name].is_floating_point() if name in own else not name.endswith("codes")):
            problems.append(f"{name} is {x.dtype} in the file")
        elif not x.isfinite().all():
            problems.append(f"{name} is not finite in the file")
    dtypes: dict[torch.dtype, set[torch.dtype]] = {}  # of the model: of the file
    for name, x in tensors.items():
        like = own.get(name, own.get(_inside(name.rpartition(".")[0], "weight")))
        if x.is_floating_point() and like is not None:
            dtypes.setdefault(like.dtype, set()).add(x.dtype)
    problems += [f"its {like} is of several types in the file: {', '.join(sorted(map(str, found)))}"
                 for like, found in dtypes.items() if len(found) > 1]
    if problems:
        raise ValueError(f"load: {path} does not match the model: {'; '.join(problems[:5])}{' and more' if len(problems) > 5 else ''}")


def _filled(net: nn.Module, layers: dict[str, Any], tensors: dict[str, Tensor], path: Path) -> nn.Module:
    for name, entry in layers.items():
        packed = Packed(tensors.pop(_inside(name, "values")), tensors.pop(_inside(name, "codes")), parse_pattern(entry["pattern"]),
                        tuple(entry["shape"]))
        settings: dict[str, Any] = {key: value if isinstance(value := entry[key], str) else tuple(value) for key in CONVOLUTION if key in entry}
        if "innermost" in entry:
            settings["innermost"] = entry["innermost"] is True
        kind: Any = SparseLinear if len(packed.shape) == 2 else SparseConv2d
        try:
            layer = kind(packed, tensors.pop(_inside(name, "bias"), None), activation=entry["activation"], **settings)
        except (ValueError, RuntimeError, TypeError) as error:
            raise ValueError(f"load: {path}: {name}: {error}") from error
        if not name:
            return cast("nn.Module", layer.eval())
        parent, _, key = name.rpartition(".")
        net.get_submodule(parent)._modules[key] = layer.eval()
    kept = {name for name, x in net.state_dict().items() if not isinstance(x, Tensor)}  # state of other kinds is the model's own
    missing, unexpected = net.load_state_dict(tensors, strict=False, assign=True)
    assert not unexpected and all(name.rpartition(".")[0] in layers for name in missing if name not in kept)  # noqa: PT018 - `_compare` has seen to it
    network.close_attention(net)
    return net
