"""What came of building the native kernels, as setup.py wrote it down beside the package."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

FOLDER = Path(__file__).resolve().parent


class MissingKernelWarning(UserWarning):
    """Warns of native kernels that were not built."""


def outcome() -> str:
    """Return the kernels that were built.

    That is "CPU", "CPU and CUDA (9.0a)", "none", or "unknown" in a source tree that was not built.
    """
    return _lines()[0]


def complaint() -> str:
    """Return the sentence that names missing kernels, why, and what to do; "" where none are missing."""
    return _lines()[1].replace("{log}", str(FOLDER / "build.log"))


def warn() -> None:
    """Warn of missing kernels when the package is imported.

    `SNOWS_REFERENCE=1`, which leaves them out anyway, gives no warning.
    """
    if complaint() and os.environ.get("SNOWS_REFERENCE") != "1":
        warnings.warn(complaint(), MissingKernelWarning, stacklevel=3)


def _lines() -> list[str]:
    try:
        text = (FOLDER / "build.txt").read_text(encoding="utf-8")
    except OSError:
        return ["unknown", ""]
    return [*text.splitlines(), "", ""][:2]
