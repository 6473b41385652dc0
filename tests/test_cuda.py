"""The ops of the native CUDA part: what defines them, the kernels themselves emulated on the host, and on a GPU where there is one.

Without a GPU the kernels of csrc/cuda are compiled twice: by the host's compiler against `emulation/cuda_on_host.h`, which runs
them as they stand, and by nvcc, whose machine code is asked for registers, spills and 16-byte loads.
"""

import ctypes
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from oracles import Dense
from torch import Tensor

from snows import ops, reference
from snows.solving.cg import Stop, batched_cg, cg
from snows.solving.operators import LinearOperator

ROOT = Path(__file__).parents[1]
CUDA = ROOT / "csrc/cuda"
VECTORS = 1027  # not a multiple of 4
HERE = ("nm_mask", "nm_select", "cg_direction", "cg_update", "batched_cg_update")  # the ops of this file
PUBLIC = {op: getattr(ops, op) for op in HERE}  # tests put kernels in their place


def run(*command):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


REFERENCE = {op: getattr(reference, op) for op in HERE}


class OnDevice:
    """The ops as they are, or their references, on a device; arguments and results stay on the CPU."""

    def __init__(self, device, functions):
        self.device, self.functions = device, functions

    def select(self, scores, n, m):
        scores = scores.to(self.device)
        return self.functions["nm_mask"](scores, n, m).cpu(), *(
            out.cpu() for out in self.functions["nm_select"](scores, n, m)
        )

    def __getattr__(self, op):
        def changed(*arguments):
            moved = [a.to(self.device, copy=True) if isinstance(a, Tensor) else a for a in arguments]
            self.functions[op](*moved)
            for before, after in zip(arguments, moved, strict=True):
                if isinstance(before, Tensor):
                    before.copy_(after)

        return changed


class Emulated:
    """The CUDA kernels on the host, three blocks at a time."""

    def __init__(self, library):
        self.library = library

    def _call(self, name, *arguments):
        getattr(self.library, name)(
            *(
                ctypes.c_void_p(a.data_ptr())
                if isinstance(a, Tensor)
                else ctypes.c_double(a)
                if isinstance(a, float)
                else ctypes.c_int64(a)
                for a in arguments
            )
        )

    def select(self, scores, n, m):
        rows, columns = scores.shape
        bytes_ = -(-columns // 8)
        mask = torch.full((rows * columns + 16,), 7, dtype=torch.uint8)
        bits, codes = torch.full((2, rows * bytes_ + 16), 0xFF, dtype=torch.uint8)
        name = f"select_{'double' if scores.dtype == torch.float64 else 'float'}"
        nothing = torch.empty(0)
        self._call(name, scores, rows, columns, n, m, mask, nothing, nothing)
        self._call(name, scores, rows, columns, n, m, nothing, bits, codes if (n, m) == (2, 4) else nothing)
        assert mask[rows * columns :].eq(7).all(), "written beyond the end"
        assert bits[rows * bytes_ :].eq(0xFF).all(), "written beyond the end"
        codes = (
            codes[: rows * bytes_].view(rows, bytes_)
            if (n, m) == (2, 4)
            else torch.empty(rows, 0, dtype=torch.uint8)
        )
        return (
            mask[: rows * columns].view(rows, columns).bool(),
            bits[: rows * bytes_].view(rows, bytes_),
            codes,
        )

    def cg_direction(self, p, r, z, state):
        self._call("cg_direction", p, r, z, p.numel(), state, 1, 3)

    def cg_update(self, x, r, p, Ap, state, rtol):
        self._call("cg_update", x, r, p, Ap, x.numel(), state, rtol, 1, 3)

    def batched_cg_update(self, x, r, p, rz, product, mask, inverse, target):
        wide = x.shape[2] % 4 == 0
        self._call("batched_cg_update", x, r, p, rz, product, mask, inverse, target, *x.shape, int(wide), 32)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None or os.uname().sysname != "Linux":
        pytest.skip("needs a C++ compiler and Linux's ucontext")
    path = tmp_path_factory.mktemp("emulation") / "emulation.so"
    run(
        compiler,
        "-std=c++17",
        "-O1",
        "-shared",
        "-fPIC",
        "-pthread",
        "-Wall",
        "-Wno-unknown-pragmas",
        f"-I{CUDA}",
        ROOT / "tests/emulation/emulation.cpp",
        "-o",
        path,
    )
    return ctypes.CDLL(str(path))


gpu = pytest.param(
    "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
)


@pytest.fixture(params=["reference", "cpu", "emulated", gpu])
def kernels(request):
    if request.param == "emulated":
        return Emulated(request.getfixturevalue("library"))
    return OnDevice("cpu", REFERENCE) if request.param == "reference" else OnDevice(request.param, PUBLIC)


def selected(scores, n, m):
    """The mask, its bits and 2:4's codes by sorting each group and writing out each byte."""
    rows, columns = scores.shape
    mask = torch.zeros(rows, columns, dtype=torch.bool)
    bits, codes = torch.zeros(2, rows, -(-columns // 8), dtype=torch.int64)
    for i, row in enumerate(scores.tolist()):
        for start in range(0, columns, m):
            order = sorted(range(start, min(start + m, columns)), key=lambda j: (-row[j], j))
            mask[i, order[:n]] = True
        for j in range(columns):
            bits[i, j // 8] += int(mask[i, j]) << j % 8
        for group in range(2 * codes.shape[1]):
            padded = [row[j] if j < columns else -torch.inf for j in range(4 * group, 4 * group + 4)]
            first, second = sorted(sorted(range(4), key=lambda j: (-padded[j], j))[:2])
            codes[i, group // 2] += (first | second << 2) << 4 * (group % 2)
    return (
        mask,
        bits.to(torch.uint8),
        codes.to(torch.uint8) if (n, m) == (2, 4) else torch.empty(rows, 0, dtype=torch.uint8),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("n", "m", "shape"),
    [
        (2, 4, (3, 2800)),
        (2, 4, (5, 31)),
        (2, 4, (3, 8)),
        (2, 4, (3, 12)),
        (2, 4, (1, 3)),
        (2, 4, (2, 5)),
        (1, 4, (2, 4100)),
        (1, 2, (7, 50)),
        (2, 3, (4, 1000)),
        (3, 8, (6, 1624)),
        (5, 7, (3, 1801)),
        (7, 16, (2, 4112)),
        (9, 17, (2, 170)),
        (31, 32, (3, 96)),
        (5, 32, (2, 70)),
        (2, 4, (0, 8)),
        (2, 4, (3, 0)),
    ],
)
def test_selection(kernels, n, m, shape, dtype):
    scores = torch.randint(-3, 4, shape).to(dtype)  # ties everywhere
    scores[scores == -3] = -torch.inf
    scores[torch.rand(shape) < 0.1] = -0.0
    for found, expected in zip(kernels.select(scores, n, m), selected(scores, n, m), strict=True):
        assert torch.equal(found, expected)


def test_selection_of_scores_that_do_not_lie_on_16_bytes(kernels):
    scores = torch.randn(1 + 3 * 16)[1:].view(3, 16)
    for found, expected in zip(kernels.select(scores, 2, 4), selected(scores, 2, 4), strict=True):
        assert torch.equal(found, expected)


def state(status=reference.RUNNING, iterations=3, rz=2.0, rr=3.0, bb=4.0):
    return torch.tensor([status, iterations, rz, rr, bb], dtype=torch.float64)


def test_a_step_of_cg(kernels):
    x, r, p = torch.randn(3, VECTORS)
    Ap = p * torch.rand(VECTORS)
    now, wide = state(rz=7.0, bb=1e6), [v.double() for v in (x, r, p, Ap)]
    kernels.cg_update(x, r, p, Ap, now, 1e-2)
    alpha = 7.0 / (wide[2] @ wide[3])
    expected = wide[1] - alpha * wide[3]
    assert torch.allclose(x.double(), wide[0] + alpha * wide[2], atol=1e-6)
    assert torch.allclose(r.double(), expected, atol=1e-6)
    assert now[reference.RR].item() == pytest.approx((expected @ expected).item(), rel=1e-5)
    assert now[[reference.STATUS, reference.ITERATIONS, reference.RZ, reference.BB]].tolist() == [
        reference.RUNNING,
        4,
        7,
        1e6,
    ]
    kernels.cg_update(x, r, p, Ap, now, 1.0)
    assert now[:2].tolist() == [reference.CONVERGED, 5]


def test_a_direction_of_cg(kernels):
    p, r, z = torch.randn(3, VECTORS)
    now, wide = state(rz=-3.0), [v.double() for v in (p, r, z)]
    kernels.cg_direction(p, r, z, now)
    rz = (wide[1] @ wide[2]).item()
    assert now.tolist() == pytest.approx([reference.RUNNING, 3, rz, 3.0, 4.0], rel=1e-5)
    assert torch.allclose(p.double(), wide[2] + rz / -3.0 * wide[0], atol=1e-4)
    first = torch.zeros(VECTORS)
    kernels.cg_direction(first, r, z, state(rz=torch.inf))
    assert torch.equal(first, z)


@pytest.mark.parametrize(
    ("iterations", "scale", "status"),
    [
        (0, -1.0, reference.NEGATIVE_CURVATURE),
        (2, -1.0, reference.NEGATIVE_CURVATURE),
        (2, 0.0, reference.NEGATIVE_CURVATURE),
        (1, torch.nan, reference.NOT_FINITE),
        (0, torch.inf, reference.NOT_FINITE),
    ],
)
def test_cg_leaves(kernels, iterations, scale, status):
    x, (r, p) = torch.zeros(VECTORS), torch.randn(2, VECTORS)
    now, before = state(iterations=iterations), r.clone()
    kernels.cg_update(x, r, p, p * scale, now, 1e-2)
    assert torch.equal(
        x, p if iterations == 0 and status == reference.NEGATIVE_CURVATURE else torch.zeros_like(p)
    )
    assert torch.equal(r, before)
    assert now.tolist() == [status, iterations + 1, 2.0, 3.0, 4.0]


@pytest.mark.parametrize(
    "status", [reference.CONVERGED, reference.NEGATIVE_CURVATURE, reference.NOT_FINITE, reference.ZERO]
)
def test_once_stopped_nothing_is_written(kernels, status):
    x, r, p, z = torch.randn(4, VECTORS)
    Ap, now = torch.full_like(p, torch.nan), state(status=status)
    before = [v.clone() for v in (x, r, p, now)]
    kernels.cg_update(x, r, p, Ap, now, 1e-2)
    kernels.cg_direction(p, r, z, now)
    assert all(torch.equal(a, b) for a, b in zip((x, r, p, now), before, strict=True))


def spd(n):
    Q = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64)).Q
    return Q @ torch.diag(torch.logspace(0, 1, n, dtype=torch.float64)) @ Q.T


class Inverse(LinearOperator):
    """The inverse of a diagonal, as a preconditioner."""

    def __init__(self, diagonal):
        self.diagonal = diagonal

    def __matmul__(self, v):
        return v / self.diagonal


@pytest.mark.parametrize("preconditioned", [False, True])
def test_cg_solves_by_every_kernel_and_to_the_last_bit_alike(kernels, monkeypatch, preconditioned):
    monkeypatch.setattr(ops, "cg_update", kernels.cg_update)
    monkeypatch.setattr(ops, "cg_direction", kernels.cg_direction)
    matrix, b = spd(70), torch.randn(70)
    A, P = Dense(matrix.float()), Inverse(matrix.diagonal().float()) if preconditioned else None
    found = cg(A, b, preconditioner=P, rtol=1e-4, max_iterations=200)
    assert found.stop is Stop.CONVERGED
    assert ((matrix @ found.x.double() - b).norm() / b.norm()).item() == pytest.approx(
        found.residual, rel=0.1
    )
    again = cg(A, b, preconditioner=P, rtol=1e-4, max_iterations=200)
    assert torch.equal(again.x, found.x)
    assert again[1:] == found[1:]


def test_looking_seldom_changes_nothing(kernels, monkeypatch):
    class Counted(Dense):
        products = 0

        def __matmul__(self, v):
            self.products += 1
            return super().__matmul__(v)

    monkeypatch.setattr(ops, "cg_update", kernels.cg_update)
    monkeypatch.setattr(ops, "cg_direction", kernels.cg_direction)
    A, b = Counted(spd(40).float()), torch.randn(40)
    often = cg(A, b, rtol=1e-2, max_iterations=200)
    assert A.products == often.iterations
    seldom = cg(A, b, rtol=1e-2, max_iterations=200, check_every=8)
    assert torch.equal(seldom.x, often.x)
    assert seldom[1:] == often[1:]
    assert A.products == often.iterations + next(i for i in range(7, 200, 8) if i >= often.iterations)


def test_a_step_of_batched_cg(kernels):
    for columns in (148, 37):
        x, r, p, product = torch.randn(4, 2, 3, columns)
        mask = torch.rand(2, 3, columns) < 0.5
        r, p = r * mask, p * mask
        inverse, rz, target = (
            torch.rand(2, columns) + 0.5,
            torch.rand(2, 3).double() + 1,
            torch.zeros(2, 3).double(),
        )
        product[:] = (
            p * (torch.rand_like(p) + 0.1) + torch.randn_like(p) * ~mask
        )  # what lies off the mask must not count
        rz[0, 1] = 0  # done before
        product[1, 0] *= -1  # no curvature left
        target[1, 2] = 1e9  # done by this step
        before = [v.clone() for v in (x, r, p)]
        X, R, P = (v.double() for v in before)
        alpha = (rz / (P * product.double() * mask).sum(-1)).unsqueeze(-1)
        expected = X + alpha * P, R - alpha * product.double() * mask
        Z = expected[1] * inverse.double().unsqueeze(1)
        left = (expected[1] * Z).sum(-1)
        turned = Z + (left / rz).unsqueeze(-1) * P
        kernels.batched_cg_update(x, r, p, rz, product, mask, inverse, target)
        stepped = torch.tensor([[1, 0, 1], [0, 1, 1]], dtype=torch.bool)
        running = torch.tensor([[1, 0, 1], [0, 1, 0]], dtype=torch.bool)
        for found, old, new, rows in zip(
            (x, r, p), before, (*expected, turned), (stepped, stepped, running), strict=True
        ):
            assert torch.equal(found[~rows], old[~rows])
            assert torch.allclose(found[rows].double(), new[rows], rtol=1e-4, atol=1e-4)
        assert torch.allclose(rz, left * running, rtol=1e-4)


def test_batched_cg_solves_by_every_kernel(kernels, monkeypatch):
    monkeypatch.setattr(ops, "batched_cg_update", kernels.batched_cg_update)
    X = torch.randn(2, 90, 20)
    gram, right, mask = X.mT @ X / 90, torch.randn(2, 5, 20), torch.rand(2, 5, 20) < 0.5
    found = batched_cg(gram, right, mask, rtol=1e-5)
    for g in range(2):
        damped = gram[g].double() + 0.01 * gram[g].diagonal().mean() * torch.eye(20)
        for i in range(5):
            keep = mask[g, i]
            assert not found[g, i][~keep].any()
            assert torch.allclose(
                found[g, i][keep].double(),
                torch.linalg.solve(damped[keep][:, keep], right[g, i][keep].double()),
                atol=1e-4,
            )


def test_opcheck():
    registered = torch.ops.snows
    r, p, q, x = torch.randn(4, 6)
    for op, arguments in (
        (registered.nm_select, (torch.randn(4, 9), 2, 4)),
        (registered.nm_select, (torch.randn(4, 9), 3, 5)),
        (registered.cg_update, (x, r, p, q, state(), 1e-2)),
        (registered.cg_direction, (p, r, q, state())),
        (
            registered.batched_cg_update,
            (
                *torch.rand(3, 2, 3, 5),
                torch.rand(2, 3).double(),
                torch.rand(2, 3, 5),
                torch.rand(2, 3, 5) < 0.5,
                torch.rand(2, 5) + 1,
                torch.rand(2, 3).double(),
            ),
        ),
    ):
        torch.library.opcheck(op.default, arguments)


V, S = torch.ones(4), state()


@pytest.mark.parametrize(
    ("op", "arguments", "message"),
    [
        (
            "nm_select",
            (torch.ones(2, 4, dtype=torch.int32), 2, 4),
            "nm_select: expected scores to be a matrix of .*got .2, 4. torch.int32",
        ),
        ("nm_select", (torch.ones(2, 64), 33, 33), "nm_select: expected 0 < n < m, got n = 33, m = 33"),
        ("nm_select", (torch.full((1, 4), torch.nan), 2, 4), "nm_select: expected scores without NaN"),
        (
            "cg_update",
            (V, V, V, V.double(), S, 0.1),
            "cg_update: expected Ap to be .4,. torch.float32 on cpu, got .4,. torch.float64",
        ),
        (
            "cg_update",
            (V, V, V.to("meta"), V, S, 0.1),
            "cg_update: expected p to be .* on cpu, got .* on meta",
        ),
        ("cg_update", (V, V[::2], V, V, S, 0.1), "cg_update: expected r to be"),
        (
            "cg_update",
            (V.long(), V, V, V, S, 0.1),
            "cg_update: expected x to be floating point, got torch.int64",
        ),
        (
            "cg_update",
            (torch.ones(2, 3).T, *torch.ones(3, 3, 2), S, 0.1),
            "cg_update: expected x to be contiguous",
        ),
        ("cg_direction", (V, V, V, S.float()), "cg_direction: expected state to be .5,. torch.float64"),
        (
            "batched_cg_update",
            (V, V, V, V, V, V, V, V),
            "batched_cg_update: expected x to be .groups, rows, columns.",
        ),
        (
            "batched_cg_update",
            (
                *torch.ones(3, 1, 2, 4),
                torch.ones(1, 2).double(),
                torch.ones(1, 2, 4),
                torch.ones(1, 2, 4),
                V[None],
                torch.ones(1, 2),
            ),
            "batched_cg_update: expected mask to be .1, 2, 4. torch.bool",
        ),
    ],
)
def test_what_does_not_fit_is_refused(op, arguments, message):
    with pytest.raises(ValueError, match=message):
        getattr(ops, op)(*arguments)


NM = "template __global__ void snows::nm_select_kernel<{0}, {1}, {2}>(snows::Selection<{0}>);"
UPDATE = (
    "template __global__ void snows::cg_update_kernel<{0}, {1}>({0}*, {0}*, const {0}*, const {0}*, int64_t, snows::State*, double, "
    "double*);"
)
DIRECTION = "template __global__ void snows::cg_direction_kernel<{0}, {1}>({0}*, const {0}*, const {0}*, int64_t, snows::State*, double*);"
BATCHED = "template __global__ void snows::batched_cg_kernel<{0}, {1}>(snows::Rows<{0}>);"
WIDE = [("float", 4), ("double", 2), ("__half", 8), ("__nv_bfloat16", 8)]
COMPILED = {  # by header: what is instantiated, and the most registers that a thread may take
    "nm_select": (
        [NM.format(T, 4, "true") for T, _ in WIDE] + [NM.format("float", M, "true") for M in (2, 8, 16)],
        64,
    ),
    "nm_select of 32": ([NM.format("float", 32, "true"), NM.format("double", 32, "false")], 128),
    "cg": ([kernel.format(*w) for kernel in (UPDATE, DIRECTION) for w in WIDE], 80),
    "batched_cg": ([BATCHED.format(*w) for w in WIDE], 80),
}


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.parametrize("name", COMPILED)
def test_nvcc_compiles_without_spills_and_with_16_byte_loads(name, tmp_path):
    kernels, most = COMPILED[name]
    source = tmp_path / "kernels.cu"
    source.write_text("\n".join([f'#include "{name.split()[0]}.cuh"', *kernels]))
    for arch in ("80", "90a"):
        log = run(
            "nvcc",
            "-std=c++17",
            f"-gencode=arch=compute_{arch},code=sm_{arch}",
            "-cubin",
            "-Xptxas",
            "-v",
            f"-I{CUDA}",
            "--keep",
            "--keep-dir",
            tmp_path,
            source,
            "-o",
            tmp_path / "kernels.cubin",
        )
        registers = [int(n) for n in re.findall(r"Used (\d+) registers", log)]
        assert len(registers) == len(kernels)
        assert max(registers) <= most, log
        assert log.count("0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads") == len(kernels), (
            log
        )
        assembly = (tmp_path / "kernels.ptx").read_text().split(".entry")[1:]
        assert len(assembly) == len(kernels)
        for entry in assembly:
            ragged = "Lb0E" in entry.split("(")[0]  # the kernel for what is not aligned
            assert ragged != bool(
                re.search(r"ld\.global(\.nc)?\.v4\.[ubf]32|ld\.global(\.nc)?\.v2\.[ubf]64", entry)
            ), entry.split("(")[0]
        if shutil.which("cuobjdump"):
            sass = run("cuobjdump", "-sass", tmp_path / "kernels.cubin")
            for function in sass.split("Function :")[1:]:
                assert ("Lb0E" in function.split()[0]) != ("LDG.E.128" in function), function.split()[0]
