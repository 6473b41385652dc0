"""cuSPARSELt as a way to run packed 2:4 layers: through its two functions written out densely, on the CPU."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from models import masked
from safetensors import safe_open
from safetensors.torch import load_file
from test_files import rewritten
from test_runtimes import Again
from torch import nn

import snows
from snows import NM, SparseLinear
from snows.choosing import compiling
from snows.choosing.compiling import CALLS, repeated
from snows.choosing.measuring import Race, Stopwatch
from snows.networks.batches import Batch
from snows.ops import cusparselt, graphs

CPU = torch.device("cpu")


class Library:
    """What the private functions compute: the product of a 2:4 weight with columns, and a bias."""

    def __init__(self):
        self.columns, self.searched, self.wrong, self.missing = [], [], 0.0, False

    def compress(self, weight):
        if self.missing:
            raise RuntimeError("cuSPARSELt not supported on your machine.")
        assert weight.dtype in (torch.float16, torch.bfloat16)
        assert all(side % 16 == 0 for side in weight.shape)
        assert int((weight.unflatten(1, (-1, 4)) != 0).sum(-1).max()) <= 2
        return weight.flatten().clone()

    def search(self, compressed, x, bias=None, transpose_result=False):
        self.searched.append(x.shape[1])
        return 3

    def multiply(self, compressed, x, bias=None, transpose_result=False, alg_id=0):
        assert compressed.dtype == x.dtype
        assert x.shape[1] % 8 == 0
        assert alg_id == 3
        self.columns.append(x.shape[1])
        y = compressed.view(-1, len(x)).float() @ x.float() + self.wrong
        y = (y if bias is None else y + bias.float()[:, None]).to(x.dtype)
        return y.T.contiguous() if transpose_result else y


@pytest.fixture
def library(monkeypatch):
    found = Library()
    monkeypatch.setattr(torch, "_cslt_compress", found.compress, raising=False)
    monkeypatch.setattr(torch, "_cslt_sparse_mm_search", found.search, raising=False)
    monkeypatch.setattr(torch, "_cslt_sparse_mm", found.multiply, raising=False)
    monkeypatch.setattr(cusparselt, "_algorithms", {})
    monkeypatch.setattr(cusparselt, "_is_with", lambda values: True)
    cusparselt._works.cache_clear()
    yield found
    cusparselt._works.cache_clear()


def dense(out=16, width=32, dtype=torch.bfloat16, pattern=NM(2, 4), bias=True):  # noqa: B008
    return masked(nn.Linear(width, out, bias=bias), pattern).to(dtype)


def by_library(layer, activation=None):
    ours = SparseLinear.from_dense(layer, activation=activation)
    return SparseLinear(ours.packed, ours.bias, activation, cusparselt=True).eval()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
@pytest.mark.parametrize("shape", [(1, 32), (32,), (8, 32), (3, 5, 32), (0, 32), (2, 0, 32)], ids=str)
def test_it_computes_the_layer_with_any_number_of_tokens(library, shape, activation, dtype):
    linear, x = dense(dtype=dtype, bias=activation != "relu"), torch.randn(shape, dtype=dtype)
    layer = by_library(linear, activation)
    assert layer.kernel == "cuSPARSELt"
    after = {None: lambda y: y, "relu": F.relu, "gelu": F.gelu}[activation]
    with torch.no_grad():
        found, want = layer(x), after(linear.float()(x.float()))
    assert found.shape == want.shape
    assert found.is_contiguous()
    torch.testing.assert_close(found.float(), want, rtol=2e-2, atol=2e-2)
    tokens = x.numel() // 32
    assert library.columns == ([-(-tokens // 8) * 8] if tokens else [])


def test_an_algorithm_is_looked_for_once_for_a_number_of_tokens(library):
    layer, other = by_library(dense()), by_library(dense())
    with torch.no_grad():
        for tokens in (3, 8, 5, 9, 16):
            layer(torch.randn(tokens, 32).bfloat16())
            other(torch.randn(tokens, 32).bfloat16())
    assert library.searched == [8, 16]


@pytest.mark.parametrize(
    "linear",
    [
        dense(dtype=torch.float32),
        dense(pattern=NM(1, 4)),
        dense(pattern=snows.Unstructured(0.7)),
        dense(out=8),
        dense(width=40),
    ],
    ids=["float32", "1:4", "unstructured", "8 rows", "40 columns"],
)
def test_what_it_does_not_take_runs_as_before(library, linear):
    layer, x = by_library(linear), torch.randn(3, linear.in_features, dtype=linear.weight.dtype)
    assert layer.kernel != "cuSPARSELt"
    with torch.no_grad():
        torch.testing.assert_close(layer(x), SparseLinear.from_dense(linear)(x))
    assert library.columns == []


def test_gradients_and_autocast_go_by_the_other_way(library):
    linear = dense()
    layer, x = by_library(linear), torch.randn(4, 32).bfloat16().requires_grad_()
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, linear.weight.sum(0).expand(4, -1), rtol=2e-2, atol=2e-2)
    with torch.no_grad(), torch.autocast("cpu", torch.float16):
        assert layer(torch.randn(4, 32)).dtype == torch.float16
    assert library.columns == []
    with pytest.raises(ValueError, match="expected an input with 32 channels, got 16"):
        layer(torch.randn(4, 16).bfloat16())
    with pytest.raises(ValueError, match=r"expected an input of the weight's torch.bfloat16"):
        layer(torch.randn(4, 32))


def test_it_is_tried_before_it_is_used(library, monkeypatch):
    assert cusparselt._works(CPU, torch.bfloat16)
    assert cusparselt._works(CPU, torch.float16)
    for fault in ({"wrong": 1.0}, {"wrong": 0.0, "missing": True}):
        cusparselt._works.cache_clear()
        library.__dict__.update(fault)
        assert not cusparselt._works(CPU, torch.bfloat16)
    cusparselt._works.cache_clear()
    monkeypatch.delattr(torch, "_cslt_compress")
    assert not cusparselt._works(CPU, torch.bfloat16)


def test_on_a_cpu_it_is_not_there():
    cusparselt._works.cache_clear()
    layer = by_library(dense())
    assert layer.kernel != "cuSPARSELt"
    assert cusparselt._works.cache_info().currsize == 0  # and not even tried


def test_the_compressed_weight_follows_the_packed_one(library):
    layer, x = by_library(dense()), torch.randn(8, 32).bfloat16()
    with torch.no_grad():
        want = layer(x)
        assert torch.equal(copy.deepcopy(layer)(x), want)
        layer.values.mul_(2)
        layer.bias.mul_(2)
        torch.testing.assert_close(layer(x), 2 * want)
    assert library.columns == [8] * 3
    assert layer.float().kernel != "cuSPARSELt"
    assert layer.bfloat16().kernel == "cuSPARSELt"


def test_the_op_holds_to_its_schema_and_an_exported_program_does_not_call_it(library):
    layer, x = by_library(dense()), torch.randn(3, 32).bfloat16()
    op = torch.ops.snows.cusparselt_linear.default
    for tokens in (x, x[:0]):
        torch.library.opcheck(
            op, (tokens, layer.order, layer.bias, 16), test_utils=("test_schema", "test_faketensor")
        )
    with torch.no_grad():
        program = torch.export.export(layer, (x,))
    assert "sparse_linear" in str(program.graph)
    assert "cusparselt" not in str(program.graph)


class Told(Stopwatch):
    """Every layer takes so long; a packed network is the fastest."""

    def __init__(self, *times):
        super().__init__()
        self.__dict__.update(times=times)

    def layer(self, runs, undecided):
        assert len(runs) == len(self.times)
        return Race([self.times] * 5)

    def network(self, runs, undecided):
        return Race([tuple(float(len(runs) - i) for i in range(len(runs)))] * 5)


def deploy(net, *times):
    x = torch.randn(3, 32, dtype=torch.bfloat16)
    return snows.deploy(net, x, stopwatch=Told(*times), progress=False)


@pytest.mark.parametrize(
    ("times", "kernel"),
    [((2.0, 1.0, 0.5), "cuSPARSELt"), ((2.0, 0.5, 1.0), "native"), ((1.0, 2.0, 1.5), "dense")],
)
def test_deploy_races_it_and_a_file_runs_without_it(library, monkeypatch, tmp_path, times, kernel):
    monkeypatch.setattr(snows.layers.PackedLayer, "kernel", "native")
    net = nn.Sequential(dense(16), nn.ReLU(), dense(16, 16)).eval()
    deployed = deploy(net, *times)
    rows = deployed.report.layers
    assert {"dense" if row.reason else row.kernel for row in rows} == {kernel}
    assert [(row.dense_ms, row.sparse_ms) for row in rows] == [(times[0], min(times[1:]))] * 2
    if kernel == "dense":
        return
    path, plain = tmp_path / "x.safetensors", tmp_path / "plain.safetensors"
    snows.save(deployed, path)
    snows.save(deployed.network, plain)
    edits = [safe_open(x, "pt").metadata()["snows"] for x in (path, plain)]
    assert edits[0] == edits[1]  # they are read off the network
    ours = deploy(net, 2.0, 0.5, 1.0)
    snows.save(ours, plain)
    stored, other = load_file(path), load_file(plain)
    assert stored.keys() == other.keys()
    assert all(torch.equal(x, other[name]) for name, x in stored.items())
    x = torch.randn(5, 32).bfloat16()
    with torch.no_grad():
        want = deployed.network(x)
        assert torch.equal(snows.load(path, net)(x), want)
        assert snows.load(path, net)[0].kernel == kernel
        monkeypatch.setattr(cusparselt, "_is_with", lambda values: False)
        loaded = snows.load(path, net)
        assert (loaded[0].kernel, loaded[0].cusparselt) == ("native", kernel == "cuSPARSELt")
        torch.testing.assert_close(loaded(x), want, rtol=2e-2, atol=2e-2)


def test_other_settings_of_a_linear_layer_are_refused(library, tmp_path):
    net, path = nn.Sequential(dense(), nn.ReLU()).eval(), tmp_path / "x.safetensors"
    snows.save(nn.Sequential(by_library(net[0], "relu"), nn.Identity()), path)
    (edit,) = [x for x in json.loads(safe_open(path, "pt").metadata()["snows"])["edits"] if "layer" in x]
    assert edit["settings"] == {"cusparselt": True}
    for wrong in (
        {"cusparselt": 1},
        {"cusparselt": False},
        {"cusparselt": True, "stride": 1},
        {"other": True},
    ):

        def change(metadata, wrong=wrong):
            next(x for x in metadata["edits"] if x["kind"] == "pack")["settings"] = wrong

        with pytest.raises(ValueError, match="settings of 0 is"):
            snows.load(rewritten(path, change), net)


def test_calls_are_repeated_in_graphs_where_there_are_any(monkeypatch):
    calls = []
    runs, batch = [lambda: calls.append("a"), lambda: calls.append("b")], Batch.of(torch.zeros(1))
    assert repeated(runs, batch) == (runs, 1)
    assert calls == []
    monkeypatch.setattr(compiling, "on_cuda", lambda batch: True)
    monkeypatch.setattr(graphs, "captured", lambda function, device: (Again(function), None))
    many, count = repeated(runs, batch)
    assert count == CALLS
    assert calls == ["a", "b"] + ["a"] * CALLS + ["b"] * CALLS
    many[1].__self__.function()
    assert calls[-CALLS:] == ["b"] * CALLS

    def refuse(function, device):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(graphs, "captured", refuse)
    assert repeated(runs, batch) == (runs, 1)
    assert Race([(20.0, 40.0), (60.0, 80.0)]).each(20).rounds == [(1.0, 2.0), (3.0, 4.0)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 5, 197, 1024])
def test_the_library_itself_on_a_gpu(tokens, dtype):
    linear = dense(512, 256, dtype).cuda()
    layer = by_library(linear, "gelu")
    if not hasattr(torch, "_cslt_compress") or torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("this torch has no cuSPARSELt, or this GPU no sparse tensor cores")
    assert layer.kernel == "cuSPARSELt"
    x = torch.randn(tokens, 256, device="cuda", dtype=dtype)
    with torch.no_grad():
        want = F.gelu(copy.deepcopy(linear).double()(x.double()))
        for _ in range(2):
            torch.testing.assert_close(layer(x).double(), want, rtol=2e-2, atol=2e-2)
    (run,), count = repeated([lambda: layer(x)], Batch.of(x))
    run()
    assert count == CALLS
