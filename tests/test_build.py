"""How the native kernels are built, what stands in for them, and where that is said."""

import importlib.util
import os
import shutil
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import pytest
import torch

from snows import build

ROOT = Path(build.__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs the source tree")


@pytest.fixture
def script(monkeypatch):
    """setup.py as a module, in an environment that asks for nothing."""
    for name in ("SNOWS_BUILD", "CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)
    spec = importlib.util.spec_from_file_location("snows_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def program(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def toolkit(folder):
    (folder / "include").mkdir(parents=True)
    (folder / "include/cuda_runtime.h").touch()
    program(folder / "bin/nvcc", f'test "$1" = --dryrun && echo "#$ TOP={folder}/bin/.." >&2')
    return folder


def test_the_cuda_toolkit_is_found_behind_a_wrapper(script, tmp_path, monkeypatch):
    real = toolkit(tmp_path / "cuda-13.0")
    program(tmp_path / "local/bin/nvcc", f'exec {real}/bin/nvcc "$@"')
    monkeypatch.setenv("PATH", f"{tmp_path}/local/bin:/usr/bin:/bin")
    assert script.cuda_home() == str(real)  # not tmp_path/local, where torch would look
    monkeypatch.setenv("PATH", f"{real}/bin:/usr/bin:/bin")
    assert script.cuda_home() == str(real)
    monkeypatch.setenv("CUDA_PATH", "/elsewhere")
    assert script.cuda_home() == "/elsewhere"


@pytest.mark.parametrize(("named", "cards", "found"), [
    ("9.0", set(), "9.0a"), ("9.0a", set(), "9.0a"), ("8.0;9.0+PTX", set(), "8.0;9.0a+PTX"), ("8.0 9.0", set(), "8.0 9.0a"),
    ("Hopper", set(), "9.0a"), ("8.6", {(9, 0)}, "8.6"), ("", {(9, 0), (8, 0)}, "8.0;9.0a"), ("", {(12, 0)}, "12.0"), ("", set(), "8.0+PTX;9.0a"),
])  # fmt: skip
def test_hopper_gets_its_own_instructions(script, named, cards, found):
    assert script.architectures(named, cards) == found


def test_every_source_is_compiled_as_cpp20(script):
    """torch 2.11 adds C++17 where no standard is named, and the sources use <bit>."""
    assert (
        [flag for flag in script.CXX if flag.startswith("-std")]
        == [flag for flag in script.NVCC if flag.startswith("-std")]
        == ["-std=c++20"]
    )


@pytest.fixture
def tree(tmp_path):
    """The project with sources that compile in a moment; gives a function that installs it into a folder and reads what was said there."""
    tree = tmp_path / "tree"
    (tree / "csrc/cpu").mkdir(parents=True)
    (tree / "csrc/cpu/empty.cpp").write_text(
        "static_assert(__cplusplus >= 202002L);\nint nothing() { return 0; }\n"
    )
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    shutil.copytree(
        ROOT / "snows",
        tree / "snows",
        symlinks=False,
        ignore=shutil.ignore_patterns("*.so", "build.txt", "build.log", "*.safetensors"),
    )

    def install(**environment):
        place = tmp_path / "place"
        shutil.rmtree(place, ignore_errors=True)
        named = {
            k: v
            for k, v in os.environ.items()
            if k not in ("SNOWS_BUILD", "CXX", "PYTHONPATH", "TORCH_CUDA_ARCH_LIST")
        }
        done = subprocess.run(
            [
                sys.executable,
                "setup.py",
                "-q",
                "build",
                "--build-lib",
                place,
                "--build-temp",
                tmp_path / "temp",
            ],
            cwd=tree,
            env=named | {"CUDA_VISIBLE_DEVICES": ""} | environment,
            capture_output=True,
            text=True,
        )
        return done, place / "snows"

    return install


def said(package):
    return (package / "build.txt").read_text().splitlines()


needs_a_compiler = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "c++")) is None, reason="needs a C++ compiler"
)


@needs_a_compiler
def test_a_build_that_succeeds(tree):
    done, package = tree()
    assert done.returncode == 0, done.stderr
    assert said(package) == ["CPU", ""]
    assert len(list(package.glob("_native*.so"))) == 1
    assert not (package / "build.log").read_text()


def test_no_compiler(tree, tmp_path):
    sentence = (
        "snows: installed without native kernels, for there is no C++ compiler; everything runs without them, but slower. "
        "Install one (Debian, Ubuntu: apt install g++), then snows again."
    )
    done, package = tree(CXX="no-such-compiler -O3")
    assert done.returncode == 0, done.stderr
    assert said(package) == ["none", sentence]
    done, _ = tree(CXX="no-such-compiler", SNOWS_BUILD="1")
    assert done.returncode != 0
    assert sentence in done.stderr


def test_a_compiler_that_fails(tree, tmp_path):
    program(
        tmp_path / "broken",
        "case $1 in -*version) echo g++ 12.2.0;; *) echo 'error: the disk is on fire' >&2; exit 1;; esac",
    )
    done, package = tree(CXX=str(tmp_path / "broken"))
    assert done.returncode == 0, done.stderr
    assert said(package) == [
        "none",
        "snows: installed without native kernels, for their build failed (log: {log}); everything runs without them, "
        "but slower. Mend what it names, then install snows again.",
    ]
    assert "the disk is on fire" in (package / "build.log").read_text()
    assert not list(package.glob("_native*.so"))
    done, _ = tree(CXX=str(tmp_path / "broken"), SNOWS_BUILD="1")
    assert done.returncode != 0
    assert "snows: installed without" in done.stderr
    if torch.version.cuda is None:  # else it is nvcc that is missed first
        assert "the disk is on fire" in done.stdout
        assert "their build failed" in done.stderr


@needs_a_compiler
@pytest.mark.parametrize("breaks", ["compiling", "linking"])
def test_cuda_kernels_that_cannot_be_built_leave_those_for_the_cpu(tree, tmp_path, breaks):
    """An nvcc that fails, and a toolkit without the library that everything is linked with, beside a torch for CUDA."""
    (tmp_path / "tree/csrc/cuda").mkdir()
    (tmp_path / "tree/csrc/cuda/empty.cu").touch()
    home = toolkit(tmp_path / "cuda")
    program(
        home / "bin/nvcc",
        f"""case "$*" in *--version*) echo "Cuda compilation tools, release 13.0, V13.0.88"; exit;; esac
test {breaks} = linking || {{ echo "error: the chip melts" >&2; exit 1; }}
while test $# -gt 0; do test "$1" = -o && out=$2; shift; done; echo | c++ -x c++ -fPIC -c -o "$out" -""",
    )
    (tmp_path / "site").mkdir()
    (tmp_path / "site/sitecustomize.py").write_text(
        "import torch\ntorch.version.cuda, torch.cuda._is_compiled = '13.0', lambda: True\n"
        "torch.cuda.device_count, torch.cuda.is_available = lambda: 0, lambda: False\n"
    )
    environment = {
        "CUDA_HOME": str(home),
        "TORCH_CUDA_ARCH_LIST": "9.0",
        "PYTHONPATH": str(tmp_path / "site"),
    }
    done, package = tree(**environment)
    assert done.returncode == 0, done.stderr
    assert "snows: building the CUDA kernels for 9.0a\n" in done.stdout
    assert said(package) == [
        "CPU",
        "snows: installed without CUDA kernels, for their build failed (log: {log}); everything runs without them, "
        "but slower. Those for the CPU were built.",
    ]
    log = (package / "build.log").read_text()
    assert (
        "the chip melts" if breaks == "compiling" else "cudart"
    ) in log or "greater than the maximum required version by CUDA" in log  # g++ 16
    assert len(list(package.glob("_native*.so"))) == 1
    done, _ = tree(**environment, SNOWS_BUILD="1")
    assert done.returncode != 0
    assert "snows: installed without CUDA kernels" in done.stderr


def test_a_build_that_is_not_wanted_says_nothing(tree):
    done, package = tree(SNOWS_BUILD="0")
    assert done.returncode == 0, done.stderr
    assert said(package) == ["none", ""]


NO_TORCH = "snows: installed without native kernels, for torch was not there to build against; everything runs without them, but slower. "


def test_an_isolated_build_finds_the_torch_of_its_environment(script, monkeypatch, tmp_path):
    """As pip isolates: the environment's packages are gone from the path."""
    site = tmp_path / "site"
    (site / "torch/utils").mkdir(parents=True)
    (site / "torch/__init__.py").write_text("")
    (site / "torch/utils/__init__.py").write_text("")
    code = textwrap.dedent(f"""
        import importlib.util, sys, sysconfig
        spec = importlib.util.spec_from_file_location("snows_setup", {str(ROOT / "setup.py")!r})
        module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module)
        sys.path = [p for p in sys.path if not p.endswith(("site-packages", "dist-packages"))]
        sysconfig.get_path = lambda name: {str(site)!r} if {{place}} else "/nowhere"
        module.shutil.which = lambda *a, **k: None
        print(module.native())
        """)
    for place, words in ((True, "there is no C++ compiler"), (False, NO_TORCH)):
        done = subprocess.run(
            [sys.executable, "-c", code.replace("{place}", str(place))], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert words in done.stderr


def test_the_import_warns_once_and_names_the_log(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "FOLDER", tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build.warn()  # a source tree that was never built
        assert build.outcome() == "unknown"
        (tmp_path / "build.txt").write_text("CPU and CUDA (9.0a)\n\n")
        build.warn()
        assert (build.outcome(), build.complaint()) == ("CPU and CUDA (9.0a)", "")
    (tmp_path / "build.txt").write_text("CPU\nsnows: installed without CUDA kernels (log: {log}).\n")
    with pytest.warns(UserWarning, match="^snows: installed without CUDA") as caught:
        build.warn()
    assert str(caught[0].message) == f"snows: installed without CUDA kernels (log: {tmp_path / 'build.log'})."
    monkeypatch.setenv("SNOWS_REFERENCE", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build.warn()
