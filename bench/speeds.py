"""Budgets in milliseconds: all kinds of treatment together beside each one alone, at the same speed.

    python bench/speeds.py --out bench/results/cpu/speeds.json

Each network is asked to be so many times as fast as the dense one under a frozen `torch.compile`, pruned and fitted at the
default settings, deployed for that runtime, and timed again beside the dense one, in turns. A kind that does not reach the
speed has no row. "Off" is how far the measured speed is from the one asked for, in per cent. Divergence and accuracy are of
all 10,000 test images.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from functools import partial
from pathlib import Path

import torch

import snows
from snows import zoo
from snows.choosing import ladders
from snows.choosing.compiling import ready
from snows.choosing.measuring import Stopwatch
from snows.evaluation import evaluate, logits_of
from snows.sparsity import NM

IMAGES = 64
UNITS = ("channels", "heads", "neurons")
KINDS = {
    "all": {},
    "units": {"using": UNITS},
    "low rank": {"using": ("low-rank",)},
    "2:4": {"using": ("nm",)},
    "1:4": {"using": ("nm",)},
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", default="resnet20,vit")
    parser.add_argument("--speeds", default="1.3,1.6,2.0")
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--runtime", default="compile")
    parser.add_argument("--seconds", type=float, default=3.0, help="of timing afterwards")
    parser.add_argument("--samples", type=int, default=1024)
    parser.add_argument(
        "--table", help="one timetable a network, FILE-NETWORK.json, for all budgets: measured if missing"
    )
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    images, labels = zoo.images("test")
    rows = json.loads(args.out.read_text())["rows"] if args.out and args.out.exists() else []
    for name in args.networks.split(","):
        dense, batches = zoo.load(name), zoo.calibration(args.samples)
        x = images[:IMAGES]
        test = list(zip(images.split(250), labels.split(250), strict=True))
        reference = [logits_of(dense, batch) for batch, _ in test]
        whole = evaluate(dense, test, reference).top1
        times = None
        if args.table:
            times = Path(f"{args.table}-{name}.json")
            if not times.exists():
                snows.measure(dense, x, runtime=args.runtime, progress=False).save(times)
        for speed in map(float, args.speeds.split(",")):
            for kind in args.kinds.split(","):
                case = {"network": name, "pattern": f"{speed:g} times", "method": kind}
                if any(all(row[key] == value for key, value in case.items()) for row in rows):
                    continue
                ladders.GROUPED = (
                    (snows.parse_pattern(kind),) if ":" in kind else (NM(4, 8), NM(2, 4), NM(1, 4))
                )
                goal = snows.Budget(
                    1 / speed, of="latency", runtime=args.runtime, images=IMAGES, **KINDS[kind]
                )
                began = time.perf_counter()
                try:
                    pruned = snows.prune(dense, batches, goal, progress=False)
                except ValueError as error:
                    print(case, error, flush=True)
                    continue
                seconds = time.perf_counter() - began
                report, net = pruned.report, pruned.network
                if report.zeros:
                    net = snows.deploy(net, x, runtime=args.runtime, progress=False).network
                nets = [ready(model, x, args.runtime) for model in (dense, net)]
                with torch.no_grad():
                    race = Stopwatch().race([partial(model, x) for model in nets], args.seconds)
                found = statistics.median(before / after for before, after in race.rounds)
                scores = evaluate(net, test, reference)
                row = {
                    **case,
                    "dense ms": race.medians[0],
                    "ms": race.medians[1],
                    "times as fast": round(found, 3),
                    "off": round(100 * abs(found / speed - 1), 2),
                    "accuracy": scores.top1,
                    "lost": round(whole - scores.top1, 2),
                    "divergence": scores.divergence,
                    "MACs": round(100 * report.macs[1] / report.macs[0], 1),
                    "parameters": round(100 * report.parameters[1] / report.parameters[0], 1),
                    "zeros": round(100 * report.zeros / report.weights, 1),
                    "samples": args.samples,
                    "seconds": round(seconds, 1),
                }
                if found >= 0.93 * speed:
                    rows.append(row)
                print(row, flush=True)
                torch.compiler.reset()
                gc.collect()
                if args.out:
                    args.out.parent.mkdir(parents=True, exist_ok=True)
                    content = {"threads": torch.get_num_threads(), "images": IMAGES, "rows": rows}
                    args.out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
