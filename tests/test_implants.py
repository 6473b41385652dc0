"""Two thin layers in the place of one: what they compute, how they are named, fitted, saved and refused."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from models import QUICK, Branches, Chain, Mapped, PaddedConv, masked, settle
from test_files import rewritten
from torch import nn
from torch.nn.utils import parametrizations

import snows
from snows import Newton
from snows.layers import SparseConv2d, SparseLinear
from snows.matching.horizon import Horizon
from snows.matching.losses import Reconstruction
from snows.matching.metrics import OutputSensitivity
from snows.networks.attention import OpenAttention, close_attention, open_attention, plain_forward
from snows.networks.batches import Batch
from snows.networks.edits import described, edits_of
from snows.networks.functions import known
from snows.networks.implants import Factored, Implant, LowRank, dense_name, why_not
from snows.networks.layers import prunable
from snows.networks.pairing import paired, unpaired
from snows.networks.stream import Schedule, Stream
from snows.networks.trace import Trace
from snows.networks.watching import Watch
from snows.sparsity import MaskedWeight


def implanted(net, ranks):
    net = copy.deepcopy(net)
    open_attention(net)
    for layer, rank in ranks.items():
        Implant(layer, rank).apply(net)
    return net


def opened(net):
    net = copy.deepcopy(net)
    open_attention(net)
    return net


CASES = {
    "branches": (
        lambda: settle(Branches()),
        {"stem": 3, "right.0": 2, "point": 4, "head": 2},
        lambda: torch.randn(3, 3, 9, 10),
    ),
    "mapped": (
        lambda: settle(Mapped()),
        {"attention.in_proj": 5, "attention.out_proj": 4, "mlp.0": 6, "mlp.2": 3, "head": 2},
        lambda: {"pixel_values": torch.randn(3, 3, 16, 16)},
    ),
    "encoder": (
        lambda: nn.TransformerEncoder(
            nn.TransformerEncoderLayer(16, 2, 24, batch_first=True), 2, enable_nested_tensor=False
        ).eval(),
        {"layers.0.linear1": 6, "layers.0.self_attn.in_proj": 7, "layers.1.linear2": 5},
        lambda: torch.randn(3, 5, 16),
    ),
}


@pytest.fixture(params=CASES, name="case")
def _case(request):
    make, ranks, batch = CASES[request.param]
    return make(), ranks, batch()


# ---------------------------------------------------------------- what it computes


@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(12, 7),
        nn.Linear(5, 9, bias=False),
        nn.Conv2d(6, 8, 3, stride=2, padding=1),
        nn.Conv2d(6, 8, (3, 1), padding="same", dilation=2, bias=False),
        nn.Conv2d(4, 6, 3, padding=(1, 2), padding_mode="reflect"),
    ],
    ids=str,
)
def test_two_layers_compute_the_truncated_weight(layer):
    net = nn.Sequential(layer).double().eval()
    weight, rank = layer.weight.detach().clone(), 3
    x = torch.randn(2, weight.shape[1], 9, 8).double() if weight.ndim == 4 else torch.randn(4, 6, 12).double()
    x = x[..., : weight.shape[1]] if weight.ndim == 2 else x
    keys = {f"0.{key}" for key in layer.state_dict()}
    Implant("0", rank).apply(net)
    assert set(net.state_dict()) == {"0.0.weight", "0.1.weight"} | {
        key.replace("0.bias", "0.1.bias") for key in keys if "bias" in key
    }
    assert {type(x) for x in net[0]} == {type(layer)}
    # the same layer with the best weight of rank 3 in it, found without the row view
    U, S, V = torch.linalg.svd(weight.flatten(1), full_matrices=False)
    best = ((U[:, :rank] * S[:rank]) @ V[:rank]).view_as(weight)
    torch.testing.assert_close(net[0].weight, best)
    dense = copy.deepcopy(layer)
    dense.weight.data = best
    torch.testing.assert_close(net(x), dense(x))
    first, second = net[0][0].weight.flatten(1), net[0][1].weight.flatten(1)
    torch.testing.assert_close(first.norm(dim=1), second.norm(dim=0))  # one step size suits both


def test_given_factors_and_intercept_are_taken():
    net = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4, bias=False)).eval()
    first, second, shift = torch.randn(2, 6).double(), torch.randn(5, 2).double(), torch.randn(5).double()
    bias, x = net[0].bias.detach().clone(), torch.randn(3, 6)
    net[0].requires_grad_(False)
    Implant("0", 2, Factored(first, second, shift)).apply(net)
    Implant("1", 1, Factored(first[:1, :5], second[:4, :1], shift[:4])).apply(net)
    torch.testing.assert_close(net[0](x), x @ (second @ first).float().T + bias + shift.float())
    torch.testing.assert_close(net[1].bias, shift[:4].float())  # a layer without a bias gets one
    assert not net[0][0].weight.requires_grad
    assert not net[0][1].bias.requires_grad
    assert net[1][1].weight.requires_grad
    assert all(p.dtype == torch.float32 for p in net.parameters())
    assert not any(m.training for m in net.modules())


def test_pytorchs_own_fast_path_goes_through_both():
    """It reads weight and bias of linear1 and linear2, and never calls them."""
    net, ranks, x = (
        CASES["encoder"][0](),
        {"layers.0.linear1": 6, "layers.1.linear2": 5},
        torch.randn(2, 5, 16),
    )
    net = copy.deepcopy(net)
    for layer, rank in ranks.items():
        Implant(layer, rank).apply(net)
    with torch.no_grad():
        fast = net(x)
        was = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            plain = net(x)
        finally:
            torch.backends.mha.set_fastpath_enabled(was)
    torch.testing.assert_close(fast, plain, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- names


def counted(trace):
    return [event.name for event in trace.events if known(event.function).counted]


def test_operations_have_the_dense_networks_names(case):
    net, ranks, x = case
    dense, thin = opened(net), implanted(net, ranks)
    one, other = Trace.of(dense, Batch.of(x)), Trace.of(thin, Batch.of(x))
    function = {
        name: "conv2d" if isinstance(m, nn.Conv2d) else "linear" for name, m in prunable(dense).items()
    }
    extra = {f"{name}.0:{function[name]}" for name in ranks}
    assert len(extra) == len(ranks)
    assert extra.isdisjoint(counted(one))
    assert [name for name in counted(other) if name not in extra] == counted(one)
    assert extra < set(counted(other))
    assert unpaired(one, other) == []
    assert all(map(paired(one, other), counted(one)))
    assert set(other.layers) == (set(one.layers) - set(ranks)) | {f"{x}.{i}" for x in ranks for i in (0, 1)}
    odd = {name for name, use in one.layers.items() if use.oddity}
    assert {name for name, use in other.layers.items() if use.oddity} == odd
    flops = sum(
        one.layers[name].flops * (rank * (w.shape[0] + w[0].numel())) // w.numel()
        for name, rank in ranks.items()
        for w in [dense.get_submodule(name).weight]
    )
    assert other.flops == one.flops - sum(one.layers[name].flops for name in ranks) + flops
    for name in ranks:
        assert dense_name(thin, f"{name}.0") == dense_name(thin, f"{name}.1") == name
        assert dense_name(thin, name) == name


def test_a_layer_called_twice_keeps_its_numbers():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix, self.head = nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, x):
            return self.head(F.relu(self.mix(F.relu(self.mix(x)))))

    net, x = Twice().eval(), Batch.of(torch.randn(2, 6))
    names = counted(Trace.of(implanted(net, {"mix": 2}), x))
    assert [name for name in names if "mix.0" not in name and "mix#1.0" not in name] == counted(
        Trace.of(net, x)
    )
    assert len(names) == 7


# ---------------------------------------------------------------- horizon


class Features(Watch):
    """Gather what every operation returns."""

    def __init__(self, net):
        super().__init__(net)
        self.found = {}

    def other(self, func, args, kwargs):
        name = self.frame.operation(func) if known(func).counted else ""
        out = func(*args, **kwargs)
        if name:
            self.found[name] = (out[0] if isinstance(out, tuple) else out).clone()
        return out


@torch.no_grad()
def features(net, batch):
    watch = Features(net)
    with plain_forward(), watch:
        batch.through(net)
    return watch.found


def stream_to(net, batch, layer):
    stream = Stream(Schedule(net, Trace.of(net, batch)), batch)
    stream.advance(layer)
    return stream


@pytest.mark.parametrize("k", [0, 1, 2, 3, 100, "end"])
def test_a_horizon_ends_where_the_dense_layers_does(case, k):
    net, ranks, x = case
    dense, thin, batch = opened(net), implanted(net, ranks), Batch.of(x)
    counts = paired(Trace.of(dense, batch), Trace.of(thin, batch))
    for name in ranks:
        wanted = Horizon(dense, name, k, batch)
        for factor in (f"{name}.0", f"{name}.1"):
            found = Horizon(thin, factor, k, batch, counts)
            assert found.operations == wanted.operations
            assert found.dense == name
            targets = found.outputs(dense.get_submodule(name).weight.detach(), stream_to(dense, batch, name))
            for key, y in wanted.outputs(
                dense.get_submodule(name).weight.detach(), stream_to(dense, batch, name)
            ).items():
                torch.testing.assert_close(targets[key], y)
            own = found.outputs(thin.get_submodule(factor).weight.detach(), stream_to(thin, batch, factor))
            assert list(own) == list(targets)


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 10), nn.Linear(10, 9), nn.Linear(9, 3)

    def forward(self, x):
        return self.c(F.gelu(self.b(F.relu(self.a(x)))))


def test_a_horizon_computes_what_the_formula_says():
    net, x = Mlp().double().eval(), torch.randn(7, 8).double()
    thin = implanted(net, {"b": 4})
    U, V, b = (p.detach() for p in (thin.b[1].weight, thin.b[0].weight, thin.b[1].bias))
    h = F.relu(net.a(x))
    for factor, at in (("b.0", V), ("b.1", U)):
        weight = torch.randn_like(at)
        u, v = (U, weight) if factor == "b.0" else (weight, V)
        own = h @ (u @ v).T + b
        found = Horizon(thin, factor, 3, Batch.of(x)).outputs(weight, stream_to(thin, Batch.of(x), factor))
        assert list(found) == ["b:linear", ":gelu", "c:linear"]
        for y, wanted in zip(found.values(), (own, F.gelu(own), net.c(F.gelu(own))), strict=True):
            torch.testing.assert_close(y, wanted)


def test_newton_on_each_factor_lowers_the_loss_by_hand_written_terms(case):
    net, ranks, x = case
    net = net.double()
    batch = Batch.of(x).map(torch.Tensor.double)
    dense, thin = opened(net), implanted(net, ranks)
    felt = OutputSensitivity(dense, batch, 0)
    for name in ranks:
        source = stream_to(dense, batch, name)
        Horizon(dense, name, 2, source)  # learns what is changed in place
        for factor in (f"{name}.0", f"{name}.1"):
            stream = stream_to(thin, batch, factor)
            horizon = Horizon(thin, factor, 2, stream)
            with torch.no_grad():
                targets = horizon.outputs(dense.get_submodule(name).weight, source)
            metrics = felt.of(targets)
            loss = Reconstruction(horizon, stream, targets, metrics)
            layer = thin.get_submodule(factor)
            start = layer.weight.detach().clone()
            before = float(loss(start))
            fit = Newton(max_iterations=20, passes=2).solve(
                [loss], MaskedWeight(start, torch.ones_like(start, dtype=torch.bool))
            )
            with torch.no_grad():
                layer.weight.copy_(fit.masked.weight)
            # the same loss by whole passes of both networks
            seen, wanted = features(thin, batch), features(dense, batch)
            after = 0.0
            for key, metric in metrics.items():
                e = (seen[key] - wanted[key]).movedim(metric.channel, -1).flatten(0, -2)
                after += float(torch.einsum("pi,ij,pj->p", e, metric.matrix(e.shape[1], like=e)[0], e).mean())
            torch.testing.assert_close(after, float(loss(fit.masked.weight)), rtol=1e-6, atol=0)
            assert after < 0.999 * before


# ---------------------------------------------------------------- files


def loaded(net, other, tmp_path):
    path = tmp_path / "net.safetensors"
    snows.save(net, path)
    return snows.load(path, other)


def test_what_was_saved_comes_back_exactly(case, tmp_path):
    net, ranks, x = case
    thin = implanted(net, ranks)
    close_attention(thin)
    other = copy.deepcopy(net)
    with torch.no_grad():
        for p in other.parameters():
            p.normal_()
    state = copy.deepcopy(other.state_dict())
    back = loaded(thin, other, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(state.values(), other.state_dict().values(), strict=True))
    assert list(back.state_dict()) == list(thin.state_dict())
    assert {name for name, m in back.named_modules() if isinstance(m, LowRank)} == set(ranks)
    with torch.no_grad():
        one, two = (Batch.of(x).through(m) for m in (thin, back))
    assert all(map(torch.equal, *(list(y.values()) if isinstance(y, dict) else [y] for y in (one, two))))
    assert edits_of(back) == edits_of(thin)
    with pytest.raises(ValueError, match="is a LowRank, no Linear or Conv2d"):
        Implant(next(iter(ranks)), 1).apply(thin)


def test_an_attention_with_thin_projections_stays_open():
    net = implanted(settle(Mapped()), {"attention.in_proj": 5})
    x = torch.randn(2, 3, 16, 16)
    wanted = net(x)["logits"]
    close_attention(net)
    assert isinstance(net.attention, OpenAttention)
    torch.testing.assert_close(net(x)["logits"], wanted)


@pytest.mark.parametrize("pattern", [snows.NM(2, 4), snows.Unstructured(0.8)], ids=str)
def test_thin_packed_and_folded_at_once(pattern, tmp_path):
    net, x = settle(Chain()), torch.randn(3, 4, 7, 5)
    thin = implanted(net, {"first": 4, "second": 4})
    names = [f"{name}.{i}" for name in ("first", "second") for i in (0, 1)]
    masks = {name: pattern.mask(thin.get_submodule(name).weight.abs()) for name in names}
    with torch.no_grad():
        for name, mask in masks.items():
            thin.get_submodule(name).weight.mul_(mask)
        wanted = thin(x)
    deployed = snows.deploy(thin, x, objective="size", progress=False, stopwatch=QUICK)
    assert all(isinstance(deployed.network.get_submodule(name), SparseConv2d) for name in names)
    back = loaded(deployed, settle(Chain()), tmp_path)
    assert all(isinstance(back.get_submodule(name), SparseConv2d) for name in names)
    with torch.no_grad():
        torch.testing.assert_close(deployed.network(x), wanted, rtol=1e-4, atol=1e-5)
        assert torch.equal(back(x), deployed.network(x))
        dense = thin.first.weight, thin.second.weight
        torch.testing.assert_close(deployed.network.second.weight.shape, dense[1].shape)
    assert {edit.kind for edit in edits_of(back)} == {"implant", "fold", "pack"}
    assert [edit.rank for edit in edits_of(back) if edit.kind == "implant"] == [4, 4]


def test_a_packed_implant_knows_its_weight():
    net = implanted(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), {"0": 4})
    masked(net)
    wanted = (net[0][1].weight @ net[0][0].weight).detach()
    for i in range(2):
        net[0][i] = SparseLinear.from_dense(net[0][i])
    torch.testing.assert_close(net[0].weight, wanted)
    assert edits_of(net)[0] == Implant("0", 4)


def test_an_edit_in_json_holds_layer_and_rank_alone():
    edit = Implant("a", 3, Factored(torch.ones(3, 4), torch.ones(4, 3)))
    assert json.loads(json.dumps(described(edit))) == {"kind": "implant", "layer": "a", "rank": 3}
    assert edit == Implant("a", 3)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rank": 0}, "rank of b is 0"),
        ({"rank": True}, "rank of b is True"),
        ({"rank": 2.0}, "rank of b is 2.0"),
        ({"rank": 2**40}, "rank of b"),
        ({"rank": 9}, "expected a rank below 9, got 9"),
        ({"rank": 3}, "b.0.weight is"),
        ({"layer": 3}, "layer is 3"),
        ({"layer": "z"}, "there is no module z"),
        ({"layer": ""}, "no Linear or Conv2d"),
        ({"more": 1}, "an edit has the entries"),
    ],
    ids=str,
)
def test_a_changed_file_is_refused(change, words, tmp_path):
    path = tmp_path / "net.safetensors"
    snows.save(implanted(Mlp().eval(), {"b": 4}), path)
    rewritten(path, lambda content: content["edits"][0].update(change))
    with pytest.raises(ValueError, match=words):
        snows.load(path, Mlp())


def test_a_file_of_format_3_is_read(tmp_path):
    net, x = masked(settle(Chain())), torch.randn(3, 4, 7, 5)
    deployed = snows.deploy(net, x, objective="size", progress=False, stopwatch=QUICK)
    path = tmp_path / "net.safetensors"
    snows.save(deployed, path)
    rewritten(path, lambda content: content.update(version=3))
    assert torch.equal(snows.load(path, Chain())(x), deployed.network(x))


# ---------------------------------------------------------------- what cannot be replaced


class Refused(nn.Module):
    """Holds a layer for every reason."""

    def __init__(self):
        super().__init__()
        self.grouped = nn.Conv2d(4, 4, 1, groups=2)
        self.padded = PaddedConv(4, 4, 3)
        self.read, self.shared, self.twin = (nn.Linear(4, 4) for _ in range(3))
        self.twin.weight = self.shared.weight
        self.computed = parametrizations.weight_norm(nn.Linear(4, 4))
        self.hooked, self.unreached, self.held, self.thin, self.fine = (nn.Linear(4, 4) for _ in range(5))
        self.norm, self.column, self.pruned = nn.LayerNorm(4), nn.Linear(4, 1), masked(nn.Linear(4, 4))
        self.pruned.register_buffer("pruning_mask", self.pruned.weight != 0, persistent=False)
        self.hooked.register_forward_hook(lambda module, args, output: output + 1)
        self.also = [self.held]

    def forward(self, x):
        x = self.padded(self.grouped(x)).mean((2, 3))
        for layer in (self.read, self.shared, self.twin, self.computed, self.hooked, self.held, self.pruned):
            x = layer(x)
        x = x + self.read.weight.sum()
        return self.column(self.norm(self.thin(self.fine(x))))


REASONS = {
    "grouped": "its convolution has 2 groups",
    "padded": "its class, PaddedConv, computes something of its own",
    "read": "its weight is read outside of it",
    "shared": "it shares its weight with twin",
    "twin": "it shares its weight with shared",
    "computed": "its weight is computed by a parametrisation",
    "hooked": "it has hooks",
    "unreached": "the example does not reach it",
    "held": "an attribute of another module holds it too",
    "thin": "it is a LowRank, no Linear or Conv2d",
    "thin.0": "it is a factor of an implant",
    "thin.1": "it is a factor of an implant",
    "norm": "it is a LayerNorm, no Linear or Conv2d",
    "column": "its weight is one row or column",
    "pruned": "it is pruned",
    "nowhere": "there is no such module",
    "fine": "",
}


@pytest.mark.parametrize("name", REASONS)
def test_why_a_layer_stays(name):
    net = Refused().eval()
    Implant("thin", 2).apply(net)
    found = why_not(net, Trace.of(net, Batch.of(torch.randn(2, 4, 5, 5))), name)
    assert found.startswith(REASONS[name])
    assert bool(found) == bool(REASONS[name])
    if name in ("grouped", "padded", "computed", "hooked", "norm", "column", "nowhere"):
        with pytest.raises(ValueError, match=rf"^({name}|there is no module {name})"):
            Implant(name, 1).apply(net)


@pytest.mark.parametrize("rank", [0, -1, 1.0, True, None, "3"])
def test_a_rank_that_is_none(rank):
    with pytest.raises(ValueError, match=r"^Implant: expected a rank of at least 1, got .* for head$"):
        Implant("head", rank)


@pytest.mark.parametrize("rank", [9, 10, 1000])
def test_a_rank_that_saves_nothing(rank):
    net = Mlp()
    with pytest.raises(ValueError, match=rf"^b: expected a rank below 9, got {rank}; leave it dense$"):
        Implant("b", rank).apply(net)
    assert isinstance(net.b, nn.Linear)
    with pytest.raises(ValueError, match=r"^b: expected a factor of \(4, 10\), got \(3, 10\)$"):
        Implant("b", 4, Factored(torch.ones(3, 10), torch.ones(9, 4))).apply(net)
    with pytest.raises(ValueError, match=r"^b: expected a factor of \(9, 4\), got \(9, 3\)$"):
        Implant("b", 4, Factored(torch.ones(4, 10), torch.ones(9, 3))).apply(net)
    assert isinstance(net.b, nn.Linear)
    with pytest.raises(ValueError, match="the network is this one layer"):
        Implant("", 2).apply(nn.Linear(4, 4))
