"""The machine that times are measured on."""

from __future__ import annotations

import platform
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Machine:
    """Name what times are measured on.

    Attributes:
        processor: its name, or that of the GPU.
        device: "cpu" or "cuda".
        threads: of the processor; 0 of a GPU.
    """

    processor: str
    device: str
    threads: int

    @classmethod
    def here(cls, device: str) -> Machine:
        """Name this machine, with as many threads as torch uses now."""
        return cls(_name(device), device, torch.get_num_threads() if device == "cpu" else 0)

    def __str__(self) -> str:
        threads = f", {self.threads} thread{'s' if self.threads > 1 else ''}" if self.threads else ""
        return self.processor + threads


def _name(device: str) -> str:
    if device == "cuda" and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    with suppress(OSError):  # Linux alone has it
        if found := re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE):
            return found[1].strip()
    return platform.processor() or platform.machine()
