"""What `--benchmark-json` writes: one row a measurement, and nothing about whose machine it was. And memory that stays."""

import platform

import pytest
import torch

from snows import heap


@pytest.fixture(scope="session", autouse=True)
def kept_memory():
    """As in `turns.in_turns`, for all alike."""
    with heap.kept():
        yield


def pytest_benchmark_update_json(config, benchmarks, output_json):
    rows = []
    for found in output_json["benchmarks"]:
        stats = found["stats"]
        times = {"quarter ms": stats["q1"], "median ms": stats["median"], "three quarters ms": stats["q3"]}
        rows.append(
            {
                **found["extra_info"],
                "rounds": stats["rounds"],
                **{name: round(1e3 * x, 6) for name, x in times.items()},
            }
        )
    cpu = output_json["machine_info"].get("cpu", {})
    output_json.clear()
    output_json.update(
        {
            "torch": torch.__version__,
            "machine": cpu.get("brand_raw") or platform.machine(),
            "threads": torch.get_num_threads(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "rows": rows,
        }
    )
