"""Freed memory is taken up again inside, and given back after."""

import ctypes
import os
import subprocess
import sys

import pytest

GLIBC = sys.platform == "linux" and hasattr(ctypes.CDLL(None), "malloc_trim")
pytestmark = pytest.mark.skipif(not GLIBC, reason="needs glibc")

PASSES = """
import resource, torch
from contextlib import nullcontext
from snows import memory

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def one_pass():  # several tensors of 6 MB live at once, all freed at the end
    tensors = [torch.full((1_600_000,), 1.0)]
    for _ in range(11):
        tensors.append(tensors[-1] + 1)

def count(around):
    with around:
        one_pass()
        before = faults()
        for _ in range(5):
            one_pass()
        return (faults() - before) / 5

torch.set_num_threads(1)
print(count(nullcontext()), count(memory.kept()))
"""


def count_faults(**environment):
    """Page faults of a pass outside and inside; twelve tensors of 6.4 MB are 18,750 pages of 4 KiB."""
    run = subprocess.run([sys.executable, "-c", PASSES], env={**os.environ, **environment}, capture_output=True, text=True, check=True)
    return tuple(map(float, run.stdout.split()))


def test_passes_do_not_fetch_their_memory_again():
    outside, inside = count_faults()
    assert outside > 100
    assert inside < outside / 20


@pytest.mark.parametrize(("name", "value"), [("MALLOC_TRIM_THRESHOLD_", "131072"), ("GLIBC_TUNABLES", "glibc.malloc.trim_threshold=131072")])
def test_the_environment_has_the_say(name, value):
    outside, inside = count_faults(**{name: value})
    assert inside > outside / 2 > 50


RESIDENT = """
import resource, torch
from snows import memory

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 1e6

before = resident()
with memory.kept():
    with memory.kept():  # its end changes nothing yet
        pass
    tensors = [torch.ones(2_000_000) for _ in range(40)]  # 320 MB, each below the threshold
    during = resident()
    last = torch.ones(10)  # stands in the way of giving back from the top alone
    del tensors
    inside = resident()
print(during - before, inside - before, resident() - before)
"""


def test_memory_goes_back_at_the_end():
    run = subprocess.run([sys.executable, "-c", RESIDENT], capture_output=True, text=True, check=True)  # this process may hold freed memory
    during, inside, after = map(float, run.stdout.split())
    assert during > 300
    assert inside > 300
    assert after < 60
