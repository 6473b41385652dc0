"""Networks that a late start, a route or a derivative could get wrong: each is pruned right, or says what is in the way."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from models import QUICK, settle
from torch import nn

import snows
from snows import NM, Matching, Newton, mask_of
from snows.matching.losses import Objective
from snows.networks.attention import plain_forward
from snows.networks.batches import Batch
from snows.networks.copies import hold_back
from snows.networks.masks import MASK
from snows.networks.stream import Stream
from snows.networks.twins import Twins

quiet = partial(snows.prune, progress=False)


def cbr(i, o):
    return nn.Sequential(nn.Conv2d(i, o, 3, padding=1, bias=False), nn.BatchNorm2d(o), nn.ReLU())


def images(*sizes):
    return [torch.randn(n, 3, 16, 16) for n in sizes or (8,) * 4]


# ---------------------------------------------------------------- state


class Gate(nn.Module):
    """Keeps a map from one call, which the network reads later."""

    def __init__(self):
        super().__init__()
        self.c, self.g = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 1)

    def forward(self, x):
        self.map = self.g(x).sigmoid()
        return F.relu(self.c(x))


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.t, self.b, self.d, self.f = (
            cbr(3, 16),
            Gate(),
            cbr(16, 16),
            cbr(16, 16),
            nn.Linear(16, 10),
        )

    def forward(self, x):
        h = self.b(self.t(self.a(x)))
        return self.f(self.d(h * self.t.map).mean((2, 3)))


def calls_in_a_whole_pass(net, batch, layer):
    """The input of a layer as a hook sees it in a whole pass."""
    seen = []
    handle = net.get_submodule(layer).register_forward_pre_hook(
        lambda module, args: seen.append(args[0].clone())
    )
    with torch.no_grad(), plain_forward():
        batch.through(net)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("sizes", [(8, 8, 8, 8), (8, 8, 8, 8, 3)], ids=["equal", "a smaller last batch"])
def test_state_that_a_module_keeps_is_the_batchs_own(sizes):
    net, batches = settle(Gated()), images(*sizes)
    twins = Twins(net, batches)
    assert twins.notes == [
        "Modules keep state from one call to the next, which the network reads, so that every pass began at the "
        "network's input; this takes longer."
    ]
    for layer in ("a.0", "t.c", "b.0", "d.0"):
        site = twins.at(layer)
        assert len(site.training) == len(sizes) - 1
        for pair in (*site.training, site.held):
            whole = calls_in_a_whole_pass(twins.sparse, pair.sparse.batch, layer)
            torch.testing.assert_close(pair.sparse.call.x, whole, rtol=1e-5, atol=1e-6)
    losses = Objective(twins, Matching(2), 0).at(twins.at("d.0"))
    assert losses.held(losses.site.weight).item() == pytest.approx(
        0, abs=1e-9
    )  # the dense weight matches the dense network
    _, report = quiet(net, batches, NM(2, 4))
    assert [x.name for x in report.layers if not x.reason] == ["t.g", "t.c", "b.0", "d.0"]


def test_a_network_without_state_starts_late():
    net = settle(
        nn.Sequential(cbr(3, 16), cbr(16, 16), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))
    )
    twins = Twins(net, images())
    assert twins.notes == []
    assert not any(schedule.whole for schedule in twins.schedules)


class Recording(nn.Module):
    """Keeps what nobody reads: a map to look at."""

    def __init__(self):
        super().__init__()
        self.layer, self.seen = cbr(16, 16), None

    def forward(self, x):
        self.seen = self.layer(x)
        return self.seen


def test_state_that_nobody_reads_costs_nothing():
    net = settle(
        nn.Sequential(
            cbr(3, 16), Recording(), cbr(16, 16), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4)
        )
    )
    twins = Twins(net, images())
    assert not any(schedule.whole for schedule in twins.schedules)


class Heads(nn.Module):
    """Returns what its heads return, one after the other, in a mapping."""

    def __init__(self):
        super().__init__()
        self.body = cbr(3, 16)
        self.classes, self.boxes, self.mask = nn.Linear(16, 4), nn.Linear(16, 2), nn.Conv2d(16, 1, 1)

    def forward(self, x):
        x = self.body(x)
        mask, pooled = self.mask(x), x.mean((2, 3))
        return {"classes": self.classes(pooled), "box": (self.boxes(pooled), mask)}


def test_a_network_that_returns_what_several_heads_return_starts_late():
    twins = Twins(settle(Heads()), images())
    assert twins.notes == []
    assert not any(schedule.whole for schedule in twins.schedules)


# ---------------------------------------------------------------- routing by data


class Experts(nn.Module):
    """Sends each sample to the expert that its mean says; one is never used."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Linear(8, 8), nn.Linear(8, 4)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)) for _ in range(3)
        )

    def forward(self, x):
        h = self.stem(x).tanh()
        chosen = (x.mean(1) > 0).long()
        out = torch.zeros_like(h)
        for i, expert in enumerate(self.experts):
            rows = chosen == i
            if rows.any():
                out = out.index_put((rows,), expert(h[rows]))
        return self.head(out.relu())


def test_experts_are_fitted_to_the_batches_that_reach_them():
    torch.manual_seed(0)
    net = Experts().eval()
    low, high = [torch.randn(8, 8) - 2 for _ in range(3)], [torch.randn(8, 8) + 2 for _ in range(3)]
    both = [torch.cat([a[:4], b[:4]]) for a, b in zip(low, high, strict=True)]
    batches = [*low, *both, *high]
    sparse, report = quiet(net, batches, NM(2, 4), select=snows.magnitude)
    assert any("Batches take different ways through the network" in note for note in report.notes)
    rows = {x.name: x for x in report.layers}
    assert [name for name, x in rows.items() if not x.reason] == [
        f"experts.{i}.{j}" for i in (0, 1) for j in (0, 2)
    ]
    assert rows["experts.2.0"].reason == "never runs"
    twins = Twins(net, batches)
    reached = [pair.sparse.batch.args[0] for pair in twins.at("experts.1.0").training]
    assert all((x.mean(1) > 0).any() for x in reached)
    assert len(reached) == sum(
        bool((x.mean(1) > 0).any()) for x in (b.args[0] for b in hold_back([Batch.of(x) for x in batches])[0])
    )
    masks, _ = quiet(net, batches, NM(2, 4), select=snows.magnitude, solver=None)
    with torch.no_grad():
        x = torch.cat([torch.randn(64, 8) - 2, torch.randn(64, 8) + 2])
        error, unfitted = (float((other(x) - net(x)).square().mean()) for other in (sparse, masks))
    assert error < unfitted


def test_an_expert_that_only_the_held_back_batch_reaches_stays_dense():
    net = Experts().eval()
    low = [torch.randn(8, 8) - 3 for _ in range(3)]
    _, report = quiet(net, [*low, torch.randn(8, 8) + 3], NM(2, 4), select=snows.magnitude)
    rows = {x.name: x for x in report.layers}
    assert rows["experts.1.0"].reason == "no calibration batch reaches it"
    assert rows["experts.1.0"].kept == 64
    assert not rows["experts.0.0"].reason


# ---------------------------------------------------------------- what cannot be differentiated


class Within(nn.Module):
    def __init__(self, between):
        super().__init__()
        self.first, self.second, self.third, self.last = (
            nn.Linear(8, 8),
            nn.Linear(8, 8),
            nn.Linear(8, 8),
            nn.Linear(8, 4),
        )
        self.between = between

    def forward(self, x):
        return self.last(self.third(self.between(self.second(self.first(x).tanh())).relu()).tanh())


def overwrite(y):
    z = torch.sigmoid(y)
    z[:, :4] = z[:, :4] * 2
    return z


@pytest.mark.parametrize(
    ("between", "note"),
    [
        (
            lambda y: torch.cdist(y.unsqueeze(0), y.unsqueeze(0))[0] @ y,
            "second: matched up to what comes before :relu",
        ),
        (overwrite, ""),
        (torch.no_grad()(lambda y: y * 2), ""),
        (nn.Hardsigmoid(), ""),
        (nn.Hardswish(), ""),
        (lambda y: y + torch.round(y), ""),
        (lambda y: y.detach() * 2, ""),
    ],
    ids=["cdist", "in place", "no_grad", "hardsigmoid", "hardswish", "round", "detach"],
)
def test_a_network_is_pruned_whatever_its_derivatives(between, note):
    torch.manual_seed(0)
    net, batches = Within(between).eval(), [torch.randn(16, 8) for _ in range(4)]
    sparse, report = quiet(net, batches, NM(2, 4), select=snows.magnitude, matching=Matching("end"))
    done = [x for x in report.layers if not x.reason]
    assert [x.name for x in done] == ["second", "third"]
    assert any(x.startswith(note) for x in report.notes) if note else not report.notes
    assert all(x.steps == 1 for x in done)
    with torch.no_grad():
        assert sparse(batches[0]).isfinite().all()


class Checkpointed(nn.Module):
    """As in timm: a switch that a user left on."""

    def __init__(self, reentrant):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.grad_checkpointing, self.reentrant = True, reentrant

    def forward(self, x):
        x = self.first(x).relu()
        if self.grad_checkpointing:
            x = torch.utils.checkpoint.checkpoint(
                lambda y: self.second(y).tanh(), x, use_reentrant=self.reentrant
            )
        else:
            x = self.second(x).tanh()
        return self.last(x)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_left_on(reentrant):
    net, batches = Checkpointed(reentrant).eval(), [torch.randn(16, 8) for _ in range(4)]
    sparse, report = quiet(net, batches, NM(2, 4), select=snows.magnitude)
    assert [x.steps for x in report.layers if not x.reason] == [1]
    assert sparse.grad_checkpointing is True
    assert net.grad_checkpointing is True


# ---------------------------------------------------------------- several inputs


class TwoInputs(nn.Module):
    def __init__(self, default):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.forward = self.with_default if default else self.without

    def with_default(self, x, scale=None):
        return self.last(
            self.second(self.first(x) * (1 if scale is None else scale.mean((1, 2))[:, None])).relu()
        )

    def without(self, x, scale):
        return self.with_default(x, scale)


@pytest.mark.parametrize("default", [True, False])
def test_a_pair_for_a_model_of_two_inputs_is_not_taken_for_labels(default):
    net = TwoInputs(default).eval()
    pairs = [(torch.randn(8, 8), torch.rand(8, 3, 3)) for _ in range(4)]
    with pytest.raises(
        ValueError,
        match=r"prune: expected a mapping of inputs by name for a model that takes 2 inputs, got a tuple of 2.*"
        r"pass \{'x': \.\.\., 'scale': \.\.\.\}",
    ):
        quiet(net, pairs, NM(2, 4))
    net.second.weight.data *= NM(2, 4).mask(net.second.weight.abs())
    with pytest.raises(ValueError, match="deploy: expected a mapping of inputs by name"):
        snows.deploy(net, pairs[0], progress=False)
    mappings = [{"x": x, "scale": scale} for x, scale in pairs]
    _, report = quiet(net, mappings, NM(2, 4))
    assert [x.name for x in report.layers if not x.reason] == ["second"]


@pytest.mark.parametrize(
    "labels", [torch.arange(8), torch.zeros(8), [0] * 8], ids=["numbers", "floats", "list"]
)
def test_labels_for_a_model_of_two_inputs_are_labels(labels):
    _, report = quiet(TwoInputs(True).eval(), [(torch.randn(8, 8), labels) for _ in range(4)], NM(2, 4))
    assert [x.name for x in report.layers if not x.reason] == ["second"]


# ---------------------------------------------------------------- masks beside weights


def test_the_mask_lies_beside_its_weight_and_in_the_result():
    """A kept weight that happens to be zero is told from one that was removed."""

    def with_a_kept_zero(weight, statistics, pattern):
        mask = pattern.mask(weight.abs())
        found = weight * mask
        found[tuple(mask.nonzero()[0])] = 0
        return snows.sparsity.MaskedWeight(found, mask)

    net = settle(nn.Sequential(cbr(3, 16), cbr(16, 16), nn.Flatten(), nn.Linear(16 * 256, 4)))
    pruned = quiet(net, images(), NM(2, 4), select=with_a_kept_zero, solver=None)
    network, report = pruned
    layer = network.get_submodule("1.0")
    assert network is pruned.network
    assert report is pruned.report
    assert list(pruned.masks) == ["1.0"]
    assert torch.equal(mask_of(layer), pruned.masks["1.0"])
    assert int(mask_of(layer).sum()) == report.layers[1].kept == layer.weight.numel() // 2
    assert int((layer.weight != 0).sum()) == layer.weight.numel() // 2 - 1
    assert list(network.state_dict()) == list(net.state_dict())
    assert torch.equal(mask_of(copy.deepcopy(network).half().get_submodule("1.0")), mask_of(layer))
    small = snows.deploy(network, images()[0], objective="size", stopwatch=QUICK, progress=False)
    assert str(small.network.get_submodule("1.0").pattern) == "2:4"
    assert small.network.get_submodule("1.0").values.numel() == layer.weight.numel() // 2


def test_masks_of_attention_survive_opening_and_closing():
    torch.manual_seed(0)
    net = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    pruned = quiet(
        net, [torch.randn(4, 6, 8) for _ in range(4)], NM(2, 4), select=snows.magnitude, solver=None
    )
    assert set(pruned.masks) == {"self_attn.out_proj", "linear1"}
    pruned = quiet(
        net,
        [torch.randn(4, 6, 8) for _ in range(4)],
        NM(2, 4),
        select=snows.magnitude,
        solver=None,
        only=lambda n, m: True,
    )
    assert torch.equal(
        getattr(pruned.network.self_attn, f"in_proj_{MASK}"), pruned.masks["self_attn.in_proj"]
    )
    assert torch.equal(mask_of(pruned.network.self_attn.out_proj), pruned.masks["self_attn.out_proj"])
    again = quiet(net, [torch.randn(4, 6, 8) for _ in range(4)], None, select=pruned.network, solver=None)
    assert all(torch.equal(again.masks[name], mask) for name, mask in pruned.masks.items())


def test_a_weight_that_is_not_zero_off_its_mask_is_refused():
    net = settle(nn.Sequential(cbr(3, 16), cbr(16, 16), nn.Flatten(), nn.Linear(16 * 256, 4)))
    network, _ = quiet(net, images(), NM(2, 4), select=snows.magnitude, solver=None)
    network.get_submodule("1.0").weight.data += 0.1  # somebody trained it
    with pytest.raises(
        ValueError,
        match=r"the weight of 1\.0 to be zero off its mask.*multiply it by its pruning_mask, .*snows\.hold, or prune again",
    ):
        snows.deploy(network, images()[0], progress=False)
    layer = network.get_submodule("1.0")
    layer.weight.data *= layer.pruning_mask
    assert (
        snows.deploy(network, images()[0], objective="size", stopwatch=QUICK, progress=False)
        .report.layers[0]
        .reason
        == ""
    )


class Corners:
    """A pattern of the test's own: of a kernel of 3 x 3 the corners go."""

    density, group = 5 / 9, None

    def __str__(self):
        return "corners"

    def fits(self, shape):
        return "" if tuple(shape[2:]) == (3, 3) else "it has no kernel of 3 x 3"

    def mask(self, scores):
        mask = torch.ones_like(scores, dtype=torch.bool)
        for i in (0, 2):
            for j in (0, 2):
                mask[:, :, i, j] = False
        return mask


@pytest.mark.parametrize("select", [snows.alps, snows.least_squares], ids=["alps", "least squares"])
def test_a_pattern_of_ones_own_goes_all_the_way(select, tmp_path):
    """Pruned, fitted, packed, saved and loaded; a layer that it does not fit stays dense with its reason."""
    net = settle(
        nn.Sequential(cbr(3, 16), cbr(16, 16), nn.Conv2d(16, 8, 1), nn.Flatten(), nn.Linear(8 * 256, 4))
    )
    pruned = quiet(net, images(), Corners(), select=select, solver=Newton(max_iterations=2))
    rows = {x.name: x for x in pruned.report.layers}
    assert rows["2"].reason == "it has no kernel of 3 x 3"
    assert rows["1.0"].pattern == "corners"
    assert torch.equal(pruned.masks["1.0"], Corners().mask(net[1][0].weight))
    deployed = snows.deploy(pruned.network, images()[0], objective="size", stopwatch=QUICK, progress=False)
    assert deployed.report.layers[0].reason == ""
    snows.save(deployed, tmp_path / "x.safetensors")
    loaded = snows.load(tmp_path / "x.safetensors", net)
    with torch.no_grad():
        x = images()[1]
        assert torch.equal(loaded(x), deployed.network(x))
        torch.testing.assert_close(loaded(x), pruned.network(x), rtol=1e-4, atol=1e-5)


def test_the_dense_weight_matches_the_dense_network_everywhere():
    """At every layer, before anything is pruned: the loss is zero, whatever the horizon."""
    net = settle(
        nn.Sequential(
            cbr(3, 16), cbr(16, 16), cbr(16, 16), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4)
        )
    )
    twins = Twins(net, images())
    for layer in ("1.0", "2.0", "5"):
        for k in (0, 3, "end"):
            losses = Objective(twins, Matching(k), 0).at(twins.at(layer))
            assert all(loss(losses.site.weight).item() < 1e-10 for loss in (losses.held, *losses))


def test_a_stream_that_is_not_reached_keeps_its_memory():
    net = Experts().eval()
    twins = Twins(net, [torch.randn(8, 8) - 3 for _ in range(4)])
    stream = Stream(twins.schedules[1], twins.batches[0])
    assert stream.advance("experts.0.0") is not None
    assert stream.advance("experts.2.0") is None
    assert stream.advance("experts.0.2") is not None
