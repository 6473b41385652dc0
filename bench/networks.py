"""Whole networks on the CPU: deployed, beside eager PyTorch and a frozen `torch.compile` of the dense network, and compiled likewise.

    python bench/networks.py --out bench/results/cpu/networks.json

Weights are masked by magnitude, which changes no time; torchvision's are random. Networks run in turns. What a network gives is
checked against the masked dense one first.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import sys
from pathlib import Path

import torch
from report import race
from turns import in_turns, keep

import snows
from snows.choosing.compiling import frozen
from snows.networks.batches import Batch, difference, outputs
from snows.sources import load_model

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
with contextlib.suppress(ImportError):  # torchvision beside a CPU build of torch
    from conftest import define_torchvision_schemas

    define_torchvision_schemas()


def masked(source: str, pattern: snows.NM | snows.Unstructured, example):
    model = load_model(source, random_weights=not source.startswith("zoo:")).model
    return snows.prune(
        model, [example], pattern, select=snows.magnitude, solver=None, recalibrate=False, progress=False
    ).network


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--networks",
        default="zoo:resnet20=1:4@8,zoo:resnet20=1:4@64,zoo:vit=1:4@8,"
        "torchvision:resnet50=1:4@8,torchvision:vit_b_16=2:4@8",
        help="source=pattern@images",
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows = []
    for entry in args.networks.split(","):
        source, _, rest = entry.partition("=")
        text, _, images = rest.partition("@")
        x = torch.randn(int(images), *((1, 28, 28) if source.startswith("zoo:") else (3, 224, 224)))
        net = masked(source, snows.parse_pattern(text), x)
        deployed, report = snows.deploy(net, x)
        last = copy.deepcopy(net).to(memory_format=torch.channels_last)
        x_last = x.contiguous(memory_format=torch.channels_last) if source != "zoo:vit" else x
        runs = {
            "eager": (net, x),
            "eager channels last": (last, x_last),
            "torch.compile frozen": (frozen(net, x), x),
            "snows": (deployed, x),
            "snows, torch.compile frozen": (frozen(deployed, x), x),
        }
        wanted = outputs(net, Batch.of(x))
        case = f"{source} {text}, {images} images, {sum(not r.reason for r in report.layers)} of {len(report.layers)} packed"
        with torch.no_grad():
            for name, (run, example) in runs.items():
                assert difference(wanted, outputs(run, Batch.of(example))) < 1e-3, (
                    name
                )  # random weights grow from layer to layer
            rows += in_turns(
                case, {name: (lambda pair=pair: pair[0](pair[1])) for name, pair in runs.items()}, args.rounds
            )
        keep(args.out, rows)
    print(race(rows))


if __name__ == "__main__":
    main()
