"""All that needs a GPU in one command, the most valuable first; what the budget does not reach is said to be missing.

    make gpu OUT=bench/results/h200 BUDGET=540
    python bench/gpu.py --out bench/results/h200 --budget 540

Takes the torch that is there: nothing is installed, no network is used. Each step's result is in OUT/gpu.json as soon as it ends, and
what it printed in OUT/gpu.log, so a run that is cut off loses one step only.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
PYTHON = sys.executable
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")


class Step(NamedTuple):
    """A command, the most seconds it may take, and the file that holds its result, if it writes one."""

    name: str
    command: list[str]
    limit: float
    result: Path | None = None


def steps(out: Path) -> list[Step]:
    """In the order of their value."""
    def tests(name: str, *arguments: str) -> list[str]:
        return [PYTHON, "-m", "pytest", "-q", "--maxfail=20", f"--junitxml={out / name}.xml", *arguments]

    kernels = [f"tests/{x.name}" for x in sorted((ROOT / "tests").glob("test_*.py")) if "mark.gpu" in x.read_text()]
    plan = [
        Step("build", [PYTHON, "setup.py", "build_ext", "--inplace"], 240),
        Step("gpu tests", tests("gpu-tests", "-m", "gpu", *kernels), 240, out / "gpu-tests.xml"),
        Step("ceilings", [PYTHON, "bench/hopper.py", "--out", str(out / "ceilings.json")], 150, out / "ceilings.json"),
    ]
    plan += [
        Step(f"benchmark {x.stem}", [PYTHON, "-m", "pytest", "-q", str(x.relative_to(ROOT)), f"--benchmark-json={out / x.stem}.json"], 300,
             out / f"{x.stem}.json")
        for x in sorted((ROOT / "bench").glob("kernels*.py"))
    ]
    plan.append(Step("benchmark products", [PYTHON, "bench/products.py", "--out", str(out / "products.json")], 300, out / "products.json"))
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    for tool in TOOLS:
        command = [sanitizer, "--tool", tool, "--error-exitcode", "9", PYTHON, "-m", "pytest", "-q", "-m", "gpu", "-k", "not large",
                   "tests/test_cuda.py", "tests/test_cuda_sparse.py"]
        plan.append(Step(f"sanitizer {tool}", command, 180))
    plan.append(Step("all tests", tests("all-tests"), 600, out / "all-tests.xml"))
    return plan


def machine() -> dict[str, object]:
    """What was measured on."""
    facts: dict[str, object] = {"python": sys.version.split()[0]}
    try:
        import torch
    except ImportError:
        return facts
    facts |= {"torch": torch.__version__, "cuda": torch.version.cuda}
    try:
        import triton

        facts["triton"] = triton.__version__
    except ImportError:
        facts["triton"] = None
    if torch.cuda.is_available():
        p = torch.cuda.get_device_properties(0)
        facts |= {"device": p.name, "capability": f"{p.major}.{p.minor}", "multiprocessors": p.multi_processor_count,
                  "memory GiB": round(p.total_memory / 2**30, 1), "L2 MiB": p.L2_cache_size / 2**20}
    facts["commit"] = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip() or None
    return facts


def read(path: Path) -> object:
    """A step's result: its JSON, or of a test run the counts and what failed."""
    if path.suffix == ".json":
        return json.loads(path.read_text())
    suite = next(ElementTree.parse(path).getroot().iter("testsuite"))
    failed = [
        {"test": f"{case.get('classname')}::{case.get('name')}", "message": (problem.get("message") or "")[:500]}
        for case in suite.iter("testcase") for problem in case if problem.tag in ("failure", "error")
    ]
    return {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")} | {"failed": failed}


def run(step: Step, left: float, log: Path) -> dict[str, object]:
    """Run a step within what is left of the budget, its output going to the log."""
    limit = min(step.limit, left)
    if limit < 5:
        return {"step": step.name, "outcome": "not reached: the budget was spent"}
    began = time.perf_counter()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "SNOWS_BUILD": "1"}
    with log.open("a") as file:
        file.write(f"\n===== {step.name}: {' '.join(step.command)}\n")
        file.flush()
        try:
            code: int | None = subprocess.run(step.command, cwd=ROOT, env=environment, stdout=file, stderr=file, timeout=limit).returncode
            outcome = "ok" if code == 0 else f"exit code {code}"
        except subprocess.TimeoutExpired:
            outcome = f"cut off after {limit:.0f} s"
        except OSError as error:
            outcome = f"could not start: {error}"
    result: dict[str, object] = {"step": step.name, "outcome": outcome, "seconds": round(time.perf_counter() - began, 1)}
    if step.result is not None and step.result.is_file():
        try:
            result["result"] = read(step.result)
        except (ValueError, ElementTree.ParseError, StopIteration) as error:
            result["result"] = f"unreadable: {error}"
        step.result.unlink()
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "gpu")
    parser.add_argument("--budget", type=float, default=1500, help="seconds in all")
    parser.add_argument("--only", default="", help="steps whose name holds this")
    args = parser.parse_args()
    began = time.monotonic()
    found = machine()
    report: dict[str, object] = {"machine": found}
    if "device" not in found:
        print("make gpu: expected a torch that sees a CUDA device, got none; run it on a machine with a GPU")
        return 2
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    log = out / "gpu.log"
    log.write_text("")
    done: list[dict[str, object]] = []
    report["steps"] = done
    for step in steps(out):
        if args.only not in step.name:
            continue
        done.append(run(step, args.budget - (time.monotonic() - began), log))
        (out / "gpu.json").write_text(json.dumps(report, indent=1) + "\n")
        print(f"{step.name}: {done[-1]['outcome']} ({done[-1].get('seconds', 0)} s)", flush=True)
    return 0 if all(x["outcome"] == "ok" for x in done) else 1


if __name__ == "__main__":
    sys.exit(main())
