"""All that needs a GPU in one command: small steps, the most valuable first; what the budget does not reach is said to be missing.

    make gpu OUT=bench/results/h200 PART=1                   # build, tests, the 2:4 benchmark, pruning end to end: 9 minutes at most
    make gpu OUT=bench/results/h200 PART=2                   # ceilings, products, the other kernels and their benchmarks
    make gpu OUT=bench/results/h200 PART=3                   # large sizes, sanitizers, everything once more
    make gpu OUT=bench/results/h200 ONLY=sanitizer BUDGET=300
    python bench/gpu.py --dry-run                            # the steps and their limits; needs no GPU

Takes the torch that is there: nothing is installed, no network is used. Each step is a process group of its own, ended with all its children
at its limit. Its result is in OUT/gpu.json as soon as it ends, in place of an earlier one of the same name, and what it printed in
OUT/gpu.log: a run that is cut off loses one step only. After a step that fails the device is asked for a sum; if it does not answer, the rest
is left, and the report says so.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PYTHON = sys.executable
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
PROBE = [PYTHON, "-c", "import torch; assert torch.ones(1000, device='cuda').sum().item() == 1000"]


class Step(NamedTuple):
    """A command, which call it belongs to, the most seconds it may take, and the file that holds its result, if it writes one."""

    part: int
    name: str
    command: Sequence[str]
    limit: float
    result: Path | None = None
    environment: dict[str, str] = {}


def steps(out: Path) -> list[Step]:
    """List all steps, the most valuable first."""

    def tests(part: int, name: str, limit: float, *arguments: str, **environment: str) -> Step:
        path = out / f"{re.sub('[^a-z0-9]+', '-', name)}.xml"
        return Step(
            part,
            name,
            [PYTHON, "-m", "pytest", "-vv", "-W", "default", f"--junitxml={path}", *arguments],
            limit,
            path,
            environment,
        )

    def benchmark(part: int, stem: str, limit: float) -> Step:
        command = [
            PYTHON,
            "-m",
            "pytest",
            "-q",
            "-W",
            "default",
            f"bench/{stem}.py",
            f"--benchmark-json={out / stem}.json",
        ]
        return Step(part, f"benchmark {stem}", command, limit, out / f"{stem}.json")

    def script(part: int, stem: str, limit: float) -> Step:
        return Step(
            part,
            stem,
            [PYTHON, f"bench/{stem}.py", "--out", str(out / f"{stem}.json")],
            limit,
            out / f"{stem}.json",
        )

    plan = [
        Step(1, "build", [PYTHON, "setup.py", "build_ext", "--inplace"], 240),
        Step(
            1,
            "machine",
            [PYTHON, "bench/gpu.py", "--machine", str(out / "machine.json")],
            60,
            out / "machine.json",
        ),
        tests(1, "tests cuda", 120, "-m", "gpu", "tests/test_cuda.py"),
        tests(1, "tests cuda sparse", 120, "-m", "gpu", "-k", "not large", "tests/test_cuda_sparse.py"),
        benchmark(1, "kernels_sparse", 240),
        tests(1, "tests cuda network", 150, "-m", "gpu", "tests/test_cuda_network.py"),
        tests(1, "tests graphs", 90, "-m", "gpu", "tests/test_graphs.py", "tests/test_waits.py"),
        tests(1, "tests store", 60, "-m", "gpu", "tests/test_store.py"),
        tests(2, "tests runtimes", 150, "-m", "gpu", "tests/test_runtimes.py", "tests/test_cusparselt.py"),
        script(2, "hopper", 150),
        script(2, "products", 240),
        tests(2, "tests kernels", 150, "-m", "gpu", "-k", "not unpack", "tests/test_kernels.py"),
        benchmark(2, "kernels", 150),
        benchmark(2, "kernels_rows", 150),
        tests(3, "tests cuda sparse large", 150, "-m", "gpu", "-k", "large", "tests/test_cuda_sparse.py"),
        tests(3, "tests kernels unpack", 180, "-m", "gpu", "-k", "unpack", "tests/test_kernels.py"),
    ]
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    for tool in TOOLS:
        for file in ("test_cuda_sparse", "test_cuda"):
            # PyTorch's allocator hands out parts of large blocks, in which an overrun is legal; without it graphs cannot be captured
            command = [
                sanitizer,
                "--tool",
                tool,
                "--error-exitcode",
                "9",
                PYTHON,
                "-m",
                "pytest",
                "-q",
                "-W",
                "default",
                "-m",
                "gpu",
                "-k",
                "not large and not graph",
                f"tests/{file}.py",
            ]
            plan.append(
                Step(
                    3, f"sanitizer {tool} {file}", command, 120, None, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
                )
            )
    plan.append(tests(3, "all tests", 600))
    return plan


def machine() -> dict[str, Any]:
    """Say what is measured on, and which implementation each operation has there."""
    facts: dict[str, Any] = {
        "python": sys.version.split()[0],
        "TORCH_CUDA_ARCH_LIST": os.environ.get("TORCH_CUDA_ARCH_LIST"),
    }
    import torch

    facts |= {"torch": torch.__version__, "cuda": torch.version.cuda}
    try:
        import triton

        facts["triton"] = triton.__version__
    except ImportError:
        facts["triton"] = None
    if torch.cuda.is_available():
        p = torch.cuda.get_device_properties(0)
        facts |= {
            "device": p.name,
            "capability": f"{p.major}.{p.minor}",
            "multiprocessors": p.multi_processor_count,
            "memory GiB": round(p.total_memory / 2**30, 1),
            "L2 MiB": p.L2_cache_size / 2**20,
            "tf32": {
                "matmul": torch.backends.cuda.matmul.allow_tf32,
                "cudnn": torch.backends.cudnn.allow_tf32,
            },
        }
    facts["driver, clocks"] = output_of(
        "nvidia-smi",
        "--query-gpu=driver_version,clocks.sm,clocks.max.sm,clocks.max.mem,power.limit",
        "--format=csv",
    )
    facts["nvcc"] = output_of("nvcc", "--version")
    facts["commit"] = output_of("git", "-C", str(ROOT), "rev-parse", "HEAD")
    try:
        from snows import ops

        facts |= {"native": ops.native, "operations": {op: ops.implementation(op, "CUDA") for op in ops.OPS}}
    except Exception as error:  # the build step says more
        facts["native"] = f"{type(error).__name__}: {error}"
    return facts


def output_of(*command: str) -> str | None:
    """What a command prints, if it is there and succeeds."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def read(path: Path) -> object:
    """Read a step's result: its JSON, or of a test run the counts and what failed."""
    if path.suffix == ".json":
        return json.loads(path.read_text())
    suite = next(ElementTree.parse(path).getroot().iter("testsuite"))
    failed = [
        {
            "test": f"{case.get('classname')}::{case.get('name')}",
            "message": (problem.get("message") or "")[:500],
        }
        for case in suite.iter("testcase")
        for problem in case
        if problem.tag in ("failure", "error")
    ]
    return {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")} | {
        "failed": failed
    }


def read_log(text: str) -> object:
    """Count what a test run that was cut off had printed until then."""
    found = re.findall(r"^(\S+::.*) (PASSED|FAILED|ERROR|SKIPPED)", text, re.MULTILINE)
    counts = {
        outcome.lower(): sum(o == outcome for _, o in found)
        for outcome in ("PASSED", "FAILED", "ERROR", "SKIPPED")
    }
    return counts | {
        "failed": [{"test": test} for test, outcome in found if outcome in ("FAILED", "ERROR")],
        "whole": False,
    }


def run_group(command: Sequence[str], limit: float, log: Path, environment: dict[str, str]) -> str:
    """Run a command as a process group within a limit of seconds, and end the whole group in any case.

    Returns:
        "ok", or what went wrong.
    """
    with log.open("ab") as file:
        try:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=os.environ | environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )
        except OSError as error:
            return f"could not start: {error}"
        try:
            code: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # what it left running holds the device
            process.wait()
    if code is None:
        return f"cut off after {limit:.0f} s"
    return (
        "ok" if code == 0 else f"ended by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    )


def run(step: Step, left: float, out: Path) -> dict[str, Any]:
    """Run a step within what is left of the budget."""
    limit = min(step.limit, left)
    if limit < 5:
        return {"step": step.name, "outcome": "not reached: the budget was spent"}
    began, log = time.perf_counter(), out / "gpu.log"
    with log.open("a") as file:
        file.write(f"\n===== {step.name}: {' '.join(step.command)}\n")
    start = log.stat().st_size
    if step.result is not None:
        step.result.unlink(missing_ok=True)
    outcome = run_group(
        step.command, limit, log, {"PYTHONPATH": str(ROOT), "SNOWS_BUILD": "1", **step.environment}
    )
    result: dict[str, Any] = {
        "step": step.name,
        "outcome": outcome,
        "seconds": round(time.perf_counter() - began, 1),
    }
    if step.result is not None:
        try:
            result["result"] = read(step.result)
        except FileNotFoundError:
            printed = log.read_bytes()[start:].decode(errors="replace")
            result["result"] = read_log(printed) if step.result.suffix == ".xml" else None
        except (ValueError, ElementTree.ParseError, StopIteration, OSError) as error:
            result["result"] = f"unreadable: {error}"
        step.result.unlink(missing_ok=True)
    return result


def record(path: Path, done: list[dict[str, Any]]) -> None:
    """Put results into the report, whole or not at all, each in place of an earlier one of its name."""
    try:
        earlier = json.loads(path.read_text())["steps"]
    except (OSError, ValueError, KeyError, TypeError):
        earlier = []
    names = [x["step"] for x in done]
    temporary = path.with_suffix(".partial")
    temporary.write_text(
        json.dumps({"steps": [x for x in earlier if x["step"] not in names] + done}, indent=1) + "\n"
    )
    temporary.replace(path)


def carry_out(plan: Sequence[Step], budget: float, out: Path, probe: Sequence[str] = PROBE) -> bool:
    """Run steps one after the other, and say whether all went well."""
    began = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    done: list[dict[str, Any]] = []
    silent = ""
    for step in plan:
        left = budget - (time.monotonic() - began)
        found = {"step": step.name, "outcome": f"not run: {silent}"} if silent else run(step, left, out)
        if (
            step.name == "machine"
            and isinstance(found.get("result"), dict)
            and found["result"].get("native") != "loaded"
        ):
            found["outcome"] = f"native kernels: {found['result'].get('native')}"
        if not silent and found["outcome"] != "ok" and "seconds" in found:
            answer = run_group(probe, 60, out / "gpu.log", {})
            silent = "" if answer == "ok" else f"after {step.name} the device did not answer ({answer})"
            found |= {"device afterwards": silent or "answers"}
        done.append(found)
        record(out / "gpu.json", done)
        print(f"{step.name}: {found['outcome']} ({found.get('seconds', 0)} s)", flush=True)
    return all(x["outcome"] == "ok" for x in done)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "gpu")
    parser.add_argument("--budget", type=float, default=540, help="seconds in all")
    parser.add_argument(
        "--part", type=int, choices=(1, 2, 3), help="one of three calls; all of them without it"
    )
    parser.add_argument("--only", default="", help="steps whose name holds this")
    parser.add_argument("--dry-run", action="store_true", help="print the steps and their limits")
    parser.add_argument("--machine", type=Path, help=argparse.SUPPRESS)  # the step of that name
    args = parser.parse_args()
    if args.machine is not None:
        args.machine.write_text(json.dumps(machine()))
        return 0
    out = args.out.resolve()
    plan = [step for step in steps(out) if args.only in step.name and args.part in (None, step.part)]
    if args.dry_run:
        for step in plan:
            print(
                f"part {step.part}, at most {step.limit:.0f} s, {step.name}: {' '.join(f'{k}={v}' for k, v in step.environment.items())} "
                f"{' '.join(step.command)}".replace(":  ", ": ")
            )
        return 0
    if not plan:
        print(f"make gpu: expected ONLY to be part of a step's name, got {args.only!r}; --dry-run lists them")
        return 2
    seen = subprocess.run(
        [PYTHON, "-c", "import torch; assert torch.cuda.is_available()"], cwd=ROOT, capture_output=True
    )
    if seen.returncode:
        print("make gpu: expected a torch that sees a CUDA device, got none; run it on a machine with a GPU")
        return 2
    return 0 if carry_out(plan, args.budget, out) else 1


if __name__ == "__main__":
    sys.exit(main())
