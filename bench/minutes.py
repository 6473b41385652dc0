"""Pruning with less time than it takes: seconds taken, and divergence on the validation images.

    python bench/minutes.py --threads 2 --out bench/results/cpu/minutes.json
    python bench/minutes.py --threads 1 --clock processor     # where other programs run beside it

Each case is first pruned without a limit, after a pass that does not count; its seconds are the default's time. Then
`snows.prune` gets shares of these seconds. "Over" is how far past the limit it ended, in per cent of the limit. The
validation images are read as `bench/zoo.py` reads them.
"""

from __future__ import annotations

import argparse
import json
import time
from functools import partial
from pathlib import Path

import torch
from zoo import images_of

import snows
import snows.pruning
from snows import zoo
from snows.choosing.deadline import Deadline
from snows.evaluation import evaluate, logits_of


def goal_of(text):
    share, _, cost = text.partition(" ")
    return snows.Structured(float(share), cost) if cost else snows.parse_pattern(text)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--cases", default="resnet20=1:4,vit=2:4,resnet20=0.5 macs,vit=0.5 macs", help="network=pattern"
    )
    parser.add_argument("--shares", default="0.25,0.5,1")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--data", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=["wall", "processor"], default="wall")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    clock = time.process_time if args.clock == "processor" else time.perf_counter
    snows.pruning.Deadline = partial(Deadline, clock=clock)
    images, labels = images_of("validation", args.data)
    test, rows = list(zip(images.split(500), labels.split(500), strict=True)), []
    for case in args.cases.split(","):
        network, _, pattern = case.partition("=")
        dense, goal = zoo.load(network), goal_of(pattern)
        reference = [logits_of(dense, x) for x, _ in test]
        snows.prune(dense, zoo.calibration(64, 16), goal, progress=False)  # what happens once in a process
        for seed in range(args.seeds):
            batches, usual = zoo.calibration(seed=seed), 0.0
            for share in (None, *map(float, args.shares.split(","))):
                limit = None if share is None else share * usual
                began = clock()
                sparse, report = snows.prune(dense, batches, goal, seconds=limit, seed=seed, progress=False)
                seconds = clock() - began
                usual = seconds if limit is None else usual
                scores = evaluate(sparse, test, reference)
                rows.append(
                    {
                        "network": network,
                        "pattern": pattern,
                        "method": "no limit" if share is None else f"{share:g} of its time",
                        "seed": seed,
                        "accuracy": scores.top1,
                        "divergence": scores.divergence,
                        "seconds": round(seconds, 2),
                        "over": round(100 * (seconds / (limit or seconds) - 1), 1),
                        "notes": " ".join(report.notes),
                    }
                )
                print(rows[-1], flush=True)
                if args.out:
                    args.out.parent.mkdir(parents=True, exist_ok=True)
                    result = {
                        "threads": args.threads,
                        "clock": args.clock,
                        "torch": torch.__version__,
                        "rows": rows,
                    }
                    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
