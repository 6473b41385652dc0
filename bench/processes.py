"""One and several processes with one core each, in turns: seconds of the walk and of the whole call.

    python bench/processes.py --out bench/results/cpu/processes.json

Each run is `torchrun -m snows prune` on 1,024 images of the zoo, at 2:4. "Walk" is the sum of the layers' seconds, "all" the whole call's, without
loading and judging; medians.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path


def seconds(network: str, processes: int) -> tuple[float, float]:
    """Prune once, and return the seconds of the walk and of the call."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "-m", "snows"]
        images = ["--model", f"zoo:{network}", "--data", "zoo:fashion-mnist", "--judge", "0"]
        subprocess.run(
            [sys.executable, *torchrun, "prune", *images, "--pattern", "2:4", "--out", str(out)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            check=True,
        )
        report = json.loads((out / "report.json").read_text())
    return sum(x["seconds"] for x in report["layers"]), report["seconds"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", default="resnet20,vit")
    parser.add_argument("--processes", default="1,2")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows = []
    for network in args.networks.split(","):
        counts = [int(x) for x in args.processes.split(",")]
        runs = {n: list[tuple[float, float]]() for n in counts}
        for _ in range(args.rounds):
            for n in counts:
                runs[n].append(seconds(network, n))
        walk, whole = (
            {n: statistics.median(x[i] for x in found) for n, found in runs.items()} for i in (0, 1)
        )
        for n in counts:
            rows.append(
                {
                    "network": network,
                    "pattern": "2:4",
                    "method": f"{n} process{'es' if n > 1 else ''}",
                    "walk": round(walk[n], 1),
                    "seconds": round(whole[n], 1),
                    "times as fast": round(walk[counts[0]] / walk[n], 2),
                }
            )
            print(rows[-1], flush=True)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({"threads": 1, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
