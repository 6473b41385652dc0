"""Where a CUDA device would multiply in TF32, and where in float32: read off PyTorch's settings, which a CPU has too."""

import pytest
import torch
from models import Branches, settle
from test_graphs import Recorded, recording
from test_solvers import LeastSquares
from torch.utils._python_dispatch import TorchDispatchMode

import snows
from snows import NM, Newton
from snows.choosing.choices import Choice
from snows.choosing.latency import shapes
from snows.choosing.measuring import Race, Stopwatch
from snows.choosing.runtimes import Clock, example_of
from snows.choosing.times import Times
from snows.networks.twins import Twins
from snows.ops import graphs
from snows.ops.precision import as_given, products_in, settings
from snows.solving.operators import GaussNewton, Hessian
from snows.sparsity import MaskedWeight

WHOLE, ROUNDED, GIVEN = ("ieee",) * 3, ("tf32",) * 3, ("none", "tf32", "tf32")


@pytest.fixture(autouse=True)
def _as_pytorch_comes():
    assert settings() == GIVEN
    yield
    assert settings() == GIVEN


class Products(TorchDispatchMode):
    """Notes the settings at every matrix product, and whether it belongs to a product of the curvature."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.seen = {True: set(), False: set()}
        self.inside = False
        for curvature in (GaussNewton, Hessian):
            monkeypatch.setattr(curvature, "product", self.within(curvature.product))

    def within(self, product):
        def noted(operator, v):
            self.inside = True
            try:
                return product(operator, v)
            finally:
                self.inside = False

        return noted

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default):
            self.seen[self.inside].add(settings())
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("curvature", ["gauss-newton", "hessian"])
@pytest.mark.parametrize("gradient", ["all", "batch"])
def test_only_the_curvatures_products_are_rounded(curvature, gradient, monkeypatch):
    X, W = torch.randn(12, 4), torch.randn(3, 4)
    loss, start = (
        LeastSquares(X, X @ W.T),
        MaskedWeight(torch.zeros(3, 4), torch.ones(3, 4, dtype=torch.bool)),
    )
    for precision, expected in (("tf32", ROUNDED), ("float32", WHOLE)):
        products = Products(monkeypatch)
        with products:
            newton = Newton(precision=precision, curvature=curvature, gradient=gradient)
            _, steps, *_ = newton.solve([loss, loss], start, held=loss)
        assert steps[0].iterations > 0
        assert products.seen == {True: {expected}, False: {WHOLE}}


def test_a_graph_is_captured_in_the_precision_of_its_products(monkeypatch):
    seen = []

    def capture(function, v):
        seen.append(("captured", settings()))
        return recording(function, v)

    monkeypatch.setattr(Recorded, "made", [])
    monkeypatch.setattr(Recorded, "replay", lambda self: seen.append(("replayed", settings())))
    loss = LeastSquares(torch.randn(12, 4), torch.randn(12, 3))
    operator = GaussNewton(loss, torch.zeros(3, 4), precision="tf32")
    operator.products = graphs.Replayed(capture)
    for _ in range(3):
        operator @ torch.ones(3, 4)
    assert seen == [("captured", ROUNDED), ("replayed", ROUNDED), ("replayed", ROUNDED)]


def test_settings_come_back_whatever_happens():
    with products_in("tf32"):
        with products_in("float32"):
            assert settings() == WHOLE
            with as_given():
                assert settings() == GIVEN
            assert settings() == WHOLE
        assert settings() == ROUNDED
    with pytest.raises(ZeroDivisionError), products_in("float32"):
        1 / 0  # noqa: B018
    assert settings() == GIVEN
    with as_given():
        assert settings() == GIVEN
    assert torch.backends.cudnn.allow_tf32  # PyTorch raises where it finds its older flags at odds with these
    assert not torch.backends.cuda.matmul.allow_tf32


class Noting(Branches):
    """A network that notes the settings at every forward pass."""

    seen = set()

    def forward(self, x):
        self.seen.add(settings())
        return super().forward(x)


def test_pruning_is_in_float32_and_leaves_the_settings_alone():
    net, batches = settle(Noting()), [torch.randn(4, 3, 8, 8) for _ in range(2)]
    Noting.seen.clear()
    snows.prune(
        net, batches, NM(2, 4), select=snows.magnitude, solver=Newton(precision="tf32"), progress=False
    )
    assert Noting.seen == {WHOLE}


def test_times_are_of_what_the_user_will_run(monkeypatch):
    net, batches, seen = settle(Noting()), [torch.randn(4, 3, 8, 8) for _ in range(2)], []
    twins = Twins(net, batches)

    def race(self, runs, *args):
        for run in runs:
            run()
        seen.append(settings())
        return Race([(1.0,) * len(runs)] * 5)

    monkeypatch.setattr(Stopwatch, "race", race)
    Noting.seen.clear()
    with products_in("float32"):
        Clock(twins, example_of(twins.batches[0], None, torch.device("cpu")), "eager").beside(Choice({}))
        assert seen == [GIVEN]
        assert Noting.seen == {GIVEN}
        ((shape, _),) = shapes(net, twins.batches[0])["point"]
        Times(batches[0], Stopwatch()).of(shape)
        assert seen == [GIVEN] * 2
        assert settings() == WHOLE


def test_what_is_asked_is_recorded_and_refused():
    assert "precision='tf32'" in str(Newton(precision="tf32"))
    with pytest.raises(ValueError, match="Newton: expected precision to be one of float32, tf32, got 'bf16'"):
        Newton(precision="bf16")
