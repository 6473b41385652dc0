"""Packed layers on the CPU beside their strongest dense rivals, on the shapes of ViT-B, ViT-L and ResNet-50.

    python -m pytest bench/layers.py --benchmark-json=bench/results/cpu/layers.json

A Linear's rivals are `F.linear` and oneDNN's prepacked linear, which a frozen `torch.compile` uses; a convolution's are
`F.conv2d` in both layouts. A case is right against float64 before it is timed. Every packed layer takes and gives ordinary
tensors, and what it converts is in its time; "innermost" ones take and give tensors with the images innermost in memory, as
they do between each other in a deployed network.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import snows
from snows.reference import innermost_images

TOKENS = 197 * 8
LINEAR = [(3072, 768), (768, 3072), (4096, 1024), (1024, 4096)]  # out, in
CONVOLUTION = [(64, 56), (128, 28), (256, 14), (512, 7)]  # channels in and out, pixels a side
PATTERNS = ["2:4", "1:4", "0.9"]
CASES = [("linear", TOKENS, *shape) for shape in LINEAR] + [("linear", 1, *shape) for shape in LINEAR] + \
        [("conv2d", batch, *shape) for batch in (16, 1) for shape in CONVOLUTION]


def rivals(kind: str, x: Tensor, layer: nn.Module) -> dict[str, Callable[[], Tensor]]:
    weight, bias = layer.weight.detach(), layer.bias.detach()
    if kind == "linear":
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, len(x))
        return {"F.linear": lambda: F.linear(x, weight, bias),
                "oneDNN packed": lambda: torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")}
    last, last_weight = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight))
    return {"F.conv2d": lambda: F.conv2d(x, weight, bias, padding=1),
            "F.conv2d channels last": lambda: F.conv2d(last, last_weight, bias, padding=1)}


def setting(kind: str, size: int, a: int, b: int, pattern: str) -> tuple[Tensor, nn.Module]:
    """An input, and a dense layer with zeros."""
    layer = nn.Linear(b, a) if kind == "linear" else nn.Conv2d(a, a, 3, padding=1)
    x = torch.randn(size, b) if kind == "linear" else torch.randn(size, a, b, b)
    layer.weight.data *= snows.parse_pattern(pattern).mask(layer.weight.data.abs())
    return x, layer.requires_grad_(False)


INNERMOST = [f"{pattern} innermost" for pattern in PATTERNS]


@pytest.mark.parametrize("implementation", [*PATTERNS, *INNERMOST, "first rival", "second rival"])
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[0]} {c[1]} {c[2]}x{c[3]}")
def test_layer(case: tuple[str, int, int, int], implementation: str, benchmark) -> None:
    torch.manual_seed(0)
    kind, size, a, b = case
    if implementation in INNERMOST and (kind == "linear" or size % 16):
        pytest.skip("for 16 images and multiples of it")
    pattern = implementation.split()[0] if implementation in PATTERNS + INNERMOST else "2:4"
    x, layer = setting(kind, size, a, b, pattern)
    name = implementation
    if implementation in PATTERNS + INNERMOST:
        x = innermost_images(x) if implementation in INNERMOST else x
        packed = (snows.SparseLinear if kind == "linear" else snows.SparseConv2d).from_dense(layer, snows.parse_pattern(pattern))

        def run() -> Tensor:
            return packed(x)
    else:
        name, run = list(rivals(kind, x, layer).items())[implementation == "second rival"]
    with torch.inference_mode():
        wanted = layer.double()(x.double())
        assert ((run().double() - wanted).norm() / wanted.norm()).item() < 2e-6
        benchmark.pedantic(run, rounds=15, iterations=1 if size > 1 else 5, warmup_rounds=3)
    flop = 2 * wanted.numel() * layer.weight[0].numel()
    benchmark.extra_info |= {"case": f"{kind} {a}x{b}, {size} {'tokens' if kind == 'linear' else 'images'}", "implementation": name,
                             "dense GFLOP/s": flop / benchmark.stats.stats.median / 1e9}
