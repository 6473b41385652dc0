"""Limits as a person writes them, bytes and seconds; without torch, so that a mistake is told at once."""

from __future__ import annotations

import math
import re
from typing import Any

UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
BINARY = {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def read_bytes(memory: Any, where: str = "memory") -> int | None:
    """Read a number of bytes, such as 8_000_000_000, "8GB", "500 MB" or "8GiB"; None stays None.

    As text a number without a unit has at least seven digits: "8" is not meant for eight bytes.

    Args:
        memory: what was given.
        where: the name of the argument or option.

    Raises:
        ValueError: it is none.
    """
    if memory is None or (type(memory) is int and memory >= 0):
        return memory
    pattern = r"\s*(?:(\d{0,18}\.?\d{1,18})\s*([KMGT]I?B)|(\d{7,18}))\s*"
    found = re.fullmatch(pattern, memory, re.ASCII | re.IGNORECASE) if isinstance(memory, str) else None
    if found is None:
        raise ValueError(f'{where}: expected bytes, such as "8GB", "8GiB" or 8000000000, got {memory!r}')
    number, unit, plain = found.groups()
    return int(plain) if plain else round(float(number) * {**UNITS, **BINARY}[unit.upper()])


def said(size: float) -> str:
    """Write a number of bytes as a person would; rounded up, so that it is enough."""
    unit, scale = next((x for x in reversed(UNITS.items()) if size >= x[1]), ("KB", 1000))
    tenths = -int(-size * 10 // scale)
    return f"{tenths / 10:g} {unit}"


def check_seconds(seconds: float | None, where: str = "prune: expected seconds") -> None:
    """Refuse a limit of time that is no number above 0; None is no limit.

    Args:
        seconds: what was given, in any unit.
        where: how the sentence of the error begins.

    Raises:
        ValueError: it is no number above 0.
    """
    if seconds is None:
        return
    number = isinstance(seconds, int | float) and not isinstance(seconds, bool)
    if not (number and 0 < seconds < math.inf):
        raise ValueError(f"{where} to be a number above 0, got {seconds!r}")
