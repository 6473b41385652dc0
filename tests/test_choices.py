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
from snows import Budget
from snows.choosing.choices import Chooser

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
