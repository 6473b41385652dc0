"""Small trained networks and the images they were made for; nothing is downloaded.

The networks were trained by `examples/train_zoo.py` on Fashion-MNIST (Xiao et al. 2017, MIT licence).
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor, nn

from snows.zoo.models import ResNet20, ViT

_FOLDER = Path(__file__).parent
_NETWORKS = {"resnet20": ResNet20, "vit": ViT}
MEAN, STD = 0.2860, 0.3530


def build(name: str) -> nn.Module:
    """Build a network in evaluation mode with random weights: "resnet20" or "vit", (B, 1, 28, 28) to (B, 10).

    Raises:
        ValueError: there is no such network.
    """
    if name not in _NETWORKS:
        raise ValueError(f"zoo: expected one of {', '.join(_NETWORKS)}, got {name!r}")
    net: nn.Module = _NETWORKS[name]()
    return net.eval()


def load(name: str) -> nn.Module:
    """Build a trained network in evaluation mode: "resnet20" or "vit", (B, 1, 28, 28) to (B, 10).

    Raises:
        ValueError: there is no such network.
    """
    net = build(name)
    net.load_state_dict(load_file(_FOLDER / f"{name}.safetensors"))
    return net


def images(split: Literal["calibration", "test"]) -> tuple[Tensor, Tensor | None]:
    """Read normalised Fashion-MNIST images and their labels.

    There are 3,000 for calibration, without labels, and 10,000 for the test.

    Returns:
        float32 (n, 1, 28, 28), and int64 (n,) or None.
    """
    with np.load(_FOLDER / "fashion_mnist.npz") as file:
        x = normalise(file[split])
        return x, torch.from_numpy(file["test_labels"].astype(np.int64)) if split == "test" else None


def normalise(pixels: NDArray[np.uint8]) -> Tensor:
    """Grey bytes (n, 28, 28) as the networks take them: float32 (n, 1, 28, 28)."""
    return torch.from_numpy(pixels.astype(np.float32)).div_(255).sub_(MEAN).div_(STD).unsqueeze(1)


SAMPLES, BATCH = 1024, 128  # of calibration, unless other numbers are asked for


def calibration(samples: int = SAMPLES, batch: int = BATCH, seed: int = 0) -> list[Tensor]:
    """Draw batches of the calibration images by `seed`."""
    found, _ = images("calibration")
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed))[:samples]
    return list(found[order].split(batch))
