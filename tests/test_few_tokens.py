"""One token and a few: the kernels that read a weight as it is packed, and the panels where those take over."""

import ctypes
import itertools
import mmap
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from snows import NM, SparseLinear, Unstructured, ops, parse_pattern, reference
from snows.packing import pack

pytestmark = pytest.mark.skipif(
    ops.implementation("sparse_linear") != "native", reason="the native kernels were not built"
)
PATTERNS = ["2:4", "1:4", "0.5", "0.9"]
DTYPES = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}


def random_weight(text, out, inputs, dtype=torch.float32):
    pattern = parse_pattern(text)
    weight = torch.randn(out, inputs)
    if isinstance(pattern, NM):
        mask = reference.nm_mask(torch.rand(out, inputs), pattern.n, pattern.m)
    else:
        mask = pattern.mask(torch.rand(out, inputs))
    return (weight * mask).to(dtype), pattern


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("text", PATTERNS)
def test_against_float64(text, dtype):
    """Widths of whole and part steps and of none, rows that are no multiple of those multiplied together."""
    torch.manual_seed(0)
    for (out, inputs), tokens in itertools.product(
        [
            (1, 8),
            (3, 16),
            (7, 24),
            (5, 32),
            (9, 40),
            (4, 48),
            (6, 64),
            (31, 72),
            (13, 80),
            (33, 96),
            (6, 520),
            (130, 784),
        ],
        [1, 2, 3, 4, 5, 8, 9, 16, 17],
    ):
        weight, pattern = random_weight(text, out, inputs, dtype)
        bias = torch.randn(out).to(dtype) if out % 2 else None
        x = torch.randn(tokens, inputs).to(dtype)
        found = SparseLinear(pack(weight, None, pattern), bias)(x)
        exact = x.double() @ weight.double().T + (0 if bias is None else bias.double())
        assert found.dtype == dtype
        assert (found.double() - exact).norm() <= DTYPES[dtype] * exact.norm(), (out, inputs, tokens)


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("kept", [1, 2])
def test_every_code_in_every_place(kept, tokens):
    choices = list(itertools.combinations(range(4), kept))
    weight = torch.zeros(len(choices), 128)
    for row, group in itertools.product(range(len(choices)), range(32)):
        for i, column in enumerate(choices[(row + group) % len(choices)]):
            weight[row, 4 * group + column] = 1 + group + 32 * i
    x = torch.randint(-8, 9, (tokens, 128)).float()  # sums of whole numbers are exact in any order
    assert torch.equal(SparseLinear(pack(weight, None, NM(kept, 4)))(x), x @ weight.T)


@pytest.mark.parametrize("tokens", [1, 4])
def test_every_byte_of_a_mask(tokens):
    bits = torch.arange(256)[:, None] >> torch.arange(8) & 1
    weight = (bits * torch.arange(1, 9)).float().view(4, 512)
    weight = torch.cat([weight, weight.flip(0), torch.zeros(1, 512)])
    x = torch.randint(-8, 9, (tokens, 512)).float()
    assert torch.equal(SparseLinear(pack(weight, None, Unstructured(0.5)))(x), x @ weight.T)


@pytest.mark.parametrize("text", PATTERNS)
def test_infinity_stays_in_its_row_and_nan_in_its_token(text):
    weight, pattern = random_weight(text, 12, 96)
    stored = weight[5].nonzero()[0]
    weight[5, stored] = torch.inf
    for tokens in (1, 2, 4, 6):
        found = SparseLinear(pack(weight, None, pattern))(torch.ones(tokens, 96))
        assert found[:, 5].eq(torch.inf).all()
        assert found[:, [r for r in range(12) if r != 5]].isfinite().all()
        x = torch.ones(tokens, 96)
        x[tokens - 1, stored] = torch.nan
        found = SparseLinear(pack(weight, None, pattern))(x)
        assert found[tokens - 1, 5].isnan()
        assert not found[: tokens - 1].isnan().any()


@pytest.mark.parametrize("text", PATTERNS)
def test_a_row_s_sum_does_not_depend_on_the_others(text):
    """Nor on the number of threads: rows are multiplied together that lie apart, by how many there are."""
    weight, pattern = random_weight(text, 517, 224)
    x, threads = torch.randn(2, 224), torch.get_num_threads()
    found = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found += [SparseLinear(pack(weight, None, pattern))(x)]
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*found)


def at_a_page_s_end(tensor):
    """Copy a tensor to where reading past its end is a fault."""
    libc = ctypes.CDLL(None, use_errno=True)
    size, page = tensor.numel() * tensor.element_size(), mmap.PAGESIZE
    whole = (size + page - 1) // page * page
    memory = mmap.mmap(-1, whole + page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert libc.mprotect(ctypes.c_void_p(start + whole), page, 0) == 0
    laid = torch.frombuffer(memory, dtype=torch.uint8, count=size, offset=whole - size).view(tensor.dtype)
    return laid.copy_(tensor.flatten()).view(tensor.shape)


def nothing_past_the_end():
    for dtype, text, (out, inputs), tokens in itertools.product(
        DTYPES, PATTERNS, [(1, 16), (6, 48), (7, 112), (9, 256)], [1, 2, 3, 4, 7]
    ):
        weight, pattern = random_weight(text, out, inputs, dtype)
        packed = pack(weight, None, pattern)
        n, m = (pattern.n, pattern.m) if isinstance(pattern, NM) else (0, 0)
        if packed.values.numel() == 0:
            continue
        values, codes = at_a_page_s_end(packed.values), at_a_page_s_end(packed.codes)
        x = at_a_page_s_end(torch.randn(tokens, inputs).to(dtype))
        order = ops.kernel_order(values, codes, (out, inputs), n, m)
        found = ops.sparse_linear(x, values, codes, None, (out, inputs), n, m, order=order)
        exact = x.double() @ weight.double().T
        assert (found.double() - exact).norm() <= DTYPES[dtype] * exact.norm(), (
            dtype,
            text,
            out,
            inputs,
            tokens,
        )


@pytest.mark.skipif(sys.platform != "linux", reason="protects pages by mprotect")
def test_nothing_is_read_past_the_end():
    script = "import test_few_tokens; test_few_tokens.nothing_past_the_end()"  # a fault would end the tests
    path = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("tokens", [1, 4, 7])
def test_views_and_shapes(tokens):
    dense = nn.Linear(64, 24)
    dense.weight.data *= reference.nm_mask(dense.weight.data.abs(), 2, 4)
    sparse = SparseLinear.from_dense(dense, activation="relu")
    for x in (torch.randn(64, tokens).T, torch.randn(tokens, 1, 64), torch.randn(tokens, 128)[:, ::2]):
        assert sparse(x).shape == dense(x).shape
        assert torch.allclose(sparse(x), dense(x).relu(), atol=1e-5)
