"""The name of the machine that times are measured on."""

from __future__ import annotations

import platform
import re
from contextlib import suppress
from pathlib import Path

import torch


def processor(device: str) -> str:
    """Name the processor, or the GPU."""
    if device == "cuda" and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    with suppress(OSError):  # Linux alone has it
        if found := re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE):
            return found[1].strip()
    return platform.processor() or platform.machine()
