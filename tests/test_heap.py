"""Freed memory is taken up again inside, and given back after."""

import ctypes
import os
import subprocess
import sys

import pytest

GLIBC = sys.platform == "linux" and hasattr(ctypes.CDLL(None), "malloc_trim")
pytestmark = pytest.mark.skipif(not GLIBC, reason="needs glibc")

PASSES = """
import ctypes, os, resource, torch
from contextlib import nullcontext
from snows import heap

statm = os.open("/proc/self/statm", os.O_RDONLY)

def mapped():  # the address space, which only what is asked of the system and given back changes; read without a buffer on the heap
    return int(os.pread(statm, 100, 0).split()[0]) * resource.getpagesize()

def one_pass():  # twelve tensors of 6.4 MB live at once, all freed at the end
    before = mapped()
    tensors = [torch.full((1_600_000,), 1.0) for _ in range(12)]
    return mapped() - before

def asked(around):
    with around:
        for _ in range(3):
            one_pass()
        return sum(one_pass() for _ in range(5)) / 5e6

torch.set_num_threads(1)
ctypes.CDLL(None).mallopt(-3, 2**20)  # tensors are mapped one by one; left to itself, glibc goes by how the heap happens to lie
print(asked(nullcontext()), asked(heap.kept()))
"""


def megabytes_asked(**environment):
    """Megabytes that a pass over 76.8 MB asks of the system, outside and inside."""
    run = subprocess.run(
        [sys.executable, "-c", PASSES],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return tuple(map(float, run.stdout.split()))


def test_passes_do_not_fetch_their_memory_again():
    outside, inside = megabytes_asked()
    assert outside > 70
    assert inside < 2  # one tensor in five passes, should a hole have closed


@pytest.mark.parametrize(
    ("name", "value"),
    [("MALLOC_TRIM_THRESHOLD_", "131072"), ("GLIBC_TUNABLES", "glibc.malloc.trim_threshold=131072")],
)
def test_the_environment_has_the_say(name, value):
    outside, inside = megabytes_asked(**{name: value})
    assert outside > 70
    assert inside > 70


HELD = """
import torch
from snows import heap

def held():  # in memory or swapped out
    with open("/proc/self/status") as file:
        return sum(int(line.split()[1]) for line in file if line.startswith(("VmRSS", "VmSwap"))) / 1e3

before = held()
with heap.kept():
    with heap.kept():  # its end changes nothing yet
        pass
    tensors = [torch.ones(2_000_000) for _ in range(40)]  # 320 MB, each below the threshold
    during = held()
    last = torch.ones(10)  # stands in the way of giving back from the top alone
    del tensors
    inside = held()
print(during - before, inside - before, held() - before)
"""


def test_memory_goes_back_at_the_end():
    run = subprocess.run(
        [sys.executable, "-c", HELD], capture_output=True, text=True, check=True
    )  # this process may hold freed memory
    during, inside, after = map(float, run.stdout.split())
    assert during > 300
    assert inside > 300
    assert after < 60
