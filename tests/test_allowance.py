"""A limit of time: what fits in it is done, and the network that comes out is whole."""

import math
import time
from functools import partial

import pytest
import torch
from test_pruning import quiet, small
from test_run import bits
from torch import nn

import snows
from snows import NM, Newton
from snows.choosing.allowance import Need, Pace
from snows.choosing.deadline import Deadline
from snows.choosing.stages import part
from snows.matching.losses import Matching
from snows.networks import proving
from snows.networks.twins import Twins
from snows.solving import models
from snows.solving.cg import Stop, cg
from snows.solving.operators import half_inner
from snows.sparsity import MaskedWeight, rows
from snows.walking import NOT_FITTED, NOT_SELECTED


class Clock:
    """A clock that goes on only when it is told to."""

    def __init__(self):
        self.time = 100.0

    def __call__(self):
        return self.time

    def taking(self, seconds, function):
        """The function, taking so long."""

        def slow(*args, **kwargs):
            self.time += seconds
            return function(*args, **kwargs)

        return slow


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr("snows.pruning.Deadline", partial(Deadline, clock=clock))
    return clock


def pruned(report):
    return {row.name: row for row in report.layers if not row.reason}


def whole(net, report, kept=2):
    for name in pruned(report):
        assert (rows(net.get_submodule(name).weight).unflatten(1, (-1, 4)) != 0).sum(-1).eq(kept).all()
        assert (snows.mask_of(net.get_submodule(name)).sum()) == net.get_submodule(
            name
        ).weight.numel() * kept // 4
    assert net(torch.randn(2, 3, 8, 8)).isfinite().all()


@pytest.mark.parametrize("seconds", [0, -1, math.nan, math.inf, "10", True, [1]])
def test_a_limit_that_is_none_is_refused(seconds):
    net, batches = small()
    with pytest.raises(ValueError, match="expected seconds to be a number above 0, got "):
        quiet(net, batches, NM(2, 4), seconds=seconds)


def test_with_enough_time_the_bits_are_those_without_a_limit(clock):
    net, batches = small()
    usual, _ = quiet(net, batches, NM(2, 4), select=snows.alps)
    limited, report = quiet(net, batches, NM(2, 4), select=snows.alps, seconds=1000)
    assert all(torch.equal(a, b) for a, b in zip(bits(limited), bits(usual), strict=True))
    assert report.notes == ["The limit was 1000 seconds: 3 of 3 layers were fitted and 0 not."]


def test_a_selector_that_takes_too_long_is_followed_by_magnitude(clock):
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(8, 8) for _ in range(7))).eval()
    select, began = clock.taking(10, snows.wanda), clock.time
    found, report = quiet(net, torch.randn(4, 16, 8).unbind(), NM(2, 4), select=select, seconds=35)
    assert clock.time - began == 30  # a fourth layer would end after the limit
    stops = [row.stop for row in pruned(report).values()]
    assert [stop == NOT_SELECTED for stop in stops] == [False] * 3 + [True] * 2
    for name in list(pruned(report))[3:]:
        mask = NM(2, 4).mask(net.get_submodule(name).weight.abs())
        assert torch.equal(snows.mask_of(found.get_submodule(name)), mask)
    assert "the masks of 2 are by magnitude" in report.notes[-1]


def test_steps_that_take_too_long_leave_the_selectors_weights(clock, monkeypatch):
    monkeypatch.setattr(models, "_gradient", clock.taking(4, models._gradient))
    net, batches = small()
    began = clock.time
    found, report = quiet(net, batches, NM(2, 4), seconds=20)
    whole(found, report)
    assert clock.time - began <= 20
    unfitted = [name for name, row in pruned(report).items() if row.stop in (NOT_FITTED, Stop.TIME.value)]
    assert unfitted
    for name in unfitted:
        weight = net.get_submodule(name).weight
        assert torch.equal(found.get_submodule(name).weight, weight * NM(2, 4).mask(weight.abs()))
    enough, after = quiet(net, batches, NM(2, 4), seconds=100)
    whole(enough, after)
    assert all(row.steps == 1 for row in pruned(after).values())


def test_no_time_at_all_leaves_a_whole_network(clock, monkeypatch):
    monkeypatch.setattr("snows.pruning.Twins", clock.taking(50, Twins))
    net, batches = small()
    found, report = quiet(net, batches, NM(1, 4), select=snows.alps, seconds=20)
    whole(found, report, 1)
    assert {row.stop for row in pruned(report).values()} == {NOT_SELECTED}
    assert report.notes == [
        "No time was left to correct BatchNorm's statistics.",
        "The limit was 20 seconds: 0 of 3 layers were fitted and 3 not; the masks of 3 are by magnitude.",
    ]
    masks = {name: snows.mask_of(found.get_submodule(name)) for name in pruned(report)}
    given, told = quiet(net, batches, None, select=masks, seconds=20)
    assert all(torch.equal(snows.mask_of(given.get_submodule(name)), mask) for name, mask in masks.items())
    assert {row.stop for row in pruned(told).values()} == {NOT_FITTED}


def test_a_limit_does_not_identify_a_run(clock, monkeypatch, tmp_path):
    net, batches = small()
    with monkeypatch.context() as slow:
        slow.setattr("snows.pruning.Twins", clock.taking(50, Twins))
        first, _ = quiet(net, batches, NM(2, 4), seconds=20, out=tmp_path)
    again, report = quiet(net, batches, NM(2, 4), seconds=900, out=tmp_path, resume=True)
    for name in pruned(report):
        assert torch.equal(first.get_submodule(name).weight, again.get_submodule(name).weight)
    (tmp_path / "layers" / "0001.safetensors").unlink()
    _, report = quiet(net, batches, NM(2, 4), out=tmp_path, resume=True)
    assert [row.steps for row in pruned(report).values()] == [0, 1, 0]


def test_a_cut_network_ends_in_time_too(clock, monkeypatch):
    net, batches = small()
    usual, _ = snows.prune(net, batches, snows.Structured(0.7, multiple=1), progress=False)
    ample, _ = snows.prune(net, batches, snows.Structured(0.7, multiple=1), seconds=1000, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(bits(ample), bits(usual), strict=True))
    monkeypatch.setattr("snows.pruning.Twins", clock.taking(50, Twins))
    found, report = snows.prune(net, batches, snows.Structured(0.7, multiple=1), seconds=20, progress=False)
    assert found(torch.randn(2, 3, 8, 8)).isfinite().all()
    assert report.macs[1] < report.macs[0]
    assert all(row.steps == 0 for row in report.layers)


def test_parts_are_of_all_batches():
    net, _ = small()
    batches = [torch.full((6, 3, 8, 8), float(i)) for i in range(4)]
    twins = Twins(net, batches)
    assert [x.samples() for x in twins.pieces()] == [6, 6, 6]
    twins.parts = 3
    assert [x.tensors()[0].mean().item() for x in twins.pieces()] == [0, 1, 2] * 3
    twins.begin_again()
    assert twins.held.samples() == 2
    site = twins.at("left", 2)
    assert [pair.sparse.call.x.shape[0] for pair in site.training] == [2, 2]
    assert len(twins.at("point").training) == 9  # those that were left behind catch up


def test_all_layers_get_the_most_batches_that_end_in_time(clock):
    """Rations of a pace that knows what layers take: so many seconds a batch, and none beside."""
    net, batches = small()
    twins = Twins(net, batches)
    deadline = Deadline(100, clock)
    pace = Pace(deadline, twins, Newton(), Matching(), recalibrate=False)
    pace.begin(["left", "right.0", "point"])
    assert pace.ration("left").batches == 3
    for works in pace._works.values():
        works.update({stage: works[stage]._replace(batch=10.0, fixed=0.0) for stage in works})
    pace._speed = (
        1.0  # 30 seconds a batch: 98 are enough for one in each of three layers, and no steps on two
    )
    ration = pace.ration("left")
    assert (ration.batches, ration.select, ration.step) == (1, True, False)
    clock.time += 10
    ration.lap("advance")
    assert pace._rate("advance") == pytest.approx(1.0)
    clock.time += 5
    ration.lap("select")
    assert pace._rate("select") == pytest.approx(0.5)
    clock.time -= 15
    assert not ration.late(0.0)
    assert ration.late(70.0)


class Quadratic:
    """Half the squared distance to a target, as a loss."""

    def __init__(self, target):
        self.target = target

    def residuals(self, weight):
        return [weight - self.target]

    def weigh(self, residuals):
        return residuals

    def __call__(self, weight):
        return half_inner(self.residuals(weight), self.residuals(weight))


def asked(answers):
    """A `late` that gives these answers in turn, and False after them; and what it was asked."""
    given, seen = iter(answers), []

    def late(seconds):
        seen.append(seconds)
        return next(given, False)

    return late, seen


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_newton_ends_between_batches_with_the_best_weight(count):
    target = torch.randn(4, 4)
    start = MaskedWeight(torch.zeros(4, 4), torch.ones(4, 4).bool())
    late, _ = asked([False] * count + [True])
    found = Newton().solve([Quadratic(target)] * 3, start, held=Quadratic(target), late=late)
    assert torch.equal(found.masked.weight, start.weight)
    assert [step.stop for step in found.steps] == [Stop.TIME]
    assert found.before == found.after


def test_newton_does_not_begin_a_step_that_takes_longer_than_there_is_time():
    target = torch.randn(4, 4)
    start = MaskedWeight(torch.zeros(4, 4), torch.ones(4, 4).bool())
    seen = []

    def late(seconds):
        seen.append(seconds)
        return seconds > 0

    solver = Newton(gradient="batch", max_iterations=1, damping=10.0)
    found = solver.solve([Quadratic(target)] * 3, start, held=Quadratic(target), late=late)
    assert [step.stop for step in found.steps][1:] == [Stop.TIME]
    assert found.after < found.before
    assert max(seen) == found.steps[0].seconds


def test_conjugate_gradients_end_in_time_with_what_they_found():
    matrix = torch.diag(torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64))
    b = torch.ones(4, dtype=torch.float64)

    class Matrix:
        def __matmul__(self, x):
            return matrix @ x

    answers = iter([False, False, True])
    found = cg(Matrix(), b, rtol=1e-12, late=lambda: next(answers))
    wanted = cg(Matrix(), b, rtol=1e-12, max_iterations=2)
    assert (found.stop, found.iterations) == (Stop.TIME, 2)
    assert torch.equal(found.x, wanted.x)


@pytest.mark.parametrize(
    ("left", "seconds"),
    [
        (70, [20, 30, 20]),  # enough for all, and 10 more each in proportion
        (33, [6, 12, 15]),
        (18, [1, 2, 15]),  # the least of each
        (10, [5.125, 4.875, 0]),  # not enough for the last
        (2, [2, 0, 0]),
    ],
)
def test_stages_share_what_is_left(left, seconds):
    needs = [Need(1, 16), Need(2, 32), Need(15, 15)]
    found = [part(i, needs, left) for i in range(3)]
    assert sum(found) == pytest.approx(left)
    for i, (need, got) in enumerate(zip(needs, found, strict=True)):
        assert got == 0 or got >= need.least or i == 0
    assert [x > 0 for x in found] == [x > 0 for x in seconds]


def test_a_late_decision_cuts_to_the_least_and_says_so(clock, monkeypatch):
    net, batches = small()
    groups = clock.taking(30, proving.groups)
    monkeypatch.setattr(proving, "groups", groups)
    found, report = snows.prune(net, batches, snows.Structured(0.44, multiple=1), seconds=20, progress=False)
    assert found(torch.randn(2, 3, 8, 8)).isfinite().all()
    assert [stage.name for stage in report.stages] == ["cut"]
    assert report.notes == [
        "The limit is less than choosing what goes takes with the fewest samples, which ended after 30 seconds.",
        "No time was left for means.",
        "No time was left for least squares.",
        "No time was left to correct BatchNorm's statistics.",
        f"The limit was 20 seconds: 0 of {len(pruned(report))} layers were fitted and {len(pruned(report))} not.",
    ]


def test_newton_is_not_said_to_have_failed_where_nothing_was_fitted(clock, monkeypatch):
    net, batches = small()
    monkeypatch.setattr(models, "_gradient", None)  # no step is tried
    monkeypatch.setattr(Pace, "_chosen", lambda *_: (1, True, False))
    _, report = snows.prune(net, batches, snows.Structured(0.7, multiple=1), seconds=1000, progress=False)
    assert [stage.name for stage in report.stages][-1] == "statistics"
    assert not any("Newton" in note for note in report.notes)


@pytest.mark.parametrize(
    ("goal", "seconds"),
    [(NM(2, 4), 2.0), (snows.Structured(0.5, using=("neurons",), order="magnitude"), 9.0)],
)
def test_large_layers_end_in_time(goal, seconds):
    """By the real clock: a selector of 3072 inputs takes tens of seconds alone."""
    torch.manual_seed(0)
    layers = [nn.Linear(768, 768), nn.Linear(768, 3072), nn.GELU(), nn.Linear(3072, 768), nn.Linear(768, 10)]
    began = time.perf_counter()
    found, report = snows.prune(
        nn.Sequential(*layers).eval(),
        torch.randn(2, 16, 16, 768).unbind(),
        goal,
        matching=Matching(metric="variance"),
        seconds=seconds,
        progress=False,
    )
    assert time.perf_counter() - began < 1.05 * seconds + 0.5
    assert found(torch.randn(2, 16, 768)).isfinite().all()
    assert "The limit was" in report.notes[-1]
