"""Accuracy and divergence of snows and its rivals on the zoo, over calibration seeds, the same images for all.

    python bench/zoo.py --network resnet20 --patterns 2:4,1:4,0.8,0.9 --out bench/results/cpu/zoo-resnet20.json
    python bench/zoo.py --network vit --patterns 2:4 --split validation --vary horizon=0,3,5,10,end passes=2
    python bench/zoo.py --network resnet20 --patterns "0.5 macs" --out bench/results/cpu/structured-resnet20.json

A pattern "0.5 macs" asks for half of the multiplications: whole units taken out, or low rank, or both.
Every method's BatchNorm statistics are corrected alike. `--vary` adds the default with one setting of `snows.prune`, of
`snows.Newton`, or `samples` or `batch`, at each value. `--split validation` measures on the 5,000 images kept out of
training and calibration, read from `--data` as `examples/train_zoo.py` reads them.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from dataclasses import fields
from functools import partial
from pathlib import Path

import peers
import torch

import snows
from snows import zoo
from snows.evaluation import evaluate, logits_of
from snows.zoo import BATCH, SAMPLES, calibration

METHODS = {
    "magnitude": dict(select=snows.magnitude, solver=None),
    "SparseGPT": dict(select=snows.sparsegpt, solver=None),
    "K = 0 on SparseGPT's masks": dict(
        select=partial(snows.least_squares, select=snows.sparsegpt), solver=None
    ),
    "K = 0 on ALPS's masks": dict(select=snows.alps, solver=None),
    "snows on SparseGPT's masks": dict(select=partial(snows.least_squares, select=snows.sparsegpt)),
    "snows": {},
}
UNITS = ("channels", "heads", "neurons")
SMALLER = {  # settings of `snows.Structured`, and others
    "snows, removal": (dict(using=UNITS), {}),
    "snows, removal, without Newton": (dict(using=UNITS), dict(solver=None)),
    "snows, low rank": (dict(using=("low-rank",)), {}),
    "snows": ({}, {}),
    "Fisher's order": (dict(using=UNITS, order="fisher"), {}),
    "magnitude's order": (dict(using=UNITS, order="magnitude"), {}),
    "HAP's order": (dict(using=UNITS, order="hap"), {}),
    "HAP's order, statistics alone": (dict(using=UNITS, order="hap", refit=False), dict(solver=None)),
    "magnitude, the same share everywhere": (dict(using=UNITS, order="magnitude", uniform=True), {}),
    peers.NAME: (dict(using=UNITS), {}),
}
HEADS = 4  # of the zoo's ViT


def variants(vary):
    """Label -> settings, for each `name=value,value` of `--vary`."""
    chosen = {}
    for entry in vary:
        name, _, values = entry.partition("=")
        for text in values.split(","):
            value = json.loads(text) if text[0].isdigit() else text
            homes = {"solver": snows.Newton, "matching": snows.Matching}
            home = next((key for key, kind in homes.items() if name in (f.name for f in fields(kind))), None)
            chosen[f"{name} = {text}"] = {home: homes[home](**{name: value})} if home else {name: value}
    return chosen


def goals(text):
    """Method -> goal and settings of `snows.prune`, for a pattern or a share of the multiplications."""
    share, _, cost = text.partition(" ")
    if not cost:
        return {name: (snows.parse_pattern(text), dict(settings)) for name, settings in METHODS.items()}
    return {
        name: (snows.Structured(float(share), cost, **goal), dict(settings))
        for name, (goal, settings) in SMALLER.items()
    }


def images_of(split, data):
    if split == "test":
        return zoo.images("test")
    sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
    import train_zoo

    return train_zoo.tensors(train_zoo.splits(data)["validation"])


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--network", default="resnet20")
    parser.add_argument("--patterns", default="2:4,1:4,0.8,0.9")
    parser.add_argument("--methods", default="", help="with semicolons between; by default all")
    parser.add_argument("--vary", nargs="+", default=[])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=SAMPLES)
    parser.add_argument("--split", choices=["test", "validation"], default="test")
    parser.add_argument("--data", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    dense = zoo.load(args.network)
    images, labels = images_of(args.split, args.data)
    test = list(zip(images.split(500), labels.split(500), strict=True))
    reference = [logits_of(dense, x) for x, _ in test]
    result = {
        "network": args.network,
        "split": args.split,
        "dense": evaluate(dense, test).top1,
        "samples": args.samples,
        "torch": torch.__version__,
        "machine": platform.machine(),
        "threads": args.threads,
        "rows": [],
    }
    for pattern in args.patterns.split(","):
        known = goals(pattern)
        wanted = [x.strip() for x in args.methods.split(";")] if args.methods else list(known)
        methods = {name: known[name] for name in wanted if name in known}
        methods |= {name: (known["snows"][0], settings) for name, settings in variants(args.vary).items()}
        for method, (goal, settings) in methods.items():
            settings = dict(settings)
            samples, batch = settings.pop("samples", args.samples), settings.pop("batch", BATCH)
            for seed in range(args.seeds):
                began, batches = time.perf_counter(), calibration(samples, batch, seed)
                if method == peers.NAME:
                    sparse = peers.torch_pruning(dense, batches, goal.share, HEADS)
                else:
                    sparse, _ = snows.prune(dense, batches, goal, seed=seed, progress=False, **settings)
                seconds = time.perf_counter() - began
                sparse.to(memory_format=torch.channels_last)
                scores = evaluate(sparse, test, reference)
                row = {
                    "pattern": pattern,
                    "method": method,
                    "seed": seed,
                    "accuracy": scores.top1,
                    "agreement": scores.agreement,
                    "divergence": scores.divergence,
                    "seconds": round(seconds, 1),
                }
                if isinstance(goal, snows.Structured):
                    costs = [
                        (peers.macs(x, images), sum(p.numel() for p in x.parameters()))
                        for x in (sparse, dense)
                    ]
                    shares = [round(100 * ours / whole, 1) for ours, whole in zip(*costs, strict=True)]
                    row["MACs"], row["parameters"] = shares
                print(row, flush=True)
                result["rows"].append(row)
                if args.out:
                    args.out.parent.mkdir(parents=True, exist_ok=True)
                    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
