"""Deployed networks on disk, and networks for other runtimes.

A deployed network is one safetensors file: the packed tensors as they are, and metadata that says how to build the layers.
That is one JSON text under the key ``snows``: the format's version, each packed layer with its pattern, shape, activation
and a convolution's settings, the modules that became an Identity because a layer computes them too, the normalisations of which
only what follows them remains, and the attention that was opened into its projections. ``sha256`` is over that text and all
tensors. Nothing in a file is executed.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from snows import network
from snows.layers import SparseConv2d, SparseLinear
from snows.network import OpenAttention
from snows.packing import Packed
from snows.rewriting import Remainder, difference, outputs, substitute
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
    write(Path(path), to_bytes(tensors, {"snows": text, "sha256": digest(dict(sorted(tensors.items())), text)}))


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


def is_packed(path: Path) -> bool:
    """Whether `save` wrote this file."""
    try:
        with safe_open(path, "pt") as file:
            return "snows" in (file.metadata() or {})
    except (SafetensorError, OSError, UnicodeDecodeError):
        return False


def export_onnx(model: nn.Module, example: Any, path: Path | str) -> float:
    """Write a network with dense weights, zeros among them, as ONNX, any number of images at a time; and run that once.

    Args:
        model: in evaluation mode, without packed layers.
        example: one batch of at least two.
        path: of the file.

    Returns:
        The largest difference of onnxruntime's outputs from the model's, relative to the largest output.

    Raises:
        ValueError: the packages are missing, the model cannot be exported, or the outputs differ by more than 1e-4.
    """
    try:
        import onnxruntime  # type: ignore[import-not-found,import-untyped,unused-ignore]
        import onnxscript  # type: ignore[import-not-found,import-untyped,unused-ignore] # noqa: F401
    except ImportError as error:
        raise ValueError(f"export: ONNX needs a package that is not installed ({error}); pip install 'snows[export]' brings it") from error
    path, inputs = Path(path), network.as_inputs(example)
    temporary = path.with_name(path.name + ".partial.onnx")
    batch = torch.export.Dim("batch")
    shapes = tuple({0: batch} if isinstance(x, Tensor) else None for x in inputs.args)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of PyTorch about itself
            torch.onnx.export(model, inputs.args, str(temporary), kwargs=inputs.kwargs, dynamo=True, external_data=False, verbose=False,
                              dynamic_shapes=None if inputs.kwargs else shapes)
        session = onnxruntime.InferenceSession(str(temporary), providers=["CPUExecutionProvider"])
        feed = dict(zip([x.name for x in session.get_inputs()], [x.numpy() for x in inputs.tensors()], strict=True))
        worst = difference(outputs(model, inputs), [torch.from_numpy(x) for x in session.run(None, feed)])
        if not worst <= 1e-4:
            raise ValueError(f"export: onnxruntime's outputs differ by {worst:.1e} of the largest; nothing was written")
        temporary.replace(path)
    except (torch.onnx.OnnxExporterError, OSError) as error:
        raise ValueError(f"export: {path} could not be written ({str(error).strip().splitlines()[0]})") from error
    finally:
        temporary.unlink(missing_ok=True)
    return worst


def _described(module: SparseLinear | SparseConv2d) -> dict[str, Any]:
    entry: dict[str, Any] = {"pattern": str(module.pattern), "shape": list(module.shape), "activation": module.activation}
    if isinstance(module, SparseConv2d):
        entry |= {key: value if isinstance(value := getattr(module, key), str) else list(value) for key in CONVOLUTION}
        entry["innermost"] = module.innermost
    return entry


def _content(path: Path, text: str) -> dict[str, Any]:
    """The metadata, of this format and complete."""
    try:
        content: dict[str, Any] = json.loads(text)
        version = content["version"]
        if not isinstance(version, int) or version > VERSION:
            raise ValueError(f"load: {path} has format {version}, this snows reads up to {VERSION}; install a newer one")
        for name, entry in content["layers"].items():
            parse_pattern(entry["pattern"])
            sound = isinstance(name, str) and len(entry["shape"]) in (2, 4) and all(type(x) is int and x > 0 for x in entry["shape"])
            if not sound or entry["activation"] not in (None, "relu", "gelu") or (len(entry["shape"]) == 4 and set(CONVOLUTION) - set(entry)):
                raise KeyError(name)
        if version == 1:
            content["remainders"] = []
        if not all(isinstance(name, str) for key in ("identities", "remainders", "opened") for name in content[key]):
            raise KeyError("identities")
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"load: the metadata of {path} is damaged ({type(error).__name__}: {error})") from error
    return content


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
        if module.bias is None and f"{name}.bias" in tensors:  # of a normalisation that was folded
            module.bias = nn.Parameter(torch.empty(len(module.weight), device="meta"))


def _module(net: nn.Module, name: str, path: Path) -> nn.Module:
    try:
        return net.get_submodule(name)
    except AttributeError:
        raise ValueError(f"load: {path} does not match the model: there is no module {name}") from None


def _compare(net: nn.Module, layers: dict[str, Any], tensors: dict[str, Tensor], path: Path) -> None:
    """Names, shapes and kinds of all tensors against the model's. What is in a packed weight, the layer itself checks."""
    own = net.state_dict()
    expected: dict[str, tuple[int, ...] | None] = {name: tuple(x.shape) for name, x in own.items()}
    problems = []
    for name, entry in layers.items():
        module = _module(net, name, path)
        weight = expected.pop(f"{name}.weight", None)
        if not isinstance(module, nn.Linear | nn.Conv2d) or weight != tuple(entry["shape"]):
            problems.append(f"{name} has a weight of {weight}, the file one of {tuple(entry['shape'])}")
        elif type(module).forward is nn.Conv2d.forward:
            problems += [f"{name} has the {key} {getattr(module, key)}, the file {entry[key]}" for key in CONVOLUTION
                         if getattr(module, key) != (entry[key] if isinstance(entry[key], str) else tuple(entry[key]))]
        expected |= {f"{name}.values": None, f"{name}.codes": None}
    problems += [f"missing {name}" for name in expected if name not in tensors]
    problems += [f"unexpected {name}" for name in tensors if name not in expected]
    for name, x in tensors.items():
        if expected.get(name) not in (None, tuple(x.shape)):
            problems.append(f"{name} is {expected[name]}, in the file {tuple(x.shape)}")
        elif x.is_floating_point() != (own[name].is_floating_point() if name in own else not name.endswith(".codes")):
            problems.append(f"{name} is {x.dtype} in the file")
    if problems:
        raise ValueError(f"load: {path} does not match the model: {'; '.join(problems[:5])}{' and more' if len(problems) > 5 else ''}")


def _filled(net: nn.Module, layers: dict[str, Any], tensors: dict[str, Tensor], path: Path) -> nn.Module:
    for name, entry in layers.items():
        packed = Packed(tensors.pop(f"{name}.values"), tensors.pop(f"{name}.codes"), parse_pattern(entry["pattern"]),
                        tuple(entry["shape"]))
        settings: dict[str, Any] = {key: value if isinstance(value := entry[key], str) else tuple(value) for key in CONVOLUTION if key in entry}
        if "innermost" in entry:
            settings["innermost"] = entry["innermost"] is True
        kind: Any = SparseLinear if len(packed.shape) == 2 else SparseConv2d
        try:
            layer = kind(packed, tensors.pop(f"{name}.bias", None), activation=entry["activation"], **settings)
        except (ValueError, RuntimeError, TypeError) as error:
            raise ValueError(f"load: {path}: {name}: {error}") from error
        parent, _, key = name.rpartition(".")
        net.get_submodule(parent)._modules[key] = layer.eval()
    missing, unexpected = net.load_state_dict(tensors, strict=False, assign=True)
    assert not unexpected and all(name.rpartition(".")[0] in layers for name in missing)  # noqa: PT018 - `_compare` has seen to it
    network.close_attention(net)
    return net
