"""ViT-L/16 or ViT-B/16 at 224x224 (random weights), pruned whole: seconds, peak memory, and what a Newton step costs, layer by layer.

    python bench/vit_l16.py --run runs/vit-l --out bench/results/cpu/vit-l16.json             # 2:4; the same again goes on with it
    python bench/vit_l16.py --goal structured --minutes 100 --run runs/half --out ...          # half of the multiplications, with a limit
    python bench/vit_l16.py --size b --blocks 0,11                                             # of ViT-B/16 the first and the last block

Seconds of layers are of the wall's clock, over all processes that a run was done in; a step's are of the processor (all threads), which does
not count what other programs take, and are of the last process. The weights of torchvision's model are made small where it starts at zero, so that
features differ. Needs torchvision.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import sys
import time
from pathlib import Path

import torch

import snows
from snows.solving.newton import Newton
from snows.sources import load_model

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
with contextlib.suppress(ImportError):  # torchvision beside a CPU build of torch
    from conftest import define_torchvision_schemas

    define_torchvision_schemas()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=["b", "l"], default="l")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument(
        "--goal", default="2:4", help='a pattern, or "structured": half of the multiplications'
    )
    parser.add_argument("--blocks", help="numbers with commas between; by default all")
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--memory", help="bound of the activations, such as 4GB")
    parser.add_argument("--run", type=Path, help="folder, gone on with where it holds the run")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    net = load_model(f"torchvision:vit_{args.size}_16", random_weights=True).model
    torch.nn.init.trunc_normal_(net.heads.head.weight, std=0.02)
    batches = list(torch.randn(args.images, 3, 224, 224).split(args.batch))
    chosen = [f"encoder_layer_{i}." for i in args.blocks.split(",")] if args.blocks else [""]
    steps = []  # of layers that this process fitted by steps, in order

    class Timed(Newton):
        def solve(self, *arguments, **options):
            began = time.process_time()
            fit = super().solve(*arguments, **options)
            steps.append((time.process_time() - began) / max(len(fit.steps), 1))
            return fit

    goal = snows.Structured(0.5) if args.goal == "structured" else snows.parse_pattern(args.goal)
    resume = args.run is not None and (args.run / "run.json").exists()
    options = {} if args.memory is None else {"memory": args.memory}
    began, processor = time.perf_counter(), time.process_time()
    _, report = snows.prune(
        net,
        batches,
        goal,
        solver=Timed(),
        recalibrate=False,
        only=lambda name, _: any(x in name for x in chosen),
        seconds=None if args.minutes is None else 60 * args.minutes,
        out=args.run,
        resume=resume,
        **options,
    )
    seconds, processor = time.perf_counter() - began, time.process_time() - processor
    layers = [x for x in report.layers if not x.reason]
    fitted = [x.name for x in layers if x.before == x.before]
    step = dict(zip(fitted[len(fitted) - len(steps) :], steps, strict=True))
    result = {
        "network": f"torchvision vit_{args.size}_16",
        "pattern": args.goal,
        "images": args.images,
        "batch": args.batch,
        "blocks": args.blocks or "all",
        "minutes": args.minutes,
        "memory": args.memory,
        "torch": torch.__version__,
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "seconds": round(seconds, 1),
        "processor seconds": round(processor, 1),
        "layers' seconds": round(sum(x.seconds for x in layers), 1),
        "predicted peak GB": round(report.predicted_bytes / 1e9, 2),
        "peak GB": round(report.peak_bytes / 1e9, 2),
        "summary": report.summary(),
        "notes": report.notes,
        "rows": [
            {
                "layer": x.name,
                "step": round(step[x.name], 2) if x.name in step else None,
                "seconds": round(x.seconds, 1),
                "before": x.before,
                "after": x.after,
            }
            for x in layers
        ],
    }
    print(json.dumps(result, indent=1))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
