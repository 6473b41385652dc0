"""Compiles csrc/cpu against the headers of the oldest and the newest supported torch; links and runs nothing.

For this machine, and for Arm where that compiler is. The headers are those of torch's wheels for macOS,
the smallest there are (0.1 GB each); they stay in .headers, which git ignores.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from setup import CXX  # noqa: E402

CACHE = ROOT / ".headers"
ARM = "aarch64-linux-gnu-g++"


def headers(version: str) -> Path:
    """Fetch the include folder of a release: "==2.11.*", or ">=2.11" for the newest."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [
                sys.executable,
                "-m",
                "pip",
                "download",
                "--quiet",
                "--disable-pip-version-check",
                "--no-deps",
                "--only-binary=:all:",
                "--python-version=3.11",
                "--platform=macosx_11_0_arm64",
                "--platform=macosx_14_0_arm64",
                f"--dest={folder}",
                f"torch{version}",
            ],
            check=True,
        )
        (wheel,) = Path(folder).glob("torch-*.whl")
        found = CACHE / wheel.name.split("-")[1]
        if not found.exists():
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(
                    f"{found}.part",
                    [name for name in archive.namelist() if name.startswith("torch/include/")],
                )
            Path(f"{found}.part").rename(found)
    return found / "torch/include"


def compiled(source: Path, include: Path, compiler: list[str]) -> str:
    """Return what the compiler says against a file; "" if nothing."""
    command = [
        *compiler,
        *CXX,
        "-O0",
        "-fsyntax-only",
        f"-I{include}",
        f"-I{include}/torch/csrc/api/include",
        str(source),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return f"{source.name}: {done.stderr}" if done.returncode else ""


def main() -> None:
    """Compile every file against both, and end with exit code 1 if one fails."""
    oldest = re.search(r'"torch>=([\d.]+)"', (ROOT / "pyproject.toml").read_text()).group(1)
    sources = sorted((ROOT / "csrc/cpu").glob("*.cpp"))
    compilers = [shlex.split(os.environ.get("CXX") or "c++"), *([[ARM]] if shutil.which(ARM) else [])]
    failed = False
    for version in (f"=={oldest}.*", f">={oldest}"):
        include = headers(version)
        for compiler in compilers:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                said = [
                    text
                    for text in pool.map(partial(compiled, include=include, compiler=compiler), sources)
                    if text
                ]
            failed = failed or bool(said)
            count = f"{len(sources) - len(said)} of {len(sources)} files of csrc/cpu compile"
            print(*said, f"torch {include.parts[-3]}, {compiler[0]}: {count}", sep="\n", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
