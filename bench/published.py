"""snows next to the published SNOWS code (github.com/mazumder-lab/SNOWS, commit 750497f) on the zoo's ResNet-20 at 1:4.

    python bench/published.py --published ../SNOWS/CNN_pruning --settings equal --repeats 3 --out bench/results/cpu/published-equal.json
    python bench/published.py --published ../SNOWS/CNN_pruning --settings own --limit 3600 --out bench/results/cpu/published-own.json

Both prune the 18 convolutions of the blocks by the same magnitude masks, from the same images. The published code is neither
part of this repository nor needed for anything else, and does not run as it is. In a copy of it:

- `prune/SNOWS.py`: delete the last function, `prune_and_update`, whose body is commented out, and the import of joblib;
- `helpers.py`: put `prune/helpers.py` in its place;
- `prune/utils.py`: delete the imports of torchvision, timm and detectors, which only the loading of its own models needs;
- `prune/Layer_pruner_new.py`: device "cuda" becomes "cpu"; DataLoader without worker processes and pinned memory.

What remains is done here from outside: a stem for one grey channel, an average over 7x7 positions, images of 28x28, the number of
passes, and a clock that leaves the choice of the masks and the final statistics out for both sides. "equal" is K = 5, mini-batches of
256, 10 iterations, 1 pass; "own" K = 40, 3 passes, at most 1,000 iterations. A run that `--limit` cuts has a lower bound of its time,
and its scores are those of the layers done so far with the others dense.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import os
import platform
import signal
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import torch
from torch import nn

import snows
from snows import zoo
from snows.evaluation import evaluate, logits_of
from snows.matching.losses import Matching
from snows.matching.normalisation import recalibrate_statistics
from snows.networks.batches import Batch
from snows.solving.newton import Newton
from snows.zoo import calibration

PATTERN = snows.NM(1, 4)
SETTINGS = {
    "equal": dict(k_step=5, max_CG_iterations=10, newton_steps=1),
    "own": dict(k_step=40, max_CG_iterations=1000, newton_steps=3),
}


def clocks():
    """Seconds of the wall's clock and of the processor, which does not count what other processes take."""
    return torch.tensor([time.perf_counter(), time.process_time()], dtype=torch.float64)


def in_block(name, _):
    return name.startswith("layer") and name.endswith(("conv1", "conv2"))


def snows_runs(masks, settings):
    """Name, calibration batch and arguments of each of our runs; all but the last have the magnitude masks."""
    given, fitted = (
        dict(pattern=None, select=masks),
        dict(pattern=PATTERN, select=snows.least_squares, only=in_block),
    )
    plain = Newton.published(max_iterations=10)
    yield "masks only", 256, given | dict(solver=None)
    yield "least squares (K = 0)", 256, fitted | dict(solver=None)
    if settings == "equal":
        yield "the published method, K = 5", 256, given | dict(matching=Matching.published(), solver=plain)
        yield (
            "K = 5 from the dense weights",
            256,
            given | dict(solver=Newton(max_iterations=10), matching=Matching(5)),
        )
    yield (
        "K = 5 from least squares",
        256,
        fitted | dict(solver=Newton(max_iterations=10), matching=Matching(5)),
    )
    yield "K = 5 from least squares, default solver, batches of 128", 128, fitted | dict(matching=Matching(5))
    if settings == "own":
        yield (
            "K = end from least squares, 3 passes, batches of 128",
            128,
            fitted | dict(matching=Matching("end"), solver=Newton(passes=3, max_iterations=10)),
        )
    yield (
        "K = 5, ALPS masks, default solver, batches of 128",
        128,
        dict(pattern=PATTERN, only=in_block, matching=Matching(5)),
    )


class Cut(Exception):  # noqa: N818
    pass


class Published:
    """The published pruner, its clock and its counts."""

    def __init__(self, folder, dense, images, settings, limit):
        sys.path.insert(0, str(folder))
        from model.resnet_cifar10_manual import resnet20
        from prune import SNOWS, Layer_pruner_new

        self.settings, self.limit = SETTINGS[settings], limit
        self.net = resnet20()
        self.net.conv1, self.net.avgpool, self.net.name = (
            nn.Conv2d(1, 16, 3, padding=1, bias=False),
            nn.AdaptiveAvgPool2d(1),
            "resnet20_cifar10",
        )
        self.net.load_state_dict(dense.state_dict())
        self.net.eval()
        self.data = torch.utils.data.TensorDataset(images, torch.zeros(len(images), dtype=torch.int64))
        pruner = self.module = Layer_pruner_new
        self.solve, self.select, self.conjugate_gradients = (
            pruner.solve_for_W_given_Z,
            pruner.MP_MN,
            SNOWS.conjugate_gradient_sparse,
        )
        pruner.solve_for_W_given_Z, pruner.MP_MN, SNOWS.conjugate_gradient_sparse = (
            self.watch,
            self.mask,
            self.count,
        )

    def watch(self, **arguments):
        self.updated = arguments["model_update"]
        solution = self.solve(**arguments, newton_steps=self.settings["newton_steps"])
        self.layers += 1
        print(
            f"published: layer {self.layers}, {self.iterations} iterations, {(clocks() - self.began)[0]:.0f} s",
            file=sys.stderr,
            flush=True,
        )
        return solution

    def mask(self, *arguments):
        began = clocks()
        weight = self.select(*arguments)
        self.selecting += clocks() - began
        return weight

    def count(self, *arguments, **options):
        x, iterations = self.conjugate_gradients(*arguments, **options)
        self.iterations += iterations
        return x, iterations

    def run(self):
        """The pruned network in the zoo's class, and what to record of the run."""

        def get_params(pruner):
            type(pruner).__base__.get_params(pruner)
            pruner.datasize = [1, 28, 28]

        def cut(*_):
            raise Cut

        self.layers, self.iterations, self.selecting = 0, 0, torch.zeros(2, dtype=torch.float64)
        names = [name for name, _ in self.net.named_parameters()]
        probe = [
            (self.data.tensors[0][:1], self.data.tensors[1][:1])
        ]  # it scores a test set after every block: one image
        kind = type("LayerPruner", (self.module.LayerPruner,), {"get_params": get_params})
        pruner = kind(
            copy.deepcopy(self.net),
            names,
            self.data,
            None,
            probe,
            len(self.data),
            None,
            1e-4,
            42,
            "cpu",
            "SNOWS",
        )
        signal.signal(signal.SIGALRM, cut)
        self.began = clocks()
        signal.setitimer(signal.ITIMER_REAL, self.limit)
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            try:
                self.updated = pruner.prune_NM(
                    1,
                    4,
                    k_step=self.settings["k_step"],
                    w_warm=False,
                    device="cpu",
                    batch_size=256,
                    max_CG_iterations=self.settings["max_CG_iterations"],
                )[0]
            except Cut:
                pass
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
        seconds = clocks() - self.began - self.selecting
        net = zoo.load("resnet20")
        net.load_state_dict(self.updated.state_dict())
        return (
            net,
            seconds,
            {"finished": self.layers == 18, "layers": self.layers, "iterations": self.iterations},
        )


def reestimate(net, batches):
    """Plain re-estimation of BatchNorm's statistics, in place."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None
    net.train()
    with torch.no_grad():
        for x in batches:
            net(x)
    net.eval()


def summary(details):
    """A line for each method: scores with corrected statistics, and how many times its seconds the published code takes."""
    lines = []
    for name, row in details.items():
        speed = row.get("published / this, seconds")
        lines.append(
            {"method": name, **row["corrected"], "seconds": row["seconds"]}
            | ({} if speed is None else {"published takes (times)": speed})
        )
    return lines


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--published", type=Path, required=True)
    parser.add_argument("--settings", choices=SETTINGS, default="equal")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument(
        "--limit", type=float, default=3600, help="seconds for each run of the published code"
    )
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    dense = zoo.load("resnet20")
    batches = {size: calibration(512, size, seed=0) for size in (128, 256)}
    images, labels = zoo.images("test")
    test = list(zip(images.split(500), labels.split(500), strict=True))
    reference = [logits_of(dense, x) for x, _ in test]
    masks = {
        name: PATTERN.mask(module.weight.detach().abs())
        for name, module in dense.named_modules()
        if in_block(name, module)
    }
    published = Published(args.published, dense, torch.cat(batches[256]), args.settings, args.limit)

    def ours(batch, arguments):
        began = clocks()
        net, report = snows.prune(dense, batches[batch], recalibrate=False, progress=False, **arguments)
        return net, clocks() - began, {"iterations": sum(x.iterations for x in report.layers)}

    runs = {
        name: partial(ours, batch, arguments) for name, batch, arguments in snows_runs(masks, args.settings)
    } | {"published": published.run}
    result = {
        "network": "resnet20",
        "pattern": str(PATTERN),
        "settings": args.settings,
        "images": 512,
        "dense": evaluate(dense, test).top1,
        "torch": torch.__version__,
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "limit": args.limit,
        "details": {},
    }
    for repeat in range(args.repeats):
        for name, run in runs.items():
            net, seconds, counts = run()
            if repeat == 0:
                row = result["details"][name] = {"runs": []} | counts
                row["magnitude masks"] = all(
                    ((net.get_submodule(x).weight != 0) <= mask).all().item() for x, mask in masks.items()
                )
                for kind, correct in (
                    ("as pruned", lambda net: None),
                    (
                        "corrected",
                        lambda net: recalibrate_statistics(net, dense, [Batch.of(x) for x in batches[256]]),
                    ),
                    ("re-estimated", lambda net: reestimate(net, batches[256])),
                ):
                    copied = zoo.load("resnet20")
                    copied.load_state_dict(net.state_dict())
                    correct(copied)
                    scores = evaluate(copied, test, reference)
                    row[kind] = {"divergence": scores.divergence, "accuracy": scores.top1}
            row = result["details"][name]
            row["runs"].append([round(x, 2) for x in seconds.tolist()])
            row["seconds"], row["processor seconds"] = map(statistics.median, zip(*row["runs"], strict=True))
            print(repeat, name, row, flush=True)
            if "published" in result["details"]:
                for x in result["details"].values():
                    for clock in ("seconds", "processor seconds"):
                        x[f"published / this, {clock}"] = round(
                            result["details"]["published"][clock] / x[clock], 2
                        )
            result["rows"] = summary(result["details"])
            if args.out:
                args.out.parent.mkdir(parents=True, exist_ok=True)
                args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
