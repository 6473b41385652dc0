"""Whole networks on the CPU: deployed, beside eager PyTorch and a frozen `torch.compile` of the dense network.

    python bench/networks.py --out bench/results/cpu/networks.json

Weights are masked by magnitude, which changes no time; torchvision's are random. Networks run in turns. What a network gives is
checked against the masked dense one first.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from report import race

import snows
from snows.network import as_inputs
from snows.rewriting import difference, outputs
from snows.sources import load_model

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
with contextlib.suppress(ImportError):  # torchvision beside a CPU build of torch
    from conftest import define_torchvision_schemas

    define_torchvision_schemas()


def masked(source: str, pattern: snows.NM | snows.Unstructured, example):
    model, _ = load_model(source)
    return snows.prune(model, [example], pattern, select=snows.magnitude, solver=None, recalibrate=False, progress=False)[0]


def frozen(model, example):
    """Compiled for inference as hard as PyTorch can on a CPU: weights are constants, prepacked by oneDNN."""
    import torch._inductor.config as config

    config.freezing = True
    compiled = torch.compile(model)
    with torch.inference_mode(False), torch.no_grad():
        compiled(example)
    return compiled


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", default="torchvision:vit_b_16=2:4@8,torchvision:resnet50=1:4@8,torchvision:resnet50=1:4@16,"
                        "zoo:resnet20=1:4@8,zoo:resnet20=1:4@64,zoo:vit=1:4@8,zoo:vit=1:4@64", help="source=pattern@images")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows = []
    for entry in args.networks.split(","):
        source, _, rest = entry.partition("=")
        text, _, images = rest.partition("@")
        x = torch.randn(int(images), *((1, 28, 28) if source.startswith("zoo:") else (3, 224, 224)))
        net = masked(source, snows.parse_pattern(text), x)
        deployed = snows.deploy(net, x)
        last = masked(source, snows.parse_pattern(text), x).to(memory_format=torch.channels_last)
        x_last = x.contiguous(memory_format=torch.channels_last) if source != "zoo:vit" else x
        runs = {"eager": (net, x), "eager channels last": (last, x_last), "torch.compile frozen": (frozen(net, x), x), "snows": (deployed, x)}
        wanted = outputs(net, as_inputs(x))
        case = f"{source} {text}, {images} images, {sum(not r.reason for r in deployed.report.layers)} of {len(deployed.report.layers)} packed"
        times = {name: [] for name in runs}
        with torch.no_grad():
            for name, (run, example) in runs.items():
                got = run(example)
                got = got if torch.is_tensor(got) else got["logits"]
                assert difference(wanted, [got]) < 1e-4, name
            for _ in range(args.rounds):
                for name, (run, example) in runs.items():
                    began = time.perf_counter()
                    run(example)
                    times[name].append(1e3 * (time.perf_counter() - began))
        for name, taken in times.items():
            quarters = dict(zip(("quarter ms", "median ms", "three quarters ms"), statistics.quantiles(taken, n=4), strict=True))
            rows.append({"case": case, "implementation": name, "rounds": len(taken), **quarters})
        if args.out:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps({"torch": torch.__version__, "threads": torch.get_num_threads(),
                                            "capability": torch.backends.cpu.get_cpu_capability(), "rows": rows}, indent=1) + "\n")
    print(race(rows))


if __name__ == "__main__":
    main()
