"""Implementations of one thing, timed in turns: a noisy moment of the machine meets all of them.

Freed memory stays with the process, for all alike: what the system takes to clear new pages is not theirs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from snows import heap
from snows.choosing.measuring import Stopwatch


@heap.kept()
def in_turns(
    case: str, runs: Mapping[str, Callable[[], object]], rounds: int, **more: object
) -> list[dict[str, object]]:
    """One row an implementation: quartiles of its milliseconds over `rounds`, after one run that does not count."""
    race = Stopwatch(rounds=rounds, repeats=1).race(list(runs.values()))
    heads = ("quarter ms", "median ms", "three quarters ms")
    return [
        {
            "case": case,
            "implementation": name,
            "rounds": rounds,
            **more,
            **dict(zip(heads, race.quartiles(i), strict=True)),
        }
        for i, name in enumerate(runs)
    ]


def large_product(device: str) -> tuple[Callable[[], object], int]:
    """A matrix product that fills the machine, and its floating-point operations: what `share of matmul` is a share of."""
    width = 8192 if device == "cuda" else 2048
    a, b = torch.randn(2, width, width, device=device)
    return lambda: a @ b, 2 * width**3


def keep(path: Path | None, rows: list[dict[str, object]]) -> None:
    """Write what was measured so far."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            json.dumps(
                {
                    "torch": torch.__version__,
                    "threads": torch.get_num_threads(),
                    "capability": torch.backends.cpu.get_cpu_capability(),
                    "rows": rows,
                },
                indent=1,
            )
            + "\n"
        )
