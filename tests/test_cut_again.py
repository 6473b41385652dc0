"""Networks that were made smaller and are made smaller again, and those whose features hardly vary."""

from functools import partial

import pytest
import torch
from torch import nn

import snows
from snows import NM, Budget, Matching, Newton, Structured
from snows.matching.statistics import factored

quick = partial(snows.prune, progress=False, matching=Matching(2), solver=Newton(max_iterations=2))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.start = nn.Linear(12, 32)
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.fc1, self.fc2, self.head = nn.Linear(32, 64), nn.Linear(64, 32), nn.Linear(32, 5)

    def forward(self, x):
        x = self.start(x)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head((x + self.fc2(torch.relu(self.fc1(x)))).mean(1))


class Images(nn.Module):
    def __init__(self):
        super().__init__()
        self.c1, self.c2 = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.Conv2d(16, 32, 3, 2, 1, bias=False)
        self.b1, self.b2, self.head = nn.BatchNorm2d(16), nn.BatchNorm2d(32), nn.Linear(32, 7)

    def forward(self, x):
        x = self.b2(self.c2(torch.relu(self.b1(self.c1(x)))))
        return self.head(torch.relu(x).mean((2, 3)))


CASES = [(Block, (32, 6, 12)), (Images, (32, 3, 8, 8))]


@pytest.mark.parametrize(("kind", "shape"), CASES, ids=["linear", "conv"])
def test_a_low_rank_network_is_cut_again_and_loads(kind, shape, tmp_path):
    batches = [torch.randn(shape) for _ in range(2)]
    net = kind().eval()
    once = quick(net, batches, Structured(0.6, using=("low-rank",))).network
    free = [x for x in snows.groups(once, batches[0]) if not x.reason]
    assert any(x.name.endswith(".0") for x in free)  # the rank of an implant
    half = {x.name: torch.arange(0, x.units, 2) for x in free}
    again, report = quick(once, batches, Structured(half))
    assert [x.loss for x in report.stages if x.taken][-1] < report.stages[0].loss
    third = quick(again, batches, Structured(0.8, multiple=4)).network
    halved = quick(third, batches, NM(2, 4), select=snows.selectors.magnitude, solver=None).network
    for i, small in enumerate((once, again, third, halved)):
        snows.save(small, tmp_path / f"{i}.safetensors")
        loaded = snows.load(tmp_path / f"{i}.safetensors", kind())
        assert torch.equal(loaded(batches[0]), small(batches[0]))
    packed = snows.deploy(halved, batches[0])
    snows.save(packed, tmp_path / "packed.safetensors")
    loaded = snows.load(tmp_path / "packed.safetensors", kind())
    torch.testing.assert_close(loaded(batches[0]), packed.network(batches[0]))


def test_attention_that_lost_heads_is_still_in_evaluation_mode():
    batches = [torch.randn(32, 6, 12) for _ in range(2)]
    small = quick(Block().eval(), batches, Structured(0.5, multiple=4, using=("heads", "neurons"))).network
    assert not any(x.training for x in small.modules())


@pytest.mark.parametrize("select", [snows.selectors.alps, snows.selectors.least_squares])
def test_both_layers_of_low_rank_get_the_pattern_that_comes_then(select):
    batches = [torch.randn(32, 6, 12) for _ in range(2)]
    goal = Structured(0.6, using=("low-rank",), multiple=4, then=NM(2, 4))
    report = quick(Block().eval(), batches, goal, select=select).report
    halved = {x.name for x in report.layers if x.kept == x.size / 2}
    assert any(x.endswith(".0") for x in halved)
    assert any(x.endswith(".1") for x in halved)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_features_that_hardly_vary_are_no_error(dtype):
    net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4))
    net, x = net.to(dtype).eval(), torch.randn(1, 8, dtype=dtype)
    for batches in ([x], [x.expand(40, 8).clone()] * 2):
        report = quick(net, batches, Structured(0.5, multiple=2)).report
        assert report.macs[1] <= 0.5 * report.macs[0]


def test_covariances_of_constant_inputs_are_factored():
    x = (torch.randn(64) * 10).repeat(500, 1)
    gram, mean = x.T @ x / len(x), x.mean(0)
    left = (gram - mean[:, None] * mean).double()[None]
    assert float(torch.linalg.eigvalsh(left)[0, 0]) < 0
    factor, added = factored(left, 0.01, gram[None], x.dtype)
    torch.testing.assert_close(factor @ factor.mT, left + added * torch.eye(64).double())
    assert float(added) < 1e-3 * float(gram.trace())


def test_layers_that_shared_a_weight_before_a_cut_are_told_so():
    layers = [x for _ in range(6) for x in (nn.Linear(16, 16), nn.ReLU())]
    layers[6].weight = layers[2].weight
    batches = [torch.randn(32, 16) for _ in range(2)]
    found = snows.prune(nn.Sequential(*layers).eval(), batches, Structured(0.8), progress=False).report
    told = {x.name: x.reason for x in found.layers if x.pattern == "dense"}
    assert told == {"2": "it shares its weight with 6", "6": "it shares its weight with 2"}


@pytest.mark.parametrize("goal", [Structured(0.7), Budget(0.6, of="bytes")], ids=["structured", "budget"])
def test_all_names_of_layers_that_still_share_after_a_cut_are_told_so(goal):
    layers = [(16, 32), (32, 32), (32, 64), (64, 32), (32, 32), (32, 10)]
    net = nn.Sequential(*(x for sizes in layers for x in (nn.Linear(*sizes), nn.ReLU()))).eval()
    net[8].weight = net[2].weight
    found = snows.prune(net, [torch.randn(64, 16) for _ in range(4)], goal, progress=False)
    assert found.network[8].weight is found.network[2].weight
    assert {x.name: x.reason for x in found.report.layers if x.pattern == "dense"} == {
        "2": "it shares its weight with 8",
        "8": "it shares its weight with 2",
    }
