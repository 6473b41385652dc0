"""Structured pruning from end to end: what goes, what the report says, interruptions, and what bad input gets."""

import copy
import os
import re
import subprocess
import sys
import time
from functools import partial

import pytest
import torch
from models import settle
from safetensors import safe_open
from test_taking import Net
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import snows
from snows import NM, Matching, Newton, Structured
from snows.choosing.asked import settings
from snows.choosing.plan import Plan
from snows.evaluation import compare
from snows.networks.edits import edits_of
from snows.results.run import Run

quick = partial(snows.prune, progress=False, matching=Matching(2), solver=Newton(max_iterations=3))
UNITS = ("channels", "heads", "neurons")
half = partial(Structured, 0.5, multiple=2, using=UNITS)


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return settle(Net())


@pytest.fixture(scope="module")
def batches():
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(160, 3, 8, 8, generator=generator)
    return list((images + images.mean((2, 3), keepdim=True) * 4).split(40))


@pytest.fixture(scope="module")
def whole(net, batches, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return quick(net, batches, half(), out=folder), folder


def macs(net, x):
    """Multiplications of one sample, counted by PyTorch."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        net(x[:1])
    return counter.get_total_flops() // 2


def error(net, other, batches):
    with torch.no_grad():
        a, b = (torch.cat([m(x) for x in batches]) for m in (net, other))
    return float((a - b).square().mean() / a.var())


def stop_after(monkeypatch, layers):
    """Interrupt a run after so many layers, of all stages together."""
    keep, count = Run.keep, 0

    def stopping(run, *args):
        nonlocal count
        if count == layers:
            raise KeyboardInterrupt
        count += 1
        keep(run, *args)

    monkeypatch.setattr(Run, "keep", stopping)


def bits(folder):
    """All that is in a network's file; the order of its metadata is safetensors' own."""
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {key: file.get_tensor(key).numpy().tobytes() for key in file.keys()}, file.metadata()  # noqa: SIM118


def test_half_of_the_multiplications_stay(net, batches, whole):
    (small, report), _ = whole
    before, after = report.macs
    assert (before, after) == (macs(net, batches[0]), macs(small, batches[0]))
    assert 0.4 * before < after <= 0.5 * before
    assert report.parameters == tuple(sum(p.numel() for p in x.parameters()) for x in (net, small))
    assert type(small) is Net
    kept = {x.name: x.kept for x in report.groups if x.kept < x.units}
    assert kept
    assert {x.name: x.reason for x in report.groups}["head"] == "its units reach the network's output"
    assert f"{after / 1e6:.4g} of {before / 1e6:.4g} million MACs" in report.summary()


def test_every_stage_lowers_the_loss_or_is_not_taken(net, batches, whole):
    (small, report), _ = whole
    assert [x.name for x in report.stages] == ["cut", "means", "least squares", "Newton"]
    taken = [x.loss for x in report.stages if x.taken]
    assert taken == sorted(taken, reverse=True)
    bare, _ = quick(net, batches, half(refit=False), solver=None, recalibrate=False)
    assert error(net, small, batches) < 0.5 * error(net, bare, batches)


def test_progress_and_seconds_are_of_all_that_is_done(net, batches, capsys):
    began = time.perf_counter()
    report = quick(net, batches, half(), progress=True).report
    took = time.perf_counter() - began
    assert 0.99 * took - 0.1 < report.seconds <= took
    assert f"; {report.seconds:.1f} s, " in report.summary()
    lines = capsys.readouterr().err.splitlines()
    stages = [
        "checking and tracing the network",
        "deciding what goes",
        "cut",
        "means",
        "least squares",
        "Newton",
    ]
    assert [x for x in lines if x in stages] == stages
    done = [x for x in lines if x.startswith(tuple(f"{i}/" for i in range(1, 100)))]
    assert len(done) == sum(not x.reason for x in report.layers)


def test_the_dense_network_is_left_alone(net, batches):
    before = copy.deepcopy(net.state_dict())
    quick(net, batches, half())
    assert all(torch.equal(x, before[key]) for key, x in net.state_dict().items())


def test_the_runs_file_loads_into_the_dense_architecture(batches, whole):
    (small, _), folder = whole
    loaded = snows.load(folder / "model.safetensors", Net())
    assert torch.equal(loaded(batches[0]), small(batches[0]))


@pytest.mark.parametrize("after", [0, 5, 11])
def test_a_run_that_stops_in_any_stage_ends_with_the_same_bits(
    net, batches, whole, tmp_path, monkeypatch, after
):
    stop_after(monkeypatch, after)
    with pytest.raises(KeyboardInterrupt):
        quick(net, batches, half(), out=tmp_path)
    monkeypatch.undo()
    assert (tmp_path / "plan.json").exists()
    assert not (tmp_path / "model.safetensors").exists()
    monkeypatch.setattr("snows.shaping.decide_cut", None)  # nothing is decided again
    again = quick(net, batches, half(), out=tmp_path, resume=True)
    assert bits(tmp_path) == bits(whole[1])
    assert [x.loss for x in again.report.stages] == [x.loss for x in whole[0].report.stages]


def test_a_damaged_plan_is_decided_again(net, batches, whole, tmp_path):
    quick(net, batches, half(), out=tmp_path)
    plan = tmp_path / "plan.json"
    sound = plan.read_text()
    plan.write_text(sound.replace('"size": 20', '"size": 21'))
    assert plan.read_text() != sound
    quick(net, batches, half(), out=tmp_path, resume=True)
    assert plan.read_text() == sound
    assert bits(tmp_path) == bits(whole[1])


def test_another_share_is_not_mixed_in(net, batches, whole):
    with pytest.raises(ValueError, match=r"resume: .* another pattern"):
        quick(net, batches, Structured(0.4, multiple=2), out=whole[1], resume=True)


def test_other_layers_left_alone_are_not_mixed_in(net, batches, whole):
    with pytest.raises(ValueError, match=r"resume: .* another choice of layers"):
        quick(net, batches, half(), out=whole[1], resume=True, skip="conv1")


def test_a_loss_that_is_not_finite_takes_no_later_stage_back(net, batches, monkeypatch):
    losses = iter([float("nan"), 0.5, 0.25])
    monkeypatch.setattr("snows.shaping.mismatch", lambda twins: next(losses))
    stages = quick(net, batches, half(), solver=None).report.stages
    assert [x.taken for x in stages] == [1, 1, 1]


def ranked(sign):
    return lambda group: sign * torch.arange(group.units)


def test_another_function_of_the_same_name_is_not_mixed_in(net, batches, tmp_path):
    bare = partial(quick, net, batches, solver=None, out=tmp_path)
    bare(half(order=ranked(1), refit=False))
    bare(half(order=ranked(1), refit=False), resume=True)  # the same again
    with pytest.raises(ValueError, match=r"resume: .* another pattern"):
        bare(half(order=ranked(-1), refit=False), resume=True)


def test_a_functions_name_is_the_same_in_every_process():
    script = """
from snows.choosing.asked import _name
def outer():
    def rule(group):
        return group.kind in {"channels", "heads", "neurons", "others"} and later(group)
    name = _name(rule)  # before `later` is there
    def later(group):
        return 1
    return name
print(outer())
"""
    names = {
        subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in "123"
    }
    assert len(names) == 1
    assert names.pop().startswith("<rule ")


def test_a_refused_share_leaves_the_folder_free(net, batches, tmp_path):
    with pytest.raises(ValueError, match=r"that is possible, 34\.1 % or more"):
        quick(net, batches, Structured(0.05, multiple=2, floor=0.5, using=UNITS), out=tmp_path)
    quick(net, batches, half(refit=False), solver=None, out=tmp_path)
    assert (tmp_path / "model.safetensors").exists()


def test_what_a_structured_run_would_not_use_is_refused(net, batches):
    masks = {"conv1": torch.ones(6, 3, 3, 3, dtype=torch.bool)}
    for select in (snows.magnitude, masks):
        with pytest.raises(ValueError, match="a Structured without then= asks for none"):
            quick(net, batches, half(), select=select)
    for key in ("only", "skip"):
        with pytest.raises(ValueError, match=f"expected {key} to name layers such as .*, got zzz"):
            quick(net, batches, half(), **{key: "zzz*"})


def by_number(group):
    return torch.arange(group.units)


def test_what_was_asked_is_the_same_text_in_every_process_and_whole():
    def asked(goal):
        return settings(goal, snows.alps, None, Matching(), 0.95, True, 0, Plan({}), [], 8)["pattern"]

    assert asked(half()) == str(half())
    assert "order=<by_number " in asked(half(order=by_number))
    assert "then=<by_number " in asked(half(then=by_number))
    assert "then={'fc1': NM(n=2, m=4)}" in asked(half(then={"fc1": NM(2, 4)}))
    many = torch.arange(2000)
    others = torch.cat([many[:1000], many[1001:]])
    assert asked(Structured({"fc1": many})) != asked(Structured({"fc1": others}))


@pytest.mark.parametrize("of", ["params", "bytes"])
def test_parameters_and_bytes_are_halved_too(net, batches, of):
    small, _ = quick(net, batches, half(of=of), solver=None)
    sizes = [sum(p.numel() for p in x.parameters()) for x in (net, small)]
    if of == "bytes":
        sizes = [sum(x.numel() * x.element_size() for x in m.state_dict().values()) for m in (net, small)]
    assert 0.35 * sizes[0] < sizes[1] <= 0.5 * sizes[0]


def test_only_some_kinds_and_layers_lose_units(net, batches):
    goal = Structured(0.9, using=("neurons",), multiple=2)
    report = quick(net, batches, goal, solver=None).report
    assert {x.name for x in report.groups if x.kept < x.units} == {"fc1"}
    report = quick(net, batches, Structured(0.8, multiple=2, using=UNITS), solver=None, skip="fc1").report
    lost = {x.name for x in report.groups if x.kept < x.units}
    assert lost
    assert lost <= {"conv1", "attention.qkv"}
    assert {x.name: x.reason for x in report.groups}["fc1"] == "excluded"
    report = quick(net, batches, Structured(0.9, multiple=2, using=UNITS), solver=None, only=["fc*"]).report
    assert {x.name for x in report.groups if x.kept < x.units} == {"fc1"}


@pytest.mark.parametrize("order", ["hap", "fisher", "magnitude"])
def test_other_orders_reach_the_share(net, batches, order):
    pruned = quick(net, batches, half(order=order), solver=None)
    assert pruned.report.macs[1] <= 0.5 * pruned.report.macs[0]
    assert any(x.error == x.error for x in pruned.report.groups) == (order != "magnitude")


def test_an_order_of_ones_own_says_what_goes(net, batches):
    goal = Structured(0.9, using=("neurons",), multiple=1, order=lambda group: torch.arange(group.units))
    pruned = quick(net, batches, goal, solver=None)
    kept = pruned.edits[0].kept["fc1.weight", 0]
    assert torch.equal(kept, torch.arange(20 - len(kept), 20))


def test_exact_units_stay(net, batches):
    units = {"fc1": torch.tensor([2, 3, 5, 7, 11])}
    pruned = quick(net, batches, Structured(units), solver=None)
    assert torch.equal(pruned.edits[0].kept["fc2.weight", 1], units["fc1"])
    for wrong in ({"fc1": torch.tensor([20])}, {"fc9": torch.tensor([0])}, {"fc1": torch.tensor([1, 1])}):
        with pytest.raises(ValueError, match="fc"):
            quick(net, batches, Structured(wrong))


def test_a_pattern_comes_after_the_cut(net, batches):
    pruned = quick(net, batches, half(multiple=4, then=NM(2, 4)))
    fc2 = pruned.network.fc2
    assert (fc2.weight.unflatten(1, (-1, 4)) != 0).sum(-1).eq(2).all()
    assert fc2.in_features < 20
    assert pruned.report.macs[1] <= 0.5 * pruned.report.macs[0]


@pytest.mark.parametrize("using", [UNITS, ("low-rank", "neurons")])
def test_a_budget_is_spent_over_the_weights_of_the_smaller_network(net, batches, using):
    goal = Structured(0.6, multiple=2, using=using, then=snows.Unstructured(0.5))
    pruned = quick(net, batches, goal, solver=None)
    rows = [x for x in pruned.report.layers if not x.reason]
    size, kept = sum(x.size for x in rows), sum(x.kept for x in rows)
    assert size == sum(mask.numel() for mask in pruned.masks.values())
    assert abs(kept - size / 2) <= 1
    assert any("." in x.name and x.name[-1] in "01" for x in rows) == ("low-rank" in using)


def test_a_pattern_that_the_new_widths_do_not_divide_leaves_the_layer_dense(net, batches):
    goal = Structured({"fc1": torch.arange(7)}, then=NM(2, 4))
    report = quick(net, batches, goal).report
    reasons = {x.name: x.reason for x in report.layers}
    assert reasons["fc2"] == "7 input channels do not divide into groups of 4"
    assert not reasons["fc1"]


def test_a_cut_network_is_pruned_and_deployed_like_any_other(batches, whole, tmp_path):
    (small, _), _ = whole
    sparse, _ = quick(small, batches, NM(1, 2))
    assert (sparse.fc1.weight == 0).float().mean() == 0.5
    packed = snows.deploy(sparse, batches[0][:16], objective="size", progress=False)
    snows.save(packed, tmp_path / "packed.safetensors")
    loaded = snows.load(tmp_path / "packed.safetensors", Net())
    torch.testing.assert_close(loaded(batches[0]), packed.network(batches[0]))
    assert type(edits_of(loaded)[0]).__name__ == "Take"
    again, report = quick(small, batches, Structured(0.7, multiple=2))
    assert report.macs[0] == macs(small, batches[0])
    snows.save(again, tmp_path / "again.safetensors")
    assert torch.equal(snows.load(tmp_path / "again.safetensors", Net())(batches[0]), again(batches[0]))


@pytest.fixture(scope="module")
def thin(net, batches, tmp_path_factory):
    folder = tmp_path_factory.mktemp("thin")
    return quick(net, batches, Structured(0.6, multiple=2, using=("low-rank", "neurons")), out=folder), folder


def test_low_rank_and_removal_share_one_budget(net, batches, thin, tmp_path):
    (small, report), folder = thin
    assert report.macs == (macs(net, batches[0]), macs(small, batches[0]))
    assert report.macs[1] <= 0.6 * report.macs[0]
    ranks = {x.name: (x.kept, x.units) for x in report.groups if x.kind == "low-rank" and x.kept < x.units}
    assert ranks
    for name, (rank, full) in ranks.items():
        first, second = small.get_submodule(name)
        assert len(first.weight) == second.weight.shape[1] == rank < full
    loaded = snows.load(folder / "model.safetensors", Net())
    assert torch.equal(loaded(batches[0]), small(batches[0]))
    taken = [x.loss for x in report.stages if x.taken]
    assert taken == sorted(taken, reverse=True)
    assert len(taken) >= 3
    exported = torch.export.export(small, (batches[0],))
    torch.testing.assert_close(exported.module()(batches[0]), small(batches[0]))
    sparse, _ = quick(small, batches, NM(1, 2))
    assert any((m.weight == 0).float().mean() == 0.5 for m in sparse.modules() if isinstance(m, nn.Linear))
    again, _ = quick(net, batches, Structured(0.6, multiple=2, using=("low-rank", "neurons")))
    assert torch.equal(again(batches[0]), small(batches[0]))


def test_low_rank_is_fitted_better_than_truncated(net, batches):
    goal = Structured(0.7, multiple=2, using=("low-rank",))
    bare, _ = quick(net, batches, Structured(0.7, multiple=2, using=("low-rank",), refit=False), solver=None)
    fitted, _ = quick(net, batches, goal, solver=None)
    assert error(net, fitted, batches) < 0.5 * error(net, bare, batches)


@pytest.mark.parametrize("after", [12])
def test_a_run_with_low_rank_that_stops_ends_with_the_same_bits(
    net, batches, thin, tmp_path, monkeypatch, after
):
    stop_after(monkeypatch, after)
    goal = Structured(0.6, multiple=2, using=("low-rank", "neurons"))
    with pytest.raises(KeyboardInterrupt):
        quick(net, batches, goal, out=tmp_path)
    monkeypatch.undo()
    quick(net, batches, goal, out=tmp_path, resume=True)
    assert bits(tmp_path) == bits(thin[1])


def test_deploy_takes_a_smaller_network_without_zeros(batches, whole):
    (small, _), _ = whole
    fast, report = snows.deploy(small, batches[0][:16], progress=False)
    assert not report.layers
    assert "no layer has zeros" in report.summary()
    torch.testing.assert_close(fast(batches[0]), small(batches[0]), rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- what bad input gets


class Plain(nn.Module):
    """Whose only width every unit of reaches all of the next layer."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.head = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.norm(self.first(x)))


@pytest.mark.parametrize(
    ("goal", "message"),
    [
        (lambda: Structured(0), "expected a share above 0 and below 1 that stays, got 0"),
        (lambda: Structured(1.0), "expected a share above 0 and below 1"),
        (lambda: Structured("half"), "expected a share"),
        (lambda: Structured({}), "expected the units of at least one group"),
        (
            lambda: Structured(0.5, of="ms"),
            "expected of to be macs, params, bytes, nonzeros, latency, got 'ms'",
        ),
        (lambda: Structured(0.5, using=("filters",)), "expected using to name some of channels"),
        (lambda: Structured(0.5, using="heads"), "expected using to name some of"),
        (lambda: Structured(0.5, order="taylor"), "expected order to be compensated, .* got 'taylor'"),
        (lambda: Structured(0.5, multiple=0), "multiple of at least 1"),
        (lambda: Structured(0.5, floor=1), "a floor from 0 to below 1"),
    ],
)
def test_settings_out_of_range(goal, message):
    with pytest.raises(ValueError, match=message):
        goal()


def test_a_share_that_floors_make_impossible_says_what_is_possible(net, batches):
    with pytest.raises(ValueError, match=r"\d+(\.\d+)? %") as caught:
        quick(net, batches, Structured(0.05, multiple=2, floor=0.5, using=UNITS))
    least = float(re.search(r"(\d+(\.\d+)?) %", str(caught.value)).group(1))
    assert least > 5


def test_a_network_without_removable_width_lists_the_reasons():
    torch.manual_seed(0)
    with pytest.raises(ValueError, match=r"no unit can be taken out .first: "):
        quick(Plain().eval(), [torch.randn(8, 6) for _ in range(4)], Structured(0.5))


def test_states_that_cannot_be_cut(net, batches, monkeypatch):
    with pytest.raises(ValueError, match="training mode"):
        quick(copy.deepcopy(net).train(), batches, half())
    with pytest.raises(ValueError, match=r"cannot run a batch of"):
        snows.groups(net, torch.randn(1, 4, 8, 8))
    with pytest.raises(ValueError, match=r"cannot run a batch of torch.float32 of \(3, 8, 8\)"):
        quick(net, [torch.randn(3, 8, 8)], half())
    with pytest.raises(TypeError, match=r"expected an nn.Module"):
        snows.groups("net", batches[0])
    masked = copy.deepcopy(net)
    nn.utils.prune.l1_unstructured(masked.fc1, "weight", 0.5)
    monkeypatch.setattr("snows.choosing.structure.proving", None)  # said before anything is decided
    with pytest.raises(ValueError, match=r"prune\.remove"):
        quick(masked, batches, half())


def test_groups_says_which_and_why(net, batches):
    found = {x.name: x for x in snows.groups(net, batches[0])}
    free = {name: (x.kind, x.units) for name, x in found.items() if not x.reason}
    assert free["conv1"] == ("channels", 6)
    assert free["attention.qkv"] == ("heads", 4)
    assert free["fc1"] == ("neurons", 20)
    assert found["head"].reason
    assert {name for x in found.values() for name in x.rows} == {
        "conv1",
        "depthwise",
        "conv2",
        "attention.qkv",
        "attention.proj",
        "fc1",
        "fc2",
        "head",
    }


def test_judged_networks_are_compared_whole(net, batches, whole):
    (small, _), _ = whole
    dense, scores = compare(net, small, batches)
    assert not dense.divergence > 0
    assert 0 < scores.divergence < 1
