"""Networks and data by name, and what the user should know of them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from snows.cli.terminal import say, warn

if TYPE_CHECKING:
    from torch import Tensor

    from snows.sources import Data, Network
    from snows.sources.preparation import Preparation


def load_network(name: str, weights: Path | None, random_weights: bool) -> Network:
    """Load a network, and say what the user should know of it."""
    from snows import sources

    network = sources.load_model(name, weights, random_weights=random_weights)
    if network.note:
        warn(network.note)
    return network


def test_data(
    data: str, network: Network, preparation: Preparation, classes: Path | None, labels: Path | None
) -> Data | None:
    """Find the test images before pruning, and say so early where there are none to judge by."""
    from snows import sources

    try:
        return sources.load_data(
            data, network, "test", preparation=preparation, classes=classes, labels=labels
        )
    except ValueError as error:
        warn(f"the result will not be judged: {error}")
        return None


def say_prepared(images: Data) -> None:
    """Say how pictures are prepared, and what else the user should know of the data."""
    if images.preparation:
        say(f"pictures: {images.preparation}")
    say_note(images)


def say_note(images: Data) -> None:
    """Say which pictures were left out, and what else the user should know of the data."""
    if images.note:
        warn(images.note)
        images.note = ""
    if images.broken:
        found = ", ".join(f"{name} ({reason})" for name, reason in images.broken[:5])
        many = f"{len(images.broken)} pictures were" if len(images.broken) > 1 else "1 picture was"
        warn(f"{many} left out: {found}{' and more' if len(images.broken) > 5 else ''}")


def example_of(
    model: str, data: str | None, network: Network, preparation: Preparation, count: int
) -> Tensor:
    """Return a batch of so many pictures, prepared for a network; noise where no data are named.

    Of fewer pictures each is taken several times.
    """
    import torch

    from snows import sources

    if data is None and model.startswith("zoo:"):
        data = "zoo:fashion-mnist"
    if data is None:
        return _noise(preparation).expand(count, -1, -1, -1).contiguous()
    found = sources.load_data(data, network, "calibration", preparation=preparation)
    images = found.first(found.available(count, 0))
    return torch.cat([images] * -(-count // len(images)))[:count]


def _noise(preparation: Preparation) -> Tensor:
    """Make a picture of noise, prepared for the network."""
    import numpy as np
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    return preparation(Image.fromarray(pixels))[None]
