"""From a picture to the tensor that a network takes, by the transforms of the network's own library."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
Numbers = tuple[float, ...] | None


class Preparation(Protocol):
    """Turns an RGB picture of Pillow into a float32 tensor of (3, H, W); its `str` says how, in a line."""

    def __call__(self, picture: Any) -> Tensor:
        """Turn a picture into a float32 tensor of (3, H, W)."""
        ...

    def override(
        self, crop: int | None = None, resize: int | None = None, mean: Numbers = None, std: Numbers = None
    ) -> Preparation:
        """Replace single settings; None keeps one. A crop without a resize keeps their ratio.

        Args:
            crop: pixels of the square that the network sees.
            resize: pixels of the shorter side before cropping.
            mean: of the three channels, in [0, 1].
            std: deviations of the three channels, likewise.

        Raises:
            ValueError: a size is below 1, or there are not three finite means and positive deviations.
        """
        ...


def check(crop: int | None, resize: int | None, mean: Numbers, std: Numbers) -> None:
    """Refuse settings that no picture can be prepared by.

    Raises:
        ValueError: see `Preparation.override`.
    """
    if min(crop or 1, resize or 1) < 1 or 0 in (crop, resize):
        raise ValueError(f"preparation: expected a crop and a resize of at least 1, got {crop} and {resize}")
    for name, values in (("means", mean), ("deviations", std)):
        if values is not None and (
            len(values) != 3
            or not all(map(math.isfinite, values))
            or (name == "deviations" and min(values) <= 0)
        ):
            raise ValueError(
                f"preparation: expected three finite {name}{' above 0' if name == 'deviations' else ''}, got "
                f"{values}"
            )


@dataclass(frozen=True)
class Plain:
    """Prepare pictures for networks of no library.

    The shorter side goes to `resize` (bicubic), the middle `crop` square stays, then ``(x / 255 - mean) /
    std``.

    Attributes:
        crop, resize: in pixels; None leaves pictures in their size.
        mean, std: of the three channels, in [0, 1].
    """

    crop: int | None = None
    resize: int | None = None
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def __call__(self, picture: Any) -> Tensor:
        """Turn a picture into a float32 tensor of (3, H, W)."""
        if self.crop is not None:
            (width, height), crop = picture.size, self.crop
            scale = (self.resize or crop) / min(width, height)
            picture = picture.resize((max(crop, round(width * scale)), max(crop, round(height * scale))), 3)
            left, top = (picture.size[0] - crop) // 2, (picture.size[1] - crop) // 2
            picture = picture.crop((left, top, left + crop, top + crop))
        x = torch.from_numpy(np.asarray(picture).astype(np.float32) / 255)
        return ((x - torch.tensor(self.mean)) / torch.tensor(self.std)).permute(2, 0, 1).contiguous()

    def __str__(self) -> str:
        sizes = (
            f"shorter side to {self.resize}, the middle {self.crop} square"
            if self.crop is not None
            else "pictures in their own size"
        )
        return f"{sizes}, mean {self.mean}, deviation {self.std}"

    def override(
        self, crop: int | None = None, resize: int | None = None, mean: Numbers = None, std: Numbers = None
    ) -> Plain:
        """Replace single settings; see `Preparation.override`."""
        check(crop, resize, mean, std)
        window, side = crop or self.crop, resize or self.resize
        if crop is not None and resize is None:
            side = round(crop * (self.resize / self.crop if self.crop and self.resize else 256 / 224))
        if resize is not None and window is None:
            window = round(resize * 224 / 256)
        return replace(self, crop=window, resize=side, mean=mean or self.mean, std=std or self.std)


@dataclass(frozen=True)
class Library:
    """Prepares pictures by a transform that a library makes.

    Attributes:
        make: from settings to the library's transform of a picture.
        settings: of the library, by its own names.
        named: maps the present settings, a crop and a resize (None for none) to the library's settings that
            say so.
        means: the library's names of means and deviations.
    """

    make: Callable[..., Callable[[Any], Tensor]]
    settings: Mapping[str, Any]
    named: Callable[[Mapping[str, Any], int | None, int | None], Mapping[str, Any]]
    means: tuple[str, str] = ("mean", "std")

    def __post_init__(self) -> None:
        object.__setattr__(self, "_transform", self.make(**self.settings))

    def __call__(self, picture: Any) -> Tensor:
        """Turn a picture into a float32 tensor of (3, H, W)."""
        return cast("Tensor", cast("Any", self)._transform(picture))

    def __str__(self) -> str:
        return " ".join(str(cast("Any", self)._transform).split())

    def override(
        self, crop: int | None = None, resize: int | None = None, mean: Numbers = None, std: Numbers = None
    ) -> Library:
        """Replace single settings; see `Preparation.override`."""
        check(crop, resize, mean, std)
        given = {
            name: value for name, value in zip(self.means, (mean, std), strict=True) if value is not None
        }
        sizes = self.named(self.settings, crop, resize) if crop or resize else {}
        return replace(self, settings={**self.settings, **sizes, **given})


def of_timm(net: Any) -> Library:
    """Make timm's own evaluation transform of a network.

    That is ``create_transform(**resolve_model_data_config(net))``.
    """
    data = importlib.import_module("timm.data")

    def named(settings: Mapping[str, Any], crop: int | None, resize: int | None) -> Mapping[str, Any]:
        size = crop or settings["input_size"][-1]
        return {
            "input_size": (settings["input_size"][0], size, size),
            "crop_pct": size / resize if resize else settings["crop_pct"],
        }

    return Library(data.create_transform, data.resolve_model_data_config(net), named)


def of_torchvision(transforms: Callable[..., Callable[[Any], Tensor]]) -> Library:
    """Make the transform of torchvision's weights: ``weights.transforms()``."""

    def named(settings: Mapping[str, Any], crop: int | None, resize: int | None) -> Mapping[str, Any]:
        own: Any = transforms(**settings)
        if not hasattr(own, "crop_size"):
            raise ValueError(
                f"preparation: {type(own).__name__} neither crops nor resizes; expected no --crop and no "
                "--resize"
            )
        before, side = own.crop_size[0], (own.resize_size or own.crop_size)[0]
        return {"crop_size": crop or before, "resize_size": resize or round((crop or before) * side / before)}

    return Library(transforms, {}, named)


def of_transformers(processor: Any) -> Library:
    """Make the transform of a Hugging Face image processor, which is called with a picture."""

    class Transform:
        def __init__(self, **settings: Any) -> None:
            self.settings = settings

        def __call__(self, picture: Any) -> Tensor:
            """Turn a picture into a float32 tensor of (3, H, W)."""
            return cast(
                "Tensor", processor(images=picture, return_tensors="pt", **self.settings)["pixel_values"][0]
            )

        def __str__(self) -> str:
            return f"{type(processor).__name__} {self.settings or ''}".strip()

    def named(settings: Mapping[str, Any], crop: int | None, resize: int | None) -> Mapping[str, Any]:
        size, found = dict(processor.size or {}), {}
        crops = bool(getattr(processor, "do_center_crop", False))
        before = size.get("shortest_edge") or size.get("height") or 224
        window = (dict(processor.crop_size or {}).get("height") if crops else None) or before
        side = resize or round((crop or window) * before / window)
        found["size"] = (
            {"shortest_edge": side} if "shortest_edge" in size else {"height": side, "width": side}
        )
        if crops:
            found["crop_size"] = {"height": crop or window, "width": crop or window}
        return found

    return Library(Transform, {}, named, ("image_mean", "image_std"))
