"""Packed layers on the CPU beside their strongest dense rivals, on the shapes of ViT-B, ViT-L and ResNet-50.

    python bench/layers.py --group linear --out bench/results/cpu/layers-linear.json

A Linear's rivals are `F.linear` and oneDNN's prepacked linear, which a frozen `torch.compile` uses; a convolution's are
`F.conv2d` in both layouts. A case is right against float64 before it is timed. Every packed layer takes and gives ordinary
tensors, and what it converts is in its time; "innermost" ones take and give tensors with the images innermost in memory, as
they do between each other in a deployed network.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from report import race
from torch import Tensor, nn
from turns import in_turns, keep

import snows
from snows.reference import innermost_images

TOKENS = 197 * 8
LINEAR = [(3072, 768), (768, 3072), (4096, 1024), (1024, 4096)]  # out, in
CONVOLUTION = [(64, 56), (128, 28), (256, 14), (512, 7)]  # channels in and out, pixels a side
PATTERNS = ["2:4", "1:4", "0.9"]
GROUPS = {  # a file each, for rows of one table have the same implementations
    "linear": [("linear", tokens, *shape) for tokens in (TOKENS, 1) for shape in LINEAR],
    "conv2d-16": [("conv2d", 16, *shape) for shape in CONVOLUTION],
    "conv2d-1": [("conv2d", 1, *shape) for shape in CONVOLUTION],
}
GROUPS |= {f"{group}-bfloat16": GROUPS[group] for group in ("linear", "conv2d-16")}


def rivals(x: Tensor, layer: nn.Module) -> dict[str, Callable[[], Tensor]]:
    weight, bias = layer.weight, layer.bias
    plain = {"F.linear": lambda: F.linear(x, weight, bias)}
    if (
        isinstance(layer, nn.Linear)
        and x.dtype == torch.bfloat16
        and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    ):
        return plain  # oneDNN packs no weight of that type here
    if isinstance(layer, nn.Linear):
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, len(x))
        return {
            **plain,
            "oneDNN packed": lambda: torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], ""),
        }
    last, last_weight = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight))
    return {
        "F.conv2d": lambda: F.conv2d(x, weight, bias, padding=1),
        "channels last": lambda: F.conv2d(last, last_weight, bias, padding=1),
    }


def ours(x: Tensor, layer: nn.Module) -> dict[str, Callable[[], Tensor]]:
    limit = 2e-6 if x.dtype == torch.float32 else 1e-2
    found: dict[str, Callable[[], Tensor]] = {}
    for text in PATTERNS:
        pattern, dense = snows.parse_pattern(text), type(layer)
        masked = (
            dense(layer.in_features, layer.out_features)
            if dense is nn.Linear
            else dense(layer.in_channels, layer.out_channels, 3, padding=1)
        )
        masked.to(x.dtype).load_state_dict(layer.state_dict())
        masked.weight.data *= pattern.mask(masked.weight.data.abs())
        packed = (snows.SparseLinear if dense is nn.Linear else snows.SparseConv2d).from_dense(
            masked, pattern
        )
        inputs = {text: x} | (
            {f"{text} innermost": innermost_images(x)} if x.ndim == 4 and len(x) % 16 == 0 else {}
        )
        wanted = masked.double()(x.double())
        for name, given in inputs.items():
            assert ((packed(given) - wanted).norm() / wanted.norm()).item() < limit, name
            found[name] = lambda packed=packed, given=given: packed(given)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--group", choices=list(GROUPS), required=True)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows: list[dict[str, object]] = []
    dtype = torch.bfloat16 if args.group.endswith("bfloat16") else torch.float32
    torch.manual_seed(0)
    with torch.no_grad():
        for kind, size, a, b in GROUPS[args.group]:
            layer = (
                (nn.Linear(b, a) if kind == "linear" else nn.Conv2d(a, a, 3, padding=1))
                .requires_grad_(False)
                .to(dtype)
            )
            x = (torch.randn(size, b) if kind == "linear" else torch.randn(size, a, b, b)).to(dtype)
            case = (
                f"{a} x {b}, {size} tokens"
                if kind == "linear"
                else f"3 x 3, {a} channels, {b} a side, {size} images"
            )
            flop = 2 * layer(x).numel() * layer.weight[0].numel()
            rows += in_turns(case, {**rivals(x, layer), **ours(x, layer)}, args.rounds, flop=flop)
            keep(args.out, rows)
    print(race(rows))


if __name__ == "__main__":
    main()
