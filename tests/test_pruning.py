import copy
import math
import os
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
import torch
from models import Branches, Mapped, settle
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import prune as torch_prune

import snows
from snows import NM, Matching, Newton, Unstructured, zoo
from snows.evaluation import evaluate, logits_of
from snows.matching.horizon import Horizon
from snows.matching.normalisation import recalibrate_statistics
from snows.networks.batches import Batch
from snows.networks.copies import hold_back
from snows.sparsity import rows
from snows.zoo import calibration

quiet = partial(
    snows.prune, select=snows.magnitude, progress=False, matching=Matching(4), solver=Newton(max_iterations=4)
)


def small(seed=0):
    torch.manual_seed(seed)
    return settle(Branches()), [torch.randn(4, 3, 8, 8) for _ in range(4)]


def loss_of(report):
    return sum(x.after for x in report.layers if not x.reason), sum(
        x.before for x in report.layers if not x.reason
    )


def test_prune_keeps_the_pattern_and_the_dense_model():
    net, batches = small()
    before = copy.deepcopy(net.state_dict())
    sparse, report = quiet(net, batches, NM(2, 4))
    assert type(sparse) is Branches
    assert list(sparse.state_dict()) == list(before)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    pruned = {x.name for x in report.layers if not x.reason}
    assert pruned == {"left", "right.0", "point"}
    for name in pruned:
        weight = sparse.get_submodule(name).weight
        assert (rows(weight).unflatten(1, (-1, 4)) != 0).sum(-1).eq(2).all()
    assert {x.name: x.reason for x in report.layers if x.reason} == {
        "stem": "first layer",
        "depthwise": "depthwise",
        "head": "last layer",
    }
    after, start = loss_of(report)
    assert after < 0.8 * start


def test_a_budget_takes_less_from_a_grouped_convolution():
    net = nn.Sequential(
        nn.Conv2d(3, 64, 1), nn.Conv2d(64, 64, 1), nn.Conv2d(64, 64, 3, groups=16), nn.Conv2d(64, 3, 1)
    ).eval()
    for layer in net[1:3]:  # magnitudes evenly spread over (0, 1], so that a share is a threshold
        count = layer.weight.numel()
        layer.weight.data = (torch.randperm(count) + 1.0).div(count).view_as(layer.weight)
    sparse, _ = snows.prune(
        net,
        [torch.randn(2, 3, 6, 6)],
        snows.Unstructured(0.5),
        select=snows.magnitude,
        solver=None,
        progress=False,
    )
    shares = [(layer.weight == 0).double().mean().item() for layer in sparse[1:3]]
    assert shares[0] / shares[1] == pytest.approx(16**0.25, rel=0.01)
    assert sum((layer.weight == 0).sum().item() for layer in sparse[1:3]) == round(
        0.5 * (64 * 64 + 64 * 4 * 9)
    )


def test_an_unstructured_budget_is_exact_over_the_prunable_weights():
    net, batches = small()
    sparse, report = quiet(net, batches, Unstructured(0.7), solver=None, cap=0.9)
    layers = [x for x in report.layers if not x.reason]
    total = sum(x.size for x in layers)
    assert "depthwise" in {x.name for x in layers}
    assert sum(x.size - x.kept for x in layers) == round(0.7 * total)
    assert all(x.kept >= 0.1 * x.size - 1 for x in layers)
    assert sum(int((sparse.get_submodule(x.name).weight == 0).sum()) for x in layers) == round(0.7 * total)


def test_patterns_by_name_and_by_function():
    net, batches = small()
    _, report = quiet(net, batches, {"left": NM(1, 4), "head": Unstructured(0.5)}, solver=None)
    assert {x.name: (x.pattern, x.kept) for x in report.layers if not x.reason} == {
        "left": ("1:4", net.left.weight.numel() // 4),
        "head": ("0.5", 30),
    }

    def linear(name, module):
        return Unstructured(0.25) if isinstance(module, nn.Linear) else None

    _, report = quiet(net, batches, linear, only=lambda n, m: True, solver=None)
    assert [x.name for x in report.layers if not x.reason] == ["head"]


def test_masks_from_elsewhere_three_ways():
    net, batches = small()
    masks = {"left": torch.rand_like(net.left.weight) < 0.5, "point": torch.rand_like(net.point.weight) < 0.5}
    by_mask, _ = quiet(net, batches, None, select=masks)
    zeroed = copy.deepcopy(net)
    parametrised = copy.deepcopy(net)
    for name, mask in masks.items():
        with torch.no_grad():
            zeroed.get_submodule(name).weight.mul_(mask)
        torch_prune.custom_from_mask(parametrised.get_submodule(name), "weight", mask)
    by_zeros, _ = quiet(net, batches, None, select=zeroed)
    again = quiet(net, batches, None, select=quiet(net, batches, None, select=masks), solver=None)
    assert torch.equal(again.network.left.weight, by_mask.left.weight)
    by_torch, report = quiet(parametrised, batches, None, select=parametrised)
    assert [x.name for x in report.layers if not x.reason] == ["left", "point"]
    for name, mask in masks.items():
        wanted = by_mask.get_submodule(name).weight
        assert not wanted[~mask].any()
        assert not torch.equal(wanted, net.get_submodule(name).weight * mask)
        assert torch.equal(by_zeros.get_submodule(name).weight, wanted)
        assert torch.equal(by_torch.get_submodule(name).weight, wanted)
    assert set(by_torch.state_dict()) == set(parametrised.state_dict())


def test_mappings_attention_generators_and_labels():
    torch.manual_seed(0)
    net = settle(Mapped())
    images = [torch.randn(4, 3, 12, 12) for _ in range(4)]
    sparse, report = quiet(net, ({"pixel_values": x, "labels": torch.zeros(4)} for x in images), NM(2, 4))
    assert type(sparse.attention) is nn.MultiheadAttention
    assert list(sparse.state_dict()) == list(net.state_dict())
    assert [x.name for x in report.layers if not x.reason] == [
        "attention.in_proj",
        "attention.out_proj",
        "mlp.0",
        "mlp.2",
    ]
    for weight in (sparse.attention.in_proj_weight, sparse.attention.out_proj.weight, sparse.mlp[0].weight):
        assert (weight.unflatten(1, (-1, 4)) != 0).sum(-1).eq(2).all()
    with torch.no_grad():
        assert sparse(pixel_values=images[0])["logits"].isfinite().all()


def test_the_zoos_network_keeps_its_function_better_than_masks_and_least_squares():
    """On images used nowhere else: divergence from the dense network of masks > layer-wise least squares > snows."""
    net = zoo.load("resnet20")
    batches, (images, labels) = calibration(192, 48), zoo.images("test")
    test = [(images[:500], labels[:500])]
    reference = [logits_of(net, test[0][0])]

    def divergence(**settings):
        sparse, _ = snows.prune(net, batches, NM(1, 4), progress=False, **settings)
        return evaluate(sparse, test, reference).divergence

    masks = divergence(solver=None, select=snows.magnitude)
    squares = divergence(solver=None, select=snows.least_squares)
    newton = divergence(matching=Matching(5), select=snows.least_squares)
    default = divergence()
    assert default < 0.8 * newton < 0.9 * squares < 0.5 * masks


def test_the_settings_of_the_published_method():
    """README's row: one step a batch, local unscaled targets; each layer's loss is that of its own unpruned weight."""
    net, batches = small()
    _, report = snows.prune(
        net,
        batches,
        NM(2, 4),
        select=snows.magnitude,
        matching=Matching.published(),
        solver=Newton.published(max_iterations=10),
        progress=False,
    )
    done = [x for x in report.layers if not x.reason]
    assert all(x.steps == 3 for x in done)  # three batches, the fourth is held back
    after, before = loss_of(report)
    assert after < 0.8 * before
    first = done[0].name
    stream = [Batch.of(batches[-1])]
    horizon = Horizon(net, first, 5, stream[0])
    own = net.get_submodule(first).weight.detach()
    masked = own * NM(2, 4).mask(own.abs())
    here = horizon.stream(stream[0])
    with torch.no_grad():
        pairs = zip(horizon.outputs(masked, here).values(), horizon.outputs(own, here).values(), strict=True)
        assert done[0].before == pytest.approx(
            sum((a - b).square().mean().item() for a, b in pairs), rel=1e-4
        )


def test_the_last_of_the_largest_batches_is_held_back():
    sizes = [8, 8, 8, 8, 1]
    training, held = hold_back([Batch.of(torch.full((n, 2), float(i))) for i, n in enumerate(sizes)])
    assert held.args[0].tolist() == [[3.0, 3.0]] * 8
    assert [x.args[0][0, 0].item() for x in training] == [0, 1, 2, 4]


def test_an_output_that_does_not_depend_on_the_layer_is_not_matched():
    class Features(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.third = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)

        def forward(self, x):
            features = self.first(x).tanh()
            return {"features": features, "logits": self.third(self.second(features).tanh())}

    _, report = quiet(
        settle(Features()), [torch.randn(16, 8) for _ in range(4)], NM(2, 4), matching=Matching("end")
    )
    (done,) = [x for x in report.layers if not x.reason]
    assert done.name == "second"
    assert done.after < 0.9 * done.before


def test_the_same_seed_gives_the_same_bits():
    net, batches = small()
    a, _ = quiet(net, batches, NM(2, 4), seed=3)
    b, _ = quiet(net, iter(batches), NM(2, 4), seed=3)
    assert all(
        torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


def test_recalibration_moves_statistics_by_what_pruning_moved():
    dense = settle(
        nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    )
    batches = [torch.randn(n, 2, 6, 6) + 0.5 for n in (5, 2, 9)]
    inputs = [Batch.of(x) for x in batches]
    same = copy.deepcopy(dense)
    recalibrate_statistics(same, dense, inputs)
    assert all(
        torch.allclose(a, b, rtol=1e-5, atol=1e-6)
        for a, b in zip(same.state_dict().values(), dense.state_dict().values(), strict=True)
    )
    sparse = copy.deepcopy(dense)
    with torch.no_grad():
        sparse[0].weight[0] *= 0.5
        sparse[3].weight[1:] *= 0.3
        moved = copy.deepcopy(sparse)
        recalibrate_statistics(moved, dense, inputs)
        x = torch.cat(batches)
        for start, norm in ((0, 1), (3, 4)):  # the second sees the first as it was corrected
            a, b = (
                dense[: start + 1](x).movedim(1, 0).flatten(1).double(),
                moved[: start + 1](x).movedim(1, 0).flatten(1).double(),
            )
            assert torch.allclose(
                moved[norm].running_mean.double(), dense[norm].running_mean + b.mean(1) - a.mean(1), atol=2e-3
            )
            ratio = b.var(1) / a.var(1)
            assert torch.allclose(
                moved[norm].running_var.double(), dense[norm].running_var * ratio, rtol=5e-2
            )
    assert not moved[1].training


def test_recalibration_of_a_channel_that_is_dead():
    dense = settle(nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)))
    with torch.no_grad():
        dense[0].weight[1] = 0
    sparse = copy.deepcopy(dense)
    recalibrate_statistics(sparse, dense, [Batch.of(torch.randn(4, 2, 6, 6))])
    assert sparse[1].running_var[1].item() == pytest.approx(dense[1].running_var[1].item(), rel=1e-6)
    assert sparse[1].running_mean[1].item() == pytest.approx(dense[1].running_mean[1].item(), abs=1e-6)


# ---------------------------------------------------------------- runs on disk


@pytest.mark.parametrize("damaged", [False, True], ids=["whole files", "half a file"])
def test_a_run_that_was_stopped_goes_on_and_ends_with_the_same_bits(tmp_path, damaged):
    net, batches = small()
    whole, _ = quiet(net, batches, NM(2, 4), out=tmp_path / "whole")

    class StopError(Exception):
        pass

    done = 0

    def only_twice(weight, statistics, pattern):
        nonlocal done
        done += 1
        if done == 3:
            raise StopError
        return snows.magnitude(weight, statistics, pattern)

    only_twice.__name__, only_twice.__module__ = "magnitude", snows.magnitude.__module__
    with pytest.raises(StopError):
        quiet(net, batches, NM(2, 4), out=tmp_path / "part", select=only_twice)
    assert len(list((tmp_path / "part" / "layers").iterdir())) == 2
    if damaged:
        (tmp_path / "part" / "layers" / "0001.safetensors").write_bytes(b"half a file")
    resumed, report = quiet(net, batches, NM(2, 4), out=tmp_path / "part", resume=True)
    assert all(
        torch.equal(a, b)
        for a, b in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True)
    )
    assert (tmp_path / "part" / "model.safetensors").read_bytes() == (
        tmp_path / "whole" / "model.safetensors"
    ).read_bytes()
    assert report.zeros == sum(x.size // 2 for x in report.layers if not x.reason)


def test_a_run_that_was_killed_goes_on_and_ends_with_the_same_bits(tmp_path):
    script = f"""
import sys, torch; sys.path.insert(0, {os.path.dirname(__file__)!r})
from test_pruning import Matching, quiet, small, NM
net, batches = small()
quiet(net, batches, NM(2, 4), matching=Matching('end'), out={str(tmp_path / "run")!r}, resume=True)
"""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([os.path.dirname(os.path.dirname(__file__)), *sys.path]),
    }
    process = subprocess.Popen([sys.executable, "-c", script], env=environment)
    layers = tmp_path / "run" / "layers"
    while not (layers.is_dir() and any(layers.glob("*.safetensors"))) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert any(layers.glob("*.safetensors"))  # it got somewhere before it was killed
    net, batches = small()
    resumed, _ = quiet(net, batches, NM(2, 4), matching=Matching("end"), out=tmp_path / "run", resume=True)
    whole, _ = quiet(net, batches, NM(2, 4), matching=Matching("end"))
    assert all(
        torch.equal(a, b)
        for a, b in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True)
    )


def test_a_run_is_not_mixed_with_another(tmp_path):
    net, batches = small()
    quiet(net, batches, NM(2, 4), out=tmp_path, solver=None)
    content = (tmp_path / "model.safetensors").read_bytes()
    other, _ = small(1)
    for change, word in (
        ({"pattern": NM(1, 4)}, "pattern"),
        ({"matching": Matching(3)}, "horizon"),
        ({"seed": 1}, "seed"),
        ({"model": other}, "model"),
        ({"batches": batches[:2]}, "data"),
    ):
        call = {
            "model": net,
            "batches": batches,
            "pattern": NM(2, 4),
            "out": tmp_path,
            "resume": True,
            "solver": None,
        } | change
        with pytest.raises(ValueError, match=f"resume: .*{word}"):
            quiet(**call)
    with pytest.raises(ValueError, match="already holds a run"):
        quiet(net, batches, NM(2, 4), out=tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == content


def test_an_out_that_cannot_be_written(tmp_path):
    net, batches = small()
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"out: .* cannot be written"):
        quiet(net, batches, NM(2, 4), out=tmp_path / "file" / "run")


# ---------------------------------------------------------------- bad input


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.layer, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.last(self.layer(self.layer(self.first(x))))


def tied():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    net[2].weight = net[1].weight
    return net.eval()


def plain():
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)).eval()


class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.c(nn.functional.dropout(self.b(self.a(x)), 0.5, training=True))


def with_nan():
    net = plain()
    net[2].weight.data[0, 0] = torch.nan
    return net


def parametrised():
    return nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 4), nn.Linear(4, 4)
    ).eval()


x = torch.randn(8, 4)
WRONG = {
    "training mode": (lambda: plain().train(), [x], NM(2, 4), {}, "evaluation mode"),
    "meta": (lambda: plain().to("meta"), [x], NM(2, 4), {}, "meta device"),
    "half": (lambda: plain().half(), [x.half()], NM(2, 4), {}, "float32 or float64"),
    "dropout": (lambda: Noisy().eval(), [x], NM(2, 4), {}, "deterministic"),
    "nan weights": (with_nan, [x], NM(2, 4), {}, "finite weights.*2.weight"),
    "no batches": (plain, [], NM(2, 4), {}, "at least one batch"),
    "a tensor for batches": (plain, x, NM(2, 4), {}, "iterable of batches"),
    "nan images": (plain, [x, x * torch.nan], NM(2, 4), {}, "batch 1"),
    "empty batch": (plain, [x[:0]], NM(2, 4), {}, "at least one sample"),
    "group divides no layer": (plain, [x], NM(2, 7), {}, "no layer is left.*7"),
    "budget beyond the caps": (plain, [x], Unstructured(0.9), {"cap": 0.5}, "raise the cap"),
    "mask of another shape": (
        plain,
        [x],
        None,
        {"select": {"2": torch.ones(3, 3, dtype=torch.bool)}},
        r"\(8, 8\), got .* \(3, 3\)",
    ),
    "mask of another dtype": (
        plain,
        [x],
        None,
        {"select": {"2": torch.full((8, 8), 0.5)}},
        "torch.bool, or zeros and ones",
    ),
    "mask for no layer": (plain, [x], None, {"select": {"nope": torch.ones(8, 8, dtype=torch.bool)}}, "nope"),
    "mask against the pattern": (
        plain,
        [x],
        NM(2, 4),
        {"select": {"2": torch.ones(8, 8, dtype=torch.bool)}},
        "keeps more than",
    ),
    "no pattern": (plain, [x], None, {}, "expected a pattern"),
    "pattern for no layer": (plain, [x], {"9": NM(2, 4)}, {}, "'9'"),
    "called twice": (lambda: Twice().eval(), [x], {"layer": NM(2, 4)}, {}, "is called 2 times"),
    "called twice, and no other": (lambda: Twice().eval(), [x], NM(2, 4), {"only": ["layer"]}, "2 times"),
    "tied": (tied, [x], {"1": NM(2, 4)}, {}, "shares its weight with 2"),
    "another network for masks": (plain, [x], None, {"select": nn.Linear(3, 3)}, "pruned copy of the model"),
    "a network without zeros": (plain, [x], None, {"select": plain()}, "needs zeros"),
    "parametrised": (parametrised, [x], NM(2, 4), {"only": ["0"]}, "parametrisation"),
    "images of another shape": (
        plain,
        [torch.randn(8, 5)],
        NM(2, 4),
        {},
        r"cannot run a batch of torch.float32 of \(8, 5\)",
    ),
    "one batch of another shape": (
        plain,
        [x, x, torch.randn(8, 5)],
        NM(2, 4),
        {},
        r"cannot run a batch of torch.float32 of \(8, 5\)",
    ),
    "images of another dtype": (plain, [x.double()], NM(2, 4), {}, "cannot run a batch of torch.float64"),
    "cap": (plain, [x], Unstructured(0.5), {"cap": math.nan}, "cap to be above 0 and at most 1, got nan"),
    "seed": (plain, [x], NM(2, 4), {"seed": -1}, "seed to be a whole number"),
    "resume of nothing": (plain, [x], NM(2, 4), {"resume": True}, "resume=True needs out="),
    "a budget of nothing": (plain, [x], Unstructured(1e-6), {}, "removes none of"),
    "compiled": (lambda: torch.compile(plain(), backend="eager"), [x], NM(2, 4), {}, "before torch.compile"),
    "no weights": (lambda: nn.Flatten().eval(), [x], NM(2, 4), {}, "without parameters"),
}


@pytest.mark.parametrize("name", WRONG)
def test_bad_input_gets_one_clear_sentence(name):
    make, batches, pattern, settings, message = WRONG[name]
    with pytest.raises(ValueError, match=message) as caught:
        quiet(make(), batches, pattern, **settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"targets": "mine"}, "Matching: expected targets to be one of dense, local, got 'mine'"),
        ({"metric": "mine"}, "Matching: expected metric to be one of output, variance, none, got 'mine'"),
        ({"horizon": -1}, 'Matching: expected horizon to be a whole number of at least 0, or "end", got -1'),
        ({"horizon": True}, "Matching: expected horizon to be a whole number"),
    ],
)
def test_a_setting_of_matching_that_is_none(setting, message):
    with pytest.raises(ValueError, match=message):
        Matching(**setting)


@pytest.mark.parametrize(
    ("pattern", "settings", "message"),
    [
        (NM(2, 4), {"matching": 3}, "expected matching to be a snows.Matching, got 3"),
        ("2:4", {}, "parse_pattern reads texts"),
        ({"2": "2:4"}, {}, "for 2, got '2:4'"),
        (NM(2, 4), {"solver": "newton"}, "snows.Newton or None"),
        (NM(2, 4), {"select": "magnitude"}, "expected select to be a rule"),
    ],
)
def test_a_setting_of_another_type_is_named(pattern, settings, message):
    with pytest.raises(TypeError, match=message):
        quiet(plain(), [x], pattern, **settings)


@pytest.mark.parametrize(
    ("select", "kind", "message"),
    [
        (
            lambda w, s, p: 3,
            TypeError,
            "expected select to return a snows.sparsity.MaskedWeight for 2, got a int",
        ),
        (
            lambda w, s, p: (w, w),
            ValueError,
            r"expected the mask that select returns for 2 to be torch.bool of",
        ),
        (
            lambda w, s, p: (w[:1], p.mask(w)),
            ValueError,
            r"expected the weight that select returns for 2 to be torch.float32 of",
        ),
        (
            lambda w, s, p: (w, w == w),
            ValueError,
            "the mask that select returns for 2 keeps more than the pattern 2:4 allows",
        ),
    ],
)
def test_what_a_rule_returns_is_checked(select, kind, message):
    with pytest.raises(kind, match=message):
        quiet(plain(), [x], NM(2, 4), select=select)


def test_a_run_does_not_write_over_the_files_of_others(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"mine")
    with pytest.raises(ValueError, match=r"holds model.safetensors, which no run there has written"):
        quiet(plain(), [x], NM(2, 4), out=tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == b"mine"
    assert not (tmp_path / "run.json").exists()


def test_an_impossible_budget_begins_no_run(tmp_path):
    with pytest.raises(ValueError, match="raise the cap"):
        quiet(plain(), [x], Unstructured(0.9), cap=0.5, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("content", [b"", b'{"version": 1', b"[1]", b"\xff\x00"])
def test_a_damaged_run_is_said_to_be(tmp_path, content):
    quiet(plain(), [x], NM(2, 4), out=tmp_path)
    (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"run.json is damaged"):
        quiet(plain(), [x], NM(2, 4), out=tmp_path, resume=True)


def test_a_damaged_layer_is_computed_again(tmp_path):
    net = plain()
    quiet(net, [x], NM(2, 4), out=tmp_path)
    wanted = (tmp_path / "model.safetensors").read_bytes()
    layer = next((tmp_path / "layers").iterdir())
    for tensors in (
        {"weight": torch.zeros(2, 2), "mask": torch.ones(2, 2, dtype=torch.bool)},
        load_file(layer),
    ):
        save_file(tensors, layer)  # of another layer; without its report
        quiet(net, [x], NM(2, 4), out=tmp_path, resume=True)
        assert (tmp_path / "model.safetensors").read_bytes() == wanted


def test_what_comes_back_lies_as_it_lay():
    net, batches = small()
    net = net.to(memory_format=torch.channels_last)
    sparse, _ = quiet(net, batches, NM(2, 4), solver=None)
    assert [p.stride() for p in sparse.parameters()] == [p.stride() for p in net.parameters()]


def test_a_masked_bias_does_not_stand_in_the_way():
    net = plain()
    torch.nn.utils.prune.l1_unstructured(net[2], "weight", 0.5)
    torch.nn.utils.prune.l1_unstructured(net[2], "bias", 0.5)
    sparse, _ = quiet(net, [x], None, select=net, solver=None)
    assert sparse.state_dict().keys() == net.state_dict().keys()
    assert (sparse[2].weight == 0).sum() >= 32
    torch.testing.assert_close(sparse[2].bias, net[2].bias)


def test_a_layer_that_never_runs_stays_dense_and_is_named():
    class Partly(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = plain(), nn.Linear(4, 4)

        def forward(self, x):
            return self.used(x)

    net = Partly().eval()
    _, report = quiet(net, [x], NM(2, 4), solver=None)
    assert {r.name: r.reason for r in report.layers if r.reason}["unused"] == "never runs"


def test_images_of_the_wrong_shape_are_the_networks_own_error():
    with pytest.raises((ValueError, RuntimeError), match=r"shape|size"):
        quiet(plain(), [torch.randn(2, 5)], NM(2, 4))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_a_batchnorm_whose_input_is_constant_keeps_a_variance(layout):
    net = nn.Sequential(nn.Conv2d(1, 3, 1), nn.BatchNorm2d(3)).eval()
    with torch.no_grad():
        net[0].weight.zero_()
        net[0].bias.copy_(torch.tensor([333.3, 0.1, -77.77]))
    sparse = copy.deepcopy(net)
    with torch.no_grad():
        sparse[0].bias.mul_(1.1)
    batches = [Batch.of(torch.randn(7, 1, 311, 301).contiguous(memory_format=layout)) for _ in range(3)]
    recalibrate_statistics(sparse, net, batches)
    assert torch.allclose(sparse[1].running_var, torch.ones(3))
    assert torch.allclose(sparse[1].running_mean, 0.1 * net[0].bias, rtol=1e-4)
