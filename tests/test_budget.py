"""Budgets: one choice among units, ranks and zeros, by any cost; timetables and frontiers."""

from __future__ import annotations

import copy
import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from models import settle
from test_latency import Counting
from test_taking import Net
from torch import nn

import snows
from snows import NM, Budget, Structured, Unstructured, packing
from snows.choosing.choices import Choice
from snows.choosing.costs import Costs, Term
from snows.choosing.deciding import Settled
from snows.choosing.ladders import _lost
from snows.choosing.measuring import Race, Stopwatch
from snows.choosing.options import DENSE, Option, treatment
from snows.choosing.runtimes import Pair
from snows.choosing.shares import ImpossibleError, divide
from snows.choosing.sketches import folded_and_packed, masked
from snows.choosing.tables import Timetable
from snows.choosing.timed import timed
from snows.choosing.times import Times
from snows.choosing.widths import Widths
from snows.layers.base import PackedLayer
from snows.matching import moments
from snows.matching.losses import Matching, Objective
from snows.matching.statistics import LayerStatistics
from snows.networks.batches import Batch
from snows.networks.implants import Implant
from snows.networks.layers import prunable
from snows.networks.twins import Twins
from snows.results.machine import Machine
from snows.selectors.sparsegpt import sparsegpt

PATTERNS = [NM(2, 4), NM(1, 4), NM(4, 8), Unstructured(0.75)]


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return settle(Net())


@pytest.fixture(scope="module")
def batches():
    torch.manual_seed(1)
    return [torch.randn(16, 3, 8, 8) for _ in range(4)]


def quick(net, batches, goal, **settings):
    return snows.prune(net, batches, goal, solver=None, progress=False, **settings)


# ---------------------------------------------------------------- costs


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_zeros_cost_what_a_packed_weight_costs(pattern):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(8, 16, 3), nn.Flatten(), nn.Linear(16, 8)).eval()
    x = torch.randn(1, 8, 3, 3)
    ladders = {name: [DENSE, Option(0.1, pattern=pattern)] for name in ("0", "2")}
    costs = Costs.of(net, Batch.of(x), [], ladders)
    weights = {name: net.get_submodule(name).weight for name in ladders}
    masks = {name: pattern.mask(torch.rand_like(w)) for name, w in weights.items()}
    whole = {of: costs.total(of) for of in ("macs", "params", "bytes", "nonzeros")}
    assert whole == {"macs": 1152 + 128, "params": 1304, "bytes": 4 * 1304, "nonzeros": 1304}
    for names in (("0",), ("2",), ("0", "2")):
        at = {treatment(name): 0 for name in names}
        gone = sum(int((~masks[name]).sum()) for name in names)
        packed = {n: packing.pack(weights[n] * masks[n], masks[n], pattern).nbytes for n in names}
        smaller = sum(weights[n].nbytes - packed[n] for n in names)
        assert costs.total("macs", at) == pytest.approx(whole["macs"] - gone)
        assert costs.total("nonzeros", at) == pytest.approx(whole["nonzeros"] - gone)
        assert costs.total("params", at) == whole["params"]
        assert costs.total("bytes", at) == pytest.approx(whole["bytes"] - smaller)


def test_ranks_and_zeros_are_options_of_one_layer():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)).eval()
    batch = Batch.of(torch.randn(2, 16))
    ladder = [DENSE, Option(0.1, rank=8), Option(0.2, pattern=NM(2, 4)), Option(0.3, rank=4)]
    costs = Costs.of(net, batch, [], {"0": ladder})
    for place, rank in ((1, 8), (3, 4)):
        thin = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)).eval()
        Implant("0", rank).apply(thin)
        assert costs.total("params", {treatment("0"): 3 - place}) == sum(p.numel() for p in thin.parameters())
    assert costs.total("nonzeros", {treatment("0"): 1}) == costs.total("nonzeros") - 16 * 32 / 2


# ---------------------------------------------------------------- losses


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_what_a_pattern_loses_is_its_error_weighed_by_the_sensitivity(net, batches, pattern):
    """Against outputs that are really computed, with the mean taken off."""
    twins = Twins(net, batches)
    objective = Objective(twins, Matching(), 0)
    name = next(x for x in twins.order if not pattern.fits(twins.sparse.get_submodule(x).weight.shape))
    site = twins.at(name)
    seen = LayerStatistics.of(site, objective.at(site).sensitivity)
    changed = sparsegpt(site.weight, seen, pattern).weight - site.weight
    x = torch.cat([part[0] for call in seen.calls for part in moments.patches(call)]).double()
    errors = (
        x @ changed.permute(0, 2, 3, 1).flatten(1).double().T if changed.ndim == 4 else x @ changed.double().T
    )
    own = (errors - errors.mean(0)).square().mean(0)
    expected = float(own @ seen.sensitivity[0].double().diagonal())
    assert _lost(site, seen, pattern) == pytest.approx(expected, rel=1e-4)


# ---------------------------------------------------------------- choices


def test_the_choice_is_the_best_of_all_there_are():
    """Two layers with three options each, and a cost that no two of them share."""
    torch.manual_seed(0)
    for _ in range(20):
        losses = torch.rand(2, 3).sort().values.double()
        losses[:, 0] = 0
        left = torch.rand(2, 3, dtype=torch.float64)
        left[:, 0] = 1
        options = [Widths(f"{i}", torch.tensor([2, 1, 0]), losses[i]) for i in range(2)]
        terms = [Term(f"{i}", macs=1.0, factors=({f"{i}": left[i].flip(0)},)) for i in range(2)]
        costs = Costs(terms, {"0": 2, "1": 2})
        limit = 0.7
        found = divide(options, costs, limit, "macs") if left.min(1).values.sum() <= 2 * limit else None
        every = {
            (a, b): float(losses[0, a] + losses[1, b])
            for a, b in itertools.product(range(3), range(3))
            if left[0, a] + left[1, b] <= 2 * limit
        }
        assert (found is None) == (not every)
        if found is not None:
            got = every[2 - found["0"], 2 - found["1"]]
            assert got <= 1.25 * min(every.values()) + 0.15


@pytest.mark.parametrize("of", ["macs", "bytes", "nonzeros"])
def test_a_share_of_any_cost_stays(net, batches, of):
    small, report = quick(net, batches, Budget(0.5, of=of, multiple=2, floor=0))
    kinds = {x.kind for x in report.groups if x.kept < x.units}
    assert kinds & {"2:4", "1:4", "4:8", "0.7", "0.8", "0.9"}
    if of == "macs":
        assert report.macs[1] <= 0.5 * report.macs[0]
    zeros = sum(int((x.weight == 0).sum()) for x in prunable(small).values())
    assert zeros == report.zeros > 0
    if of == "nonzeros":
        total = sum(p.numel() for p in net.parameters())
        assert sum(p.numel() for p in small.parameters()) - zeros <= 0.5 * total + 1
    for name, layer in prunable(small).items():
        row = next((x for x in report.layers if x.name == name and ":" in x.pattern), None)
        if row is not None:
            pattern = snows.parse_pattern(row.pattern)
            mask = snows.mask_of(layer)
            assert bool((pattern.mask(mask.float()) | ~mask).all())


def test_megabytes_are_a_share_of_the_bytes(net, batches):
    whole = sum(x.nbytes for x in (*net.parameters(), *net.buffers()))
    one = quick(net, batches, Budget(0.6, of="bytes", multiple=2, floor=0))
    two = quick(net, batches, Budget(mb=0.6 * whole / 1e6, multiple=2, floor=0))
    assert [(x.name, x.kept) for x in one.report.groups] == [(x.name, x.kept) for x in two.report.groups]
    with pytest.raises(ValueError, match=r"expected fewer megabytes than the network has, .*, got mb=1000"):
        quick(net, batches, Budget(mb=1000))


def test_layers_without_a_pattern_are_fitted_and_the_run_resumes_with_the_same_bits(net, batches, tmp_path):
    goal = Budget(0.5, using=("nm", "channels"), multiple=2, floor=0)
    first = snows.prune(net, batches, goal, progress=False, out=tmp_path / "a")
    patterns = {x.name: x.pattern for x in first.report.layers}
    assert set(patterns.values()) & {"2:4", "1:4", "4:8"}
    assert "fitted" in patterns.values()
    again = snows.prune(net, batches, goal, progress=False, out=tmp_path / "a", resume=True)
    for a, b in zip(first.network.state_dict().values(), again.network.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert {n: torch.equal(m, again.masks[n]) for n, m in first.masks.items()} == dict.fromkeys(
        first.masks, True
    )


def test_what_is_said_of_treated_layers_is_of_the_cut_network(net, batches):
    small, report = quick(net, batches, Budget(0.35, multiple=4, floor=0))
    treated = {x.name: x for x in report.groups if x.kind not in ("channels", "neurons", "heads", "low-rank")}
    layers = {name: small.get_submodule(name) for name in treated}
    whole = {name: net.get_submodule(name).weight.numel() for name in treated}
    assert any(layers[name].weight.numel() < whole[name] for name in treated)
    for name, layer in layers.items():
        assert treated[name].units == layer.weight.numel()
        assert treated[name].kept == int(snows.mask_of(layer).sum())


def test_zeros_alone_leave_the_network_as_large(net, batches):
    small, report = quick(net, batches, Budget(0.7, using=("nm", "unstructured")))
    assert report.stages == []
    assert [tuple(p.shape) for p in small.parameters()] == [tuple(p.shape) for p in net.parameters()]
    assert report.zeros > 0
    assert report.macs[1] <= 0.7 * report.macs[0]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({}, "expected one of a share, ms and mb that stays, got none"),
        ({"share": 0.5, "ms": 3}, "expected one of a share, ms and mb that stays, got share and ms"),
        ({"ms": 0}, "expected ms above 0, got 0"),
        ({"share": 1.5}, "expected a share above 0 and below 1 that stays, got 1.5"),
        ({"share": 0.5, "of": "flops"}, "expected of to be macs, params, bytes, nonzeros, latency"),
        ({"share": 0.5, "using": ("magic",)}, "expected using to name some of channels, heads"),
        ({"share": 0.5, "then": NM(2, 4)}, r"a pattern for all layers \(then\) or a choice by layer"),
        ({"share": 0.5, "times": "t.json"}, "expected times with milliseconds to save, got of='macs'"),
        ({"share": 0.5, "of": "latency", "times": 3}, "expected times to be a file, got 3"),
        ({"share": {}, "layers": {"a": "2:4"}}, r"a rank or a pattern .* for each of the layers, got '2:4'"),
        ({"share": {}, "layers": {"a": True}}, "a rank or a pattern .* for each of the layers, got True"),
        ({"share": 0.5, "layers": {"a": 3}}, "expected units by name of a group as the share"),
    ],
)
def test_goals_that_make_no_sense(wrong, said):
    with pytest.raises(ValueError, match=said):
        Budget(**wrong)


def test_a_timetable_is_the_same_by_a_path_or_its_name():
    assert Budget(0.5, of="latency", times="t.json") == Budget(0.5, of="latency", times=Path("t.json"))


def test_what_may_be_done_has_one_order():
    """A set has another one in each process, and a run records what was asked."""
    for using in ({"nm", "channels"}, ["nm", "channels"], ("channels", "nm", "nm")):
        assert Budget(0.5, using=using).using == ("channels", "nm")


def test_masks_from_elsewhere_are_refused_where_a_budget_makes_zeros(net, batches):
    masks = {"fc2": torch.ones_like(net.fc2.weight).bool()}
    with pytest.raises(ValueError, match="a Budget chooses which layers get zeros, and select brings masks"):
        quick(net, batches, Budget(0.5), select=masks)
    with pytest.raises(ValueError, match="select chooses masks, and a Budget without then= asks for none"):
        quick(net, batches, Budget(0.5, using=("channels",)), select=masks)


def test_structured_is_a_budget_without_zeros():
    assert isinstance(Structured(0.5), Budget)
    assert Structured(0.5).using == ("channels", "heads", "neurons", "low-rank")
    with pytest.raises(ValueError, match="Structured: expected using to name some of channels, heads"):
        Structured(0.5, using=("nm",))


def test_a_share_that_is_not_possible_says_what_is_and_what_holds_it_up(net, batches):
    with pytest.raises(ValueError, match=r"is possible, .* % or more, got 1 %; most of that is of .*, .*, "):
        quick(net, batches, Budget(0.01))


def test_given_units_ranks_and_patterns_are_taken(net, batches):
    groups = {x.name: x for x in snows.groups(net, batches[0]) if not x.reason}
    name = next(iter(groups))
    layers = {"fc2": 4, "conv2": NM(2, 4)}
    fits = {k: v for k, v in layers.items() if k in dict(net.named_modules())}
    goal = Budget({name: torch.arange(2)}, layers=fits)
    small, report = quick(net, batches, goal)
    rows = {(x.name, x.kind): x.kept for x in report.groups}
    assert rows[name, groups[name].kind] == 2
    for layer, asked in fits.items():
        if isinstance(asked, int):
            assert rows[layer, "low-rank"] == asked
        else:
            assert (
                int(snows.mask_of(small.get_submodule(layer)).sum()) == rows[layer, str(asked)]
                or name != layer
            )
    with pytest.raises(ValueError, match=r"Budget: fc2 cannot get 1000 \(its rank can be from 1 to"):
        quick(net, batches, Budget({}, layers={"fc2": 1000}))
    with pytest.raises(ValueError, match=r"expected layers such as .*, got 'nothing'"):
        quick(net, batches, Budget({}, layers={"nothing": 3}))


class Odd(nn.Module):
    """Has a weight that two layers share, a layer that is called twice, and a convolution of groups."""

    def __init__(self):
        super().__init__()
        self.first, self.grouped = nn.Conv2d(4, 16, 3), nn.Conv2d(16, 16, 1, groups=4)
        self.plain = nn.Conv2d(16, 16, 1)
        self.a, self.b, self.twice, self.last = (nn.Linear(16, 16) for _ in range(4))
        self.b.weight = self.a.weight

    def forward(self, x):
        x = self.plain(self.grouped(self.first(x)).relu()).relu().mean((2, 3))
        for layer in (self.a, self.b, self.twice, self.twice):
            x = layer(x).relu()
        return self.last(x)


@pytest.fixture
def odd():
    torch.manual_seed(0)
    return Odd().eval(), [torch.randn(8, 4, 6, 6) for _ in range(4)]


@pytest.mark.parametrize(
    ("layers", "skip", "said"),
    [
        ({"a": NM(2, 4)}, None, r"a cannot get 2:4 \(it shares its weight with b\); leave it out"),
        ({"twice": NM(2, 4)}, None, r"twice cannot get 2:4 \(it is called 2 times in one forward pass\)"),
        ({"plain": NM(2, 4)}, ["plain"], r"plain cannot get 2:4 \(only or skip leaves it out\)"),
        ({"plain": 3}, ["plain"], r"plain cannot get 3 \(only or skip leaves it out\)"),
        ({"plain": NM(2, 6)}, None, r"plain cannot get 2:6 \(16 input channels do not divide"),
    ],
)
def test_what_a_layer_cannot_get_is_refused_before_anything_is_fitted(odd, tmp_path, layers, skip, said):
    with pytest.raises(ValueError, match=said):
        quick(*odd, Budget({}, layers=layers), skip=skip, out=tmp_path)
    assert not (tmp_path / "plan.json").exists()


def test_layers_that_share_a_weight_or_are_called_repeatedly_get_no_zeros(odd):
    report = quick(*odd, Budget(0.9, using=("nm",))).report
    treated = {x.name for x in report.groups if ":" in x.kind}
    assert treated
    assert treated <= {"plain"}


# ---------------------------------------------------------------- milliseconds


def test_what_is_timed_is_packed_in_the_chosen_layers_alone(odd):
    """Zeros that a model came with stay where they are, in a convolution of groups too."""
    net, batches = odd
    with torch.no_grad():
        net.grouped.weight[0] = net.a.weight[0] = 0
    masked(net, {"plain": NM(2, 4), "grouped": NM(2, 4)})
    dense, packed = folded_and_packed(net, Batch.of(batches[0]), {"plain": NM(2, 4), "grouped": NM(2, 4)})
    assert [x for x, m in packed.named_modules() if isinstance(m, PackedLayer)] == ["plain"]
    assert not any(isinstance(m, PackedLayer) for m in dense.modules())
    torch.testing.assert_close(packed(batches[0]), dense(batches[0]))


class Fake:
    """Times networks whose packed layers save another part than they do alone."""

    def __init__(self, costs, part):
        self.costs, self.part, self.seen = costs, part, []

    def beside(self, choice):
        whole = self.costs.total("latency")
        plain = self.costs.total("latency", choice.without_zeros)
        small = plain - self.part * (plain - self.costs.total("latency", choice.widths))
        self.seen.append(choice)
        return Pair(whole, small / whole, 0.0, plain / whole)


def two_layers(packed):
    """A layer that may lose width, and one that may get zeros."""
    width = torch.arange(101.0) / 100
    zeros = torch.tensor([0.4, 1.0], dtype=torch.float64)
    dense = 1 - packed * (1 - zeros)
    terms = [
        Term("a", latency=5.0, factors=({"g": width},)),
        Term("b", latency=5.0, factors=({treatment("b"): dense},)),
    ]
    return Costs(terms, {"g": 100, treatment("b"): 1})


def by_share(costs, share):
    """Zeros if they save anything, then width."""
    limit, zeros = share * 10, {treatment("b"): 0}
    use = costs.total("latency", zeros) < 10 - 1e-9
    fixed = costs.total("latency", {**(zeros if use else {}), "g": 0})
    width = math.floor(100 * (limit - fixed) / 5)
    if width < 0:
        raise ValueError("no")
    options = {"b": Option(0.1, pattern=NM(2, 4))} if use else {}
    return Choice({}, options, {"g": width, **(zeros if use else {})})


@pytest.mark.parametrize("part", [1.0, 0.7, 0.3, 0.0, -0.2])
def test_packed_weights_are_predicted_to_save_what_they_save_in_the_network(part):
    clock = Fake(two_layers(1.0), part)
    found = timed(clock, two_layers, 0.6, by_share, lambda text: None)
    assert found.pair.share == pytest.approx(0.6, rel=0.03)
    assert len(clock.seen) <= 4
    if part <= 0:  # they save nothing, so that none is packed in the end
        assert not found.choice.patterns
    else:
        assert found.packed == pytest.approx(part if len(clock.seen) > 1 else 1.0, rel=1e-6)


def test_times_that_scatter_too_much_are_refused(monkeypatch):
    monkeypatch.setattr("snows.choosing.timed.NOISE", 0.15)

    class Noisy(Fake):
        def beside(self, choice):
            return super().beside(choice)._replace(error=0.4)

    with pytest.raises(
        ValueError, match=r"known to 15% or better, got one that is known to 40.0%.*quieter machine"
    ):
        timed(Noisy(two_layers(1.0), 1.0), two_layers, 0.6, by_share, lambda text: None)


def test_a_clock_that_is_too_coarse_is_refused(net, batches, monkeypatch):
    monkeypatch.setattr(Stopwatch, "race", lambda self, runs, *_: Race([(0.0,) * len(runs)] * 5))
    with pytest.raises(
        ValueError, match=r"expected a clock that tells how long a call takes, got a time of 0"
    ):
        quick(net, batches, Budget(0.5, of="latency"))


class Sparse(Counting):
    """Counts multiplications by weights that are not zero; packed layers are counted by what they keep."""

    def race(self, runs, seconds=0.0, undecided=lambda race: False):
        from snows.layers.base import PackedLayer

        found = []
        for run in runs:
            kept = [0]

            def count(module, args, output, kept=kept):
                positions = output.numel() // module.shape[0]
                kept[0] += int((module.packed.values != 0).sum()) * positions

            hook = nn.modules.module.register_module_forward_hook(
                lambda m, a, o, count=count: count(m, a, o) if isinstance(m, PackedLayer) else None
            )
            try:
                dense = Counting.race(self, [run]).rounds[0][0]
            finally:
                hook.remove()
            found.append(dense + kept[0] / 1e6)
        return Race([tuple(found)] * 5)


@pytest.fixture
def sparse_clock(monkeypatch):
    monkeypatch.setattr(Stopwatch, "race", Sparse.race)
    monkeypatch.setattr("snows.choosing.structure.has_kernel", lambda *args: True)


@pytest.mark.usefixtures("sparse_clock")
@pytest.mark.parametrize("using", [("nm",), ("channels", "nm", "low-rank")])
def test_a_share_of_the_milliseconds_stays_with_packed_layers(net, batches, tmp_path, using):
    goal = Budget(0.7, of="latency", using=using, multiple=4, floor=0, images=4)
    report = quick(net, batches, goal, out=tmp_path).report
    assert 0.5 < report.small_ms / report.dense_ms <= 0.7 * 1.03
    assert report.zeros > 0
    table = Timetable.read(tmp_path / "times.json")
    assert table.whole == pytest.approx(report.dense_ms)
    # with the table of that run nothing is timed, and the choice is the one that it predicts
    again = quick(
        net,
        batches,
        Budget(0.7, of="latency", using=using, multiple=4, floor=0, times=tmp_path / "times.json"),
    )
    assert again.report.small_ms / again.report.dense_ms <= 0.71
    assert any(f"predicted, by a timetable of {Machine.here('cpu')}" in x for x in again.report.notes)


@pytest.mark.usefixtures("sparse_clock")
def test_milliseconds_may_be_absolute(net, batches):
    whole = Timetable.begin(
        snows.choosing.deciding.clock_of(Twins(net, batches), Budget(0.5, of="latency"))
    ).whole
    goal = Budget(ms=0.6 * whole, using=("channels", "neurons", "heads"), multiple=1, floor=0)
    report = quick(net, batches, goal).report
    assert report.small_ms <= 1.03 * 0.6 * whole
    with pytest.raises(
        ValueError, match=r"fewer milliseconds than the network takes for 16 images at a time"
    ):
        quick(net, batches, Budget(ms=1e6))


# ---------------------------------------------------------------- timetables


@pytest.fixture
def table(net, batches, sparse_clock, tmp_path):
    found = snows.measure(net, batches[0], images=4, progress=False)
    found.save(tmp_path / "table.json")
    return found, tmp_path / "table.json"


def test_a_timetable_is_read_as_it_was_written(table):
    found, path = table
    again = Timetable.read(path)
    assert (again.whole, again.packed, again.correction) == (found.whole, found.packed, found.correction)
    assert again.times.found == found.times.found
    assert again.layers == found.layers
    # this clock counts in networks as in layers, of which nine tenths are said to be layers
    assert found.packed == pytest.approx(1 / 0.9, rel=0.02)
    assert again.runtime == "eager"
    assert again.images == 4


def test_a_timetable_serves_a_budget_and_nothing_is_timed(table, net, batches, monkeypatch):
    monkeypatch.setattr(Stopwatch, "race", None)
    _, report = quick(net, batches, Budget(0.7, of="latency", times=table[1], multiple=2, floor=0))
    assert report.small_ms / report.dense_ms <= 0.71
    assert report.settings["images"] == 4  # of the timetable, for `snows deploy`


def test_a_timetable_of_something_else_is_refused(table, net, batches, tmp_path):
    path = table[1]
    with pytest.raises(ValueError, match="expected a timetable of runtime compile, got one of eager and 4"):
        quick(net, batches, Budget(0.7, of="latency", times=path, runtime="compile"))
    with pytest.raises(
        ValueError, match="expected a timetable of runtime eager and 8 images, got one of eager"
    ):
        quick(net, batches, Budget(0.7, of="latency", times=path, images=8))
    other = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4)).eval()
    with pytest.raises(
        ValueError, match="of this model and size of images, got one in which 0 is another layer"
    ):
        quick(other, batches, Budget(0.7, of="latency", times=path))
    with pytest.raises(ValueError, match="of this model and size of images"):
        quick(net, [torch.randn(16, 3, 12, 12)] * 4, Budget(0.7, of="latency", times=path))
    double = [x.double() for x in batches]
    with pytest.raises(
        ValueError, match=r"weights in torch.float64, got one of torch.float32; measure again"
    ):
        quick(copy.deepcopy(net).double(), double, Budget(0.7, of="latency", times=path))
    with pytest.raises(ValueError, match="cannot be read"):
        quick(net, batches, Budget(0.7, of="latency", times=tmp_path / "none.json"))
    for text in ("", "[]", "{}", '{"kind": "snows timetable", "version": 3}'):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(ValueError, match=r"times: .*timetable"):
            Timetable.read(tmp_path / "bad.json")
    content = json.loads(path.read_text())
    for key, value in (
        ("whole", -1),
        ("times", [{}]),
        ("layers", 3),
        ("runtime", "x"),
        ("images", "many"),
        ("packed", math.nan),
        ("images", math.inf),
    ):
        (tmp_path / "bad.json").write_text(json.dumps({**content, key: value}))
        with pytest.raises(ValueError, match=r"times: .* is damaged"):
            Timetable.read(tmp_path / "bad.json")


def test_a_layer_that_a_table_lacks_is_named():
    from snows.choosing.times import Shape

    with pytest.raises(ValueError, match=r"16 inputs and 8 outputs in 2:4 .* got a table without it"):
        Times(None, Stopwatch()).of(Shape(16, 8, (2, 16), 1, True), NM(2, 4))


# ---------------------------------------------------------------- frontiers

SHARES = (0.8, 0.6, 0.45)


@pytest.mark.parametrize("of", ["macs", "bytes"])
def test_each_point_is_what_prune_chooses_for_its_share(net, batches, tmp_path, of):
    using = ("channels", "neurons", "heads", "low-rank", "unstructured")  # which fit any width
    goal = Budget(0.5, of=of, using=using, multiple=2, floor=0)
    found = snows.frontier(net, batches, goal, SHARES, progress=False)
    found.save(tmp_path / "frontier.json")
    again = type(found).read(tmp_path / "frontier.json")
    assert again.points == found.points
    assert [x.share for x in found.points] == list(SHARES)
    losses = [x.loss for x in found.points]
    assert losses == sorted(losses)
    assert all(x.cost <= (x.share + 1e-6) * found.whole for x in found.points)
    direct = quick(net, batches, replace(goal, share=SHARES[1]))
    taken = quick(net, batches, again.budget(1))
    kept = [[(x.name, x.kind, x.kept) for x in y.report.groups if x.kept < x.units] for y in (direct, taken)]
    assert kept[0] == kept[1]
    assert found.points[1].macs == direct.report.macs[1] == taken.report.macs[1]
    for a, b in zip(direct.network.state_dict().values(), taken.network.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert "predicted loss" in str(found)


@pytest.mark.usefixtures("sparse_clock")
def test_a_frontier_of_milliseconds(net, batches):
    goal = Budget(0.5, of="latency", multiple=2, floor=0, images=4)
    found = snows.frontier(net, batches, goal, SHARES, progress=False)
    for i, point in enumerate(found.points):
        report = quick(net, batches, found.budget(i)).report
        assert report.small_ms == pytest.approx(point.cost, rel=0.15)


@pytest.mark.usefixtures("sparse_clock")
def test_milliseconds_are_corrected_at_a_share_that_is_possible(net, batches):
    found = snows.frontier(net, batches, Budget(0.5, of="latency"), (0.9, 0.02, 0.01), progress=False)
    assert [x.share for x in found.points] == [0.9]
    assert found.notes[0].startswith("Left out: 2.0%, 1.0%. Budget: expected a share of the milliseconds")
    with pytest.raises(ValueError, match="expected a share of the milliseconds that is possible"):
        snows.frontier(net, batches, Budget(0.5, of="latency"), (0.01, 0.02, 0.03), progress=False)


def test_a_frontier_is_of_a_budget(net, batches):
    with pytest.raises(TypeError, match=r"frontier: expected goal to be a snows.Budget, got 0.5"):
        snows.frontier(net, batches, 0.5, progress=False)
    with pytest.raises(ValueError, match=r"frontier: expected a goal with an order by name"):
        snows.frontier(net, batches, Structured(0.5, then=NM(2, 4)), progress=False)


def test_shares_that_are_not_possible_are_left_out(net, batches):
    found = snows.frontier(net, batches, Budget(0.5), (0.8, 0.01, 0.7), progress=False)
    assert [x.share for x in found.points] == [0.8, 0.7]
    assert found.notes[0].startswith("Left out: 1.0%. Budget: expected a share of the MACs that is possible")
    with pytest.raises(ValueError, match="expected a point from 0 to 1, got 2"):
        found.budget(2)
    with pytest.raises(ValueError, match="expected a share of the MACs"):
        snows.frontier(net, batches, Budget(0.5), (0.01,), progress=False)
    with pytest.raises(ValueError, match="expected shares above 0 and below 1"):
        snows.frontier(net, batches, Budget(0.5), (2,), progress=False)


def test_files_that_are_no_frontier(tmp_path):
    for text in ("", "[]", '{"kind": "snows frontier", "version": 1}'):
        (tmp_path / "f.json").write_text(text)
        with pytest.raises(ValueError, match="expected a file that snows frontier wrote"):
            snows.frontiers.Frontier.read(tmp_path / "f.json")
    with pytest.raises(ValueError, match="cannot be read"):
        snows.frontiers.Frontier.read(tmp_path / "none.json")


def test_folding_saves_no_part_of_a_budget(net, batches, monkeypatch):
    """Where zeros may be chosen the network as it came is timed folded too; elsewhere neither is."""
    seen = []

    def ready(model, example, runtime):
        seen.append(any(isinstance(m, nn.BatchNorm2d) for m in model.modules()))
        return model

    monkeypatch.setattr("snows.choosing.runtimes.ready", ready)
    twins = Twins(net, batches)
    for goal, unfolded in ((Budget(0.5, of="latency"), False), (Structured(0.5, of="latency"), True)):
        seen.clear()
        clock = snows.choosing.deciding.clock_of(twins, goal)
        clock.beside(Choice({}))
        assert seen == [unfolded, unfolded]
    clock = snows.choosing.deciding.clock_of(twins, Budget(0.5, of="latency"))
    seen.clear()
    clock.beside(Choice({}, {"conv2": Option(0.1, pattern=NM(2, 4))}))
    assert seen == [False] * 3  # as it came, packed, and with dense weights


# ---------------------------------------------------------------- what is said


def test_what_is_impossible_is_said_of_the_share_that_was_asked_for():
    """Chosen by 45 % of a prediction of which 62.5 % have to stay, where the network takes twice as much."""
    costs = Costs([Term("a", latency=1.0, factors=({"a": torch.tensor([0.625, 1.0])},))], {"a": 1})
    option = Widths("a", torch.tensor([1, 0]), torch.tensor([0.0, 1.0], dtype=torch.float64))

    def choose(costs, share):
        return divide([option], costs, share, "latency")

    with pytest.raises(ImpossibleError, match=r"possible, 62.5 % or more, got 45 %; most of that is of a;"):
        choose(costs, 0.45)
    with pytest.raises(ImpossibleError, match="possible, got 90 % where nothing that may be done saves any"):
        Settled(costs, 2.0).chosen(choose, 0.9)
    with pytest.raises(ImpossibleError, match=r"possible, 78.2 % or more, got 50 %"):
        Settled(costs, 1.25).chosen(choose, 0.5)
    assert Settled(costs, 1.25).chosen(choose, 0.8) == {"a": 0}


def test_nothing_to_save_is_said_so(net, batches):
    goal = Budget(0.9, of="params", using=("unstructured",))
    with pytest.raises(ValueError, match="got 90 % where nothing that may be done saves any; allow more"):
        quick(net, batches, goal)
