"""Smaller networks on the CPU beside the dense one, eager and under a frozen `torch.compile`, in turns.

    python bench/smaller.py --out bench/results/cpu/smaller.json

Units are taken out as `snows.prune` decides it, by order "compensated" for the zoo's trained networks and by magnitude, the
same share of every width, for untrained ones; weights do not change the times, so nothing is fitted. No low rank.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path

import torch
from report import race
from turns import in_turns, keep

import snows
from snows import zoo
from snows.choosing.compiling import frozen
from snows.sources import load_model

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
with contextlib.suppress(ImportError):  # torchvision beside a CPU build of torch
    from conftest import define_torchvision_schemas

    define_torchvision_schemas()

UNITS = ("channels", "heads", "neurons")


def smaller(source: str, share: float, example):
    """The dense network, and one with a share of its multiplications."""
    trained = source.startswith("zoo:")
    model = load_model(source, random_weights=not trained).model
    rule = {"order": "compensated"} if trained else {"order": "magnitude", "uniform": True}
    goal = snows.Structured(share, using=UNITS, refit=False, **rule)
    batches = zoo.calibration(256) if trained else [example]
    return model, snows.prune(model, batches, goal, solver=None, recalibrate=False, progress=False)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--networks",
        default="zoo:resnet20=0.5@64,zoo:resnet20=0.3@64,zoo:vit=0.5@64,zoo:vit=0.3@64,"
        "torchvision:resnet50=0.5@8,torchvision:vit_b_16=0.5@8",
        help="source=share@images",
    )
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows = []
    for entry in args.networks.split(","):
        source, _, rest = entry.partition("=")
        share, _, images = rest.partition("@")
        x = torch.randn(int(images), *((1, 28, 28) if source.startswith("zoo:") else (3, 224, 224)))
        dense, (small, report) = smaller(source, float(share), x)
        with torch.no_grad():
            runs = {
                "eager": dense,
                "torch.compile frozen": frozen(dense, x),
                "snows": small,
                "snows, torch.compile frozen": frozen(small, x),
            }
            case = f"{source}, {report.macs[1] / report.macs[0]:.0%} of MACs, {images} images"
            calls = {name: (lambda net=net, x=x: net(x)) for name, net in runs.items()}
            found = in_turns(case, calls, args.rounds)
        rows += found
        keep(args.out, rows)
        torch.compiler.reset()
    print(race(rows))


if __name__ == "__main__":
    main()
