"""The orders of units, against least squares, derivatives and sums written out."""

from __future__ import annotations

import weakref
from itertools import combinations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from snows.choosing import compensated as compensating
from snows.choosing.compensated import compensated
from snows.choosing.orders import curves, fisher, hap
from snows.matching import pulled
from snows.matching.consumers import Measured
from snows.matching.metrics import Metric, OutputSensitivity
from snows.networks.batches import Batch
from snows.networks.channels import Group


class Reads(nn.Module):
    """Six channels that a convolution, a grouped one and a linear layer read."""

    def __init__(self):
        super().__init__()
        self.make = nn.Conv2d(2, 6, 3, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.wide = nn.Conv2d(6, 4, 3, padding=1, stride=2)
        self.grouped = nn.Conv2d(6, 4, (1, 2), groups=2)
        self.flat = nn.Linear(6, 5)

    def forward(self, x):
        x = torch.relu(self.norm(self.make(x)))
        found = [self.wide(x), self.grouped(x), self.flat(x.mean((-1, -2)))]
        return torch.cat([y.flatten(1).tanh() for y in found], 1)


def made(seed=0):
    """The network in double precision, two batches, and its group."""
    torch.manual_seed(seed)
    net = Reads().double().eval()
    nn.init.uniform_(net.norm.running_mean, -0.3, 0.3)
    nn.init.uniform_(net.norm.weight, 0.5, 2)
    batches = [Batch.of(torch.randn(n, 2, 7, 8, dtype=torch.float64)) for n in (5, 3)]
    units = torch.arange(6)[:, None]
    group = Group(
        "make", "channels", {"make": units}, {"wide": units, "grouped": units, "flat": units},
        {("norm.weight", 0): units},
    )  # fmt: skip
    return net, batches, group


class Given:
    """Metrics that were drawn, in place of an output sensitivity."""

    def __init__(self, sizes, seed=1):
        generator = torch.Generator().manual_seed(seed)
        self.metrics = {
            name: Metric(0.2, torch.randn(n, 2, dtype=torch.float64, generator=generator))
            for name, n in sizes.items()
        }

    def of(self, operations):
        return {x: m for x in operations for name, m in self.metrics.items() if x.startswith(f"{name}:")}

    def matrix(self, name):
        metric = self.metrics[name]
        return metric.basis @ metric.basis.T + metric.floor * torch.eye(len(metric.basis)).double()


def fitted(inputs, weight, own, metric, gone, damping):
    """What the best fit without some units loses, with an intercept, by least squares over all rows.

    Args:
        inputs: (rows, inputs).
        weight: (out, inputs).
        own: the units' inputs, (units, entries).
        metric: (out, out).
        gone: units.
        damping: relative to the mean variance of an input.
    """
    x = (inputs - inputs.mean(0)) / len(inputs) ** 0.5
    ridge = (damping * x.square().sum(0).mean()) ** 0.5
    x = torch.cat([x, ridge * torch.eye(x.shape[1], dtype=x.dtype)])
    y = x @ weight.T
    kept = torch.ones(x.shape[1], dtype=torch.bool)
    kept[own[list(gone)].flatten()] = False
    left = y - x[:, kept] @ torch.linalg.lstsq(x[:, kept], y, driver="gelsd").solution
    return float(torch.trace(left @ metric @ left.T))


def lost(net, batches, sensitivity, damping=0.01):
    """By set of units, what the three readers lose, written out with `F.unfold`."""
    hidden = [torch.relu(net.norm(net.make(x.args[0]))).detach() for x in batches]
    units = torch.arange(6)
    windows = torch.cat([F.unfold(h, 3, padding=1, stride=2).mT.flatten(0, 1) for h in hidden])
    pairs = torch.cat([F.unfold(h, (1, 2)).mT.flatten(0, 1) for h in hidden])
    means = torch.cat([h.mean((-1, -2)) for h in hidden])
    layers = {x: getattr(net, x).weight.detach().flatten(1) for x in ("wide", "grouped", "flat")}
    metrics = {x: sensitivity.matrix(x) for x in layers}

    def of(gone):
        total = fitted(
            windows, layers["wide"], units[:, None] * 9 + torch.arange(9), metrics["wide"], gone, damping
        )
        total += fitted(means, layers["flat"], units[:, None], metrics["flat"], gone, damping)
        for i in range(2):  # a group of the convolution knows three units and two outputs
            own = torch.arange(3)[:, None] * 2 + torch.arange(2)
            there = [u - 3 * i for u in gone if u // 3 == i]
            rows = slice(2 * i, 2 * i + 2)
            total += fitted(
                pairs[:, 6 * i : 6 * i + 6], layers["grouped"][rows], own,
                metrics["grouped"][rows, rows], there, damping,
            )  # fmt: skip
        return total

    return of


SIZES = {"wide": 4, "grouped": 4, "flat": 5}


@pytest.mark.parametrize("together", [False, True])
def test_compensated_costs_are_those_of_least_squares_without_the_units(together, monkeypatch):
    if together:
        monkeypatch.setattr(compensating, "SINGLE", 0)
        monkeypatch.setattr(compensating, "STEP", 2)
    net, batches, group = made()
    sensitivity = Given(SIZES)
    curve = compensated(Measured(net, batches, sensitivity), [group])["make"]
    expected = lost(net, batches, sensitivity)
    order = curve.order.tolist()
    assert sorted(order) == list(range(6))
    assert curve.cost[0] == 0
    for k in range(1, 7):
        assert float(curve.cost[k]) == pytest.approx(expected(order[:k]), rel=1e-8)
        if not together:  # the unit that costs least beside those that have gone
            assert order[k - 1] == min(order[k - 1 :], key=lambda u, k=k: expected([*order[: k - 1], u]))


def test_every_set_of_units_costs_what_least_squares_loses():
    net, batches, group = made(1)
    sensitivity = Given(SIZES, 2)
    ((_, consumers),) = Measured(net, batches, sensitivity).consumers([group])
    assert list(consumers) == list(SIZES)
    expected = lost(net, batches, sensitivity, 0.05)
    for gone in (x for k in range(1, 7) for x in combinations(range(6), k)):
        readers = [
            compensating._Reader(consumer, consumer.inputs(group.columns[name]), 0.05)
            for name, consumer in consumers.items()
        ]
        cost = sum(x.lose(torch.tensor(gone)) for x in readers).sum()
        assert float(cost) == pytest.approx(expected(gone), rel=1e-8)


def test_without_a_sensitivity_an_error_weighs_its_share_of_the_layers_own_output():
    net, batches, group = made()
    group = Group("make", "channels", group.rows, {"flat": group.columns["flat"]})
    curve = compensated(Measured(net, batches), [group], damping=1e-9)["make"]
    assert float(curve.cost[-1]) == pytest.approx(1, rel=1e-6)  # all that the layer makes is lost


def test_several_passes_measure_what_one_does():
    net, batches, group = made()
    other = Group("wide", "channels", {"wide": torch.arange(4)[:, None]}, {"flat": torch.arange(5)[:, None]})
    one = dict((g.name, c) for g, c in Measured(net, batches).consumers([group, other]))
    each = dict((g.name, c) for g, c in Measured(net, batches, memory=1).consumers([group, other]))
    assert one["wide"]["flat"] is one["make"]["flat"]
    assert each["wide"]["flat"] is not each["make"]["flat"]
    assert torch.equal(one["make"]["flat"].covariance, each["make"]["flat"].covariance)


def test_a_pass_begins_when_the_moments_of_the_one_before_are_gone(monkeypatch):
    net, batches, group = made()
    widths = {"wide": 4, "grouped": 4}
    others = [
        Group(x, "channels", {x: torch.arange(n)[:, None]}, {"flat": torch.arange(n)[:, None]})
        for x, n in widths.items()
    ]
    known, alive, gathered = [], [], Measured._gathered

    def gathering(self, names):
        alive.append(sum(x() is not None for x in known))
        found = gathered(self, names)
        known.extend(map(weakref.ref, found.values()))
        return found

    monkeypatch.setattr(Measured, "_gathered", gathering)
    found = compensated(Measured(net, batches, memory=1), [group, *others])
    assert list(found) == ["make", "wide", "grouped"]
    assert alive == [0, 0, 0]
    assert len(known) == 3 + 1 + 1


def test_the_output_sensitivity_weighs_the_layers_that_read():
    net, batches, group = made()
    sensitivity = OutputSensitivity(net, batches[0], 0)
    ((_, consumers),) = Measured(net, batches, sensitivity).consumers([group])
    for name, consumer in consumers.items():
        (operation,) = consumer.operations
        metric = sensitivity.of([operation])[operation]
        groups, n = len(consumer.weight), len(net.get_submodule(name).weight)
        expected = [w.T @ g @ w for w, g in zip(consumer.weight, metric.matrix(n, groups), strict=True)]
        weighed = consumer.weighed()
        assert torch.allclose(weighed.T @ weighed, torch.block_diag(*expected), rtol=1e-10)


def gradients_of(net, x, name):
    """The Jacobian of the output by a layer's weight: (entries of the output, out, in * kernel)."""
    parameters = {k: p.detach() for k, p in net.named_parameters()}

    def output(weight):
        return torch.func.functional_call(net, parameters | {f"{name}.weight": weight}, (x,)).flatten()

    return torch.func.jacrev(output)(parameters[f"{name}.weight"]).flatten(2)


class Small(nn.Module):
    """A unit is two outputs of one layer and one of another."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 4, 2), nn.Conv2d(1, 2, 1, stride=2)
        self.c, self.d = nn.Conv2d(6, 2, 1), nn.Linear(6, 2)

    def hidden(self, x):
        return torch.cat([self.a(x).sigmoid(), self.b(F.pad(x, (0, 1, 0, 1))[..., :3, :3]).tanh()], 1)

    def read(self, h):
        return self.c(h).square().mean((-1, -2)) + self.d(h.mean((-1, -2))).sin()

    def forward(self, x):
        return self.read(self.hidden(x))


def small():
    torch.manual_seed(3)
    net = Small().double().eval()
    x = torch.randn(2, 1, 3, 3, dtype=torch.float64)
    columns = torch.tensor([[0, 1, 4], [2, 3, 5]])
    group = Group(
        "a", "channels", {"a": torch.tensor([[0, 1], [2, 3]]), "b": torch.tensor([[0], [1]])},
        {"c": columns, "d": columns},
    )  # fmt: skip
    return net, x, group


SIGNS = torch.tensor([[1, 1], [1, -1]]).double()
SIGNS = torch.kron(SIGNS, SIGNS)  # four orthogonal rows: their mean square is that of all noise


@pytest.fixture
def every_sign(monkeypatch):
    """Let noise be four rows of signs that are orthogonal, in turn."""
    drawn = []

    def noise(y, generator):
        drawn.append(SIGNS[len(drawn) % 4].view(y.shape) / (4 * y.var(unbiased=False)) ** 0.5)
        return drawn[-1]

    monkeypatch.setattr(pulled, "_noise", noise)


def test_hap_is_the_trace_of_the_gauss_newton_matrix_times_the_weights(every_sign):
    net, x, group = small()
    curve = hap(Measured(net, [Batch.of(x)]), [group], error=0, most=4)["a"]
    scale = 1 / (4 * net(x).var(unbiased=False))
    traces, draws, energy = torch.zeros(2).double(), torch.zeros(4, 2).double(), torch.zeros(2).double()
    for name, rows in group.rows.items():
        jacobian = gradients_of(net, x, name)
        weight = net.get_submodule(name).weight.detach().flatten(1)
        for unit in range(2):
            J = jacobian[:, rows[unit]].flatten(1)
            traces[unit] += torch.trace(J.T @ J * scale)
            draws[:, unit] += (SIGNS @ J).square().sum(1) * scale
            energy[unit] += weight[rows[unit]].square().sum()
    size = 2 * 4 + 1  # weights of a unit
    scores = traces / (2 * size) * energy
    assert curve.order.tolist() == scores.argsort().tolist()
    assert torch.allclose(curve.cost[1:], scores.sort().values.cumsum(0), rtol=1e-10)
    assert torch.allclose(curve.error, draws.std(0) / 2 / traces, rtol=1e-10)


def test_fisher_is_the_mean_square_of_the_derivative_by_a_gate(every_sign):
    net, x, group = small()
    curve = fisher(Measured(net, [Batch.of(x)]), [group], error=0, most=4)["a"]
    members = torch.zeros(2, 6).double()
    members.scatter_(1, group.columns["c"], 1)
    scores = torch.zeros(2).double()
    for signs in SIGNS:
        gates = torch.ones(2, 2, dtype=torch.float64, requires_grad=True)  # samples, units
        y = net.read(net.hidden(x) * (gates @ members)[:, :, None, None])
        loss = (y.flatten() * signs).sum() / (4 * y.detach().var(unbiased=False)) ** 0.5
        (derivative,) = torch.autograd.grad(loss, gates)
        scores += derivative.square().sum(0) / 4
    assert curve.order.tolist() == scores.argsort().tolist()
    assert torch.allclose(curve.cost[1:], scores.sort().values.cumsum(0), rtol=1e-10)


def test_noise_is_signs_over_the_spread_and_number_of_outputs():
    y = torch.randn(40, 25, generator=torch.Generator().manual_seed(0)) * 3
    z = pulled._noise(y, torch.Generator().manual_seed(1))
    expected = (1000 * float(y.double().var(unbiased=False))) ** -0.5
    assert z.abs().unique().tolist() == pytest.approx([expected])
    assert abs(int((z > 0).sum()) - 500) < 60


def test_noise_is_drawn_until_the_error_is_small():
    net, x, group = small()
    measured = Measured(net, [Batch.of(x)])
    exact = hap(measured, [group], error=0, most=256)["a"]
    rough = hap(measured, [group], error=0.2, most=256)["a"]
    assert float(exact.error.median()) < 0.1 < float(rough.error.median()) < 0.2
    assert torch.equal(rough.cost, hap(measured, [group], error=0.2, most=256)["a"].cost)  # one seed


@pytest.mark.parametrize("order", ["hap", "fisher"])
def test_the_seed_says_which_noise_is_drawn(order):
    net, x, group = small()
    measured = Measured(net, [Batch.of(x)])
    one, other, again = (curves(order, measured, [group], seed)["a"].cost for seed in (0, 1, 1))
    assert torch.equal(other, again)
    assert not torch.equal(one, other)


class InPlace(nn.Module):
    """Changes in place what a layer has read."""

    def __init__(self, inplace=True):
        super().__init__()
        self.a, self.b, self.c, self.inplace = nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(4, 2), inplace

    def forward(self, x):
        x = self.a(x)
        y = self.b(x)
        return y + self.c(F.relu(x, self.inplace))


@pytest.mark.parametrize("order", ["hap", "fisher", "compensated"])
def test_networks_that_change_tensors_in_place_give_the_same(order):
    torch.manual_seed(0)
    changing, plain, units = InPlace(), InPlace(False), torch.arange(4)[:, None]
    plain.load_state_dict(changing.state_dict())
    group = Group("a", "neurons", {"a": units}, {"b": units, "c": units})
    found = [
        curves(order, Measured(net.eval(), [Batch.of(torch.arange(12.0).view(4, 3) - 6)]), [group])["a"]
        for net in (changing, plain)
    ]
    assert torch.allclose(found[0].cost, found[1].cost, rtol=1e-5)
    assert found[0].order.tolist() == found[1].order.tolist()


def test_magnitude_is_the_root_mean_square_of_a_units_weights():
    net, batches, group = made()
    curve = curves("magnitude", Measured(net, batches), [group])["make"]
    expected = []
    for u in range(6):
        half = slice(0, 2) if u < 3 else slice(2, 4)
        own = [
            net.make.weight[u],
            net.wide.weight[:, u],
            net.grouped.weight[half, u % 3],
            net.flat.weight[:, u],
        ]
        expected.append(torch.cat([x.flatten() for x in own]).square().mean().sqrt().detach())
    expected = torch.stack(expected)
    assert curve.order.tolist() == expected.argsort().tolist()
    assert torch.allclose(curve.cost[1:], expected.sort().values.cumsum(0), rtol=1e-12)


def test_a_function_of_a_group_is_an_order_and_groups_with_a_reason_are_left_out():
    net, batches, group = made()
    fixed = Group("flat", "neurons", {"flat": torch.arange(5)[:, None]}, {}, reason="it reaches the output")
    scores = torch.tensor([3, 1, 2, 1, 0, 5])
    found = curves(lambda g: scores, Measured(net, batches), [group, fixed])
    assert list(found) == ["make"]
    curve = found["make"]
    assert curve.order.tolist() == [4, 1, 3, 2, 0, 5]
    assert curve.cost.tolist() == [0, 0, 1, 2, 4, 7, 12]
    assert curve.kept(2).tolist() == [0, 5]


@pytest.mark.parametrize(
    "scores", [torch.ones(5), torch.ones(6, 1), torch.tensor([1, 2, 3, 4, 5, -1.0]),
               torch.tensor([1, 2, 3, 4, 5, torch.nan]), torch.ones(0), torch.full((6,), torch.inf), None, "many"],
)  # fmt: skip
def test_scores_that_are_not_a_groups_are_refused(scores):
    net, batches, group = made()
    with pytest.raises(
        ValueError, match=r"make: expected one finite score of at least 0 for each of 6 units"
    ):
        curves(lambda g: scores, Measured(net, batches), [group])


def test_unknown_orders_and_networks_without_derivatives_are_refused():
    net, batches, group = made()
    with pytest.raises(ValueError, match="expected one of compensated, hap, fisher, magnitude or a function"):
        curves("random", Measured(net, batches), [group])

    class Cut(Reads):
        def forward(self, x):
            return super().forward(x).detach()

    for order in ("hap", "fisher"):
        with pytest.raises(ValueError, match="expected a network that can be differentiated"):
            curves(order, Measured(Cut().double().eval(), batches), [group])
