"""Conjugate-gradient iterations with and without a preconditioner, layer by layer, on a network of the zoo.

    python bench/preconditioner.py --network resnet20 --pattern 1:4 --out bench/results/cpu/preconditioner-resnet20-1-4.json

The system is the first Newton step's: Gauss-Newton of the horizon (K = 3) at ALPS's weights on one batch, damped by
1e-3 of the curvature's mean. Iterations are counted to an unpreconditioned relative residual of 1e-2, at most 200; beside
them the share of the loss that the quadratic model has lost after 5 iterations.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
from pathlib import Path

import torch

from snows import alps, parse_pattern, zoo
from snows.matching.horizon import Horizon
from snows.matching.losses import Reconstruction
from snows.matching.metrics import OutputSensitivity
from snows.networks.batches import Batch
from snows.networks.stream import Schedule, Stream
from snows.networks.trace import Trace
from snows.selectors import LayerStatistics
from snows.solving.cg import cg
from snows.solving.operators import GaussNewton, Restricted, trace
from snows.solving.preconditioners import Kronecker, RowBlocks
from snows.zoo import calibration


def layer_counts(net, layer, streams, sensitivities, pattern, damping=1e-3):
    calls = [stream.advance(layer) for stream in streams]
    weight = net.get_submodule(layer).weight.detach().clone()
    if pattern.fits(weight.shape):
        return None
    horizon = Horizon(net, layer, 3, streams[0])
    generator = torch.Generator().manual_seed(0)
    metrics = sensitivities.of(horizon.operations)
    with torch.no_grad():
        targets = horizon.outputs(weight, streams[0])
    loss = Reconstruction(horizon, streams[0], targets, metrics)
    statistics_ = LayerStatistics(calls, calls, lambda: metrics[horizon.operations[0]].matrix(len(weight)))
    masked = alps(weight, statistics_, pattern)
    factors = statistics_.factors
    H = GaussNewton(loss, masked.weight)
    mean = trace(H, masked.mask, probes=4, generator=generator).mean / int(masked.mask.sum())
    A, b = Restricted(H, masked.mask, damping * mean), -H.grad * masked.mask
    row = {"layer": layer}
    for name, kind in (("none", None), ("kronecker", Kronecker), ("rows", RowBlocks)):
        P = kind(factors, masked.mask, damping) if kind else None
        row[name] = cg(A, b, preconditioner=P, rtol=1e-2, max_iterations=200).iterations
        x = cg(A, b, preconditioner=P, rtol=1e-12, max_iterations=5).x
        row[f"{name} decrease"] = -((x * (H @ x)).sum().item() / 2 - (x * b).sum().item()) / H.value
    return row


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--network", default="resnet20")
    parser.add_argument("--pattern", default="1:4")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    net = zoo.load(args.network).to(memory_format=torch.channels_last)
    inputs = [Batch.of(x) for x in calibration(256, 64)]
    watched = Trace.of(net, inputs[0])
    plan = Schedule(net, watched)
    streams = [Stream(plan, x) for x in inputs]
    sensitivities = OutputSensitivity(net, inputs[-1], torch.Generator().manual_seed(0))
    rows = [
        row
        for layer in list(watched.start)[1:-1]
        if (row := layer_counts(net, layer, streams, sensitivities, parse_pattern(args.pattern)))
    ]
    medians = {name: statistics.median(row[name] for row in rows) for name in ("none", "kronecker", "rows")}
    ratio = statistics.median(row["rows"] / row["none"] for row in rows)
    result = {
        "network": args.network,
        "pattern": args.pattern,
        "torch": torch.__version__,
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "medians": medians,
        "median of rows / none": ratio,
        "layers": rows,
    }
    print(json.dumps({k: v for k, v in result.items() if k != "layers"}, indent=1))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
