"""Milliseconds as a cost: fitted times, and choices that are timed until they are what was asked."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from models import settle
from test_taking import Net

import snows
from snows import Structured
from snows.choosing.choices import Choice
from snows.choosing.costs import Costs, Term
from snows.choosing.latency import latency, shapes
from snows.choosing.measuring import Race, Stopwatch
from snows.choosing.options import DENSE, Option, treatment
from snows.choosing.runtimes import Pair, example_of
from snows.choosing.timed import timed
from snows.choosing.times import Fit, Shape, Times, fitted
from snows.networks import proving
from snows.networks.batches import Batch
from snows.networks.layers import prunable

POINTS = list(itertools.product((0.25, 0.5, 1.0), (0.25, 0.5, 1.0)))


@pytest.mark.parametrize("fit", [(0.1, 0.2, 0.3, 0.4), (0, 0, 0, 2.0), (1.0, 0, 0.5, 0), (0.7, 0, 0, 0)])
def test_times_of_that_form_are_found_again(fit):
    times = [Fit(*fit).at(u, v) for u, v in POINTS]
    torch.testing.assert_close(torch.tensor(fitted(POINTS, times)), torch.tensor([float(x) for x in fit]))


def test_no_coefficient_is_below_zero_and_no_better_fit_is_missed():
    """Against the projected gradient method, on times that no such form has."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        times = torch.rand(len(POINTS), generator=generator, dtype=torch.float64) + 0.1
        found = torch.tensor(fitted(POINTS, times.tolist()), dtype=torch.float64)
        assert (found >= 0).all()
        columns = torch.tensor([[1, u, v, u * v] for u, v in POINTS], dtype=torch.float64) / times[:, None]
        x, step = torch.zeros(4, dtype=torch.float64), 1 / torch.linalg.matrix_norm(columns, 2) ** 2
        for _ in range(20000):
            x = (x - step * columns.mT @ (columns @ x - 1)).clamp_min(0)
        errors = [(columns @ y - 1).square().sum() for y in (found, x)]
        assert errors[0] <= errors[1] + 1e-9


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (torch.nn.Linear(12, 20), (5, 7, 12)),
        (torch.nn.Conv2d(8, 12, 3, 2, 1), (2, 8, 9, 11)),
        (torch.nn.Conv2d(8, 8, 3, 1, 1, groups=8), (2, 8, 9, 9)),
        (torch.nn.Conv2d(8, 16, (1, 5), padding="same", groups=4), (2, 8, 6, 6)),
    ],
)
def test_a_narrower_layer_is_a_layer_with_less(layer, x):
    net = torch.nn.Sequential(layer).eval()
    found = shapes(net, Batch.of(torch.zeros(x)))["0"]
    assert len(found) == 1
    shape, size = found[0]
    assert size == net(torch.zeros(x)).numel()
    assert shape.call(1, 1, torch.zeros(1))().shape == net(torch.zeros(x)).shape
    narrow = shape.call(0.5, 0.5, torch.zeros(1))()
    channel = narrow.ndim - 1 if isinstance(layer, torch.nn.Linear) else 1
    assert narrow.shape[channel] == len(layer.weight) // 2


class Counting(Stopwatch):
    """Takes as many milliseconds as a call multiplies millions, and a little for being called."""

    def race(self, runs, seconds=0.0, undecided=lambda race: False):
        from torch.utils.flop_counter import FlopCounterMode

        row = []
        for run in runs:
            with FlopCounterMode(display=False) as counter:
                run()
            row.append(1e-5 + counter.get_total_flops() / 2e6)
        return Race([tuple(row)] * 5)


def test_predicted_milliseconds_are_those_of_the_cut_network():
    torch.manual_seed(0)
    net = settle(Net())
    batch = Batch.of(torch.randn(2, 3, 8, 8))
    groups = [x for x in proving.groups(net, batch) if not x.reason]
    watch = Counting()
    times = Times(torch.zeros(1), watch)

    def layers(network):
        return sum(
            times.of(shape).at(1, 1) for calls in shapes(network, batch).values() for shape, _ in calls
        )

    whole = 2 * layers(net)  # half of it is not the layers'
    costs = latency(net, batch, whole, groups, {}, times)
    assert costs.total("latency") == pytest.approx(whole)
    kept = {x.name: torch.arange(max(1, x.units // 2)) for x in groups}
    take, declined = proving.proved(net, batch, groups, kept)
    assert not declined
    small = snows.pruning.Twins(net, [batch.args[0]] * 2).sparse
    take.apply(small)
    widths = {name: len(x) for name, x in kept.items()}

    def entries(network):
        return {name: sum(size for _, size in calls) for name, calls in shapes(network, batch).items()}

    before, after = entries(net), entries(small)
    rest = whole / 2 * sum(after.values()) / sum(before.values())
    assert costs.total("latency", widths) == pytest.approx(layers(small) + rest, rel=1e-6)


def test_a_layer_of_low_rank_costs_its_two_thin_ones():
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(16, 32, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(32, 8, 1)
    )
    batch, watch = Batch.of(torch.randn(2, 16, 6, 6)), Counting()
    ladder = [DENSE, Option(0.1, rank=16), Option(0.2, rank=8)]
    times = Times(torch.zeros(1), watch)
    costs = latency(
        net.eval(), batch, 1e9, [], {"0": ladder}, times
    )  # so long that no layer's time is scaled
    saved = float(costs.saved("latency", {}, treatment("0"), torch.tensor([0]))[0])
    x = batch.args[0]
    dense, *thin = watch.race(
        [
            lambda: F.conv2d(x, torch.zeros(32, 16, 3, 3), padding=1),
            lambda: F.conv2d(x, torch.zeros(8, 16, 3, 3), padding=1),
            lambda: F.conv2d(torch.zeros(2, 8, 6, 6), torch.zeros(32, 8, 1, 1)),
        ]
    ).medians
    assert saved == pytest.approx(dense - sum(thin), rel=1e-6)


class Biased:
    """Times networks that take a power of the share that was predicted."""

    def __init__(self, power, error=0.0):
        self.power, self.error, self.seen = power, error, []

    def beside(self, choice):
        self.seen.append(choice.share)
        share = choice.share**self.power
        return Pair(10.0, share, self.error, share)


class Asked(Choice):
    """A choice that takes a share of the predicted time."""

    def __init__(self, share):
        super().__init__({}, widths={"all": round(1000 * share)})
        self.__dict__["share"] = share


def predicted(packed):
    """A cost that is a thousandth of one width."""
    return Costs([Term("all", latency=10.0, factors=({"all": torch.arange(1001.0) / 1000},))], {"all": 1000})


def choose(costs, share):
    if share < 0.1:
        raise ValueError("no")
    return Asked(share)


@pytest.mark.parametrize("power", [0.5, 0.8, 1.0, 1.3])
def test_a_choice_is_made_again_until_its_time_is_near(power):
    clock = Biased(power)
    choice, pair, _, _ = timed(clock, predicted, 0.5, choose, lambda text: None)
    assert pair.share == pytest.approx(0.5, rel=0.03)
    assert choice.share**power == pair.share
    assert choice.notes == []
    assert len(clock.seen) <= 5


def test_what_cannot_be_reached_is_said():
    choice, pair, _, _ = timed(Biased(0.1), predicted, 0.5, choose, lambda text: None)
    assert pair.share > 0.75
    assert "50 % of the milliseconds were asked for; the network that came nearest takes" in choice.notes[0]
    with pytest.raises(ValueError, match="no"):
        timed(Biased(1), predicted, 0.05, choose, lambda text: None)


def test_times_that_scatter_are_near_enough_sooner():
    clock = Biased(0.9, error=0.1)
    timed(clock, predicted, 0.5, choose, lambda text: None)
    assert len(clock.seen) == 1


def test_so_many_images_are_timed():
    batch = Batch.of(torch.arange(5.0)[:, None])
    cpu = torch.device("cpu")
    assert example_of(batch, None, cpu).samples() == 5
    assert example_of(batch, 3, cpu).args[0].flatten().tolist() == [0, 1, 2]
    assert example_of(batch, 7, cpu).args[0].flatten().tolist() == [0, 1, 2, 3, 4, 0, 1]


@pytest.mark.parametrize(
    ("using", "share"), [(("channels", "heads", "neurons"), 0.5), (("channels", "low-rank"), 0.7)]
)
def test_a_share_of_the_milliseconds_stays(monkeypatch, tmp_path, using, share):
    """With a clock that counts multiplications."""
    torch.manual_seed(0)
    net = settle(Net())
    batches = [torch.randn(16, 3, 8, 8) for _ in range(4)]
    monkeypatch.setattr(Stopwatch, "race", Counting.race)
    goal = Structured(share, of="latency", using=using, multiple=1, images=4)
    small, report = snows.prune(net, batches, goal, solver=None, progress=False, out=tmp_path)
    assert 0.85 * share < report.small_ms / report.dense_ms <= 1.03 * share
    assert report.settings["runtime"] == "eager"
    assert f"{report.small_ms:.3g} of {report.dense_ms:.3g} ms" in report.summary()
    assert {x.kind for x in report.groups if x.kept < x.units} & {"channels", "low-rank"}
    assert sum(x.weight.numel() for x in prunable(small).values()) < sum(
        x.weight.numel() for x in prunable(net).values()
    )
    again = snows.prune(net, batches, goal, solver=None, progress=False, out=tmp_path, resume=True)
    assert again.report.small_ms == report.small_ms  # what was decided is not timed again


@pytest.mark.parametrize("wrong", [{"runtime": "onnx"}, {"images": 0}, {"images": 2.5}])
def test_settings_out_of_range(wrong):
    with pytest.raises(
        ValueError, match="expected a runtime of eager or compile or cuda-graph and a number of images"
    ):
        Structured(0.5, of="latency", **wrong)


class Lists(torch.nn.Conv2d):
    """Says its settings in lists."""

    def _conv_forward(self, x, weight, bias):
        return F.conv2d(x, weight, bias, list(self.stride), list(self.padding))


def test_settings_in_lists_are_timed_too():
    net = torch.nn.Sequential(Lists(4, 6, 3, 2, 1)).eval()
    ((shape, size),) = shapes(net, Batch.of(torch.zeros(1, 4, 8, 8)))["0"]
    assert size == shape.call(1, 1, torch.zeros(1))().numel() == 6 * 4 * 4
    assert Times(torch.zeros(1), Counting()).of(shape).at(1, 1) > 0


def test_shapes_tell_layouts_apart():
    net = torch.nn.Sequential(torch.nn.Conv2d(4, 4, 3)).eval()
    x = torch.zeros(1, 4, 8, 8)
    (plain, _), (last, _) = (
        shapes(net, Batch.of(y))["0"][0] for y in (x, x.contiguous(memory_format=torch.channels_last))
    )
    assert isinstance(plain, Shape)
    assert (plain.last, last.last) == (False, True)
