"""One Gauss-Newton product: our rules beside PyTorch's own double backward through the same graph, as it is and compiled.

    python bench/products.py --out bench/results/cpu/products.json

A ViT-B block (K = 3, 16 images, 197 tokens) and a ResNet-50 stage (K = 6, 32 images), random weights. "eager" is the same horizon, the
same loss and the same trick for `J v` through PyTorch's functions alone; both keep their graph. "torch.compile" is Inductor's code for
eager's product, its operations traced by `make_fx` with what the graph keeps as constants: `torch.compile` itself takes no gradient
through a graph made outside of it, and what it can take, `torch.func.jvp` and `vjp`, would repeat the forward pass at each product.
Its compilation is not in its time. On a GPU "snows" and "torch.compile" replay CUDA graphs. Products are compared first. "share of
matmul" is what the matrix products and convolutions inside would take at the speed of one large matrix product, timed in turns with
the others, over the time taken.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from report import race
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode
from turns import in_turns, keep, large_product

from snows.matching.horizon import Horizon
from snows.matching.losses import Reconstruction
from snows.networks.batches import Batch
from snows.ops import graphs
from snows.solving.operators import GaussNewton
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
    "ResNet-50 stage 2, conv2": (
        lambda: nn.Sequential(*(Bottleneck(512) for _ in range(3))),
        "0.conv2",
        (32, 512, 28, 28),
        6,
    ),
}


def product(name: str, implementation: str) -> GaussNewton:
    """The operator, its graph built by our rules or by PyTorch's."""
    torch.manual_seed(0)
    make, layer, shape, k = CASES[name]
    net, x = make().eval().to(DEVICE), torch.randn(shape, device=DEVICE)
    if len(shape) == 4:
        net, x = net.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    run = {"run": lambda func, args, kwargs: func(*args, **kwargs)} if implementation == "eager" else {}
    window = Horizon(net, layer, k, Batch.of(x), **run)
    stream = window.stream(Batch.of(x))
    weight = net.get_submodule(layer).weight.detach()
    with torch.no_grad():
        targets = window.outputs(weight, stream)
    operator = GaussNewton(Reconstruction(window, stream, targets), weight + 0.01 * torch.randn_like(weight))
    if implementation == "eager":
        operator.products = graphs.Replayed(None)
    return operator


def flop_of(operator: GaussNewton, v: Tensor) -> int:
    """Of a product's matrix products and convolutions. Each derivative of attention has four products."""

    def four(q: torch.Size, k: torch.Size) -> int:
        return 4 * 2 * q.numel() * k[-2]

    formulas = {
        torch.ops.snows.attention_grad: lambda g, q, k, *_, **__: four(q, k),
        torch.ops.snows.attention_tangent: lambda dq, dk, dv, q, k, *_, **__: four(q, k),
    }
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        operator.product(v)
    total: int = counter.get_total_flops()
    return total


def compiled(operator: GaussNewton, v: Tensor) -> Callable[[Tensor], Tensor]:
    """The product's operations through Inductor, ready to run."""
    traced = make_fx(lambda v: operator @ v)(v)
    function = torch.compile(traced, fullgraph=True, mode="reduce-overhead" if DEVICE == "cuda" else None)
    function(v)
    return function


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=50 if DEVICE == "cuda" else 7)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = (
        False  # products are compared to 1e-4; cuDNN's default is TF32
    )
    rows: list[dict[str, object]] = []
    for case in CASES:
        ours, eager = product(case, "snows"), product(case, "eager")
        v = torch.randn_like(ours.grad)
        runs: dict[str, Callable[[Tensor], Tensor]] = {"snows": ours.__matmul__, "eager": eager.__matmul__}
        if DEVICE == "cuda":
            runs["snows without its graph"] = ours.product
        began = time.perf_counter()
        try:
            runs["torch.compile"] = compiled(eager, v)
        except Exception as error:
            rows.append(
                {
                    "case": case,
                    "implementation": "torch.compile",
                    "cannot be compiled": f"{type(error).__name__}: {error}"[:500],
                }
            )
        seconds = time.perf_counter() - began
        wanted = eager @ v
        for name, run in runs.items():
            for _ in range(3):  # the third is a replay
                assert ((run(v) - wanted).norm() / wanted.norm()).item() < 1e-4, name
        flop, (large, large_flop) = flop_of(ours, v), large_product(DEVICE)
        *found, ceiling = in_turns(
            case, {name: partial(run, v) for name, run in runs.items()} | {"matmul": large}, args.rounds
        )
        for row in found:
            row |= {
                "flop": flop,
                "share of matmul": flop / large_flop * ceiling["median ms"] / row["median ms"],
            }
        rows += [
            row | ({"seconds to compile": seconds} if row["implementation"] == "torch.compile" else {})
            for row in found
        ]
        keep(args.out, rows)
        torch.compiler.reset()
    print(race(rows))


if __name__ == "__main__":
    main()
