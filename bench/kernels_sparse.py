"""The packed 2:4 layers on a GPU beside cuBLAS, cuDNN and torch's cuSPARSELt, in bfloat16.

    python -m pytest bench/kernels_sparse.py --benchmark-json=bench/results/h100/kernels_sparse.json

An implementation is right against float64 before it is timed. A run is one CUDA graph of a call for each of several weights and inputs, for
a few tokens so many that none is in the cache when its turn comes; where a graph cannot be captured, the same calls one by one, and `timed
as` says so. cuSPARSELt takes multiples of 8 tokens: others are padded inside the call that is timed. `TFLOP/s` counts the multiplications
of the dense weight. On Hopper the many tokens are multiplied both ways, by mma.sp and by wgmma.sp: the faster one belongs into
WGMMA_BY_DEFAULT (csrc/cuda/sparse_wgmma.cuh).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from snows import NM, SparseConv2d, SparseLinear
from snows.packing import pack

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CACHE = 128 * 2**20  # more than a second-level cache, the packed weights counted at half
MANY = 197 * 64  # tokens
VIT = [
    (768, 768),
    (2304, 768),
    (3072, 768),
    (768, 3072),
    (1024, 1024),
    (3072, 1024),
    (4096, 1024),
    (1024, 4096),
]  # out, in: ViT-B, ViT-L
TOKENS = [
    *((out, width, MANY) for out, width in VIT),
    *((1024, 4096, n) for n in (1, 2, 4, 8, 16)),
    (3072, 768, 197),
    (768, 3072, 197),
]
IMAGES = [(256, 14), (128, 28), (512, 7), (64, 56)]  # channels in and out, side; 64 images, 3 x 3


class Case(NamedTuple):
    """A weight, an input, and for each implementation what computes their product."""

    weight: Tensor
    input: Tensor
    exact: Callable[[], Tensor]
    calls: dict[
        str, Callable[[], Callable[[], Tensor]]
    ]  # each sets up, searches included, and returns what is timed


def two_of_four(*shape: int) -> Tensor:
    weight = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    return weight * NM(2, 4).mask(weight.abs())


def linear(out: int, width: int, tokens: int) -> Case:
    w, x = two_of_four(out, width), torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16)

    def cusparselt() -> Callable[[], Tensor]:
        compressed = torch._cslt_compress(w)

        def whole() -> Tensor:
            return F.pad(x, (0, 0, 0, -tokens % 8)).T

        best = torch._cslt_sparse_mm_search(compressed, whole(), transpose_result=True)
        return lambda: torch._cslt_sparse_mm(compressed, whole(), alg_id=best, transpose_result=True)[:tokens]

    def snows() -> Callable[[], Tensor]:
        layer = SparseLinear(pack(w, None, NM(2, 4)))
        assert layer.order.numel() > 0
        return lambda: layer(x)

    calls = {
        "snows mma.sp": snows,
        "snows wgmma.sp": snows,
        "dense": lambda: lambda: F.linear(x, w),
        "cuSPARSELt": cusparselt,
    }
    return Case(w, x, lambda: x.double() @ w.double().T, calls)


def convolution(channels: int, side: int) -> Case:
    last = torch.channels_last
    w = two_of_four(channels, channels, 3, 3).contiguous(memory_format=last)
    x = torch.randn(64, channels, side, side, device="cuda", dtype=torch.bfloat16).contiguous(
        memory_format=last
    )

    def snows() -> Callable[[], Tensor]:
        layer = SparseConv2d(pack(w, None, NM(2, 4)), padding=1)
        assert layer.order.numel() > 0
        return lambda: layer(x)

    return Case(
        w,
        x,
        lambda: F.conv2d(x.double(), w.double(), padding=1),
        {"snows": snows, "dense": lambda: lambda: F.conv2d(x, w, padding=1)},
    )


def graph_of(calls: list[Callable[[], Tensor]]) -> tuple[Callable[[], object], str]:
    """All calls as one CUDA graph, or one by one where that does not work."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for call in calls:
                call()
    except RuntimeError as problem:
        torch.cuda.synchronize()
        return lambda: [call() for call in calls], f"eager, no graph: {problem}"[:200]
    return graph.replay, "graph"


def measure(make: Callable[[], Case], implementation: str, multiplications: int, benchmark) -> None:
    torch.manual_seed(0)
    first = make()
    call = first.calls[implementation]()
    exact = first.exact()
    error = ((call().double() - exact).norm() / exact.norm()).item()
    assert error < 1e-2
    del exact
    few = first.input.nbytes < first.weight.nbytes
    count = CACHE // (first.weight.nbytes // 2) + 1 if few else 4
    calls = [call, *(make().calls[implementation]() for _ in range(count - 1))]
    run, how = graph_of(calls)

    def one() -> None:
        run()
        torch.cuda.synchronize()

    benchmark.pedantic(one, rounds=30, warmup_rounds=5)
    seconds = benchmark.stats.stats.median / count
    benchmark.extra_info |= {
        "implementation": implementation,
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "calls": count,
        "timed as": how,
        "error": error,
        "us a call": 1e6 * seconds,
        "TFLOP/s": 2 * multiplications / seconds / 1e12,
    }


@pytest.mark.parametrize("implementation", ["snows mma.sp", "snows wgmma.sp", "dense", "cuSPARSELt"])
@pytest.mark.parametrize(("out", "width", "tokens"), TOKENS)
def test_linear(
    out: int, width: int, tokens: int, implementation: str, benchmark, monkeypatch: pytest.MonkeyPatch
) -> None:
    if implementation == "snows wgmma.sp" and (tokens < MANY or torch.cuda.get_device_capability() != (9, 0)):
        pytest.skip("for many tokens on Hopper")
    monkeypatch.setenv("SNOWS_WGMMA", str(int(implementation == "snows wgmma.sp")))
    measure(lambda: linear(out, width, tokens), implementation, out * width * tokens, benchmark)


@pytest.mark.parametrize("implementation", ["snows", "dense"])
@pytest.mark.parametrize(("channels", "side"), IMAGES)
def test_convolution(
    channels: int, side: int, implementation: str, benchmark, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    measure(lambda: convolution(channels, side), implementation, 64 * side**2 * 9 * channels**2, benchmark)
