"""How often the host would wait for a device: counted on a CPU, and forbidden on a device between two looks."""

import sys

import pytest
import torch
import torch.nn.functional as F
from test_graphs import reconstruction
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from snows import NM, Unstructured, alps, reference, sparsegpt
from snows.networks.watching import Call
from snows.ops import masks
from snows.selectors import LayerStatistics
from snows.solving.cg import Stop, _looks, cg
from snows.solving.operators import GaussNewton, Hessian, LinearOperator, Restricted
from snows.solving.preconditioners import Factors, Kronecker, RowBlocks, inverse_of
from snows.sparsity import rows

aten = torch.ops.aten
READS = (  # a number, or a size that depends on numbers
    aten._local_scalar_dense,
    aten.nonzero,
    aten.masked_select,
    aten._unique2,
    aten.unique_dim,
    aten.unique_consecutive,
    aten.equal,
    aten.bincount,
    aten.repeat_interleave,
    aten._linalg_check_errors,
)
INDEXED = (aten.index, aten.index_put_, aten.index_put, aten._index_put_impl_)


class Waits(TorchDispatchMode):
    """Notes every operation for whose result the host would wait, were the tensors on a device."""

    def __init__(self):
        super().__init__()
        self.found = []
        self._lists = Lists(self.found)

    def __enter__(self):
        self._lists.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self._lists.__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        packet = function.overloadpacket
        by_mask = packet in INDEXED and any(
            x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1]
        )
        if packet in READS or by_mask:
            self.found.append(str(packet))
        return function(*args, **(kwargs or {}))


class Lists(TorchFunctionMode):
    """Notes where a tensor becomes a list or an array, which PyTorch does not dispatch on a CPU."""

    def __init__(self, found):
        super().__init__()
        self.found = found

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (torch.Tensor.tolist, torch.Tensor.numpy):
            self.found.append(function.__name__)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("work", "count"),
    [
        (lambda x: x.sum().item(), 1),
        (lambda x: bool((x > 0).any()), 1),
        (lambda x: float(x[0]), 1),
        (lambda x: x[x > 0], 1),
        (lambda x: x.nonzero(), 1),
        (lambda x: x.masked_fill_(x > 0, 0).tolist(), 1),
        (lambda x: torch.linalg.cholesky(x.square().diag()), 1),
        (lambda x: x.__setitem__(x > 0, 1), 1),
        (lambda x: torch.where(x > 0, x, 0).cumsum(0).gather(0, torch.arange(3)), 0),
        (lambda x: torch.linalg.cholesky_ex(x.square().diag()), 0),
    ],
)
def test_the_counter_counts(work, count):
    with Waits() as waits:
        work(torch.randn(3))
    assert len(waits.found) == count, waits.found


class Unbounded(LinearOperator):
    """As another operator, with a spectrum so wide that conjugate gradients never come to an end."""

    def __init__(self, operator, like):
        self.operator = operator
        self.scale = torch.logspace(-6, 6, like.numel(), dtype=like.dtype, device=like.device).view_as(like)

    def __matmul__(self, v):
        return self.scale * (self.operator @ (self.scale * v)) + self.scale * v


def solve(curvature, preconditioner, name, layer, device, iterations):
    """Conjugate gradients on a layer of a trained network, as Newton's method asks for them."""
    loss, at = reconstruction(name, layer, device)
    mask = torch.rand(at.shape, device=device) < 0.5
    matrix = rows(at)
    factors = Factors(
        torch.eye(matrix.shape[1], dtype=at.dtype, device=device)[None],
        torch.eye(len(matrix), dtype=at.dtype, device=device)[None],
    )
    A = Unbounded(Restricted(curvature(loss, at, iterations), mask, 1e-3), at)
    M = preconditioner and preconditioner(factors, mask, 1e-3)
    b = torch.randn_like(at)
    with Waits() as waits:
        found = cg(A, b, preconditioner=M, rtol=1e-30, max_iterations=iterations, check_every=8)
    return found, waits


@pytest.mark.parametrize(("name", "layer"), [("resnet20", "layer2.0.conv1"), ("vit", "blocks.1.qkv")])
@pytest.mark.parametrize(
    ("curvature", "preconditioner"), [(GaussNewton, RowBlocks), (Hessian, Kronecker), (GaussNewton, None)]
)
def test_conjugate_gradients_wait_once_in_eight_iterations_and_at_the_end(
    curvature, preconditioner, name, layer
):
    for iterations, looks in ((7, 0), (18, 2)):
        found, waits = solve(curvature, preconditioner, name, layer, "cpu", iterations)
        assert (found.iterations, found.stop) == (iterations, Stop.ITERATIONS)
        assert waits.found == ["aten._local_scalar_dense"] * looks + ["tolist"]


def test_a_device_is_looked_at_every_eighth_iteration_and_asked_for_the_time_then():
    on_device, here = torch.empty(1, device="meta"), torch.empty(1)
    assert [i for i in range(24) if _looks(i, on_device)] == [7, 15, 23]
    assert all(_looks(i, here) for i in range(24))
    asked, b = [], torch.ones(5, dtype=torch.float64)
    A = Restricted(Diagonal(torch.logspace(0, 9, 5, dtype=b.dtype)), torch.ones(5, dtype=torch.bool), 0.0)

    def late():
        asked.append(1)
        return len(asked) == 2

    found = cg(A, b, rtol=0.0, max_iterations=100, check_every=3, late=late)
    assert (found.stop, found.iterations, len(asked)) == (Stop.TIME, 5, 2)


class Diagonal(LinearOperator):
    def __init__(self, entries):
        self.entries = entries

    def __matmul__(self, v):
        return self.entries * v


def layer(inputs, outputs):
    """A layer's weight, and statistics of inputs that are strongly correlated."""
    x = torch.randn(200, inputs, dtype=torch.float64) @ torch.randn(inputs, inputs, dtype=torch.float64)
    calls = [Call(F.linear, x)]
    eye = torch.eye(outputs, dtype=torch.float64)[None]
    return torch.randn(outputs, inputs, dtype=torch.float64), LayerStatistics(calls, calls, lambda: eye)


@pytest.fixture
def _as_on_a_device(monkeypatch):
    """The CPU's kernel looks for NaN by itself, a device's does not."""
    monkeypatch.setattr(masks, "KERNEL_LOOKS", False)
    monkeypatch.setattr(torch.ops.snows, "nm_mask", reference.nm_mask)


@pytest.mark.usefixtures("_as_on_a_device")
@pytest.mark.parametrize("pattern", [NM(2, 4), Unstructured(0.5)], ids=str)
def test_alps_looks_at_the_mask_every_third_step_and_for_nan_once(pattern, monkeypatch):
    weight, statistics = layer(64, 48)
    _ = statistics.gram, statistics.sensitivity
    monkeypatch.setattr(sys.modules["snows.selectors.alps"], "batched_cg", lambda gram, right, *a, **k: right)
    counts = {}
    for steps in (3, 6, 24):
        with Waits() as waits:
            alps(weight, statistics, pattern, max_iterations=steps)
        counts[steps] = len(waits.found)
    assert counts[6] - counts[3] == 1
    assert counts[24] - counts[6] == 6  # as long as weights still move


@pytest.mark.usefixtures("_as_on_a_device")
def test_sparsegpt_looks_once_however_many_groups_there_are():
    counts = []
    for inputs in (16, 64):
        weight, statistics = layer(inputs, 8)
        _ = statistics.gram
        with Waits() as waits:
            sparsegpt(weight, statistics, NM(2, 4))
        counts.append(len(waits.found))
    assert counts[0] == counts[1]


@pytest.mark.usefixtures("_as_on_a_device")
@pytest.mark.parametrize("select", [alps, sparsegpt])
@pytest.mark.parametrize("pattern", [NM(2, 4), Unstructured(0.5)], ids=str)
def test_nan_that_comes_up_on_the_way_is_refused(select, pattern):
    weight, statistics = layer(16, 8)
    weight[3, 5] = torch.inf  # whose difference to itself is NaN
    with pytest.raises(ValueError, match="expected scores without NaN, got NaN; check the weights"):
        select(weight, statistics, pattern)


def test_masks_are_looked_at_again_afterwards():
    scores = torch.tensor([[1.0, torch.nan, 3.0, 2.0]])
    with masks.unlooked():
        assert Unstructured(0.5).mask(scores).dtype == torch.bool
    for pattern in (NM(2, 4), Unstructured(0.5)):
        with pytest.raises(ValueError, match="expected scores without NaN"):
            pattern.mask(scores)


@pytest.mark.parametrize("at_once", [False, True])
def test_inverses_of_many_factors(at_once):
    roots = torch.randn(5, 7, 7, dtype=torch.float64)
    matrices = roots @ roots.mT + torch.eye(7)
    found = inverse_of(torch.linalg.cholesky(matrices), at_once)
    assert torch.allclose(found, torch.linalg.inv(matrices), rtol=1e-9, atol=1e-12)


def test_row_blocks_wait_for_their_width_and_once_in_a_chunk():
    mask = torch.rand(12, 20) < 0.5
    with Waits() as waits:
        RowBlocks(Factors(torch.eye(20)[None], torch.eye(12)[None]), mask, 1e-3)
    assert waits.found == ["aten._local_scalar_dense"] * 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("switch", ["0", "1"], ids=["eager", "graphs"])
@pytest.mark.parametrize("curvature", [GaussNewton, Hessian])
def test_an_iteration_does_not_wait_for_the_device(curvature, switch, monkeypatch):
    torch.use_deterministic_algorithms(False)  # cuBLAS would ask for an environment variable
    monkeypatch.setenv("SNOWS_GRAPHS", switch)
    product, products = Unbounded.__matmul__, []

    def watched(operator, v):  # from the third on: the first warms up, the second may be captured
        found = product(operator, v)
        products.append(torch.cuda.get_sync_debug_mode())
        torch.cuda.set_sync_debug_mode("error" if 2 <= len(products) < 7 else "default")
        return found

    monkeypatch.setattr(Unbounded, "__matmul__", watched)
    try:
        found, _ = solve(curvature, RowBlocks, "vit", "blocks.1.qkv", "cuda", 7)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert products == [0, 0, 2, 2, 2, 2, 2]
    assert found.iterations == 7
