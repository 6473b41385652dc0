"""Choices of groups and layers that have to go together: what cannot be done is not chosen."""

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
from models import settle
from test_taking import Net
from torch import nn

import snows
from snows import Budget, Structured
from snows.choosing.choices import Chooser
from snows.choosing.packing import nbytes

quick = partial(snows.prune, solver=None, progress=False)


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return settle(Net())


@pytest.fixture(scope="module")
def batches():
    torch.manual_seed(1)
    return [torch.randn(16, 3, 8, 8) for _ in range(4)]


class Chain(nn.Module):
    """Widths that the groups of a pattern need not divide once they are cut, and a weight of three calls."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 24, 3, padding=1)
        self.a, self.b = nn.Conv2d(24, 32, 3, padding=1), nn.Conv2d(32, 24, 3, padding=1)
        self.shared, self.tied = nn.Conv2d(24, 24, 3, padding=1), nn.Conv2d(24, 24, 3, padding=1)
        self.tied.weight = self.shared.weight
        self.head = nn.Linear(24, 10)

    def forward(self, x):
        x = self.stem(x).relu()
        x = x + self.b(self.a(x).relu())
        x = self.tied(self.shared(self.shared(x).relu()).relu()).relu()
        return self.head(x.mean((2, 3)))


def test_a_pattern_that_a_cut_width_does_not_divide_into_is_not_chosen():
    torch.manual_seed(0)
    net, batches = Chain().eval(), [torch.randn(16, 3, 12, 12) for _ in range(4)]
    shares = (0.8, 0.6, 0.5, 0.45)
    found = snows.frontier(net, batches, Budget(0.6, multiple=4), shares, progress=False)
    patterns = 0
    for i, point in enumerate(found.points):
        sparse, report = quick(net, batches, found.budget(i))
        assert point.macs == report.macs[1] <= shares[i] * report.macs[0]
        for name, pattern in point.layers.items():
            if ":" in str(pattern):
                patterns += 1
                assert sparse.get_submodule(name).weight.shape[1] % int(str(pattern)[-1]) == 0
    assert patterns


def test_what_was_left_out_is_not_chosen_again(net, batches, monkeypatch):
    edited, tried = Chooser.edited, []

    def without_the_first(chooser, choice):
        first = min(choice.options)
        tried.append((first, choice.options[first]))
        return edited(
            chooser, replace(choice, options={x: choice.options[x] for x in choice.options if x != first})
        )

    monkeypatch.setattr(Chooser, "edited", without_the_first)
    report = quick(net, batches, Budget(0.7, using=("low-rank", "nm"))).report
    assert len(set(tried)) == len(tried) > 1
    assert any("What can be done together leaves" in x for x in report.notes)


def test_masks_of_torch_are_refused_before_anything_is_decided(net, batches):
    net = copy.deepcopy(net)
    torch.nn.utils.prune.l1_unstructured(net.conv1, "weight", 0.5)
    for call in (quick, partial(snows.frontier, progress=False)):
        with pytest.raises(
            ValueError, match=r"without masks of torch.nn.utils.prune, got one on conv1; make"
        ):
            call(net, batches, Budget(0.5))


def test_an_amount_that_is_not_possible_is_said_as_an_amount(net, batches, monkeypatch):
    whole = nbytes(net) / 1e6
    with pytest.raises(
        ValueError, match=r"an amount of bytes that is possible, 0\.\d+ of 0\.\d+ MB or more, got 1e-06 of"
    ):
        quick(net, batches, Budget(mb=1e-6))
    monkeypatch.setattr("snows.choosing.structure.proving", None)  # said before units are looked for
    with pytest.raises(ValueError, match=rf"fewer megabytes than the network has, {whole:.4g}, got mb=1"):
        quick(net, batches, Budget(mb=1))


def test_a_share_that_steps_miss_has_a_note():
    torch.manual_seed(0)
    net, batches = Chain().eval(), [torch.randn(8, 3, 12, 12) for _ in range(4)]
    report = quick(net, batches, Structured(0.9, using=("channels",), multiple=16)).report
    stays = report.macs[1] / report.macs[0]
    assert stays < 0.97 * 0.9
    assert any(
        x.startswith(f"90.0% of the MACs were asked for; the network that came nearest has {stays:.1%}")
        for x in report.notes
    )
    report = quick(net, batches, Structured(0.9, using=("channels",), multiple=1)).report
    assert not any("came nearest" in x for x in report.notes)


def test_what_a_budget_of_bytes_leaves_is_in_the_report(net, batches):
    report = quick(net, batches, Budget(0.6, of="bytes", multiple=2)).report
    before, now = report.counted
    assert before == nbytes(net)
    assert now <= 0.6 * before
    assert f"{now / 1e6:.4g} of {before / 1e6:.4g} million bytes, packed" in report.summary()


def test_layers_that_nothing_is_done_to_are_named():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.one, self.last = nn.Conv2d(3, 8, 3), nn.Conv1d(8, 8, 3), nn.Linear(8, 4)

        def forward(self, x):
            return self.last(self.one(self.first(x).flatten(2)).relu().mean(2))

    torch.manual_seed(0)
    report = quick(Mixed().eval(), [torch.randn(4, 3, 8, 8)] * 4, Structured(0.7, multiple=1)).report
    assert "Linear and Conv2d layers alone are pruned; as they came stay one (Conv1d)." in report.notes
