"""Builds the optional native kernels where torch and a compiler are at hand; pyproject.toml holds everything else."""

import os
import shutil
import sys
import warnings
from pathlib import Path

from setuptools import setup

REQUIRED = os.environ.get("SNOWS_BUILD") == "1"


def give_up(why: str) -> dict:
    message = f"snows: installed without native kernels ({why}); everything runs on the reference in plain PyTorch"
    if REQUIRED:
        raise SystemExit(message)
    warnings.warn(message, stacklevel=2)
    return {}


def native() -> dict:
    """Arguments for `setup` that build `snows/_native*.so`, or none."""
    try:
        import torch
        from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension
    except ImportError:
        return give_up("torch is not visible to the build; use pip install --no-build-isolation")
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        return give_up("no C++ compiler")

    class Build(BuildExtension):
        def run(self) -> None:
            try:
                super().run()
            except Exception as error:  # the package works without it
                log = Path("build.log").resolve()
                log.write_text(str(error))
                give_up(f"the build failed, see {log}")

        def copy_extensions_to_source(self) -> None:  # after a build that failed there is nothing to copy
            if all(Path(self.get_ext_fullpath(e.name)).exists() or Path(self.build_lib).exists() for e in self.extensions):
                try:
                    super().copy_extensions_to_source()
                except OSError:
                    give_up("the build left no library")

    openmp = [] if sys.platform == "darwin" else ["-fopenmp"]
    cuda = torch.version.cuda is not None and CUDA_HOME is not None and shutil.which("nvcc", path=f"{CUDA_HOME}/bin") is not None
    cards = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())} if cuda else set()
    if (9, 0) in cards:  # left alone, torch builds for 9.0, which lacks Hopper's own instructions
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", ";".join(f"{a}.{b}{'a' * ((a, b) == (9, 0))}" for a, b in sorted(cards)))
    sources = sorted(str(p) for p in [*Path("csrc/cpu").glob("*.cpp"), *(Path("csrc/cuda").glob("*.cu") if cuda else [])])
    depends = sorted(str(p) for p in [*Path("csrc/cpu").glob("*.h"), *Path("csrc/cuda").glob("*.cuh")])
    extension = (CUDAExtension if cuda else CppExtension)(
        "snows._native", sources, depends=depends, extra_link_args=[*openmp, "-s"],
        extra_compile_args={"cxx": ["-O3", "-g0", "-fno-trapping-math", *openmp], "nvcc": ["-O3"]})
    return {"ext_modules": [extension], "cmdclass": {"build_ext": Build.with_options(use_ninja=shutil.which("ninja") is not None)}}


setup(**native())
