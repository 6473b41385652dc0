"""Networks that were asked for a share of the milliseconds, timed again beside the dense one.

    python bench/milliseconds.py --out bench/results/cpu/milliseconds.json

Units are decided and taken out, and nothing is fitted; no low rank. With `--fitted` whatever loses least is chosen, layers with
zeros are deployed for the runtime, and what stays is fitted at the default settings. What `prune` measured while it chose
does not count: both networks are timed in turns afterwards, with normalisations folded where zeros may be chosen. "Off" is how far the measured share is from the one asked for, in per cent of it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from functools import partial
from pathlib import Path

import torch
from smaller import UNITS, load_model

import snows
from snows import zoo
from snows.choosing.compiling import ready
from snows.choosing.measuring import Stopwatch
from snows.choosing.sketches import folded
from snows.networks.batches import Batch


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", default="zoo:resnet20,zoo:vit,torchvision:resnet50")
    parser.add_argument("--shares", default="0.8,0.65,0.5")
    parser.add_argument("--runtimes", default="eager,compile")
    parser.add_argument("--fitted", action="store_true")
    parser.add_argument("--seconds", type=float, default=3.0, help="of timing afterwards")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows = json.loads(args.out.read_text())["rows"] if args.out and args.out.exists() else []
    for source in args.networks.split(","):
        trained = source.startswith("zoo:")
        dense = load_model(source, random_weights=not trained).model
        batches = zoo.calibration(256) if trained else [torch.randn(8, 3, 224, 224)]
        x = batches[0][: 64 if trained else 8]
        for runtime in args.runtimes.split(","):
            for share in map(float, args.shares.split(",")):
                asked = {"of": "latency", "runtime": runtime, "images": len(x)}
                began = time.perf_counter()
                if args.fitted:
                    small, report = snows.prune(
                        dense, zoo.calibration(), snows.Budget(share, **asked), progress=False
                    )
                else:
                    order = "compensated" if trained else "magnitude"
                    goal = snows.Structured(share, using=UNITS, order=order, refit=False, **asked)
                    small, report = snows.prune(
                        dense, batches, goal, solver=None, recalibrate=False, progress=False
                    )
                seconds = time.perf_counter() - began
                nets = [dense, small]
                if args.fitted:
                    small = snows.deploy(small, x, runtime=runtime, progress=False).network
                    nets = [folded(dense, Batch.of(x)), small]
                nets = [ready(net, x, runtime) for net in nets]
                with torch.no_grad():
                    race = Stopwatch().race([partial(net, x) for net in nets], args.seconds)
                found = statistics.median(ours / whole for whole, ours in race.rounds)
                rows.append(
                    {
                        "network": source,
                        "pattern": f"{runtime}, {100 * share:g} %{', fitted' if args.fitted else ''}",
                        "dense ms": race.medians[0],
                        "ms": race.medians[1],
                        "measured %": 100 * found,
                        "off": 100 * abs(found / share - 1),
                        "MACs": round(100 * report.macs[1] / report.macs[0], 1),
                        "seconds": round(seconds, 1),
                    }
                )
                print(rows[-1], flush=True)
                torch.compiler.reset()
                if args.out:
                    args.out.parent.mkdir(parents=True, exist_ok=True)
                    args.out.write_text(
                        json.dumps({"threads": torch.get_num_threads(), "rows": rows}, indent=1) + "\n"
                    )
    print(f"median off: {statistics.median(row['off'] for row in rows):.1f} %")


if __name__ == "__main__":
    main()
