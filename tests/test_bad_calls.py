"""No call of an op ends the process, whatever it is called with."""

import json
import os
import subprocess
import sys
from pathlib import Path


def test_calls_that_do_not_belong_together_are_refused_or_right():
    script = Path(__file__).with_name("bad_calls.py")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(script.parents[1]), os.environ.get("PYTHONPATH", "")]),
    }
    run = subprocess.run(
        [sys.executable, script, "14"], capture_output=True, text=True, env=environment, timeout=300
    )
    *lines, last = run.stdout.splitlines() or [""]
    assert run.returncode == 0, f"died of {run.returncode} in: {last}\n{run.stderr[-2000:]}"
    found = json.loads(last)
    assert found["missing"] == []
    assert found["odd"] == []
    assert found["tried"] > 1500
    assert found["refused"] > 0.6 * found["tried"]
    assert len(lines) == found["tried"]
