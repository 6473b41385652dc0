"""One Gauss-Newton product: our rules beside PyTorch's own double backward through the same graph.

    python -m pytest bench/products.py --benchmark-json=bench/results/cpu/products.json

A ViT-B block (K = 3, 16 images, 197 tokens) and a ResNet-50 stage (K = 6, 32 images), random weights. "eager" is the same horizon, the
same loss and the same trick for `J v` through PyTorch's functions alone; both keep their graph. Products are compared first.
"""

from __future__ import annotations

import contextlib
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from snows import horizon, network
from snows.horizon import Horizon, Reconstruction
from snows.operators import GaussNewton
from snows.zoo.models import EncoderBlock

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Bottleneck(nn.Module):
    """ResNet's (He et al. 2016), the input as wide as the output."""

    def __init__(self, width: int) -> None:
        super().__init__()
        inner = width // 4
        self.conv1, self.bn1 = nn.Conv2d(width, inner, 1, bias=False), nn.BatchNorm2d(inner)
        self.conv2, self.bn2 = nn.Conv2d(inner, inner, 3, padding=1, bias=False), nn.BatchNorm2d(inner)
        self.conv3, self.bn3 = nn.Conv2d(inner, width, 1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        return F.relu(x + self.bn3(self.conv3(y)))


CASES = {
    "ViT-B block, qkv": (lambda: nn.Sequential(EncoderBlock(768, 12)), "0.qkv", (16, 197, 768), 3),
    "ViT-B block, fc1": (lambda: nn.Sequential(EncoderBlock(768, 12)), "0.fc1", (16, 197, 768), 3),
    "ResNet-50 stage 2, conv2": (lambda: nn.Sequential(*(Bottleneck(512) for _ in range(3))), "0.conv2", (32, 512, 28, 28), 6),
}


def product(name: str, implementation: str) -> GaussNewton:
    """The operator, its graph built by our rules or by PyTorch's."""
    torch.manual_seed(0)
    make, layer, shape, k = CASES[name]
    net, x = make().eval().to(DEVICE), torch.randn(shape, device=DEVICE)
    if len(shape) == 4:
        net, x = net.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    window = Horizon(net, layer, k, network.as_inputs(x))
    stream = window.stream(network.as_inputs(x))
    weight = net.get_submodule(layer).weight.detach()
    with contextlib.ExitStack() as stack:
        if implementation == "eager":
            stack.enter_context(mock.patch.object(horizon, "reroute", lambda func, args, kwargs: func(*args, **kwargs)))
            stack.enter_context(mock.patch.object(horizon, "_convolution", lambda args, kwargs: F.conv2d(*args, **kwargs)))
        with torch.no_grad():
            targets = window.outputs(weight, stream)
        return GaussNewton(Reconstruction(window, stream, targets), weight + 0.01 * torch.randn_like(weight))


@pytest.mark.parametrize("implementation", ["snows", "eager"])
@pytest.mark.parametrize("name", CASES)
def test_product(name: str, implementation: str, benchmark) -> None:
    operator = product(name, implementation)
    v = torch.randn_like(operator.grad)
    if implementation == "snows":
        wanted = product(name, "eager") @ v
        assert ((operator @ v - wanted).norm() / wanted.norm()).item() < 1e-4

    def run() -> None:
        operator @ v
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(run, rounds=20 if DEVICE == "cuda" else 5, warmup_rounds=1)
    benchmark.extra_info |= {"case": name, "implementation": implementation}
