"""Products by a CUDA graph: the logic through a graph that calls again what it recorded, the numbers on a device."""

import gc
import logging
import weakref

import pytest
import torch
from oracles import dense_gauss_newton, dense_hessian, matrix_of
from test_operators import case
from torch import nn

from snows import Newton, zoo
from snows.matching.horizon import Horizon
from snows.matching.losses import Reconstruction
from snows.networks.attention import open_attention
from snows.networks.batches import Batch
from snows.ops import graphs
from snows.solving.operators import GaussNewton, Hessian
from snows.sparsity import MaskedWeight

curvatures = pytest.mark.parametrize(
    ("curvature", "oracle"), [(GaussNewton, dense_gauss_newton), (Hessian, dense_hessian)]
)


class Recorded:
    """Stands for a CUDA graph: computes when it is replayed, from and into the same memory; it keeps nothing alive."""

    made = []

    def __init__(self, function, v):
        self.function, self.v, self.output, self.replays = (
            weakref.WeakMethod(function),
            v,
            torch.full_like(v, torch.nan),
            0,
        )
        Recorded.made.append(weakref.ref(self))

    def replay(self):
        self.output.copy_(self.function()(self.v))
        self.replays += 1


def recording(function, v):
    graph = Recorded(function, v)
    return graph, graph.output


def refusing(function, v):
    Recorded.made.append(None)
    raise RuntimeError("operation not permitted when stream is capturing")


@pytest.fixture
def made(monkeypatch):
    monkeypatch.setattr(Recorded, "made", [])
    return Recorded.made


@curvatures
def test_replayed_products_are_those_of_the_dense_matrix(curvature, oracle, made):
    loss, at = case(nn.GELU())
    operator, expected = curvature(loss, at), oracle(loss, at)
    operator.products = graphs.Replayed(recording)
    found = matrix_of(operator, at)
    assert (found - expected).norm() <= 1e-10 * expected.norm()
    (graph,) = (x() for x in made)
    assert graph.replays == at.numel() - 1  # all but the first


def test_a_product_is_the_callers_own(made):
    loss, at = case(nn.Tanh())
    operator = GaussNewton(loss, at)
    operator.products = graphs.Replayed(recording)
    v = torch.randn_like(at)
    first = [operator @ v for _ in range(3)]
    kept = first[-1].clone()
    operator @ v.neg_()
    assert torch.equal(first[-1], kept)
    assert torch.equal(first[0], first[2])
    first[-1].zero_()
    assert torch.equal(operator @ v, -kept)


def test_what_cannot_be_captured_stays_eager_and_only_the_log_says_so(made, caplog):
    loss, at = case(nn.GELU())
    operator, expected = GaussNewton(loss, at), dense_gauss_newton(loss, at)
    operator.products = graphs.Replayed(refusing)
    with caplog.at_level(logging.DEBUG):
        found = matrix_of(operator, at)
    assert (found - expected).norm() <= 1e-10 * expected.norm()
    assert made == [None]  # it tried once
    assert [(r.levelno, r.name) for r in caplog.records] == [(logging.DEBUG, "snows.ops.graphs")]
    assert "not permitted" in caplog.text


def test_other_errors_are_not_hidden():
    def broken(function, v):
        raise TypeError

    products = graphs.Replayed(broken)
    products(torch.neg, torch.ones(2))
    with pytest.raises(TypeError):
        products(torch.neg, torch.ones(2))


def test_a_graph_goes_with_its_operator(made):
    loss, at = case(nn.GELU())
    operator = GaussNewton(loss, at)
    operator.products = graphs.Replayed(recording)
    operator @ at
    assert not made
    operator @ at
    (graph,) = made
    assert graph() is not None
    gc.disable()  # by reference counts alone, before a line search needs the memory
    try:
        del operator
        assert graph() is None
    finally:
        gc.enable()


def test_on_a_cpu_nothing_is_captured():
    loss, at = case(nn.GELU())
    operator = Hessian(loss, at)
    assert all(torch.equal(operator @ at, operator.product(at)) for _ in range(3))
    assert operator.products._graph is None


class Memory:
    """Stands for memory that graphs compute in."""


class Pretended:
    """Stands for `torch.cuda.CUDAGraph`: memory can be shared for as long as a graph has it."""

    def capture_begin(self, pool=None):
        memory = Memory() if pool is None else pool()
        if memory is None:
            raise AssertionError("the pool is gone")
        self.memory, self.open = memory, True

    def capture_end(self):
        self.open = False

    def pool(self):
        return weakref.ref(self.memory)

    def replay(self):
        pass


@pytest.fixture
def pretended(monkeypatch):
    def forbidden():
        raise AssertionError("waits for the device or gives memory back")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Pretended)
    for name in ("synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, forbidden)


def broken(v):
    raise RuntimeError("not permitted")


def captured_memory():
    """The memory of a graph that is gone at once, as an operator's is before the next is built."""
    graph, output = graphs.capture(torch.neg, torch.ones(2))
    assert not graph.open
    assert torch.equal(output, -torch.ones(2))
    return weakref.ref(graph.memory)


@pytest.mark.usefixtures("pretended")
def test_successive_graphs_compute_in_one_memory_until_the_end():
    with graphs.one_pool():
        found = [captured_memory() for _ in range(3)]
        assert found[0]() is not None
        assert found[0]() is found[1]() is found[2]()
        with graphs.one_pool():  # of another solve
            assert captured_memory()() is not found[0]()
        assert captured_memory()() is found[0]()
    assert found[0]() is None
    assert captured_memory()() is None  # outside each has its own


@pytest.mark.usefixtures("pretended")
def test_memory_of_a_capture_that_failed_is_not_used_again():
    with graphs.one_pool():
        first = captured_memory()
        with pytest.raises(RuntimeError, match="not permitted"):
            graphs.capture(broken, torch.ones(2))
        assert first() is None
        assert captured_memory()() is not None


@pytest.mark.parametrize(
    ("switch", "device", "calls", "expected"),
    [
        (None, "cuda", graphs.FEWEST - 1, False),
        (None, "cuda", graphs.FEWEST, True),
        (None, "cuda", None, True),
        ("0", "cuda", None, False),
        ("0", "cuda", 1000, False),
        ("1", "cuda", 2, True),
        ("1", "cpu", 1000, False),
        (None, "cpu", None, False),
    ],
)
def test_what_is_captured(monkeypatch, switch, device, calls, expected):
    monkeypatch.delenv("SNOWS_GRAPHS", raising=False)
    if switch is not None:
        monkeypatch.setenv("SNOWS_GRAPHS", switch)
    assert graphs.capturing(torch.device(device), calls) == (graphs.capture if expected else None)


@pytest.mark.parametrize(("solver", "expected"), [(Newton(), False), (Newton.published(), True)])
def test_a_solver_with_few_products_captures_none(monkeypatch, made, solver, expected):
    capturing = graphs.capturing
    monkeypatch.delenv("SNOWS_GRAPHS", raising=False)
    monkeypatch.setattr(graphs, "capture", recording)
    monkeypatch.setattr(graphs, "capturing", lambda device, calls: capturing(torch.device("cuda"), calls))
    loss, at = case(nn.Tanh())
    solver.solve([loss], MaskedWeight(at, torch.ones_like(at, dtype=torch.bool)))
    assert len(made) == expected


def reconstruction(name, layer, device="cuda"):
    """A loss of a trained network in float64 on a device, and a weight to look at it from."""
    net = zoo.load(name).double().to(device)
    open_attention(net)
    inputs = Batch.of(zoo.images("calibration")[0][:8].double().to(device))
    horizon = Horizon(net, layer, 4, inputs)
    stream, weight = horizon.stream(inputs), net.get_submodule(layer).weight.detach()
    with torch.no_grad():
        targets = horizon.outputs(weight, stream)
    return Reconstruction(horizon, stream, targets), weight + 0.05 * torch.randn_like(weight)


@pytest.fixture
def _any_algorithm():
    torch.use_deterministic_algorithms(False)  # cuBLAS would ask for an environment variable


gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.usefixtures("_any_algorithm"),
]


class TestOnADevice:
    pytestmark = gpu

    @curvatures
    def test_against_the_dense_matrix(self, curvature, oracle):
        loss, at = case(nn.GELU())
        expected = oracle(loss, at)
        loss.net, loss.x, loss.y = loss.net.cuda(), loss.x.cuda(), loss.y.cuda()
        operator = curvature(loss, at.cuda())
        columns = [
            (operator @ e.view(at.shape).cuda()).flatten().cpu()
            for e in torch.eye(at.numel(), dtype=at.dtype)
        ]
        assert operator.products._graph is not None
        assert (torch.stack(columns, 1) - expected).norm() <= 1e-10 * expected.norm()

    @pytest.mark.parametrize(("name", "layer"), [("resnet20", "layer2.0.conv1"), ("vit", "blocks.1.qkv")])
    @pytest.mark.parametrize("curvature", [GaussNewton, Hessian])
    def test_through_a_horizon_against_eager(self, curvature, name, layer):
        loss, at = reconstruction(name, layer)
        replayed, eager = curvature(loss, at), curvature(loss, at)
        eager.products = graphs.Replayed(None)
        for _ in range(4):
            v = torch.randn_like(at)
            found, wanted = replayed @ v, eager @ v
            assert (found - wanted).norm() <= 1e-11 * wanted.norm()
        assert replayed.products._graph is not None

    def test_memory_goes_with_the_operator(self):
        loss, at = reconstruction("resnet20", "layer2.0.conv1")
        v = torch.randn_like(at)

        def use():
            operator = GaussNewton(loss, at)
            for _ in range(3):
                operator @ v
            assert operator.products._graph is not None

        use()  # libraries keep workspaces
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
        for _ in range(3):
            use()
        torch.cuda.empty_cache()
        assert torch.cuda.memory_allocated() <= before[0]
        assert torch.cuda.memory_reserved() <= before[1]

    def test_a_function_that_waits_for_the_device_stays_eager_and_the_device_goes_on(self):
        def waits(v):
            return v * v.sum().item()

        products = graphs.Replayed(graphs.capture)
        v = torch.ones(3, device="cuda")
        found = [products(waits, v) for _ in range(3)]
        assert products._graph is None
        assert all(x.tolist() == [3, 3, 3] for x in found)
        loss, at = reconstruction("resnet20", "layer2.0.conv1")
        operator = GaussNewton(loss, at)
        assert ((operator @ at) - (operator @ at)).norm() <= 1e-11 * (operator @ at).norm()
