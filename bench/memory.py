"""ViT-B/16 at 224x224 (random weights) pruned in less memory than its activations take: seconds and peak memory.

    python bench/memory.py --images 1024 --bounds none,4GB --out bench/results/cpu/memory.json

Two layers are pruned, the first block's MLP, whose inputs are the widest of the network; each bound in a process of its own, so that its
peak is its own. Without a bound activations lie in memory, if they fit in half of what is free. Fewer blocks save the time of passes through
what follows the pruned layers, and the memory of its weights. Processor seconds do not count what other processes take. Needs torchvision.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import subprocess
import sys
import time
from pathlib import Path

import torch

import snows

LAYERS = ("*encoder_layer_0.mlp.0", "*encoder_layer_0.mlp.3")


def prune(images: int, batch: int, bound: str, iterations: int, blocks: int) -> dict[str, object]:
    """Prune with one bound; "none" for no more than the machine has."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from conftest import define_torchvision_schemas

    define_torchvision_schemas()
    from torchvision.models import vit_b_16

    torch.manual_seed(0)
    net = vit_b_16(weights=None).eval()
    for name in list(dict(net.encoder.layers.named_children()))[blocks:]:
        delattr(net.encoder.layers, name)
    torch.nn.init.trunc_normal_(net.heads.head.weight, std=0.02)
    batches = list(torch.randn(images, 3, 224, 224).split(batch))
    began, processor = time.perf_counter(), time.process_time()
    pruned, report = snows.prune(
        net,
        batches,
        snows.NM(2, 4),
        select=snows.magnitude if iterations else snows.least_squares,  # whose weights depend on all pictures
        solver=snows.Newton(max_iterations=iterations) if iterations else None,
        only=LAYERS,
        memory=None if bound == "none" else bound,
    )
    seconds, processor = time.perf_counter() - began, time.process_time() - processor
    bits = hashlib.sha256()
    for p in pruned.parameters():
        bits.update(p.detach().numpy().tobytes())
    return {
        "bound": bound,
        "seconds": round(seconds, 1),
        "processor seconds": round(processor, 1),
        "seconds of layers": [round(x.seconds, 1) for x in report.layers if not x.reason],
        "peak GB": round(report.peak_bytes / 1e9, 2),
        "predicted GB": round(report.predicted_bytes / 1e9, 2),
        "sha256": bits.hexdigest()[:16],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--bounds", default="none,500MB")
    parser.add_argument(
        "--iterations", type=int, default=2, help="of conjugate gradients; 0 for no Newton step"
    )
    parser.add_argument(
        "--blocks", type=int, default=12, help="of the network that are there; the first is pruned"
    )
    parser.add_argument("--one", action="store_true", help="prune in this process, with one bound")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(prune(args.images, args.batch, args.bounds, args.iterations, args.blocks)))
        return
    given = ("images", "batch", "iterations", "blocks")
    settings = [x for name in given for x in (f"--{name}", str(getattr(args, name)))]
    rows = []
    for bound in args.bounds.split(","):
        command = [sys.executable, __file__, "--one", "--bounds", bound, *settings]
        run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        rows.append(json.loads(run.stdout.splitlines()[-1]))
        print(rows[-1], flush=True)
    result = {
        "network": "torchvision vit_b_16",
        "layers": list(LAYERS),
        "blocks": args.blocks,
        "images": args.images,
        "batch": args.batch,
        "iterations": args.iterations,
        "torch": torch.__version__,
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "rows": rows,
    }
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
