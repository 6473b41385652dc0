"""The papers' networks and patterns, in one command, for whoever owns CIFAR or ImageNet.

    python bench/paper.py --case resnet20-cifar10 --data cifar10:FOLDER --out paper.json
    python bench/paper.py --case resnet50 --data FOLDER --out paper.json                    # ImageNet: train and val, a folder a class
    python bench/paper.py --case vit-b16 --data FOLDER --device cuda --out paper.json

SNOWS (arXiv 2411.18376) prunes ResNet-20 and ResNet-50 on CIFAR, ResNet-50 and MobileNetV1 on ImageNet, ViT-B/16 and ViT-L/16. Each case
names a network with trained weights (`--model` and `--weights` take another's), its patterns and how many calibration images they use; the
rest is the default of `snows.prune`. The case `resnet20-cifar10` runs code of the repository that its weights come from. Rows are written
one by one; a second call goes on with those that are missing.

No figure of this file stands in the repository: neither dataset is free to pass on, and it was only run on small ones that its test makes.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

import snows
from snows import sources
from snows.cli.terminal import device_of
from snows.evaluation import compare
from snows.results.storage import write

CNN, UNSTRUCTURED = ("2:4", "1:4"), ("0.5", "0.6", "0.7", "0.8", "0.9")


class Case(NamedTuple):
    """A network by name, its patterns, how many images calibrate, and what its library does not say of its pictures."""

    model: str
    patterns: tuple[str, ...]
    samples: int = 3000
    preparation: dict[str, Any] = {}


CIFAR10 = {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2470, 0.2435, 0.2616)}
CASES = {
    "resnet20-cifar10": Case("paper:cifar10_resnet20", (*CNN, *UNSTRUCTURED), 3000, CIFAR10),
    "resnet50-cifar100": Case("timm:hf-hub:edadaltocg/resnet50_cifar100", CNN),
    "resnet50": Case("torchvision:resnet50:IMAGENET1K_V1", CNN),
    "mobilenetv1": Case("timm:mobilenetv1_100", UNSTRUCTURED[:4]),
    "vit-b16": Case("torchvision:vit_b_16:IMAGENET1K_V1", ("2:4",), 1024),
    "vit-l16": Case("torchvision:vit_l_16:IMAGENET1K_SWAG_LINEAR_V1", ("2:4",), 1024),
}


def cifar10_resnet20() -> torch.nn.Module:
    """Fetch a trained ResNet-20 of CIFAR-10 through torch.hub, which runs that repository's code."""
    net: torch.nn.Module = torch.hub.load(
        "chenyaofo/pytorch-cifar-models", "cifar10_resnet20", pretrained=True, trust_repo=True
    )
    return net.eval()


def settings_of(case: Case, args: argparse.Namespace) -> dict[str, object]:
    """What a row was measured with; one with others is another row."""
    return {
        "model": args.model or case.model,
        "weights": str(args.weights) if args.weights else None,
        "data": args.data,
        "calibration": args.samples or case.samples,
        "batch": args.batch,
        "seed": args.seed,
        "judged": args.judge,
    }


def measure(case: Case, data: str, pattern: str, args: argparse.Namespace) -> dict[str, object]:
    """Prune by magnitude and by snows, and judge both on the same test images."""
    device = device_of(args.device)
    network = sources.load_model(args.model or case.model, args.weights)
    preparation = network.preparation.override(**case.preparation)
    batches = sources.load_data(data, network, "calibration", preparation=preparation).draw(
        args.samples or case.samples, args.batch, args.seed
    )
    test = sources.load_data(data, network, "test", preparation=preparation, classes=args.classes)
    net, asked = network.model.to(device), snows.parse_pattern(pattern)
    row: dict[str, object] = {"pattern": pattern, **settings_of(case, args)}
    for method, settings in (("magnitude", {"select": snows.magnitude, "solver": None}), ("snows", {})):
        began = time.perf_counter()
        pruned, _ = snows.prune(net, batches, asked, seed=args.seed, **settings)
        seconds = time.perf_counter() - began
        dense, scores = compare(net, pruned, test.spread(args.judge, args.batch))
        row |= {
            "images": dense.images,
            "dense": dense.top1,
            method: scores.top1,
            f"{method} agreement": scores.agreement,
            f"{method} divergence": scores.divergence,
            f"{method} seconds": round(seconds, 1),
        }
    return row


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", choices=CASES, required=True)
    parser.add_argument("--data", required=True, help="as snows prune --data")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--patterns", help="instead of the case's, with commas between")
    parser.add_argument("--model", help="instead of the case's")
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--classes", type=Path, help="as snows eval --classes")
    parser.add_argument("--samples", type=int)
    parser.add_argument("--judge", type=int, default=10_000, help="test images")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    case = CASES[args.case]
    content = json.loads(args.out.read_text()) if args.out.exists() else {}
    rows = content.setdefault(args.case, [])
    for pattern in args.patterns.split(",") if args.patterns else case.patterns:
        wanted = {"pattern": pattern, **settings_of(case, args)}
        if any(all(row.get(key) == value for key, value in wanted.items()) for row in rows):
            continue
        rows.append(measure(case, args.data, pattern, args))
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write(args.out, (json.dumps(content, indent=1) + "\n").encode())
        print(json.dumps(rows[-1]), flush=True)


if __name__ == "__main__":
    main()
