"""The packed layers on sparse tensor cores: the kernels emulated on the host, compiled by nvcc, and on a GPU where there is one.

`emulation/tensor_core_on_host.h` has the instructions from the PTX manual's tables, so that a kernel that gives an operand to the wrong
lane, reads a line before it has landed or a stage before it is safe is wrong on a CPU too. Weights and inputs are small integers: their
sums are exact, and what is compared is compared bit for bit.
"""

import ctypes
import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

from snows import NM, ops
from snows.layers import SparseLinear
from snows.packing import pack
from snows.sparsity import rows

ROOT = Path(__file__).parents[1]
CUDA = ROOT / "csrc/cuda"
LARGE, MEDIUM, SMALL, WGMMA = range(4)
DTYPES = [torch.float16, torch.bfloat16]
TILE, WORDS = 32, 288  # kernel_order.cuh
GUARD = 64  # numbers around a tensor that no kernel may touch
TWO_OF_FOUR = NM(2, 4)


def run(*command):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def address(x):
    return ctypes.c_void_p(0 if x is None else x.data_ptr())


def integers(*shape):
    return torch.randint(-2, 3, shape).float()


def sparse_weight(*shape, dtype):
    """A 2:4 weight of small integers, zeros among the kept and groups that keep fewer than two: dense and packed."""
    out, columns = rows(torch.empty(shape, device="meta")).shape
    scores = F.pad(torch.rand(out, columns), (0, -columns % 4), value=-1.0)
    mask = TWO_OF_FOUR.mask(scores)[:, :columns] & (torch.rand(out, columns) < 0.9)
    matrix = torch.where(
        mask, integers(out, columns).masked_fill(torch.rand(out, columns) < 0.1, -0.0), 0
    ).to(dtype)
    weight, mask = (
        m if len(shape) == 2 else m.view(out, *shape[2:], shape[1]).permute(0, 3, 1, 2)
        for m in (matrix, mask)
    )
    return weight, pack(weight, mask, TWO_OF_FOUR)


def guarded(x):
    """x between NaNs, on 16 bytes: what is read beyond it shows."""
    room = torch.full((x.numel() + 2 * GUARD,), torch.nan, dtype=x.dtype)
    room[GUARD : GUARD + x.numel()] = x.flatten()
    return room[GUARD : GUARD + x.numel()].view(x.shape)


class Poisoned:
    """NaN where results are to stand, and behind them."""

    def __init__(self, count, dtype):
        self.count, self.room = count, torch.full((count + GUARD,), torch.nan, dtype=dtype)

    def result(self, *shape):
        assert self.room[self.count :].isnan().all(), "written beyond the end"
        return self.room[: self.count].view(shape)


class Emulated:
    """The kernels on the host: `late` copies land when they are waited for, else at once; `backwards`, the last warp runs first."""

    def __init__(self, library):
        self.library = library

    def adversary(self, late, backwards):
        self.library.adversary(int(late), int(backwards))

    def order(self, packed):
        out, columns = rows(torch.empty(packed.shape, device="meta")).shape
        count = -(-out // TILE) * -(-columns // (2 * TILE)) * 2 * WORDS
        order = torch.full((count + GUARD,), -1, dtype=torch.int32)
        self.library.kernel_order(
            address(packed.values),
            address(packed.codes),
            ctypes.c_int64(out),
            ctypes.c_int64(columns),
            address(order),
        )
        assert order[count:].eq(-1).all(), "written beyond the end"
        return order[:count]

    def linear(self, x, packed, bias, activation, how):
        out, columns = packed.shape
        x, order = guarded(x), self.order(packed)
        result, partial = Poisoned(len(x) * out, x.dtype), Poisoned(how[1] * len(x) * out, torch.float32)
        self.library.sparse_linear(
            self._how(x, *how),
            address(order),
            out,
            columns,
            address(bias),
            address(result.room),
            address(partial.room),
            ops.ACTIVATIONS.index(activation),
            address(x),
            len(x),
        )
        return result.result(len(x), out)

    def conv2d(self, x, packed, bias, settings, activation, how):
        images, channels, height, width = x.shape
        out, _, *kernel = packed.shape
        size = [
            (side + 2 * p - d * (k - 1) - 1) // s + 1
            for side, k, s, p, d in zip((height, width), kernel, *settings, strict=True)
        ]
        x, order = guarded(x.permute(0, 2, 3, 1)), self.order(packed)
        count = images * out * size[0] * size[1]
        result, partial = Poisoned(count, x.dtype), Poisoned(how[1] * count, torch.float32)
        sizes = (ctypes.c_int * 13)(
            channels, height, width, *kernel, *size, *(v for pair in settings for v in pair)
        )
        self.library.sparse_conv2d(
            self._how(x, *how),
            address(order),
            out,
            address(bias),
            address(result.room),
            address(partial.room),
            ops.ACTIVATIONS.index(activation),
            address(x),
            images,
            sizes,
        )
        return result.result(images, *size, out).permute(0, 3, 1, 2)

    def _how(self, x, shape, splits, wide):
        return (ctypes.c_int * 4)(int(x.dtype == torch.bfloat16), shape, splits, int(wide))


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None or os.uname().sysname != "Linux" or os.uname().machine != "x86_64":
        pytest.skip("needs a C++ compiler with _Float16 and Linux's ucontext")
    path = tmp_path_factory.mktemp("emulation") / "sparse.so"
    run(
        compiler,
        "-std=c++17",
        "-O2",
        "-shared",
        "-fPIC",
        "-pthread",
        "-Wall",
        "-Wno-unknown-pragmas",
        f"-I{CUDA}",
        ROOT / "tests/emulation/sparse.cpp",
        "-o",
        path,
    )
    return ctypes.CDLL(str(path))


@pytest.fixture(params=["late", "late, last warp first", "at once", "at once, last warp first"])
def adversary(request, library):
    emulated = Emulated(library)
    emulated.adversary("late" in request.param, "last" in request.param)
    return emulated


@pytest.fixture
def emulated(library):
    emulated = Emulated(library)
    emulated.adversary(True, False)
    return emulated


def check(found: Tensor, sums: Tensor, activation: str) -> None:
    """Rounded once from exact sums; by gelu, which float32 computes, to half a unit more."""
    wanted = ops.reference.activate(sums, activation) if activation != "relu" else sums.relu()
    if activation == "gelu":
        unit = torch.finfo(found.dtype).eps
        assert ((found.double() - wanted).abs() <= unit * (wanted.abs() + 1e-3)).all()
    else:
        assert torch.equal(found, wanted.to(found.dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(40, 72), (32, 64), (1, 4), (33, 67), (5, 6), (70, 200)])
def test_the_order_is_a_permutation_that_the_instruction_s_tables_give(emulated, dtype, shape):
    weight, packed = sparse_weight(*shape, dtype=dtype)
    down, across = -(-shape[0] // TILE), -(-shape[1] // (2 * TILE)) * 2
    tiles = emulated.order(packed).view(down, across, WORDS)
    found = torch.zeros(down * TILE, across * TILE, dtype=dtype)
    for i in range(down):
        for j in range(across):
            fragments = tiles[i, j, :256].view(dtype).view(2, 32, 8)  # half, lane, element
            for half in range(2):
                for lane in range(32):
                    for e in range(8):
                        row, stored = (
                            lane // 4 + (8 if e % 4 >= 2 else 0),
                            2 * (lane % 4) + e % 2 + (8 if e >= 4 else 0),
                        )
                        group, second = divmod(stored, 2)
                        word = int(tiles[i, j, 256 + 4 * (row % 8) + 2 * half + group // 4]) >> 16 * (
                            row // 8
                        )
                        place = word >> 4 * (group % 4) + 2 * second & 3
                        found[TILE * i + 16 * half + row, TILE * j + 4 * group + place] += fragments[
                            half, lane, e
                        ]
    padded = F.pad(weight, (0, across * TILE - shape[1], 0, down * TILE - shape[0]))
    assert torch.equal(found, padded + 0.0)


def test_words_of_codes_are_those_of_torch_s_own_converter(emulated):
    scores = torch.rand(128, 192)
    weight = (TWO_OF_FOUR.mask(scores) * (scores + 1)).bfloat16()
    values, codes = sparse_semi_structured_from_dense_cutlass(weight)
    packed = pack(weight, None, TWO_OF_FOUR)
    assert torch.equal(packed.values, values)
    tiles = emulated.order(packed).view(4, 6, WORDS)
    assert torch.equal(tiles[..., 256:].transpose(0, 1), codes.flatten().view(torch.int32).view(6, 4, 32))


def test_all_six_codes(emulated):
    pairs = [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
    mask = torch.zeros(32, 16, 4, dtype=torch.bool)
    for row in range(32):
        for group in range(16):
            mask[row, group, pairs[(row + group) % 6]] = True
    weight = torch.where(mask, torch.randint(1, 3, mask.shape), 0).view(32, 64).half()
    x = torch.randint(-20, 20, (9, 64)).half()
    found = emulated.linear(x, pack(weight, mask.view(32, 64), TWO_OF_FOUR), None, "none", (SMALL, 1, True))
    check(found, x.double() @ weight.double().T, "none")


LINEAR = [  # tokens, out, in; shape, splits, wide
    (1, 40, 72, (SMALL, 1, True)),
    (16, 96, 512, (SMALL, 3, True)),
    (13, 65, 456, (SMALL, 1, True)),
    (9, 33, 136, (SMALL, 5, True)),
    (70, 100, 456, (MEDIUM, 2, True)),
    (65, 72, 64, (MEDIUM, 1, True)),
    (37, 33, 67, (MEDIUM, 1, False)),
    (3, 7, 330, (MEDIUM, 2, False)),
    (131, 136, 328, (LARGE, 1, True)),
    (20, 3, 200, (LARGE, 2, True)),
    (131, 136, 328, (WGMMA, 1, True)),
    (20, 3, 64, (WGMMA, 1, True)),
    (1, 264, 72, (WGMMA, 1, True)),
    (65, 250, 136, (WGMMA, 1, True)),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "out", "width", "how"), LINEAR)
def test_linear(emulated, dtype, tokens, out, width, how):
    weight, packed = sparse_weight(out, width, dtype=dtype)
    x, bias = integers(tokens, width).to(dtype), integers(out).to(dtype)
    sums = x.double() @ weight.double().T
    for activation, b in (
        (("none", None), ("relu", bias))
        if tokens > 64
        else (("none", bias), ("relu", bias), ("gelu", None), ("gelu", bias))
    ):
        check(emulated.linear(x, packed, b, activation, how), sums if b is None else sums + b, activation)


@pytest.mark.parametrize(
    ("tokens", "out", "width", "how"),
    [
        (16, 64, 840, (SMALL, 1, True)),
        (9, 64, 1000, (SMALL, 2, True)),
        (40, 64, 650, (MEDIUM, 1, False)),
        (64, 64, 520, (MEDIUM, 1, True)),
        (128, 128, 320, (LARGE, 1, True)),
        (128, 256, 840, (WGMMA, 1, True)),
        (128, 256, 520, (WGMMA, 1, True)),
    ],
)
def test_no_line_is_read_before_it_lands_nor_overwritten_before_it_is_read(
    adversary, tokens, out, width, how
):
    weight, packed = sparse_weight(out, width, dtype=torch.float16)
    x = integers(tokens, width).half()
    check(adversary.linear(x, packed, None, "none", how), x.double() @ weight.double().T, "none")


CONV = [  # images, channels, height, width; out, kernel; stride, padding, dilation; shape, splits, wide
    ((2, 8, 7, 6), (24, 3, 3), ((1, 1), (1, 1), (1, 1)), (MEDIUM, 1, True)),
    ((1, 16, 9, 11), (40, 3, 5), ((2, 1), (1, 2), (1, 2)), (MEDIUM, 2, True)),
    ((3, 8, 5, 5), (9, 1, 1), ((2, 2), (0, 0), (1, 1)), (MEDIUM, 1, True)),
    ((2, 24, 4, 4), (70, 2, 3), ((1, 2), (3, 0), (2, 1)), (LARGE, 1, True)),
    ((1, 64, 3, 3), (64, 3, 3), ((1, 1), (1, 1), (1, 1)), (SMALL, 3, True)),
    ((2, 3, 8, 7), (10, 3, 3), ((1, 1), (1, 1), (1, 1)), (MEDIUM, 1, False)),
    ((1, 12, 6, 9), (16, 3, 2), ((3, 2), (2, 1), (1, 3)), (MEDIUM, 2, False)),
    ((1, 5, 1, 1), (4, 2, 2), ((1, 1), (1, 1), (1, 1)), (MEDIUM, 1, False)),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("input_shape", "weight_shape", "settings", "how"), CONV)
def test_convolution(emulated, dtype, input_shape, weight_shape, settings, how):
    weight, packed = sparse_weight(weight_shape[0], input_shape[1], *weight_shape[1:], dtype=dtype)
    x, bias = integers(*input_shape).to(dtype), integers(weight_shape[0]).to(dtype)
    sums = F.conv2d(x.double(), weight.double(), None, *settings)
    check(emulated.conv2d(x, packed, None, settings, "none", how), sums, "none")
    check(
        emulated.conv2d(x, packed, bias, settings, "relu", how), sums + bias.double().view(-1, 1, 1), "relu"
    )


def test_the_choice_fills_the_processors(emulated):
    def choose(*arguments):
        found = (ctypes.c_int64 * 3)()
        emulated.library.choose(*(ctypes.c_int64(a) for a in arguments[:3]), *arguments[3:], found)
        return tuple(found)

    assert choose(3072, 768, 197 * 64, 1, 132) == (LARGE, 24 * 99, 1)
    assert choose(3072, 768, 128 * 11, 1, 132) == (LARGE, 24 * 11, 1)  # two for each processor
    assert choose(3072, 768, 128 * 10, 1, 132) == (MEDIUM, 48 * 20, 1)
    assert choose(768, 3072, 197, 1, 132) == (MEDIUM, 12 * 4 * 5, 5)
    assert choose(1024, 4096, 16, 1, 132) == (SMALL, 16 * 16, 16)
    assert choose(1024, 64, 1, 1, 132) == (SMALL, 16, 1)  # too few columns to split
    assert choose(3072, 770, 197 * 64, 0, 132) == (MEDIUM, 48 * 197, 1)
    for rows_and_tokens, wide, taken in (
        ((768, 197 * 64), 1, True),
        ((768, 197 * 16), 1, False),
        ((768, 197 * 64), 0, False),
    ):
        assert (
            bool(emulated.library.wgmma_takes(*(ctypes.c_int64(a) for a in rows_and_tokens), wide, 132))
            == taken
        )


def disassembler():
    """cuobjdump, from a toolkit or from Triton's wheel; None where there is none."""
    triton = importlib.util.find_spec("triton")
    wheel = (
        f"{Path(triton.origin).parent}/backends/nvidia/bin"
        if triton is not None and triton.origin is not None
        else ""
    )
    return shutil.which("cuobjdump") or shutil.which("cuobjdump", path=wheel)


PRODUCT = "template __global__ void snows::sparse_product_kernel<{0}, snows::{1}, snows::{2}>(snows::Product<{0}>, snows::{2});"
MOST = {
    "Large": 255,
    "Medium": 102,
    "Small": 80,
}  # registers, of 65,536: two blocks of Large, five of Medium on a processor
SOME = [
    ("__nv_bfloat16", "Large", "Tokens<true>"),
    ("__half", "Small", "Tokens<true>"),
    ("__half", "Medium", "Pixels<true>"),
]
REST = [
    ("__nv_bfloat16", "Large", "Pixels<true>"),
    ("__half", "Large", "Tokens<true>"),
    ("__half", "Medium", "Tokens<false>"),
    ("__nv_bfloat16", "Medium", "Pixels<false>"),
]


def compiled(arch, kernels, headers, folder):
    """By nvcc, without spills: registers by kernel, PTX by kernel, machine code by kernel where there is a disassembler, and what nvcc said."""
    if f"sm_{arch.rstrip('a')}\n" not in run("nvcc", "--list-gpu-code") + "\n":
        pytest.skip(f"this nvcc does not know sm_{arch}")
    source, cubin = folder / "kernels.cu", folder / "kernels.cubin"
    source.write_text("\n".join([f'#include "{header}"' for header in headers] + kernels))
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
        folder,
        source,
        "-o",
        cubin,
    )
    registers = {
        name: int(count)
        for name, count in re.findall(
            r"Compiling entry function '(\S+)'.*?Used (\d+) registers", log, re.DOTALL
        )
    }
    assert (
        log.count("0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads")
        == len(registers)
        == len(kernels) + 1
    ), log  # kernel_order
    ptx = {
        entry.split("(")[0].strip(): entry
        for entry in (folder / "kernels.ptx").read_text().split(".entry")[1:]
    }
    tool = disassembler()
    code = (
        {}
        if tool is None
        else {function.split()[0]: function for function in run(tool, "-sass", cubin).split("Function :")[1:]}
    )
    assert not any(re.search(r"\b(LDL|STL)\b", function) for function in code.values())
    return registers, ptx, code, log


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.parametrize(
    ("arch", "kernels"),
    [("80", SOME + REST), ("86", SOME[:1]), ("89", SOME[:1]), ("90a", SOME), ("120", SOME[:1])],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_nvcc_compiles_to_sparse_instructions_without_spills(arch, kernels, tmp_path):
    entries = [
        *(PRODUCT.format(*k) for k in kernels),
        "template __global__ void snows::sum_splits_kernel<__half>(snows::Product<__half>);",
    ]
    registers, ptx, code, _ = compiled(arch, entries, ["sparse_linear.cuh", "sparse_conv2d.cuh"], tmp_path)
    for name, count in registers.items():
        shape = {"Li128ELi128E": "Large", "Li64ELi64E": "Medium", "Li64ELi16E": "Small"}.get(
            (re.findall(r"ShapeI(Li\d+ELi\d+E)", name) or [""])[0]
        )
        assert count <= MOST.get(shape, 64), (name, count)
    products = [entry for name, entry in ptx.items() if "sparse_product" in name]
    assert len(products) == len(kernels)
    for name, entry in ((name, entry) for name, entry in ptx.items() if "sparse_product" in name):
        assert ("ld.shared.u64" in entry) == ("Pixels" in name)  # addresses of tokens are computed, not kept
        assert re.search(r"mma\.sp(::ordered_metadata)?\.sync\.aligned\.m16n8k32", entry)
        assert "ldmatrix.sync.aligned.m8n8.x4" in entry
        assert "cp.async.cg" in entry
        assert re.search(r"ld\.shared\.v4\.[bfu]32", entry)  # a lane's values in one load
    for name, function in code.items():
        assert ("sparse_product" in name) == ("HMMA.SP.16832.F32" in function)


WARPGROUPS = [
    f"template __global__ void snows::wgmma_product_kernel<{t}>(snows::Product<{t}>, snows::Tokens<true>);"
    for t in ("__half", "__nv_bfloat16")
]


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.parametrize("arch", ["90a", "90", "80"])
def test_nvcc_compiles_the_warpgroups_product_for_hopper_alone(arch, tmp_path):
    registers, ptx, code, log = compiled(arch, WARPGROUPS, ["sparse_wgmma.cuh"], tmp_path)
    assert "wgmma" not in re.sub(r"\S*wgmma_product_kernel\S*", "", log), (
        log
    )  # as ptxas says where it lets products wait for each other
    for name in (name for name in ptx if "wgmma_product" in name):
        assert (registers[name] > 128) == (
            arch == "90a"
        )  # by which the layer knows whether there is a kernel
        kind = "bf16" if "bfloat16" in name else "f16"
        assert ptx[name].count(f"wgmma.mma_async.sp.sync.aligned.m64n128k32.f32.{kind}.{kind}") == (
            8 if arch == "90a" else 0
        )  # two steps of four
        if arch == "90a" and code:
            step = r"LDGSTS\.E\.BYPASS\.128|LDG\.E\.128|FENCE\.VIEW\.ASYNC|BAR\.SYNC|WARPGROUP\.\S+ gsb0, 0x1|HGMMA\.SP\.64x128x32\.F32(?:\.BF16)?"
            assert all(len(re.findall(part, code[name])) >= 2 for part in step.split("|"))
            assert len(re.findall(r"HGMMA\.SP\.", code[name])) == 8


gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.fixture
def device():
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("needs sparse tensor cores: compute capability 8.0")
    return torch.device("cuda")


class TestOnGPU:
    pytestmark = gpu

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(
        ("tokens", "out", "width"),
        [
            (0, 64, 64),
            (7, 33, 67),
            (16, 200, 1024),
            (300, 10, 770),
            (129, 512, 32),
            (130, 136, 328),
            *(
                pytest.param(*sizes, id=f"large {sizes}")
                for sizes in (
                    (1, 1024, 4096),
                    (16, 1000, 4096),
                    (197, 768, 3072),
                    (197 * 8, 3072, 768),
                    (197 * 64, 768, 768),
                    (5000, 1031, 1000),
                )
            ),
        ],
    )
    def test_linear(self, device, dtype, tokens, out, width):
        weight, packed = sparse_weight(out, width, dtype=dtype)
        on = packed._replace(values=packed.values.to(device), codes=packed.codes.to(device))
        x, bias = integers(tokens, width).to(device, dtype), integers(out).to(device, dtype)
        sums = (x.double() @ weight.to(device).double().T).cpu()  # whole numbers: exact
        order = ops.kernel_order(on.values, on.codes, on.shape, 2, 4)
        assert order.numel() > 0
        for given in (order, None):
            for activation, b in (("none", None), ("relu", bias), ("gelu", bias)):
                found = ops.sparse_linear(x, on.values, on.codes, b, on.shape, 2, 4, activation, given)
                check(found.cpu(), sums if b is None else sums + b.cpu(), activation)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(
        ("tokens", "out", "width"),
        [
            (128 * 160, 8, 72),
            *(
                pytest.param(*sizes, id=f"large {sizes}")
                for sizes in (
                    (197 * 64, 768, 768),
                    (197 * 64, 768, 3072),
                    (197 * 64, 3072, 768),
                    (10001, 1031, 1000),
                )
            ),
        ],
    )
    def test_linear_by_warpgroups(self, device, dtype, tokens, out, width, monkeypatch):
        if torch.cuda.get_device_capability() != (9, 0):
            pytest.skip("needs Hopper's warpgroups: compute capability 9.0")
        monkeypatch.setenv("SNOWS_WGMMA", "1")  # an error where they are not compiled in
        weight, packed = sparse_weight(out, width, dtype=dtype)
        values, codes = packed.values.to(device), packed.codes.to(device)
        x, bias = integers(tokens, width).to(device, dtype), integers(out).to(device, dtype)
        sums = (x.double() @ weight.to(device).double().T).cpu()  # whole numbers: exact
        for activation, b in (("none", None), ("relu", bias), ("gelu", bias)):
            found = ops.sparse_linear(x, values, codes, b, packed.shape, 2, 4, activation)
            check(found.cpu(), sums if b is None else sums + b.cpu(), activation)

    @pytest.mark.parametrize("last", [False, True])
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(
        ("input_shape", "weight_shape", "settings"),
        [
            *(case[:3] for case in CONV),
            ((0, 8, 9, 9), (8, 3, 3), ((1, 1), (1, 1), (1, 1))),
            *(
                pytest.param(*sizes, id=f"large {sizes}")
                for sizes in (
                    ((8, 256, 14, 14), (256, 3, 3), ((1, 1), (1, 1), (1, 1))),
                    ((64, 64, 56, 56), (64, 3, 3), ((2, 2), (1, 1), (1, 1))),
                    ((4, 3, 64, 64), (64, 7, 7), ((2, 2), (3, 3), (1, 1))),
                    ((16, 512, 7, 7), (512, 1, 1), ((1, 1), (0, 0), (1, 1))),
                )
            ),
        ],
    )
    def test_convolution(self, device, dtype, input_shape, weight_shape, settings, last):
        weight, packed = sparse_weight(weight_shape[0], input_shape[1], *weight_shape[1:], dtype=dtype)
        x, bias = integers(*input_shape).to(device, dtype), integers(weight_shape[0]).to(device, dtype)
        x = x.contiguous(memory_format=torch.channels_last) if last else x
        sums = (
            F.conv2d(x.double(), weight.to(device).double(), bias.double(), *settings).round().cpu()
        )  # whole numbers
        values, codes = packed.values.to(device), packed.codes.to(device)
        order = ops.kernel_order(values, codes, packed.shape, 2, 4)
        assert order.numel() > 0
        found = ops.sparse_conv2d(x, values, codes, bias, packed.shape, 2, 4, *settings, "relu", order)
        assert found.is_contiguous(
            memory_format=torch.channels_last
            if x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
            else torch.contiguous_format
        )
        check(found.cpu(), sums, "relu")

    def test_what_the_kernels_do_not_take_is_multiplied_densely(self, device):
        torch.use_deterministic_algorithms(False)  # else cuBLAS wants a variable in the environment; so below
        for dtype, pattern in ((torch.float32, TWO_OF_FOUR), (torch.float16, NM(1, 4))):
            weight = torch.randn(24, 32) * pattern.mask(torch.rand(24, 32))
            layer = SparseLinear(pack(weight.to(dtype), None, pattern)).to(device)
            assert layer.order.numel() == 0
            x = torch.randn(5, 32, device=device).to(dtype)
            assert torch.allclose(layer(x), x @ weight.to(device, dtype).T, atol=1e-2)

    def test_gradients_and_graphs(self, device):
        torch.use_deterministic_algorithms(False)
        dense = torch.nn.Linear(256, 128)
        with torch.no_grad():
            dense.weight.mul_(TWO_OF_FOUR.mask(dense.weight.abs()))
        layer = SparseLinear.from_dense(dense.bfloat16(), TWO_OF_FOUR, activation="gelu").to(device)
        x = torch.randn(40, 256, device=device, dtype=torch.bfloat16, requires_grad=True)
        exact = x.detach().double().requires_grad_()
        layer(x).sum().backward()
        F.gelu(
            F.linear(exact, dense.weight.to(device).double(), dense.bias.to(device).double())
        ).sum().backward()
        assert ((x.grad - exact.grad).norm() / exact.grad.norm()).item() < 1e-2
        with torch.no_grad():
            wanted, graph = layer(x), torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                found = layer(x)
            graph.replay()
        assert torch.equal(found, wanted)
