"""The solver's C++ kernels for CPUs against float64 and the reference, at every instruction set."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from snows import NM, ops, parse_pattern, reference
from snows.packing import pack
from snows.sparsity import rows, unrows

OPS = torch.ops.snows
pytestmark = pytest.mark.skipif(
    ops.implementation("gelu") != "native", reason="the native kernels were not built"
)


@pytest.mark.skipif("SNOWS_NESTED" in os.environ, reason="runs this file")
@pytest.mark.parametrize(
    ("capability", "onednn"), [("avx2", "AVX2"), ("default", "AVX2"), ("default", "SSE41")]
)
def test_the_other_instruction_sets(capability, onednn):
    """This file's tests as older processors run them: PyTorch's own GELU is oneDNN's, which goes by its own setting."""
    environment = {
        **os.environ,
        "ATEN_CPU_CAPABILITY": capability,
        "ONEDNN_MAX_CPU_ISA": onednn,
        "SNOWS_NESTED": "1",
        "PYTHONPATH": str(Path(ops.__file__).parents[2]),
    }
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:]


def gelu_in_float64(x):
    """Value, slope and second derivative, by erfc: exact in both tails."""
    x = x.double()
    share, density = torch.special.erfc(-x / 2**0.5) / 2, torch.exp(-x * x / 2) / (2 * torch.pi) ** 0.5
    return x * share, share + x * density, density * (2 - x * x)


def portable():
    """Whether GELU's value and slope are the reference's, PyTorch's own: which is left to it without AVX2."""
    return torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512")


def test_gelu_to_a_few_units_in_the_last_place():
    x = torch.cat([torch.linspace(-13, 13, 300_001), 1e-3 * torch.randn(10_000)])
    value, slope, curve = gelu_in_float64(x)
    found, steep = OPS.gelu(x, "none")
    bent = OPS.gelu_curve(x, torch.ones_like(x), "none")
    assert (
        (found - value).abs() <= (2e-6 if portable() else 6e-7 * value.abs())
    ).all()  # PyTorch's cancels in the left tail
    assert ((steep - slope).abs() <= 4e-7).all()
    assert (
        (bent - curve).abs()
        <= 4e-7 * (x.abs() + 1) * torch.exp(-(x.double() ** 2) / 2) * (1 + x.abs()) + 1e-36
    ).all()


@pytest.mark.parametrize("make", [
    lambda: torch.randn(0), lambda: torch.randn(1), lambda: torch.randn(15), lambda: torch.randn(7, 11), lambda: torch.randn(3, 20_011),
    lambda: torch.randn(6, 5).T, lambda: torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last), lambda: torch.randn(9, 8)[:, ::2],
    lambda: torch.randn(4, 1).expand(4, 5), lambda: torch.randn(33)[1:], lambda: torch.randn(()),
])  # fmt: skip
def test_gelu_of_any_size_and_layout(make):
    x = 3 * make()
    for g in (torch.randn_like(x), torch.randn(x.shape).contiguous(), torch.randn_like(x).double()):
        found, same = (
            (*module.gelu(x, "none"), module.gelu_curve(x, g, "none")) for module in (OPS, reference)
        )
        value, slope, curve = gelu_in_float64(x)
        for one, other, exact in zip(found, same, (value, slope, curve * g), strict=True):
            assert (one.shape, one.dtype, one.stride()) == (other.shape, other.dtype, other.stride())
            assert torch.allclose(one.double(), exact, rtol=1e-6, atol=2e-6)


def test_gelu_of_what_is_not_finite_or_huge():
    """As the reference has it in float64: PyTorch's gelu of infinity and of -0.0 in float32 differs from processor to processor."""
    x = torch.tensor(
        [torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1e30, -1e30, 1e19, -1e19, 20.0, -20.0, 1e-40] * 3
    )
    found, wide = OPS.gelu(x, "none"), reference.gelu(x.double(), "none")
    if portable():  # the reference itself, which is right wherever the value is finite
        same = reference.gelu(x, "none")
        assert all(
            torch.equal(one.view(torch.int32), other.view(torch.int32))
            for one, other in zip(found, same, strict=True)
        )
    else:
        assert torch.equal(found[0][x == 0].signbit(), x[x == 0].signbit())
    kept = ~x.isinf() if portable() else slice(None)
    for one, other in zip(found, wide, strict=True):
        assert torch.allclose(one[kept], other[kept].float(), rtol=1e-6, atol=1e-40, equal_nan=True)
    curve, same = (
        OPS.gelu_curve(x, torch.ones_like(x), "none"),
        reference.gelu_curve(x, torch.ones_like(x), "none"),
    )
    assert torch.allclose(curve, same, rtol=1e-6, atol=1e-40, equal_nan=True)
    g = torch.tensor([torch.nan, torch.inf, -torch.inf])
    assert torch.equal(OPS.gelu_curve(torch.ones(3), g, "none").nan_to_num(7), g.nan_to_num(7))


@pytest.mark.parametrize(("dtype", "approximate"), [
    (torch.float64, "none"), (torch.float64, "tanh"), (torch.float32, "tanh"), (torch.bfloat16, "none"), (torch.float16, "none"),
])  # fmt: skip
def test_what_gelu_does_not_take_is_the_reference(dtype, approximate):
    x, g = torch.randn(2, 100).to(dtype)
    found, same = (
        (*module.gelu(x, approximate), module.gelu_curve(x, g, approximate)) for module in (OPS, reference)
    )
    assert all(torch.equal(one, other) for one, other in zip(found, same, strict=True))


def test_both_derivatives_of_gelu_are_those_of_float64():
    def derivatives(dtype):
        x, g, v = (2 * torch.randn(3, 5, 1000, generator=torch.Generator().manual_seed(1))).to(dtype)
        x.requires_grad_()
        g.requires_grad_()
        y = ops.gelu(x)
        (first,) = torch.autograd.grad(y, x, g, create_graph=True)
        return [t.double() for t in (y, first, *torch.autograd.grad(first, (g, x), v))]

    for one, exact in zip(derivatives(torch.float32), derivatives(torch.float64), strict=True):
        assert (one - exact).norm() <= 2e-7 * exact.norm()


def test_opcheck():
    x = torch.randn(5, 7)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own
        for leaf in (x.clone().requires_grad_(), x.T.clone().requires_grad_()):
            torch.library.opcheck(OPS.gelu.default, (leaf, "none"))
        torch.library.opcheck(OPS.gelu_curve.default, (x, x, "none"))
        torch.library.opcheck(OPS.gelu_curve.default, (x.T, x.view(7, 5), "none"))


def system(n, dtype):
    x, r, p = torch.randn(3, n).to(dtype)
    return (
        x,
        r,
        p,
        p * torch.rand(n).to(dtype),
        torch.tensor([reference.RUNNING, 3, n, 0, 1e9], dtype=torch.float64),
    )


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-14), (torch.float32, 3e-7), (torch.bfloat16, 1e-2), (torch.float16, 1e-3)],
)
@pytest.mark.parametrize("n", [0, 1, 17, 8192, 50_011])
def test_a_step_and_a_direction_of_cg_over_many_chunks(n, dtype, tolerance):
    arguments = system(n, dtype)
    wide = [a.to(torch.float64, copy=True) for a in arguments]
    x, r, p, Ap, state = arguments
    ops.cg_update(*arguments, 1e-9)
    curvature = (wide[2] * wide[3]).sum()
    if n == 0:
        assert state[0] == reference.NEGATIVE_CURVATURE
        return
    alpha = n / curvature
    assert (x - (wide[0] + alpha * wide[2])).abs().max() <= tolerance * wide[0].abs().max()
    assert (r - (wide[1] - alpha * wide[3])).abs().max() <= tolerance * (
        wide[1] - alpha * wide[3]
    ).abs().max()
    rr = (r.double() * r.double()).sum().item()  # of what was stored
    assert state.tolist() == pytest.approx([reference.RUNNING, 4, n, rr, 1e9], rel=1e-12)
    before = p.to(torch.float64, copy=True)
    ops.cg_direction(p, r, Ap, state)
    rz = (r.double() * Ap.double()).sum().item()
    assert state[reference.RZ].item() == pytest.approx(rz, rel=1e-12, abs=1e-12)
    turned = wide[3] + rz / n * before
    assert (p - turned).abs().max() <= 2 * tolerance * turned.abs().max()


def test_threads_change_no_bit():
    found, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            torch.manual_seed(0)
            arguments = system(300_001, torch.float32)
            ops.cg_update(*arguments, 1e-9)
            ops.cg_direction(*(arguments[i] for i in (2, 1, 3, 4)))
            found.append(
                (
                    *arguments,
                    *OPS.gelu(arguments[0], "none"),
                    OPS.gelu_curve(arguments[0], arguments[1], "none"),
                )
            )
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


FLOATS = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str
)


@FLOATS
@pytest.mark.parametrize(
    ("n", "m"), [(2, 4), (1, 4), (3, 4), (1, 2), (4, 8), (2, 3), (5, 7), (1, 16), (31, 32)]
)
def test_selection_with_ties_and_ragged_groups(n, m, dtype):
    for shape in ((1, 1), (3, 2), (7, 4 * m), (5, 64 * m + 3), (130, 129), (0, 8), (4, 0)):
        scores = torch.randint(-2, 3, shape).to(dtype)  # whole numbers: many are equal
        scores[torch.rand(shape) < 0.1] = -torch.inf
        scores[torch.rand(shape) < 0.1] = torch.inf
        assert torch.equal(OPS.nm_mask(scores, n, m), reference.nm_mask(scores, n, m))
        for found, expected in zip(
            OPS.nm_select(scores, n, m), reference.nm_select(scores, n, m), strict=True
        ):
            assert torch.equal(found, expected)


@FLOATS
def test_selection_sees_nan_wherever_it_stands(dtype):
    for m in (4, 8):
        for place in (0, 5, 63, 1023, 1026):
            scores = torch.randn(3, 1027).to(dtype)
            scores[1, place] = torch.nan
            for op in (ops.nm_mask, ops.nm_select):
                with pytest.raises(ValueError, match=f"{op.__name__}: expected scores without NaN"):
                    op(scores, 2, m)


@FLOATS
def test_masked_of_any_size(dtype):
    for shape in ((0,), (1,), (7,), (8,), (9, 11), (3, 5, 3, 3), (201, 403)):
        weight, mask = torch.randn(shape).to(dtype), torch.rand(shape) < 0.5
        weight[~mask & (torch.rand(shape) < 0.5)] = torch.nan
        weight[mask & (torch.rand(shape) < 0.2)] = -0.0
        found = OPS.masked(weight, ops.pack_bits(mask))
        assert torch.equal(found, torch.where(mask, weight, 0))
        assert torch.equal(found.signbit(), weight.signbit() & mask)
        if len(shape) == 4:
            last = weight.contiguous(memory_format=torch.channels_last)
            assert torch.equal(OPS.masked(last, ops.pack_bits(mask)), found)


@FLOATS
@pytest.mark.parametrize("text", ["2:4", "1:4", "4:8", "1:16", "3:5", "7:8", "0.5", "0.93"])
def test_unpack_bit_for_bit(text, dtype):
    pattern = parse_pattern(text)
    for shape in ((5, 32), (33, 67), (1, 1), (3, 1, 3, 3), (130, 16, 2, 3), (4, 80, 1, 1)):
        weight = torch.randn(shape).to(dtype)
        scores = rows(torch.rand(shape))
        kept = (
            reference.nm_mask(scores, pattern.n, pattern.m)
            if isinstance(pattern, NM)
            else scores > pattern.sparsity
        )
        mask = unrows(kept, weight.shape)
        weight = torch.where(mask, weight, 0)
        packed = pack(weight, mask, pattern)
        found = OPS.unpack(packed.values, packed.codes, packed.shape, *packed.group)
        assert found.is_contiguous()
        assert torch.equal(found, weight)


def test_unpack_refuses_codes_of_other_values():
    packed = pack(torch.eye(40), None, parse_pattern("0.9"))
    with pytest.raises(ValueError, match="unpack: expected codes for 39 stored values, got codes for 40"):
        OPS.unpack(packed.values[:-1], packed.codes, packed.shape, 0, 0)
    with pytest.raises(ValueError, match="unpack: expected at least 200 bytes of codes, got 199"):
        OPS.unpack(packed.values, packed.codes[:-1], packed.shape, 0, 0)
    for shape, n, m in (
        ((16, 16), 0, 4),
        ((8,), 0, 0),
        ((4, 2**61), 0, 0),
        ((40, 40), 4, 4),
        ((40, 40), 2, 64),
        ((-1, 40), 0, 0),
    ):
        with pytest.raises(ValueError, match="unpack: "):
            OPS.unpack(packed.values, packed.codes, shape, n, m)


def test_numbers_of_one_byte():
    weight = torch.randn(100).to(torch.float8_e4m3fn)
    mask = torch.rand(100) < 0.5
    found = OPS.masked(weight, ops.pack_bits(mask))
    assert torch.equal(found.view(torch.uint8), weight.view(torch.uint8) * mask)
