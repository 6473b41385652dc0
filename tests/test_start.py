"""What is imported when: `import snows` and `--help` without torch, each name when it is used."""

import inspect
import subprocess
import sys
from typing import get_args

import pytest

import snows
from snows import cli, demo
from snows.cli import pruning, terminal


def python(code):
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_importing_the_package_imports_no_torch():
    assert (
        python("import sys, snows; snows.__version__, dir(snows); print('torch' in sys.modules)") == "False\n"
    )
    assert python("import sys, snows; print(snows.NM(2, 4), 'torch' in sys.modules)") == "2:4 True\n"
    assert (
        python("import snows; from snows import *; print(prune.__module__, SparseLinear.__module__)")
        == "snows.pruning snows.layers.linear\n"
    )
    assert python("import snows, torch; snows.ops; print(torch.ops.snows.nm_mask)") == "snows.nm_mask\n"


@pytest.mark.parametrize(
    "command", ["", "prune", "eval", "report", "deploy", "bench", "export", "demo", "info"]
)
def test_help_answers_without_torch(command):
    text = python(f"""
import sys
from snows.cli import main
sys.argv = ["snows", *{command.split()}, "--help"]
try:
    main()
except SystemExit as end:
    assert end.code == 0
print("torch" in sys.modules)
""")
    assert "Usage:" in text
    assert text.endswith("False\n")


def test_every_public_name_is_there_and_no_other():
    assert set(snows.__all__) <= set(dir(snows))
    for name in snows.__all__:
        assert getattr(snows, name).__name__ == name
    with pytest.raises(AttributeError, match="module 'snows' has no attribute 'nothing'"):
        snows.nothing  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'nothing'"):
        from snows import nothing  # noqa: F401


def test_the_options_start_from_the_library_s_own_numbers():
    """They are written out, so that `--help` needs no torch."""
    defaults = {
        command.callback.__name__: {
            p.name: p.default for p in inspect.signature(command.callback).parameters.values()
        }
        for command in cli.app.registered_commands
    }
    assert (defaults["prune"]["iterations"], defaults["prune"]["passes"]) == (
        snows.Newton().max_iterations,
        snows.Newton().passes,
    )
    assert defaults["demo"]["images"] == demo.JUDGED


def test_every_rule_that_the_command_line_offers_is_a_selector():
    assert all(callable(pruning._rule(name)) for name in get_args(pruning.Rule))
    with pytest.raises(KeyError):
        pruning._rule("best")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("gpu", "--device: expected auto, cpu, cuda or cuda:NUMBER, got 'gpu'"),
        ("cuda:x", "got 'cuda:x'"),
        ("cuda:", "got 'cuda:'"),
        ("cuda:99", r"expected one that is there, got cuda:99, but this torch \(.*\) sees"),
        ("cpu:1", "got cpu:1"),
    ],
)
def test_a_device_that_is_not_there_is_one_sentence(text, sentence):
    with pytest.raises(ValueError, match=sentence):
        terminal.device_of(text)


def test_auto_is_cuda_where_there_is_one(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert terminal.device_of("auto") == torch.device("cpu")
    assert terminal.device_of("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    current = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert terminal.device_of("auto") == torch.device("cuda")
    assert terminal.device_of("cuda:1") == torch.device("cuda:1")
    assert current == [1]  # what waits for the device waits for this one
    with pytest.raises(ValueError, match="sees 2 CUDA devices"):
        terminal.device_of("cuda:2")
