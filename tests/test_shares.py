"""The division of a share, against every division there is."""

from __future__ import annotations

import math
import random
import re

import pytest
import torch

from snows.choosing.costs import Costs, Term
from snows.choosing.curves import Curve
from snows.choosing.shares import allocate, divide, even
from snows.choosing.widths import Widths, given_units
from snows.networks.channels import Group


def group(name, units, each=1, reason=""):
    entries = torch.arange(units * each).view(units, each)
    return Group(name, "channels", {name: entries}, {}, reason=reason)


def curve(steps):
    steps = torch.as_tensor(steps, dtype=torch.float64)
    return Curve(torch.arange(len(steps)), torch.cat([steps.new_zeros(1), steps.cumsum(0)]))


def table(units, share=1.0):
    return 1 - share * (1 - torch.arange(units + 1, dtype=torch.float64) / units)


def chain(sizes, positions):
    """Layers one after the other, each with as many rows as a group has units; the ends are fixed."""
    names = [f"g{i}" for i in range(len(sizes))]
    ends = [(3, None), *zip(sizes, names, strict=True), (5, None)]
    terms = []
    for (inputs, a), (outputs, b), p in zip(ends, ends[1:], positions, strict=False):
        factors = tuple({x: table(n)} for x, n in ((a, inputs), (b, outputs)) if x)
        terms.append(Term(f"{a}{b}", macs=p * inputs * outputs, params=inputs * outputs, factors=factors))
    return Costs(terms, dict(zip(names, sizes, strict=True)))


def macs(sizes, positions):
    """What such a chain costs, without tables."""
    ends = [3, *sizes, 5]
    return sum(p * a * b for a, b, p in zip(ends, ends[1:], positions, strict=False))


def best(options, limit, positions):
    """The least loss of all divisions."""
    widths = torch.cartesian_prod(*(x.allowed for x in options)).T
    loss = torch.cartesian_prod(*(x.loss for x in options)).sum(1)
    return float(loss[macs(widths, positions) <= limit].min())


@pytest.mark.parametrize("shape", ["convex", "any"])
@pytest.mark.parametrize("seed", range(8))
def test_the_division_is_within_a_hundredth_of_the_best_of_all(shape, seed):
    draw = random.Random(seed)
    sizes = [draw.choice([8, 10, 12]) for _ in range(4)]
    positions = [draw.choice([1, 4, 16]) for _ in range(5)]
    groups = [group(f"g{i}", n) for i, n in enumerate(sizes)]
    curves = {}
    for x in groups:
        steps = [draw.random() ** 3 * 10 for _ in range(x.units)]
        curves[x.name] = curve(sorted(steps) if shape == "convex" else steps)
    costs = chain(sizes, positions)
    for share in (0.8, 0.5, 0.3):
        options = [Widths.of(x, curves[x.name], 1, 0.1) for x in groups]
        limit = share * macs(sizes, positions)
        got = allocate(groups, curves, costs, share, multiple=1)
        assert macs(list(got.values()), positions) <= limit * (1 + 1e-9)
        loss = sum(float(curves[n].cost[len(curves[n].order) - k]) for n, k in got.items())
        assert loss <= 1.01 * best(options, limit, positions)


def test_a_curve_that_is_flat_after_a_jump_is_followed_to_the_flat_part():
    groups = [group("g0", 8), group("g1", 8)]
    curves = {"g0": curve([1, 0, 0, 0, 0, 0, 0, 0]), "g1": curve([0.5] * 8)}  # 7 of g0 cost 1, 2 of g1 do
    costs = Costs([Term(x, macs=100, factors=({x: table(8)},)) for x in ("g0", "g1")], {"g0": 8, "g1": 8})
    assert allocate(groups, curves, costs, 0.75, multiple=1) == {"g0": 4, "g1": 8}
    assert allocate(groups, curves, costs, 0.5, multiple=1) == {"g0": 1, "g1": 7}


def test_widths_are_multiples_and_stay_above_the_floor():
    zeros = curve([0.0] * 20)
    assert Widths.of(group("a", 20), zeros).allowed.tolist() == [20, 16, 8]
    assert Widths.of(group("a", 20), zeros, floor=0.5).allowed.tolist() == [20, 16]
    assert Widths.of(group("a", 20, each=6), zeros).allowed.tolist() == [20, 16, 12, 8, 4]
    assert Widths.of(group("a", 20, each=64), zeros).allowed.tolist() == list(range(20, 1, -1))
    assert Widths.of(group("a", 20), zeros, 1, 0.0).allowed.tolist() == list(range(20, 0, -1))
    assert Widths.of(group("a", 5), curve([0.0] * 5)).allowed.tolist() == [5]


def test_a_width_costs_what_the_units_that_go_cost():
    widths = Widths.of(group("a", 6), curve([1, 2, 3, 4, 5, 6]), multiple=2)
    assert widths.allowed.tolist() == [6, 4, 2]
    assert widths.loss.tolist() == [0, 3, 10]


@pytest.mark.parametrize("share", [0.9, 0.6, 0.35])
def test_an_even_division_keeps_the_widest_part_of_all_that_fits(share):
    sizes, positions = [16, 24, 40], [4, 2, 1, 1]
    groups = [group(f"g{i}", n) for i, n in enumerate(sizes)]
    costs = chain(sizes, positions)
    curves = {x.name: curve([0.0] * x.units) for x in groups}  # not read
    got = list(allocate(groups, curves, costs, share, multiple=1, uniform=True).values())
    limit = share * macs(sizes, positions)
    parts = [i / 4801 for i in range(480, 4802)]  # a fine grid that meets no half unit
    within = [
        near
        for near in ([max(math.ceil(n / 10), round(p * n)) for n in sizes] for p in parts)
        if macs(near, positions) <= limit
    ]
    assert got == within[-1]


def test_groups_without_a_curve_or_with_a_reason_keep_all_units():
    groups = [group("g0", 8), group("g1", 8, reason="it reaches the output"), group("g2", 8)]
    got = allocate(
        groups, {"g0": curve([1.0] * 8), "g1": curve([0.0] * 8)}, chain([8] * 3, [1] * 4), 0.8, multiple=1
    )
    assert got["g0"] < 8
    assert got["g1"] == got["g2"] == 8


def test_a_share_that_the_floors_exclude_is_refused_with_the_least_that_is_possible():
    groups = [group("g0", 8), group("g1", 8)]
    curves = {x.name: curve([1.0] * 8) for x in groups}
    costs = chain([8, 8], [1, 1, 1])  # 24 + 64 + 40
    least = (3 * 2 + 2 * 2 + 2 * 5) / 128  # 15.625 %
    for uniform in (False, True):
        with pytest.raises(ValueError, match=re.escape("15.7 % or more, got 15.6 %")):
            allocate(groups, curves, costs, 0.156, multiple=2, uniform=uniform)
        got = allocate(groups, curves, costs, least, multiple=2, uniform=uniform)
        assert got == {"g0": 2, "g1": 2}


def test_bad_settings_are_refused():
    groups, costs = [group("g0", 8)], chain([8], [1, 1])
    curves = {"g0": curve([1.0] * 8)}
    for share in (0, -0.5, 1.01, float("nan")):
        with pytest.raises(ValueError, match="expected a share above 0 and of at most 1"):
            allocate(groups, curves, costs, share)
    for setting in ({"multiple": 0}, {"floor": -0.1}, {"floor": 1.1}):
        with pytest.raises(ValueError, match="expected a multiple of at least 1 and a floor from 0 to 1"):
            allocate(groups, curves, costs, 0.5, **setting)


def test_a_rank_is_a_width_like_any_other():
    """A dense layer of 10 by 10 costs 100, two factors of rank r cost 20 r: rank 5 is no smaller."""
    ranks = Widths("low rank", torch.tensor([10, 4, 3, 2, 1]), torch.tensor([0, 0.1, 0.3, 2, 9]).double())
    left = torch.tensor([*(0.2 * r for r in range(10)), 1], dtype=torch.float64)
    units = Widths.of(group("g0", 10), curve([0.25] * 10), 1)
    terms = [
        Term("layer", macs=100, factors=({"low rank": left},)),
        Term("other", macs=100, factors=({"g0": table(10)},)),
    ]
    costs = Costs(terms, {"low rank": 10, "g0": 10})
    assert divide([ranks, units], costs, 0.9, "macs") == {"low rank": 4, "g0": 10}
    assert divide([ranks, units], costs, 0.7, "macs") == {"low rank": 3, "g0": 8}
    assert even([ranks, units], costs, 0.9, "macs")["g0"] < 10


def test_units_chosen_elsewhere_are_sorted_and_checked():
    groups = [group("g0", 8), group("g1", 8, reason="it reaches the output")]
    assert given_units(groups, {"g0": torch.tensor([5, 0, 3], dtype=torch.int32)})["g0"].tolist() == [0, 3, 5]
    for bad in ([], [0, 0], [-1, 2], [8], [[1, 2]], [0.5], [True, False]):
        with pytest.raises(ValueError, match=r"different numbers from 0 to 7 of the units of g0"):
            given_units(groups, {"g0": torch.tensor(bad)})
    with pytest.raises(ValueError, match="expected names of groups such as g0, g1, got g7"):
        given_units(groups, {"g7": torch.tensor([1])})
    with pytest.raises(ValueError, match=r"no unit of g1 can be taken out \(it reaches the output\)"):
        given_units(groups, {"g1": torch.tensor([1])})
