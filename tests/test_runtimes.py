"""Networks are raced in the runtime that they will run in: what is faster eagerly need not be compiled."""

import json

import pytest
import torch
from models import QUICK, Mapped, masked, settle
from torch import nn

import snows
from snows.choosing import candidates, compiling
from snows.choosing.compiling import Captured, UnavailableError, ready
from snows.choosing.measuring import Race, Stopwatch
from snows.choosing.runtimes import Clock
from snows.layers import SparseLinear
from snows.networks.batches import Batch
from snows.networks.twins import Twins
from snows.ops import graphs
from snows.results.deployment import Deployment


class Told(Stopwatch):
    """Layers are twice as fast packed; the times of networks are what it is told, a race after the other."""

    def __init__(self, *wholes):
        super().__init__()
        self.__dict__.update(wholes=iter(wholes))

    def layer(self, runs, undecided):
        return Race([(2.0, *[1.0] * (len(runs) - 1))] * 5)

    def network(self, runs, undecided):
        found = next(self.wholes)
        assert len(runs) == len(found)
        for run in runs:
            run()
        return Race([tuple(found)] * 5)


@pytest.fixture
def made(monkeypatch):
    """Networks that were made ready, by runtime; nothing is compiled."""
    found = []

    def record(net, example, runtime):
        found.append(runtime)
        return net

    monkeypatch.setattr(candidates, "ready", record)
    monkeypatch.setattr(SparseLinear, "kernel", "native")
    return found


@pytest.fixture
def net():
    return masked(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)))


def deploy(net, *wholes, **settings):
    return snows.deploy(net, torch.randn(3, 8), stopwatch=Told(*wholes), progress=False, **settings)


EAGER = (3.0, 2.5, 2.0)  # as it came, dense, packed
COMPILED = (1.6, 1.5, 1.8)  # dense is faster, by either margin


@pytest.mark.parametrize(
    ("runtime", "wholes", "kinds", "times"),
    [
        ("eager", [EAGER], [SparseLinear] * 2, (3.0, 2.0)),
        ("compile", [COMPILED] * 2, [nn.Linear] * 2, (1.6, 1.5)),
        ("fastest", [EAGER, COMPILED, COMPILED, (2.0, 1.5)], [nn.Linear] * 2, (1.6, 1.5)),
        ("fastest", [EAGER, COMPILED, COMPILED, (1.2, 1.5)], [SparseLinear] * 2, (3.0, 2.0)),
        ("fastest", [EAGER, (1.6, 1.5, 1.0), (2.0, 1.0)], [SparseLinear] * 2, (1.6, 1.0)),
    ],
)
def test_the_choice_is_made_in_the_runtime(net, made, runtime, wholes, kinds, times):
    deployed = deploy(net, *wholes, runtime=runtime)
    report = deployed.report
    assert [type(m) for m in deployed.network if not isinstance(m, nn.ReLU | nn.Identity)] == kinds
    assert (report.dense_ms, report.sparse_ms) == times
    assert deployed.runtime == ("eager" if times == EAGER[::2] else "compile")
    assert set(made) == ({"compile"} if runtime != "eager" else set())
    assert all(not row.reason for row in report.layers) == (kinds[0] is SparseLinear)
    assert Deployment.from_json(report.to_json()) == report
    text = str(report)
    assert ("torch.compile(network)" in text) == (deployed.runtime == "compile")
    assert (", under torch.compile)" in text) == (deployed.runtime == "compile")
    assert ("packed ms" in text) == (runtime != "eager")


def test_every_runtime_that_was_raced_is_in_the_report(net, made):
    report = deploy(net, EAGER, COMPILED, COMPILED, (2.1, 1.6), runtime="fastest").report
    rows = [(x.runtime, x.dense_ms, x.packed_ms, x.chosen) for x in report.runtimes]
    assert rows == [("eager", 2.5, 2.0, "packed"), ("compile", 1.5, 1.8, "dense")]
    lines = [line.replace("│", " ").split() for line in str(report).splitlines()]
    assert ["eager", "2.50", "2.00", "packed"] in lines
    assert ["compile", "1.50", "1.80", "dense,", "the", "fastest"] in lines
    turns = "Timed in turns, what was chosen took 2.10 ms in runtime eager and 1.60 ms in runtime compile."
    assert turns in report.notes


def test_what_is_smaller_is_packed_in_any_runtime(net, made):
    deployed = deploy(net, COMPILED, objective="size", runtime="compile")
    assert [row.reason for row in deployed.report.layers] == [""] * 2
    assert deployed.report.sparse_ms == 1.8


def test_a_smaller_network_without_zeros_is_raced_with_itself(made):
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    batches = [torch.randn(16, 8) for _ in range(4)]
    goal = snows.Structured(0.5, using=("neurons", "channels"), multiple=1)
    small = snows.prune(net, batches, goal, solver=None, progress=False).network
    deployed = deploy(small, (3.0, 2.5), (2.0, 1.5), (2.5, 1.5), runtime="fastest")
    assert (deployed.runtime, deployed.report.dense_ms, deployed.report.sparse_ms) == ("compile", 2.0, 1.5)
    assert [(x.runtime, x.dense_ms, x.chosen) for x in deployed.report.runtimes] == [
        ("eager", 2.5, "dense"),
        ("compile", 1.5, "dense"),
    ]
    again = Deployment.from_json(deployed.report.to_json())
    assert again.runtimes[0].packed_ms != again.runtimes[0].packed_ms
    assert deployed.edits == []


def test_a_report_from_before_there_were_runtimes_is_read(net, made):
    report = deploy(net, EAGER).report
    content = json.loads(report.to_json())
    del content["runtime"], content["runtimes"]
    old = Deployment.from_json(json.dumps(content))
    assert (old.runtime, old.runtimes) == ("eager", [])
    assert old.layers == report.layers
    assert "packed ms" not in str(old)
    content["runtimes"] = [{"runtime": 3}]
    with pytest.raises(ValueError, match="runtime 0: expected runtime to be of type str"):
        Deployment.from_json(json.dumps(content))


def test_a_runtime_that_is_not_here_is_refused_or_left_out(net, monkeypatch):
    monkeypatch.setattr(compiling, "frozen", lambda net, example: None)
    monkeypatch.setattr(SparseLinear, "kernel", "native")
    with pytest.raises(ValueError, match=r'deploy: torch.compile cannot compile .*runtime="eager"$'):
        deploy(net, runtime="compile")
    with pytest.raises(ValueError, match=r"deploy: a CUDA graph needs a network on a CUDA device, .*;"):
        deploy(net, runtime="cuda-graph")
    with pytest.raises(ValueError, match='"eager", "compile", "cuda-graph" or "fastest", got \'onnx\''):
        deploy(net, runtime="onnx")
    deployed = deploy(net, EAGER, runtime="fastest")
    assert deployed.runtime == "eager"
    (note,) = deployed.report.notes
    assert note.startswith("There was no race in runtime compile: torch.compile cannot compile")
    twins = Twins(net, [torch.randn(4, 8) for _ in range(4)])
    for runtime in ("compile", "cuda-graph"):
        with pytest.raises(ValueError, match=r'^prune: .*; ask for the milliseconds of runtime="eager"$'):
            Clock(twins, Batch.of(torch.randn(4, 8)), runtime, stopwatch=QUICK).dense()


class Again:
    """Stands for a CUDA graph: calls again, and writes where the first call wrote."""

    def __init__(self, function):
        self.function, self.output = function, function()

    def replay(self):
        for old, new in zip(
            Batch.of(self.output).tensors(), Batch.of(self.function()).tensors(), strict=True
        ):
            old.copy_(new)


def again(function, device):
    graph = Again(function)
    return graph, graph.output


def test_a_captured_network_computes_what_it_is_given(monkeypatch):
    """Through a graph that calls again what it recorded."""
    monkeypatch.setattr(graphs, "captured", again)
    net = settle(Mapped())
    with torch.inference_mode():
        first, second = ({"pixel_values": torch.randn(2, 3, 16, 16)} for _ in range(2))
        fast = Captured(net, Batch.of(first))
        kept = first["pixel_values"].clone()
        for x in (second, first):
            found = Batch.of(x).through(fast)
            torch.testing.assert_close(found["logits"], net(**x)["logits"])
        assert torch.equal(first["pixel_values"], kept)


def test_what_cannot_be_captured_says_so(monkeypatch):
    def refuse(function, device):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(graphs, "captured", refuse)
    net, x = nn.Linear(2, 2).eval(), torch.randn(1, 2)
    with pytest.raises(UnavailableError, match="a CUDA graph needs"):
        ready(net, x, "cuda-graph")
    monkeypatch.setattr(compiling, "on_cuda", lambda batch: True)
    with pytest.raises(UnavailableError, match=r"capture this network \(.* stream is capturing\)$"):
        ready(net, x, "cuda-graph")


def test_a_network_is_compiled_and_comes_back_as_it_is(net, tmp_path):
    """Under torch.compile itself."""
    x = torch.randn(3, 8)
    deployed = snows.deploy(net, x, runtime="fastest", objective="size", stopwatch=QUICK, progress=False)
    raced = {row.runtime: row for row in deployed.report.runtimes}
    assert raced.keys() == {"eager", "compile"}, deployed.report.notes
    assert all(row.dense_ms > 0 and row.packed_ms > 0 for row in raced.values())
    assert type(deployed.network) is nn.Sequential
    snows.save(deployed, tmp_path / "x.safetensors")
    loaded = ready(snows.load(tmp_path / "x.safetensors", net), x, "compile")
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), net(x))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_every_runtime_of_a_gpu():
    net, first, second = masked(settle(Mapped())).cuda(), *torch.randn(2, 2, 3, 16, 16).cuda()
    first, second = {"pixel_values": first}, {"pixel_values": second}
    fast = ready(net, first, "cuda-graph")
    with torch.no_grad():
        for x in (second, first):
            found = Batch.of(x).through(fast)["logits"]
            torch.testing.assert_close(found, net(**x)["logits"], rtol=1e-4, atol=1e-4)
    report = snows.deploy(
        net, first, runtime="fastest", objective="size", stopwatch=QUICK, progress=False
    ).report
    assert {"eager", "cuda-graph"} <= {row.runtime for row in report.runtimes}
