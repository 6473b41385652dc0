"""What a cut network has left of the dense one's features, and the least squares that fit it to that."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from snows.matching.compensation import Intercept, compensate, unchanged
from snows.matching.mismatch import mismatch
from snows.matching.statistics import DAMPING, LayerStatistics
from snows.networks.batches import Batch
from snows.networks.implants import Implant
from snows.networks.reduction import Reduction
from snows.networks.twins import Twins


class Cutting:
    """Cut by hand: an edit that takes a function of the network."""

    def __init__(self, apply):
        self.apply = apply


class Net(nn.Module):
    def __init__(self, bias=True):
        super().__init__()
        self.a = nn.Conv2d(3, 6, 3, padding=1, bias=bias)
        self.norm = nn.BatchNorm2d(6)
        self.b = nn.Conv2d(6, 4, 3, bias=bias)
        self.fc = nn.Linear(4, 5)

    def forward(self, x):
        return self.fc(self.b(F.relu(self.norm(self.a(x)))).mean((2, 3)))


KEPT = torch.tensor([0, 2, 3, 5])


def cut(net):
    for module, key, dim in [("a", "weight", 0), ("a", "bias", 0), ("b", "weight", 1)] + [
        ("norm", key, 0) for key in ("weight", "bias", "running_mean", "running_var")
    ]:
        owner = net.get_submodule(module)
        old = getattr(owner, key)
        if old is not None:
            new = old.detach().index_select(dim, KEPT).clone()
            setattr(owner, key, nn.Parameter(new) if isinstance(old, nn.Parameter) else new)
    net.a.out_channels = net.norm.num_features = net.b.in_channels = len(KEPT)


def twins_of(net, batches):
    twins = Twins(net, batches)
    twins.apply([Cutting(cut)], {"a": KEPT}, {})
    return twins


@pytest.fixture
def batches():
    torch.manual_seed(0)
    return [torch.randn(12, 3, 8, 8, dtype=torch.float64) + 0.3 for _ in range(5)]


def made(bias=True):
    torch.manual_seed(1)
    net = Net(bias).double().eval()
    with torch.no_grad():
        net.norm.running_mean.normal_()
        net.norm.running_var.uniform_(0.5, 2)
        net.norm.bias.fill_(0.5)
    return net


def test_what_is_left_of_the_dense_features(batches):
    net = made()
    reduction = Reduction.of(net, {"a": KEPT}, Batch.of(batches[0]), {})
    assert {name: (dim, kept.tolist()) for name, (dim, kept) in reduction.kept.items()} == {
        "a:conv2d": (-3, KEPT.tolist()),
        ":relu": (-3, KEPT.tolist()),
    }
    y = torch.randn(2, 6, 8, 8)
    assert torch.equal(reduction.left("a:conv2d", y), y[:, KEPT])
    assert reduction.left("fc:linear", y) is y


class Heads(nn.Module):
    """Two heads of three features, folded into the batch in one of two ways."""

    def __init__(self, folded):
        super().__init__()
        self.folded, self.qkv, self.out = folded, nn.Linear(4, 18), nn.Linear(6, 4)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, -1, 3)).permute(2, 0, 3, 1, 4)
        if self.folded:
            q, k, v = (t.flatten(0, 1) for t in (q, k, v))
            y = torch.softmax(q @ k.mT, -1) @ v
            return self.out(y.unflatten(0, (len(x), -1)).transpose(1, 2).flatten(2))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("folded", [False, True])
def test_heads_that_are_gone(folded):
    left = torch.cat([torch.arange(3) + 6 * part for part in range(3)])
    x = torch.randn(2, 5, 4)
    found = Reduction.of(Heads(folded).eval(), {"qkv": left}, Batch.of(x), {})
    dim, kept = found.kept["qkv:linear"]
    assert dim == -1
    assert kept.tolist() == [0, 1, 2, 6, 7, 8, 12, 13, 14]
    if folded:  # heads lie among the samples, whose number is another in every batch
        assert found.lost == {":softmax"}
    else:
        dim, kept = found.kept[":scaled_dot_product_attention"]
        assert (dim, kept.tolist()) == (-3, [0])


def patches(x):
    return F.unfold(x, 3, padding=0).transpose(1, 2).flatten(0, 1)


def test_least_squares_with_an_intercept(batches):
    net = made()
    twins = twins_of(net, batches)
    site, intercept = twins.at("b"), Intercept.of(twins, "b")
    assert not unchanged(site)
    before = mismatch(twins)
    compensate(site, LayerStatistics.of(site, lambda: None), intercept)

    training = [x for x in batches if x is not batches[-1]]  # the last is held back
    features = torch.cat([F.relu(net.norm(net.a(x))) for x in training])
    X = patches(features[:, KEPT])
    Y = net.b(features).permute(0, 2, 3, 1).flatten(0, 2)
    start = net.b.weight[:, KEPT].flatten(1)
    centred, level = X - X.mean(0), Y - Y.mean(0)
    shift = DAMPING * len(X) * centred.square().mean()
    rows = torch.cat([centred, shift.sqrt() * torch.eye(X.shape[1], dtype=X.dtype)])
    right = torch.cat([level, shift.sqrt() * start.T])
    weight = torch.linalg.lstsq(rows, right).solution.T
    torch.testing.assert_close(site.layer.weight.flatten(1), weight)
    torch.testing.assert_close(site.layer.bias, Y.mean(0) - weight @ X.mean(0))
    assert mismatch(twins) < 0.7 * before


def test_intercepts_alone_restore_the_mean(batches):
    net = made()
    twins = twins_of(net, batches)
    site = twins.at("b")
    weight = site.layer.weight.detach().clone()
    compensate(site, LayerStatistics.of(site, lambda: None), Intercept.of(twins, "b"), weights=False)
    assert torch.equal(site.layer.weight, weight)
    training = torch.cat(batches[:-1])
    wanted = net.b(F.relu(net.norm(net.a(training)))).mean((0, 2, 3))
    found = twins.sparse.b(F.relu(twins.sparse.norm(twins.sparse.a(training)))).mean((0, 2, 3))
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(("kernel", "stride", "padding"), [(3, 2, 1), (3, 1, 0), (1, 2, 0)])
def test_the_second_factor_of_an_implant_is_fitted_to_the_dense_layers_output(
    batches, kernel, stride, padding
):
    torch.manual_seed(3)
    net = (
        nn.Sequential(nn.Conv2d(3, 6, kernel, stride, padding), nn.ReLU(), nn.Conv2d(6, 2, 1)).double().eval()
    )
    twins = Twins(net, batches)
    twins.apply([Implant("0", 2)], {}, {"0.0": "0", "0.1": "0"})
    site = twins.at("0.1")
    compensate(site, LayerStatistics.of(site, lambda: None), Intercept.of(twins, "0.1"), weights=False)
    training = torch.cat(batches[:-1])
    wanted, found = (x[0](training).mean((0, 2, 3)) for x in (net, twins.sparse))
    torch.testing.assert_close(found, wanted)


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 4, 3, bias=False)
        self.norm, self.last, self.fc = nn.BatchNorm2d(6), nn.BatchNorm2d(4), nn.Linear(4, 5)

    def forward(self, x):
        return self.fc(self.last(self.b(F.relu(self.norm(self.a(x))))).mean((2, 3)))


def test_a_batchnorm_holds_the_intercept(batches):
    torch.manual_seed(2)
    net = Normed().double().eval()
    with torch.no_grad():
        net.last.running_mean.normal_()
        net.last.running_var.uniform_(0.5, 2)
        net.norm.bias.fill_(0.5)
    twins = twins_of(net, batches)
    intercept = Intercept.of(twins, "b")
    assert set(intercept.tensors()) == {"mean", "variance"}
    compensate(twins.at("b"), LayerStatistics.of(twins.at("b"), lambda: None), intercept)
    training = torch.cat(batches[:-1])
    dense = net.b(F.relu(net.norm(net.a(training))))
    sparse = twins.sparse.b(F.relu(twins.sparse.norm(twins.sparse.a(training))))
    moved = net.last.running_mean + sparse.mean((0, 2, 3)) - dense.mean((0, 2, 3))
    torch.testing.assert_close(twins.sparse.last.running_mean, moved)
    ratio = (sparse.var((0, 2, 3), unbiased=False) + 1e-5) / (dense.var((0, 2, 3), unbiased=False) + 1e-5)
    torch.testing.assert_close(twins.sparse.last.running_var, net.last.running_var * ratio)


def test_a_layer_before_the_cut_has_nothing_to_fit(batches):
    net = made()
    twins = twins_of(net, batches)
    assert not unchanged(twins.at("a"))  # some of its outputs are gone
    whole = Twins(copy.deepcopy(net), batches)
    assert unchanged(whole.at("b"))
