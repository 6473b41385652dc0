"""Builds the optional native kernels where torch and a compiler are at hand; the rest is in pyproject.toml.

What came of it goes into `build.txt` beside the installed package: a line for `snows info` and, where kernels
are missing, a sentence that the first `import snows` warns with, for pip hides what a build prints.
SNOWS_BUILD=1 makes every missing kernel an error, SNOWS_BUILD=0 builds none.
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

REQUIRED, UNWANTED = (os.environ.get("SNOWS_BUILD") == value for value in "10")
OPENMP = [] if sys.platform == "darwin" else ["-fopenmp"]


def compiler_flags(machine: str) -> list[str]:
    """Return the C++ compiler's flags for a processor."""
    flags = ["-std=c++20", "-O3", "-g0", "-fno-trapping-math", *OPENMP]  # torch 2.11 would say C++17
    if machine == "aarch64":  # gcc would load so far ahead that the product's sums leave the registers
        flags.append("-fno-schedule-insns")
    return flags


CXX = compiler_flags(platform.machine())
NVCC = ["-std=c++20", "-O3"]


def missing(what: str, why: str, remedy: str) -> str:
    """Return the sentence for kernels that were not built; raise it where they are required."""
    sentence = (
        f"snows: installed without {what} kernels, for {why}; everything runs without them, but slower. "
        f"{remedy}"
    )
    if REQUIRED:
        raise SystemExit(sentence)
    print(sentence, file=sys.stderr)
    return sentence


def record(command, outcome: str, sentence: str = "", log: str = "") -> None:
    """Write what came of the build beside the package that `command` makes."""
    folder = (
        Path("snows")
        if getattr(command, "editable_mode", False) or getattr(command, "inplace", False)
        else Path(command.build_lib, "snows")
    )
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("_native*") if outcome == "none" else ():
        old.unlink()
    (folder / "build.txt").write_text(f"{outcome}\n{sentence}\n", encoding="utf-8")
    (folder / "build.log").write_text(log, encoding="utf-8")


def cuda_home() -> str | None:
    """Find the CUDA toolkit's folder: by the environment, by where nvcc lies, or by what nvcc says."""
    named, nvcc = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH"), shutil.which("nvcc")
    if named:
        return named
    guesses = [Path("/usr/local/cuda")]
    if nvcc is not None:
        with suppress(OSError):
            said = subprocess.run(
                [nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True, check=False
            )
            guesses = [*map(Path, re.findall(r"TOP=(.+)", said.stdout + said.stderr)), *guesses]
        guesses.insert(0, Path(nvcc).parents[1])
    return next((str(home.resolve()) for home in guesses if (home / "include/cuda_runtime.h").exists()), None)


def architectures(named: str, cards: set[tuple[int, int]]) -> str:
    """List the architectures to compile for.

    Hopper's own instructions are in 9.0a, which neither torch nor most images name.
    """
    if not named:
        named = ";".join(f"{a}.{b}" for a, b in sorted(cards)) or "8.0+PTX;9.0"
    return re.sub(r"\bHopper\b", "9.0a", re.sub(r"(?<![\d.])9\.0(?![\da])", "9.0a", named))


@contextmanager
def written_to(log: Path) -> Iterator[None]:
    """Send what this process and the compilers print into a file."""
    kept = [os.dup(1), os.dup(2)]
    sys.stdout.flush(), sys.stderr.flush()
    with log.open("wb") as file:
        try:
            os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
            yield
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            for fd, old in zip((1, 2), kept, strict=True):
                os.dup2(old, fd), os.close(old)


def without(sentence: str) -> dict:
    """Arguments for `setup` that build no kernels and say why, if there is a reason to say."""

    class Noted(build_py):
        def run(self) -> None:
            super().run()
            record(self, "none", sentence)

    return {"cmdclass": {"build_py": Noted}}


def native() -> dict:
    """Arguments for `setup` that build `snows/_native*.so`, or none."""
    if UNWANTED:
        return without("")
    sys.path.append(
        sysconfig.get_path("purelib")
    )  # an isolated build does not see the torch of the environment that it installs into
    try:
        import torch
    except ImportError:
        remedy = "Install torch, then snows again: pip install --force-reinstall --no-deps ."
        return without(missing("native", "torch was not there to build against", remedy))
    if shutil.which(shlex.split(os.environ.get("CXX") or "c++")[0]) is None:
        return without(
            missing(
                "native",
                "there is no C++ compiler",
                "Install one (Debian, Ubuntu: apt install g++), then snows again.",
            )
        )
    home, named = cuda_home(), os.environ.get("TORCH_CUDA_ARCH_LIST", "")
    cuda = torch.version.cuda is not None and bool(named or REQUIRED or torch.cuda.is_available())
    sentence = ""
    if named and torch.version.cuda is None:
        sentence = missing(
            "CUDA",
            "this torch was built without CUDA",
            "Install one that was built with it, then snows again.",
        )
    if cuda and (home is None or shutil.which("nvcc", path=f"{home}/bin") is None):
        remedy = f"Install CUDA {torch.version.cuda} or set CUDA_HOME to it, then snows again."
        cuda, sentence = False, missing("CUDA", "nvcc or its headers were not found", remedy)
    if cuda:
        os.environ["CUDA_HOME"] = str(
            home
        )  # torch would take the folder above the first nvcc, whatever lies there
        cards = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
        os.environ["TORCH_CUDA_ARCH_LIST"] = named = architectures(named, cards)
        print(f"snows: building the CUDA kernels for {named}")
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    def extension(kind: type) -> object:
        sources = [
            *Path("csrc/cpu").glob("*.cpp"),
            *(Path("csrc/cuda").glob("*.cu") if kind is CUDAExtension else []),
        ]
        depends = [*Path("csrc/cpu").glob("*.h"), *Path("csrc/cuda").glob("*.cuh")]
        return kind(
            "snows._native",
            sorted(map(str, sources)),
            depends=sorted(map(str, depends)),
            extra_link_args=[*OPENMP, "-s"],
            extra_compile_args={"cxx": [*CXX], "nvcc": [*NVCC]},
        )

    class Build(BuildExtension):
        def attempt(self) -> str:
            """Build, and return what was printed where that failed."""
            log = Path(self.build_temp, "build.log")
            log.parent.mkdir(parents=True, exist_ok=True)
            try:
                with written_to(log):
                    super().run()
            except Exception as error:  # the package works without it
                text = f"{log.read_text(errors='replace')}\n{error}\n"
                print(text)
                return text
            return ""

        def run(self) -> None:
            compiler = self.compiler  # its name; a run puts the compiler itself in its place
            outcome, said, log = f"CPU and CUDA ({named})" if cuda else "CPU", sentence, self.attempt()
            if log and cuda:
                said = missing("CUDA", "their build failed (log: {log})", "Those for the CPU were built.")
                vars(self.extensions[0]).update(
                    vars(extension(CppExtension))
                )  # what setuptools noted in it for the build stays
                self.compiler, outcome = compiler, "CPU"
                again = self.attempt()
                log, failed = log + again, bool(again)
            else:
                failed = bool(log)
            if failed:
                outcome, said = (
                    "none",
                    missing(
                        "native",
                        "their build failed (log: {log})",
                        "Mend what it names, then install snows again.",
                    ),
                )
                self.extensions = self.distribution.ext_modules = []
            record(self, outcome, said, log)

    first = extension(CUDAExtension if cuda else CppExtension)
    return {
        "ext_modules": [first],
        "cmdclass": {"build_ext": Build.with_options(use_ninja=shutil.which("ninja") is not None)},
    }


if __name__ == "__main__":
    setup(**native())
