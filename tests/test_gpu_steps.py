"""`make gpu` without a GPU: what its steps are, and what is left of a run in which steps die, hang or write rubbish."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
spec = importlib.util.spec_from_file_location("bench_gpu", ROOT / "bench" / "gpu.py")
gpu = importlib.util.module_from_spec(spec)
spec.loader.exec_module(gpu)


def python(code, name, limit=60.0, result=None):
    return gpu.Step(1, name, [sys.executable, "-c", code], limit, result)


ANSWERS, SILENT = [sys.executable, "-c", ""], [sys.executable, "-c", "raise SystemExit(1)"]


def outcomes(out):
    return {x["step"]: x["outcome"] for x in json.loads((out / "gpu.json").read_text())["steps"]}


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_faults_leave_a_whole_report_and_the_other_steps(tmp_path, capsys):
    half, junk, good, pid = (tmp_path / x for x in ("half.json", "junk.xml", "good.json", "pid"))
    grandchild = (
        f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']); "
        f"open({str(pid)!r}, 'w').write(str(p.pid)); p.wait()"
    )
    plan = [
        python("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "dies"),
        python(grandchild, "hangs", 6.0),
        python(f"open({str(half)!r}, 'w').write('{{\"rows\": [1,')", "half", result=half),
        python(f"open({str(junk)!r}, 'w').write('<testsuites><testsuite')", "junk", result=junk),
        gpu.Step(1, "missing", ["/nowhere/compute-sanitizer"], 60),
        python("raise SystemExit(3)", "fails"),
        python(
            "print('tests/a.py::test_b[large (1, 2)] PASSED\\ntests/a.py::test_c FAILED')",
            "cut",
            result=tmp_path / "never.xml",
        ),
        python(f"open({str(good)!r}, 'w').write('{{\"a\": 1}}')", "good", result=good),
    ]
    assert not gpu.carry_out(plan, 600, tmp_path, ANSWERS)
    assert outcomes(tmp_path) == {
        "dies": "ended by SIGSEGV",
        "hangs": "cut off after 6 s",
        "half": "ok",
        "junk": "ok",
        "missing": "could not start: [Errno 2] No such file or directory: '/nowhere/compute-sanitizer'",
        "fails": "exit code 3",
        "cut": "ok",
        "good": "ok",
    }
    found = {x["step"]: x for x in json.loads((tmp_path / "gpu.json").read_text())["steps"]}
    assert found["half"]["result"].startswith("unreadable: Expecting value")
    assert found["junk"]["result"].startswith("unreadable: ")
    assert found["good"]["result"] == {"a": 1}
    assert found["cut"]["result"] == {
        "passed": 1,
        "failed": [{"test": "tests/a.py::test_c"}],
        "error": 0,
        "skipped": 0,
        "whole": False,
    }
    assert found["fails"]["device afterwards"] == "answers"
    for _ in range(50):
        if not alive(int(pid.read_text())):
            break
        time.sleep(0.1)
    assert not alive(int(pid.read_text()))
    assert "fails: exit code 3" in capsys.readouterr().out


def test_a_device_that_does_not_answer_is_named_and_nothing_more_is_run(tmp_path):
    plan = [python("", "first"), python("raise SystemExit(1)", "second"), python("", "third")]
    assert not gpu.carry_out(plan, 600, tmp_path, SILENT)
    assert outcomes(tmp_path) == {
        "first": "ok",
        "second": "exit code 1",
        "third": "not run: after second the device did not answer (exit code 1)",
    }


def test_what_the_budget_does_not_reach_is_said_to_be_missing(tmp_path):
    assert not gpu.carry_out([python("", "first")], 2, tmp_path, ANSWERS)
    assert outcomes(tmp_path) == {"first": "not reached: the budget was spent"}


def test_a_second_call_keeps_the_first_one_s_results(tmp_path):
    assert gpu.carry_out([python("", "a"), python("", "b")], 60, tmp_path, ANSWERS)
    assert not gpu.carry_out([python("raise SystemExit(2)", "b"), python("", "c")], 60, tmp_path, ANSWERS)
    assert outcomes(tmp_path) == {"a": "ok", "b": "exit code 2", "c": "ok"}
    (tmp_path / "gpu.json").write_text('{"steps": [')
    assert gpu.carry_out([python("", "d")], 60, tmp_path, ANSWERS)
    assert outcomes(tmp_path) == {"d": "ok"}


def test_the_report_of_a_real_test_run_names_what_failed(tmp_path):
    (tmp_path / "test_it.py").write_text(
        "def test_good(): pass\ndef test_bad(): assert 1 == 2, 'one is not two'\n"
    )
    path = tmp_path / "x.xml"
    step = gpu.Step(
        1,
        "tests",
        [
            sys.executable,
            "-m",
            "pytest",
            "-vv",
            "-p",
            "no:cacheprovider",
            f"--junitxml={path}",
            str(tmp_path / "test_it.py"),
        ],
        100,
        path,
    )
    assert not gpu.carry_out([step], 100, tmp_path, ANSWERS)
    (found,) = json.loads((tmp_path / "gpu.json").read_text())["steps"]
    assert {k: found["result"][k] for k in ("tests", "failures", "errors", "skipped")} == {
        "tests": 2,
        "failures": 1,
        "errors": 0,
        "skipped": 0,
    }
    assert "one is not two" in found["result"]["failed"][0]["message"]
    printed = (tmp_path / "gpu.log").read_text()
    assert gpu.read_log(printed)["passed"] == 1  # a run that is cut off has no XML, but these lines


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git, to be without it")
def test_the_dry_run_lists_every_step_without_git_or_a_gpu(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "PATH"} | {"PATH": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, ROOT / "bench" / "gpu.py", "--dry-run"],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert [line.split(", ")[2].split(":")[0] for line in lines] == [
        step.name for step in gpu.steps(Path("x"))
    ]
    assert lines[0].startswith("part 1, at most 240 s, build: ")
    assert gpu.output_of("snows-has-no-such-command") is None


def test_the_steps_name_files_that_exist_and_the_most_valuable_come_first():
    plan = gpu.steps(Path("out"))
    for step in plan:
        for word in step.command[1:]:
            if word.endswith(".py"):
                assert (ROOT / word).is_file(), word
    assert len({step.name for step in plan}) == len(plan)
    first = [step.name for step in plan if step.part == 1]
    assert first[0] == "build"
    assert first.index("benchmark kernels_sparse") < first.index("tests cuda network")
    assert all(
        step.environment.get("PYTORCH_NO_CUDA_MEMORY_CACHING") == "1"
        and "not large and not graph" in step.command
        for step in plan
        if step.name.startswith("sanitizer")
    )
    gpu_files = {x.name for x in (ROOT / "tests").glob("test_*.py") if f"mark.{'gpu'}" in x.read_text()}
    assert gpu_files <= {
        word.partition("/")[2] for step in plan for word in step.command if word.startswith("tests/")
    }
