"""Triton kernels against the reference and float64: in the interpreter on CPU tensors, or, with a GPU, on the device.

Without a GPU they are also compiled ahead of time for both architectures, and what the compiler made of them is read.
"""

import json
import os
import subprocess
import sys
import warnings
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_packing import bits_of, some_mask

from snows import NM, Unstructured, ops, reference
from snows.ops import register, sdpa
from snows.packing import pack

GPU = torch.cuda.is_available()  # without one conftest.py has asked for the interpreter
triton = pytest.importorskip("triton", reason="Triton is not installed")
if (
    not GPU
    and tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7)
    and tuple(map(int, np.__version__.split(".")[:2])) >= (2, 4)
):
    pytest.skip("Triton 3.6's interpreter does not run with NumPy 2.4", allow_module_level=True)
pytestmark = pytest.mark.filterwarnings(
    "ignore:Conversion of an array:DeprecationWarning"
)  # Triton 3.6's interpreter, of NumPy

device = pytest.mark.parametrize("device", [
    pytest.param("cpu", marks=pytest.mark.skipif(GPU, reason="the interpreter is for machines without a GPU")),
    pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not GPU, reason="needs a CUDA device")]),
])  # fmt: skip
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
# Of the norm; half an ulp is 6e-8, 2e-3, 2.4e-4. A tensor core cuts its sums off, which the interpreter does not.
TOLERANCE = {torch.float32: 1e-5 if GPU else 3e-6, torch.bfloat16: 6e-3, torch.float16: 8e-4}


def bits(shape):
    return ops.pack_bits(torch.rand(shape) < 0.5)


def normal(rows, n, weight=True):
    """LayerNorm's point: x, mean, rstd, before, after, shape."""
    x = torch.randn(rows, n) + 0.5
    _, mean, rstd = reference.layer_norm(x, None, None, (n,), 1e-5)
    return x, mean, rstd, torch.randn(n) if weight else None, None if weight else torch.randn(n), (n,)


def heads(h, n, m, w, d, bias=None):
    """Attention's point: q, k, v, out, kept, bias, scale."""
    q, k, v = torch.randn(h, n, w), torch.randn(h, m, w), torch.randn(h, m, d)
    out, kept = reference.attention(q, k, v, bias, 0.3, False)
    return q, k, v, out, kept, bias, 0.3


def some_masked(h, n, m):
    return torch.randn(h, n, m).masked_fill_(torch.rand(h, n, m) < 0.3, -torch.inf)


# op: (file, several argument lists): whole blocks, odd sizes, a view, nothing at all
CALLS = {
    "masked": ("masked", [lambda: (torch.randn(32, 64), bits((32, 64))), lambda: (torch.randn(7, 11), bits((7, 11))),
                          lambda: (torch.randn(9, 8).T, bits((8, 9))), lambda: (torch.randn(0, 3), bits((0, 3)))]),
    "gelu": ("gelu", [lambda: (3 * torch.randn(2, 1024), "none"), lambda: (3 * torch.randn(1001), "tanh"),
                      lambda: (torch.tensor([-30.0, -0.0, 30.0]), "tanh"), lambda: (torch.randn(0), "none")]),
    "gelu_curve": ("gelu", [lambda: (3 * torch.randn(2, 1024), torch.randn(2, 1024), "none"), lambda: (torch.randn(999), torch.randn(999), "tanh"),
                            lambda: (torch.randn(5, 4).T, torch.randn(4, 5), "tanh")]),
    "affine_relu_grad": ("affine_relu", [lambda: (torch.randn(2, 3, 16, 16), torch.randn(2, 3, 16, 16).relu(), torch.randn(3)),
                                         lambda: (torch.randn(2, 5, 1300), torch.randn(2, 5, 1300).relu(), torch.randn(5)),
                                         lambda: (torch.randn(3, 4), torch.randn(3, 4).relu(), torch.randn(4)),
                                         lambda: (torch.randn(0, 4, 2), torch.randn(0, 4, 2), torch.randn(4))]),
    "layer_norm": ("layer_norm", [lambda: (torch.randn(4, 768) + 1, torch.randn(768), torch.randn(768), (768,), 1e-5),
                                  lambda: (torch.randn(2, 3, 7, 5), None, torch.randn(7, 5), (7, 5), 0.1),
                                  lambda: (torch.randn(0, 8), None, None, (8,), 1e-5)]),
    "layer_norm_grad": ("layer_norm", [lambda: (torch.randn(4, 768), *normal(4, 768)), lambda: (torch.randn(5, 33), *normal(5, 33, False))]),
    "layer_norm_curve": ("layer_norm", [lambda: (torch.randn(4, 256), torch.randn(4, 256), *normal(4, 256)),
                                        lambda: (torch.randn(5, 33), torch.randn(5, 33), *normal(5, 33, False))]),
    "attention": ("attention", [lambda: (*heads(2, 64, 64, 16, 32)[:3], None, 0.3, False),
                                lambda: (*heads(3, 37, 50, 24, 8)[:3], some_masked(3, 37, 50), 0.3, False),
                                lambda: (*heads(2, 5, 5, 4, 4)[:3], torch.randn(5, 5).expand(2, 5, 5), 0.3, False),
                                lambda: (*heads(1, 3, 5, 4, 4)[:3], torch.full((1, 3, 5), -torch.inf), 0.3, False)]),
    "attention_grad": ("attention", [lambda: (torch.randn(2, 64, 32), *heads(2, 64, 64, 16, 32)),
                                     lambda: (torch.randn(3, 37, 8), *heads(3, 37, 50, 24, 8, some_masked(3, 37, 50)))]),
    "attention_tangent": ("attention", [lambda: (*(torch.randn(2, 64, n) for n in (16, 16, 32)), *heads(2, 64, 64, 16, 32)),
                                        lambda: (torch.randn(3, 37, 24), torch.randn(3, 50, 24), torch.randn(3, 50, 8),
                                                 *heads(3, 37, 50, 24, 8, some_masked(3, 37, 50)))]),
}  # fmt: skip


def cast(args, dtype, device):
    """Rounded to `dtype`; statistics stay in at least float32."""

    def one(a):
        if not isinstance(a, torch.Tensor):
            return a
        statistic = a.ndim == 2 and a.shape[-1:] == (1,)
        return a.to(
            device, dtype if a.is_floating_point() and not (statistic and dtype.itemsize == 2) else None
        )

    return [one(a) for a in args]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, in the interpreter: exp of -inf
@device
@dtypes
@pytest.mark.parametrize("name", CALLS)
def test_a_kernel_against_the_reference_and_float64(name, dtype, device):
    file, calls = CALLS[name]
    kernel = import_module(f"snows.kernels.{file}")
    for make in calls:
        args = cast(make(), dtype, device)
        if file == "attention" and name != "attention":  # the logarithms stay as they are
            args[-3] = args[-3].float()
        assert kernel.takes(*args)
        exact = cast(args, torch.float64, "cpu")
        found, same, wanted = (
            f(*a)
            for f, a in (
                (getattr(kernel, name), args),
                (getattr(reference, name), args),
                (getattr(reference, name), exact),
            )
        )
        for one, other, oracle in zip(
            *(x if isinstance(x, tuple) else (x,) for x in (found, same, wanted)), strict=True
        ):
            assert one.shape == oracle.shape
            assert one.dtype == other.dtype
            assert not one.isnan().any()
            size = oracle.norm() + 1e-30
            assert (one.cpu() - oracle).norm() <= TOLERANCE[dtype] * size
            assert (one.cpu().double() - other.cpu()).norm() <= 2 * TOLERANCE[dtype] * size
    if name == "masked":
        assert torch.equal(found, same)


@pytest.fixture
def registered(monkeypatch):
    """Without a GPU, the kernels under the dispatcher's CPU key while the test runs."""
    monkeypatch.setattr(sdpa, "MADE_AGAIN", {"cpu", "cuda"})
    library = torch.library.Library("snows", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # of what is meant here, that some of them take a native kernel's place
        for file, names in ops.TRITON.items() if not GPU else ():
            for name in names:
                library.impl(
                    name, getattr(import_module(f"snows.kernels.{file}"), name), "CPU", allow_override=True
                )
    yield
    library._destroy()


def layers(x):
    """All ops in a row, x (2, 20, 24)."""
    x = ops.layer_norm(x, (24,), torch.linspace(0.5, 2, 24).to(x), torch.linspace(-1, 1, 24).to(x))
    q = x.unflatten(-1, (3, 8)).transpose(1, 2)
    x = x + ops.attention(q, q.flip(-2), q, torch.linspace(-1, 1, 20).to(x).expand(20, 20)).transpose(
        1, 2
    ).flatten(2)
    scale, shift = torch.linspace(0.5, 2, 20).to(x), torch.linspace(-0.5, 1, 20).to(x)
    x = ops.affine_relu(x, (x * scale[:, None] + shift[:, None]).detach(), scale)
    x = ops.masked(x, ops.pack_bits(torch.arange(x.numel(), device=x.device) % 3 > 0))
    return ops.gelu(x) + ops.gelu(x, "tanh")


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@device
def test_both_derivatives_through_the_kernels_are_those_of_the_reference_in_float64(device, request):
    """Value, gradient, Gauss-Newton's two products and the Hessian's: an opaque kernel would give None or zeros."""
    x, g, v = torch.randn(2, 20, 24), torch.randn(2, 20, 24), torch.randn(2, 20, 24)

    def derivatives(dtype, device):
        at, pulled, along = (t.to(device, dtype) for t in (x, g, v))
        at.requires_grad_()
        pulled.requires_grad_()
        y = layers(at)
        (grad,) = torch.autograd.grad(y, at, pulled, create_graph=True)
        tangent, curve = torch.autograd.grad(grad, (pulled, at), along)
        return [t.double().cpu() for t in (y, grad, tangent, curve)]

    oracle = derivatives(torch.float64, "cpu")
    request.getfixturevalue("registered")
    expected = "triton" if GPU else "native"
    assert all(
        ops.implementation(name, device.upper()) == expected
        for names in ops.TRITON.values()
        for name in names
    )
    for one, other in zip(derivatives(torch.float32, device), oracle, strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm()


@pytest.mark.parametrize(("capability", "dtype", "kernel"), [
    ((9, 0), torch.float32, True), ((8, 0), torch.bfloat16, True), ((9, 0), torch.float64, False), ((7, 5), torch.float32, False),
])  # fmt: skip
@pytest.mark.skipif(GPU, reason="the interpreter is for machines without a GPU")
def test_what_a_kernel_does_not_take_goes_to_the_reference(capability, dtype, kernel, monkeypatch):
    ran = []
    gelu = import_module("snows.kernels.gelu")
    for name, module in (("kernel", gelu), ("reference", reference)):
        monkeypatch.setattr(
            module, "gelu", lambda *a, name=name, run=module.gelu: (ran.append(name), run(*a))[1]
        )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    x = torch.randn(5).to(dtype)
    value, slope = register.from_triton("gelu", "gelu")(x, "none")
    assert ran == ["kernel" if kernel else "reference"]
    assert (value - torch.nn.functional.gelu(x)).norm() <= 1e-2
    assert value.dtype == slope.dtype == dtype


@pytest.mark.parametrize(("dtype", "width", "keep", "taken"), [
    (torch.float32, 64, False, True), (torch.float32, 65, False, False), (torch.bfloat16, 128, False, True), (torch.float32, 8, True, False),
])  # fmt: skip
def test_attention_takes_heads_up_to_its_widest(dtype, width, keep, taken):
    attention = import_module("snows.kernels.attention")
    q, k, v = (torch.randn(2, 3, width).to(dtype) for _ in range(3))
    out, kept = reference.attention(q, k, v, None, 0.1, keep)
    assert attention.takes(q, k, v, None, 0.1, keep) == taken
    assert attention.takes(out, q, k, v, out, kept, None, 0.1) == taken
    assert attention.takes(q, k, v, q, k, v, out, kept, None, 0.1) == taken


GUARD = 1024  # numbers around a tensor that no kernel may read or write
PACKED_SHAPES = [(5, 32), (3, 37), (4, 6, 3, 2), (6, 24, 1, 1), (1, 1), (3, 0), (0, 8), (3, 1101), (2, 2048)]


def guarded(x):
    """x between numbers that no test stores."""
    room = torch.full((x.numel() + 2 * GUARD,), torch.nan if x.is_floating_point() else 255).to(x)
    room[GUARD : GUARD + x.numel()] = x.flatten()
    return room[GUARD : GUARD + x.numel()].view(x.shape)


def packed_weight(shape, pattern, dtype):
    """A weight of up to n a group, some kept values zeros of both signs: dense and packed."""
    mask = some_mask(shape, pattern) if isinstance(pattern, NM) else torch.rand(shape) < 1 - pattern.sparsity
    weight = (
        torch.randn(shape)
        .masked_fill(torch.rand(shape) < 0.2, -0.0)
        .masked_fill(torch.rand(shape) < 0.2, 0.0)
    )
    weight = torch.where(mask, weight, 0).to(dtype)
    return weight, pack(weight, mask, pattern)


@pytest.fixture
def rooms(monkeypatch):
    """What `new_empty` hands out while the test runs: poisoned, and guarded on both sides."""
    rooms, plain = [], torch.Tensor.new_empty

    def new_empty(x, *size, dtype=None, **more):
        if more:  # by the interpreter
            return plain(x, *size, dtype=dtype, **more)
        poison = torch.nan if (dtype or x.dtype).is_floating_point else -1
        rooms.append(
            torch.full(
                (torch.Size(size).numel() + 2 * GUARD,), poison, dtype=dtype or x.dtype, device=x.device
            )
        )
        return rooms[-1][GUARD : len(rooms[-1]) - GUARD].view(size)

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    return rooms


@device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("pattern", [NM(2, 4), NM(1, 4), NM(2, 8), NM(4, 8), NM(1, 2), NM(3, 5), NM(1, 3), NM(6, 32), NM(31, 32),
                                     Unstructured(0.9), Unstructured(0.1)], ids=str)  # fmt: skip
def test_unpack_gives_the_dense_weight_bit_for_bit(pattern, dtype, device, rooms):
    if device == "cuda" and dtype in (torch.float16, torch.float64) and pattern != NM(2, 4):
        pytest.skip("each is compiled anew, and differs from another dtype by its width alone")
    unpack = import_module("snows.kernels.unpack")
    for shape in PACKED_SHAPES:
        weight, packed = packed_weight(shape, pattern, dtype)
        args = (
            guarded(packed.values.to(device)),
            guarded(packed.codes.to(device)),
            packed.shape,
            *packed.group,
        )
        assert unpack.takes(*args)
        found = unpack.unpack(*args)
        assert found.is_contiguous()
        assert torch.equal(bits_of(found.cpu()), bits_of(weight)), shape
    for room in rooms:
        assert all(
            side.isnan().all() if room.is_floating_point() else side.eq(-1).all()
            for side in (room[:GUARD], room[-GUARD:])
        )


@device
def test_unpack_reads_all_six_codes_of_2_of_4(device):
    unpack = import_module("snows.kernels.unpack")
    values = torch.tensor(
        [[1.0, 2.0, 3.0, -0.0, 5.0, 6.0, torch.inf, 8.0, 9.0, 0.0, 11.0, torch.nan]], device=device
    )
    codes = torch.tensor([0x84, 0x9C, 0xED], dtype=torch.uint8, device=device)
    dense = [[1.0, 2.0, 0.0, 0.0], [3.0, 0.0, -0.0, 0.0], [5.0, 0.0, 0.0, 6.0],
             [0.0, torch.inf, 8.0, 0.0], [0.0, 9.0, 0.0, 0.0], [0.0, 0.0, 11.0, torch.nan]]  # fmt: skip
    assert torch.equal(
        bits_of(unpack.unpack(values, codes, (1, 24), 2, 4).cpu()), bits_of(torch.tensor([dense]).view(1, 24))
    )


@device
def test_products_without_a_kernel_of_their_own_unpack_by_the_kernel(device, request, monkeypatch):
    """In 1:4 and bfloat16 no native build has one either; small whole numbers make every sum exact."""
    torch.use_deterministic_algorithms(False)  # else cuBLAS wants a variable in the environment
    unpack, ran = import_module("snows.kernels.unpack"), []
    monkeypatch.setattr(unpack, "unpack", lambda *a, run=unpack.unpack: (ran.append(a), run(*a))[1])
    request.getfixturevalue("registered")
    for shape, inputs, settings in (
        ((24, 36), (5, 36), ()),
        ((8, 12, 3, 2), (2, 12, 7, 6), ((2, 1), (1, 0), (1, 2))),
    ):
        mask = some_mask(shape, NM(1, 4))
        weight = torch.where(mask, torch.randint(-2, 3, shape), 0).bfloat16()
        packed = pack(weight, mask, NM(1, 4))
        x, bias = (torch.randint(-2, 3, size).to(device, torch.bfloat16) for size in (inputs, shape[:1]))
        x.requires_grad_()
        dense, op, plain = (
            (F.conv2d, ops.sparse_conv2d, reference.sparse_conv2d)
            if settings
            else (F.linear, ops.sparse_linear, reference.sparse_linear)
        )
        at = x.detach().double().cpu().requires_grad_()
        wanted = dense(at, weight.double(), bias.double().cpu(), *settings).relu()
        args = (
            x,
            packed.values.to(device),
            packed.codes.to(device),
            bias,
            packed.shape,
            1,
            4,
            *settings,
            "relu",
        )
        found = op(*args)
        found.sum().backward()
        wanted.sum().backward()
        assert torch.equal(found.double().cpu(), wanted)
        assert torch.equal(x.grad.double().cpu(), at.grad)
        assert torch.equal(plain(*args), found)
    assert len(ran) >= 6  # two values and a gradient each


@pytest.mark.parametrize(("dtype", "m", "taken"), [(torch.bfloat16, 32, True), (torch.float64, 4, True), (torch.float32, 64, False),
                                                   (torch.int32, 4, False)])  # fmt: skip
def test_unpack_takes_the_groups_and_numbers_that_pack_writes(dtype, m, taken):
    unpack = import_module("snows.kernels.unpack")
    assert (
        unpack.takes(torch.zeros(1, 1, dtype=dtype), torch.zeros(1, dtype=torch.uint8), (1, m), 1, m) == taken
    )


def compile_all(tmp_path, *targets):
    """What the compiler made of every kernel for these architectures and dtypes."""
    tools = Path(import_module("triton").__file__).parent / "backends" / "nvidia" / "bin"
    missing = [t for t in ("cuobjdump", "nvdisasm", "ptxas") if not (tools / t).exists()]
    if missing:
        pytest.skip(f"this Triton ships no {', '.join(missing)}")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {
        "TRITON_CACHE_DIR": str(tmp_path),
        "PYTHONPATH": str(Path(__file__).parents[1]),
        "TRITON_DEFAULT_FP_FUSION": "1",
    }
    script = Path(__file__).with_name("compile_kernels.py")
    run = subprocess.run([sys.executable, script, *targets], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


def test_compiled_kernels_keep_to_registers_and_load_sixteen_bytes(tmp_path):
    targets = ["80:fp32", "90:bf16"]  # the other two pairs pass too; each takes a quarter of a minute
    compiled = compile_all(tmp_path, *targets)
    kernels = {
        name
        for file in ops.TRITON
        for name in vars(import_module(f"snows.kernels.{file}"))
        if name.endswith("_kernel")
    }
    assert sorted(c["kernel"] for c in compiled) == sorted([*kernels] * len(targets))
    for c in compiled:
        attention = c["kernel"].startswith("attention")
        assert c["stack"] == c["spills"] == 0, c
        assert c["wide loads"] > 0 or c["kernel"] in ("unpack_kernel", "count_kernel"), (
            c
        )  # bits, and values found by them
        assert c["wide stores"] > 0 or c["kernel"] == "count_kernel", c  # one number
        assert c["registers"] <= (255 if attention else 64), (
            c
        )  # 64: 1,024 threads, half the most, on a multiprocessor
        assert c["shared"] <= 99 * 1024, c  # what a program may have on sm_86 and sm_89
        assert (c["tensor core"] > 0) == attention, c
