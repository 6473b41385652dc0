"""ViT-B/16 at 224x224 (random weights): seconds, peak memory, and what a step costs in the first and in the last block.

    python bench/vit_b16.py --out bench/results/cpu/vit-b16.json               # every layer
    python bench/vit_b16.py --blocks 0,11                                       # the first and the last block only

Seconds are of the wall's clock, a step's of the processor (all threads), which does not count what other processes take. The weights of
torchvision's model are made small where it starts at zero, so that features differ. Needs torchvision.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import time
from pathlib import Path

import torch
from torchvision.models import vit_b_16

import snows
from snows.solving.newton import Newton


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--pattern", default="2:4")
    parser.add_argument("--blocks", default=",".join(str(i) for i in range(12)))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    net = vit_b_16(weights=None).eval()
    torch.nn.init.trunc_normal_(net.heads.head.weight, std=0.02)
    batches = list(torch.randn(args.images, 3, 224, 224).split(args.batch))
    chosen = tuple(f"encoder_layer_{i}." for i in args.blocks.split(","))
    steps = {}

    class Timed(Newton):
        def solve(self, *arguments, **options):
            began = time.process_time()
            fit = super().solve(*arguments, **options)
            steps[len(steps)] = (time.process_time() - began) / max(len(fit.steps), 1)
            return fit

    began, processor = time.perf_counter(), time.process_time()
    _, report = snows.prune(
        net,
        batches,
        snows.parse_pattern(args.pattern),
        solver=Timed(),
        recalibrate=False,
        only=lambda name, _: any(x in name for x in chosen),
    )
    seconds, processor = time.perf_counter() - began, time.process_time() - processor
    layers = [x for x in report.layers if not x.reason]
    result = {
        "network": "torchvision vit_b_16",
        "pattern": args.pattern,
        "images": args.images,
        "batch": args.batch,
        "blocks": args.blocks,
        "torch": torch.__version__,
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "seconds": round(seconds, 1),
        "processor seconds": round(processor, 1),
        "peak GB": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "rows": [
            {
                "layer": x.name,
                "step": round(steps[i], 2),
                "seconds": round(x.seconds, 1),
                "before": x.before,
                "after": x.after,
            }
            for i, x in enumerate(layers)
        ],
    }
    print(json.dumps(result, indent=1))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
