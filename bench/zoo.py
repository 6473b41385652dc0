"""Accuracy and divergence of snows and its rivals on the zoo, several calibration seeds, the same masks and images for all.

    python bench/zoo.py --network resnet20 --patterns 2:4,1:4,0.8,0.9 --seeds 3 --out bench/results/cpu/zoo-resnet20.json

Every method's BatchNorm statistics are corrected alike. The masks are SparseGPT's; "masks" keeps the dense weights on them.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from functools import partial
from pathlib import Path

import torch

import snows
from snows import zoo
from snows.demo import calibration
from snows.evaluation import evaluate, logits_of
from snows.sparsity import MaskedWeight


def masks_only(weight, statistics, pattern):
    """SparseGPT's mask with the dense weights on it."""
    mask = snows.sparsegpt(weight, statistics, pattern).mask
    return MaskedWeight(weight * mask, mask)


METHODS = {
    "magnitude": dict(select=snows.magnitude, solver=None),
    "masks": dict(select=masks_only, solver=None),
    "sparsegpt": dict(select=snows.sparsegpt, solver=None),
    "least squares (K = 0)": dict(select=snows.least_squares, solver=None),
    "snows": {},
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="resnet20")
    parser.add_argument("--patterns", default="2:4,1:4,0.8,0.9")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    dense = zoo.load(args.network)
    images, labels = zoo.images("test")
    test = list(zip(images.split(500), labels.split(500), strict=True))
    reference = [logits_of(dense, x) for x, _ in test]
    result = {"network": args.network, "dense": evaluate(dense, test).top1, "samples": args.samples, "torch": torch.__version__,
              "machine": platform.machine(), "threads": torch.get_num_threads(), "rows": []}
    for pattern in args.patterns.split(","):
        for method in args.methods.split(","):
            prune = partial(snows.prune, progress=False, **METHODS[method])
            for seed in range(args.seeds):
                began = time.perf_counter()
                sparse, _ = prune(dense, calibration(args.samples, args.batch, seed), snows.parse_pattern(pattern), seed=seed)
                seconds = time.perf_counter() - began
                scores = evaluate(sparse, test, reference)
                row = {"pattern": pattern, "method": method, "seed": seed, "accuracy": scores.top1, "agreement": scores.agreement,
                       "divergence": scores.divergence, "seconds": round(seconds, 1)}
                print(row, flush=True)
                result["rows"].append(row)
                if args.out:
                    args.out.parent.mkdir(parents=True, exist_ok=True)
                    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
