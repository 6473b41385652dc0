"""A GPU's ceilings, and how the sparse matrix products that torch ships with compare with its dense ones.

    python bench/hopper.py --out bench/results/h200/ceilings.json

Copy bandwidth, matrix products by precision, what a launch and a synchronisation cost; and for the shapes of ViT-B and ViT-L, bfloat16,
dense (cuBLAS) beside 2:4 through cuSPARSELt (with its search over algorithms) and CUTLASS, as replays of CUDA graphs over rotating inputs
where that works. cuSPARSELt takes multiples of 8 tokens: others are padded inside the call that is timed. A part that fails is recorded
with its error and the others go on. Every product is checked against float64 before it is timed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

SHAPES = [
    (out, width)
    for out, width in ((768, 768), (3072, 768), (768, 3072), (1024, 1024), (4096, 1024), (1024, 4096))
]
TOKENS = (1, 16, 197, 197 * 8, 197 * 64)


def milliseconds(f: Callable[[], object], repeats: int = 30) -> dict[str, float]:
    """Median and quartiles of f by device events, after a warm-up."""
    for _ in range(5):
        f()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        f()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    q1, median, q3 = statistics.quantiles(times, n=4)
    return {"median ms": median, "q1 ms": q1, "q3 ms": q3}


def replayed(f: Callable[[], object], times: int = 20) -> Callable[[], object]:
    """`times` calls of f as one CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        f()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(times):
            f()
    return graph.replay


def ceilings() -> dict[str, object]:
    result: dict[str, object] = {}
    torch.backends.cudnn.allow_tf32 = False
    for mib in (64, 256, 1024):
        x = torch.randn(mib * 2**18, device="cuda")
        y = torch.empty_like(x)
        t = milliseconds(lambda x=x, y=y: y.copy_(x))
        result[f"copy {mib} MiB"] = t | {"GB/s": 2 * x.nbytes / t["median ms"] / 1e6}
    for name, dtype, tf32 in (
        ("float32", torch.float32, False),
        ("tf32", torch.float32, True),
        ("bfloat16", torch.bfloat16, False),
        ("float16", torch.float16, False),
    ):
        torch.backends.cuda.matmul.allow_tf32 = tf32
        a, b = (torch.randn(8192, 8192, device="cuda", dtype=dtype) for _ in range(2))
        t = milliseconds(lambda a=a, b=b: a @ b, 10)
        result[f"matmul 8192 {name}"] = t | {"TFLOP/s": 2 * 8192**3 / t["median ms"] / 1e9}
    torch.backends.cuda.matmul.allow_tf32 = False
    small = torch.randn(1024, device="cuda")
    for count in (1, 100):
        torch.cuda.synchronize()
        seconds = []
        for _ in range(50):
            began = time.perf_counter()
            for _ in range(count):
                small.add_(1.0)
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began)
        result[f"{count} launches and one synchronisation, us"] = 1e6 * statistics.median(seconds)
    began = time.perf_counter()
    for _ in range(200):
        small[0].item()
    result["one .item(), us"] = 1e6 * (time.perf_counter() - began) / 200
    return result


def error(found: Tensor, wanted: Tensor) -> float:
    return ((found.double() - wanted).norm() / wanted.norm()).item()


def products(out: int, width: int, tokens: int) -> dict[str, object]:
    """Dense and 2:4 of one shape, each as a graph of 20 calls over four inputs in turn; times are of one call."""
    weight = torch.randn(out, width, device="cuda", dtype=torch.bfloat16)
    mask = torch.zeros_like(weight, dtype=torch.bool).view(out, -1, 4)
    mask.scatter_(2, weight.view(out, -1, 4).abs().topk(2, dim=2).indices, True)
    weight = weight * mask.view_as(weight)
    inputs = [torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16) for _ in range(4)]
    wanted = inputs[0].double() @ weight.double().T
    turn = iter(range(10**9))

    def timed(f: Callable[[Tensor], Tensor]) -> dict[str, object]:
        found = f(inputs[0])
        record: dict[str, object] = {"error": error(found, wanted)}
        if not record["error"] < 2e-2:  # type: ignore[operator]  # NaN too
            return record | {"failed": "wrong result"}
        try:
            call = replayed(lambda: f(inputs[next(turn) % 4]))
            times, how = milliseconds(call, 15), "graph"
        except RuntimeError as problem:
            torch.cuda.synchronize()
            call, how = (lambda: [f(inputs[i % 4]) for i in range(20)]), f"eager, no graph: {problem}"[:200]
            times = milliseconds(call, 15)
        return record | {key: value / 20 for key, value in times.items()} | {"timed as": how}

    result: dict[str, object] = {"dense": timed(lambda x: x @ weight.T)}

    def cusparselt() -> dict[str, object]:
        compressed = torch._cslt_compress(weight)

        def whole(x: Tensor) -> Tensor:
            return F.pad(x, (0, 0, 0, -tokens % 8)).T

        best = torch._cslt_sparse_mm_search(compressed, whole(inputs[0]), transpose_result=True)
        return timed(
            lambda x: torch._cslt_sparse_mm(compressed, whole(x), alg_id=best, transpose_result=True)[:tokens]
        ) | {"algorithm": best}

    def cutlass() -> dict[str, object]:
        from torch.sparse import SparseSemiStructuredTensorCUTLASS

        sparse = SparseSemiStructuredTensorCUTLASS.from_dense(weight)
        return timed(lambda x: F.linear(x, sparse))

    for name, f in (("cuSPARSELt", cusparselt), ("CUTLASS of torch", cutlass)):
        try:
            result[name] = f()
        except Exception as problem:
            result[name] = {"failed": f"{type(problem).__name__}: {problem}"[:300]}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.manual_seed(0)
    result: dict[str, object] = {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(),
        "ceilings": ceilings(),
    }
    rows: list[dict[str, object]] = []
    result["rows"] = rows
    for out, width in SHAPES:
        for tokens in TOKENS:
            rows.append({"out": out, "in": width, "tokens": tokens} | products(out, width, tokens))
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
