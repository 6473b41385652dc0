"""What csrc/cpu computes without torch, against plain loops in double: as this machine computes it, and as an Arm processor would.

For Arm, tests/cpp/kernels.cpp and the kernels are cross-built and run under emulation, which tells what they compute and nothing of how fast.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))
from setup import compiler_flags  # noqa: E402

SOURCES = ["tests/cpp/kernels.cpp", "csrc/cpu/product.cpp", "csrc/cpu/order.cpp"]
COMPILER = shlex.split(os.environ.get("CXX") or "c++")
ARM, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
CAPABILITY = torch.backends.cpu.get_cpu_capability()
HALF_ULP = 2.0**-24  # of 1 in float32


def built(compiler, machine, program, *flags):
    command = [*compiler, *compiler_flags(machine), *flags, *SOURCES, "-o", str(program)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def check(command):
    """Whether the program finds no error above its own bounds, and none that is large for rows of up to 768 weights."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    errors = [float(part) for part in re.findall(r"largest error ([\d.e+-]+)", done.stdout)]
    assert len(errors) == 7, done.stdout  # six patterns, conjugate gradients
    assert all(HALF_ULP < error < 8 * HALF_ULP for error in errors), done.stdout
    assert done.stdout.count(" 0 wrong") == 3, done.stdout


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    """The program for this machine, which the compiler lets check its memory if it can."""
    if shutil.which(COMPILER[0]) is None:
        pytest.skip("there is no C++ compiler")
    program, machine = tmp_path_factory.mktemp("native") / "kernels", os.uname().machine
    checks = ["-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    if built(COMPILER, machine, program, *checks).returncode != 0:
        done = built(COMPILER, machine, program)
        assert done.returncode == 0, done.stderr
    return program


@pytest.mark.parametrize("instructions", ["portable", "AVX2", "AVX512"])
def test_this_machine_computes_what_plain_loops_do(native, instructions):
    if instructions not in {"portable", CAPABILITY, "AVX2" if CAPABILITY == "AVX512" else CAPABILITY}:
        pytest.skip(f"PyTorch found no {instructions} here, or was told to use none")
    check([native, instructions.lower()])


def test_an_arm_processor_computes_what_plain_loops_do(tmp_path):
    if shutil.which(ARM) is None or shutil.which(EMULATOR) is None:
        pytest.skip(
            f"there is no {ARM} or no {EMULATOR} (Debian: apt install g++-aarch64-linux-gnu qemu-user)"
        )
    done = built([ARM], "aarch64", tmp_path / "kernels", "-static")
    assert done.returncode == 0, done.stderr
    check([EMULATOR, tmp_path / "kernels"])
