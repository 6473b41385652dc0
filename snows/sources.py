"""Where networks and images come from, by a short text: `zoo:resnet20`, `torchvision:resnet50`, `cifar10:FOLDER`, a folder."""

from __future__ import annotations

import importlib
import json
import math
import sys
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from snows import files, zoo
from snows.network import first_line

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Preprocessing:
    """How a picture becomes a tensor: shorter side to `resize`, the middle `crop` square, then ``(x / 255 - mean) / std``.

    Attributes:
        crop: pixels of the square that the network sees.
        resize: pixels of the shorter side before cropping.
        mean, std: of the three channels, in [0, 1].

    Raises:
        ValueError: a size is below 1, or there are not three finite means and positive deviations.
    """

    crop: int = 224
    resize: int = 256
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def __post_init__(self) -> None:
        if self.crop < 1 or self.resize < 1:
            raise ValueError(f"preprocessing: expected a crop and a resize of at least 1, got {self.crop} and {self.resize}")
        if not (len(self.mean) == len(self.std) == 3 and all(map(math.isfinite, (*self.mean, *self.std))) and min(self.std) > 0):
            raise ValueError(f"preprocessing: expected three means and three deviations above 0, got {self.mean} and {self.std}")


# ---------------------------------------------------------------- networks


def load_model(source: str, weights: Path | None = None) -> tuple[nn.Module, Preprocessing]:
    """Build a network in evaluation mode, and say how it wants its pictures.

    Args:
        source: `zoo:NAME`, `torchvision:NAME`, `timm:NAME`, `hf:FOLDER` or `package.module:callable`.
        weights: a safetensors file, also one of packed layers, or a pickled checkpoint (loaded with ``weights_only=True``);
            without one, zoo and hf have theirs and the others start at random, from the same numbers every time.

    Raises:
        ValueError: there is no such network, or the weights do not match it.
    """
    kind, _, name = source.partition(":")
    if not kind or not name:
        raise ValueError(f"model: expected zoo:NAME, torchvision:NAME, timm:NAME, hf:FOLDER or package.module:callable, got {source!r}")
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            net, processing = _build(kind, name)
    except ImportError as error:
        advice = "pip install 'snows[models]' brings torchvision, timm and transformers" if kind in ("torchvision", "timm", "hf") else \
            "expected a module in this folder or on the Python path"
        raise ValueError(f"model: {source} needs a package that is not installed or does not load ({error}); {advice}") from error
    except Exception as error:  # whatever building it raises
        if "torchvision::" in str(error):
            raise ValueError(f"model: {source} needs a torchvision that was built for this torch ({torch.__version__}); install both from "
                             f"the same index ({first_line(error)})") from error
        raise error if isinstance(error, _MismatchError) else ValueError(f"model: {source} could not be built ({first_line(error)})") from error
    if not isinstance(net, nn.Module):
        raise ValueError(f"model: expected {source} to return an nn.Module, got {type(net).__name__}")
    if weights is not None and files.is_packed(weights):
        return files.load(weights, net), processing
    if weights is not None:
        load_weights(net, weights)
    return net.eval(), processing


def _build(kind: str, name: str) -> tuple[Any, Preprocessing]:
    if kind == "zoo":
        return zoo.load(name), Preprocessing()
    if kind == "torchvision":
        models = importlib.import_module("torchvision.models")
        if name not in models.list_models():
            raise AttributeError(f"torchvision has no network {name!r}")
        return models.get_model(name, weights=None), Preprocessing()
    if kind == "timm":
        net = importlib.import_module("timm").create_model(name, pretrained=False)
        return net, _timm_preprocessing(net)
    if kind == "hf":
        return _load_hf(Path(name))
    if not {"", str(Path.cwd())} & set(sys.path):  # as `python -m snows` has it
        sys.path.append(str(Path.cwd()))
    return getattr(importlib.import_module(kind), name)(), Preprocessing()


class _MismatchError(ValueError):
    """Weights that do not fit the network they are for."""

    def __init__(self, path: Path, **problems: list[str]) -> None:
        found = [f"{kind.replace('_', ' ')} {', '.join(names[:5])}{' and more' if len(names) > 5 else ''}"
                 for kind, names in problems.items() if names]
        super().__init__(f"weights: {path} does not match the model: {'; '.join(found)}")


def _timm_preprocessing(net: nn.Module) -> Preprocessing:
    config: Any = getattr(net, "pretrained_cfg", {}) or {}
    crop = int(config.get("input_size", (3, 224, 224))[-1])
    return Preprocessing(crop, round(crop / config.get("crop_pct", 0.875)),
                         tuple(config.get("mean", IMAGENET_MEAN)), tuple(config.get("std", IMAGENET_STD)))


def _load_hf(folder: Path) -> tuple[nn.Module, Preprocessing]:
    if not (folder / "config.json").is_file():
        raise ValueError(f"model: expected {folder} to hold a config.json as transformers saves it, got none")
    transformers = importlib.import_module("transformers")
    net, found = transformers.AutoModelForImageClassification.from_pretrained(
        folder, local_files_only=True, output_loading_info=True, ignore_mismatched_sizes=True)
    missing, reshaped = list(found["missing_keys"]), [str(x[0]) for x in found["mismatched_keys"]]
    if missing or reshaped:  # transformers would leave them random
        raise _MismatchError(folder, missing=missing, unexpected=list(found["unexpected_keys"]), of_another_shape=reshaped)
    processing = Preprocessing()
    path = folder / "preprocessor_config.json"
    if path.is_file():
        config = json.loads(path.read_text())
        size = config.get("size", 224)
        size = size.get("height", size.get("shortest_edge", 224)) if isinstance(size, Mapping) else size
        crop = config.get("crop_size", size)
        crop = crop.get("height", size) if isinstance(crop, Mapping) else crop
        processing = Preprocessing(crop, size, tuple(config.get("image_mean", IMAGENET_MEAN)), tuple(config.get("image_std", IMAGENET_STD)))
    return net, processing


def load_weights(net: nn.Module, path: Path) -> None:
    """Load a checkpoint into a network of the same architecture.

    Raises:
        ValueError: the file is no checkpoint, or names or shapes do not match; the names are listed.
    """
    if not path.is_file():
        raise ValueError(f"weights: there is no file {path}")
    state: Any
    try:
        state = load_file(path)
    except SafetensorError:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of other pickle protocols: it loads, or it does not
                state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # whatever a damaged file makes it raise
            raise ValueError(f"weights: {path} is neither safetensors nor a whole checkpoint of tensors alone (one that would run code "
                             "is not loaded)") from error
    for key in ("state_dict", "model", "model_state_dict"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not all(isinstance(x, Tensor) for x in state.values()):
        raise ValueError(f"weights: expected {path} to hold a state_dict of tensors")
    if state and all(k.startswith("module.") for k in state):  # saved from DataParallel
        state = {k.removeprefix("module."): v for k, v in state.items()}
    own = net.state_dict()
    problems = {
        "missing": [k for k in own if k not in state],
        "unexpected": [k for k in state if k not in own],
        "of_another_shape": [k for k in state if k in own and state[k].shape != own[k].shape],
    }
    if any(problems.values()):
        raise _MismatchError(path, **problems)
    net.load_state_dict(dict(state))


# ---------------------------------------------------------------- images


@dataclass
class Images:
    """Labelled or unlabelled images that are read when they are asked for.

    Attributes:
        items: what `read` understands, one an image.
        labels: class numbers, -1 for none.
        broken: files that could not be read, by name.
    """

    items: Any
    labels: np.ndarray
    processing: Preprocessing
    broken: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int) -> Tensor | None:
        """One image as a float32 (C, H, W) tensor, or None if its file is broken."""
        item = self.items[index]
        if isinstance(item, Path):
            return self._open(item)
        if isinstance(item, Tensor):
            return item
        return _normalised(item, self.processing)

    def _open(self, path: Path) -> Tensor | None:
        image_module = importlib.import_module("PIL.Image")
        try:
            with image_module.open(path) as picture:
                return picture_to_tensor(picture, self.processing)
        except Exception:  # whatever a damaged picture, or one of too many pixels, makes Pillow raise
            self.broken.append(path.name)
            return None

    def batches(self, size: int, indices: Any = None) -> Iterator[tuple[Tensor, Tensor]]:
        """(images, labels) pairs of up to `size`, in the order of `indices`; broken files are left out and noted."""
        images: list[Tensor] = []
        labels: list[int] = []
        for index in range(len(self)) if indices is None else indices:
            image = self.read(int(index))
            if image is None:
                continue
            images.append(image)
            labels.append(int(self.labels[index]))
            if len(images) == size:
                yield torch.stack(images), torch.tensor(labels)
                images, labels = [], []
        if images:
            yield torch.stack(images), torch.tensor(labels)


def picture_to_tensor(picture: Any, processing: Preprocessing) -> Tensor:
    """A PIL picture as the network takes it: RGB, shorter side resized (bicubic), centre crop, normalised."""
    picture = picture.convert("RGB")
    width, height = picture.size
    scale = processing.resize / min(width, height)
    picture = picture.resize((max(processing.crop, round(width * scale)), max(processing.crop, round(height * scale))), 3)
    left, top = (picture.size[0] - processing.crop) // 2, (picture.size[1] - processing.crop) // 2
    return _normalised(np.asarray(picture.crop((left, top, left + processing.crop, top + processing.crop))), processing)


def _normalised(pixels: np.ndarray, processing: Preprocessing) -> Tensor:
    x = torch.from_numpy(pixels.astype(np.float32) / 255)
    return ((x - torch.tensor(processing.mean)) / torch.tensor(processing.std)).permute(2, 0, 1).contiguous()


SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm"}


def load_data(source: str, processing: Preprocessing, split: str) -> Images:
    """Find images.

    Args:
        source: `zoo:fashion-mnist`, `cifar10:FOLDER`, `cifar100:FOLDER` (the published binary files), or a folder of
            pictures, with one folder a class (ImageNet's layout, classes in alphabetical order) or none.
        processing: how pictures become tensors.
        split: "calibration" or "test"; for CIFAR the training and the test files, for a folder its subfolder `train` or
            `val` if there is one.

    Raises:
        ValueError: there are no images.
    """
    kind, separator, rest = source.partition(":")
    if kind == "zoo" and separator:
        if rest != "fashion-mnist":
            raise ValueError(f"data: expected zoo:fashion-mnist, got {source!r}")
        x, known = zoo.images("calibration" if split == "calibration" else "test")
        return Images(x, np.full(len(x), -1) if known is None else known.numpy(), processing)
    if kind in ("cifar10", "cifar100") and separator:
        return _load_cifar(Path(rest), kind, processing, split)
    folder = Path(source)
    if not folder.is_dir():
        raise ValueError(f"data: there is no folder {source}; expected one, zoo:fashion-mnist, cifar10:FOLDER or cifar100:FOLDER")
    inner = folder / ("train" if split == "calibration" else "val")
    folder = inner if inner.is_dir() else folder
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    if not files:
        raise ValueError(f"data: found no pictures below {folder} ({', '.join(sorted(SUFFIXES))})")
    try:
        importlib.import_module("PIL.Image")
    except ImportError as error:
        raise ValueError("data: reading pictures needs Pillow; pip install 'snows[images]'") from error
    classes = sorted({p.relative_to(folder).parts[0] for p in files if len(p.relative_to(folder).parts) > 1})
    number = {name: i for i, name in enumerate(classes)}
    labels = [number.get(p.relative_to(folder).parts[0], -1) if len(p.relative_to(folder).parts) > 1 else -1 for p in files]
    return Images(files, np.array(labels), processing)


def _load_cifar(folder: Path, kind: str, processing: Preprocessing, split: str) -> Images:
    names = {
        ("cifar10", "calibration"): [f"data_batch_{i}.bin" for i in range(1, 6)],
        ("cifar10", "test"): ["test_batch.bin"],
        ("cifar100", "calibration"): ["train.bin"],
        ("cifar100", "test"): ["test.bin"],
    }[kind, "calibration" if split == "calibration" else "test"]
    head = 1 if kind == "cifar10" else 2  # CIFAR-100: coarse label, then fine
    records = []
    for name in names:
        found = next((p for p in (folder / name, *sorted(folder.glob(f"*/{name}"))) if p.is_file()), None)
        if found is None:
            raise ValueError(f"data: expected {name} in {folder} (the published binary version of {kind})")
        raw = np.fromfile(found, np.uint8)
        if len(raw) == 0 or len(raw) % (head + 3072):
            raise ValueError(f"data: {found} is not a binary file of {kind}: {len(raw)} bytes are not whole records of {head + 3072}")
        records.append(raw.reshape(-1, head + 3072))
    table = np.concatenate(records)
    pixels = table[:, head:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return Images(pixels, table[:, head - 1].astype(np.int64), processing)
