"""What somebody met who broke things: each is right now, or refused with a sentence."""

import json
import os
import types
from contextlib import suppress
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from models import QUICK
from torch import nn

import snows
from snows import NM
from snows.layers import SparseConv2d, SparseLinear
from snows.networks.twins import Twins
from snows.results.deployment import DeployedLayer, Deployment
from snows.results.report import Report

quiet = partial(snows.prune, progress=False, select=snows.magnitude)


def sparse(net):
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                module.weight.mul_(torch.rand_like(module.weight) > 0.6)
    return net.eval()


def small(net, x):
    return snows.deploy(net, x, objective="size", stopwatch=QUICK, progress=False)


def moved(net, deployed, x):
    with torch.no_grad():
        wanted = net(x.clone())
        return float((deployed.network(x.clone()) - wanted).abs().max() / wanted.abs().max())


# ---------------------------------------------------------------- late starts


class Ignored(nn.Module):
    """Calls an activation for what it does in place, and not for what it returns."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(16, 16) for _ in range(4))
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        h = self.a(x)
        self.act(h)
        h = self.b(h)
        self.act(h)
        h = self.c(h)
        self.act(h)
        return self.d(h)


class Plain(Ignored):
    def forward(self, x):
        return self.d(F.relu(self.c(F.relu(self.b(F.relu(self.a(x)))))))


def test_a_late_start_that_would_be_wrong_is_noticed_with_one_batch_too():
    torch.manual_seed(0)
    odd, plain = Ignored().eval(), Plain().eval()
    plain.load_state_dict(odd.state_dict())
    x = torch.randn(64, 16)
    found, report = quiet(odd, [x], NM(2, 4))
    wanted, _ = quiet(plain, [x], NM(2, 4))
    assert any("every pass began at the network's input" in note for note in report.notes)
    assert torch.equal(found.b.weight != 0, wanted.b.weight != 0)
    assert torch.allclose(found.c.weight, wanted.c.weight, atol=1e-5)


def test_batches_of_two_sizes_are_compared_too():
    class Kept(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c, self.d = (nn.Conv2d(4, 4, 1) for _ in range(4))
            self.keeper = nn.Identity()

        def forward(self, x):
            self.keeper.seen = self.a(x).mean((2, 3), keepdim=True)
            return self.d(self.c(self.b(x).relu()).relu() + self.keeper.seen)

    net = Kept().eval()
    twins = Twins(net, [torch.randn(4, 4, 6, 6), torch.randn(4, 4, 8, 8)])
    site = twins.at("d")
    assert len(site.training) == 2
    for pair in site.training:
        with torch.no_grad():
            x = pair.sparse.batch.args[0]
            kept = net.a(x).mean((2, 3), keepdim=True)
            assert torch.allclose(pair.sparse.call.x, net.c(net.b(x).relu()).relu() + kept, atol=1e-5)


class Raising(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(16, 16)

    def forward(self, x):
        self.layer(x)
        raise ValueError("not today")


class Catching(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.bad, self.b, self.c, self.d = (
            nn.Linear(16, 16),
            Raising(),
            nn.Linear(16, 16),
            nn.Linear(16, 16),
            nn.Linear(16, 4),
        )

    def forward(self, x):
        h = self.a(x).tanh()
        with suppress(ValueError):
            h = self.bad(h)
        return self.d(self.c(self.b(h).tanh()).tanh() + h)


@pytest.mark.parametrize("count", [1, 4])
def test_a_module_that_raises_and_is_caught(count):
    _, report = quiet(Catching().eval(), [torch.randn(32, 16) for _ in range(count)], NM(2, 4))
    done = [x for x in report.layers if not x.reason]
    assert {"b", "c"} <= {x.name for x in done}
    assert all(x.after == x.after for x in done)
    assert not any("finite" in note for note in report.notes)


# ---------------------------------------------------------------- modules that something else holds or hooks


class Listed(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.r, self.fc = (
            nn.Conv2d(3, 16, 3),
            nn.Conv2d(16, 16, 3),
            nn.ReLU(),
            nn.Linear(16, 10),
        )
        self.routes = {"x": [self.a]}

    def forward(self, x):
        return self.fc(self.b(self.r(self.routes["x"][0](x))).mean((2, 3)))


def test_a_layer_that_a_dict_holds_too_stays_dense():
    net, x = sparse(Listed()), torch.randn(4, 3, 8, 8)
    deployed = small(net, x)
    assert moved(net, deployed, x) < 1e-5
    assert {row.name: row.reason for row in deployed.report.layers}[
        "a"
    ] == "an attribute of another module holds it too"


class Active(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.relu, self.fc = nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Linear(16, 10)

    def forward(self, x):
        return self.fc(self.relu(self.conv(x)).mean((2, 3)))


def double(module, args, output):
    return output * 2


@pytest.mark.parametrize("how", ["hook", "forward"])
def test_an_activation_that_does_more_is_not_absorbed(how):
    net, x = sparse(Active()), torch.randn(4, 3, 8, 8)
    if how == "hook":
        net.relu.register_forward_hook(double)
    else:
        net.relu.forward = types.MethodType(lambda self, x: F.relu(x) * 2, net.relu)
    deployed = small(net, x)
    assert moved(net, deployed, x) < 1e-5
    assert isinstance(deployed.network.conv, SparseConv2d)
    assert "relu" not in deployed.report.folded


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.attn = nn.Linear(8, 16), nn.MultiheadAttention(16, 2, batch_first=True)
        self.mlp, self.last = nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x):
        h = self.first(x)
        h = h + self.attn(h, h, h, need_weights=False)[0]
        return self.last(self.mlp(h).relu().mean(1))


def louder(module, args, output):
    return output[0] * 30, output[1]


def test_attention_with_hooks_stays_as_it_is():
    torch.manual_seed(0)
    net, batches = Attending().eval(), [torch.randn(8, 5, 8) for _ in range(4)]
    _, quietly = quiet(net, batches, NM(2, 4))
    net.attn.register_forward_hook(louder)
    pruned, loudly = quiet(net, batches, NM(2, 4))
    before = {x.name: x.before for x in quietly.layers}
    assert all(
        x.before != before[x.name] for x in loudly.layers if not x.reason
    )  # another network, other losses
    deployed = small(sparse(net), batches[0])
    assert moved(net, deployed, batches[0]) < 1e-5
    assert type(deployed.network.attn) is nn.MultiheadAttention
    assert type(pruned.attn) is nn.MultiheadAttention


def hidden(x):
    """An operation that no mode of torch functions sees."""
    with torch._C.DisableTorchFunction():
        return torch.sigmoid(x)


def test_what_packed_layers_would_change_stays_dense():
    """A reader that nothing can watch, after an absorbed activation: the outputs tell."""

    class Scripted(Active):
        def forward(self, x):
            h = self.conv(x)
            return self.fc((self.relu(h) + hidden(h)).mean((2, 3)))

    net, x = sparse(Scripted()), torch.randn(4, 3, 8, 8)
    deployed = small(net, x)
    assert moved(net, deployed, x) < 1e-5
    assert any("Packed layers changed the outputs by" in note for note in deployed.report.notes)
    assert {row.reason for row in deployed.report.layers} == {"the network would not compute the same"}


def test_a_network_that_is_one_layer_is_packed():
    layer, x = sparse(nn.Linear(16, 4)), torch.randn(3, 16)
    deployed = small(layer, x)
    assert isinstance(deployed.network, SparseLinear)
    assert moved(layer, deployed, x) < 1e-5


class Holding(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(16, 16) for _ in range(3))
        self.step = lambda x: F.relu(self.b(x))

    def forward(self, x):
        return self.c(self.step(self.a(x)))


def test_a_function_that_holds_a_module_is_refused():
    with pytest.raises(ValueError, match="the step of the model is a function that holds on to its module"):
        quiet(Holding().eval(), [torch.randn(8, 16)], NM(2, 4))


# ---------------------------------------------------------------- inputs


class Clamping(Plain):
    def forward(self, x):
        x.clamp_(-0.5, 0.5)
        return super().forward(x)


def test_a_network_that_changes_its_input_does_not_change_the_callers():
    net, x = Clamping().eval(), torch.randn(8, 16)
    before = x.clone()
    with pytest.raises(
        ValueError, match="expected a model that leaves its input alone, but it changes it in place"
    ):
        quiet(net, [x], NM(2, 4))
    assert torch.equal(x, before)
    deployed = small(sparse(net), x)
    assert torch.equal(x, before)
    assert deployed.report.difference < 1e-5


@pytest.mark.parametrize("variadic", [False, True])
def test_a_second_input_of_two_dimensions_is_no_label(variadic):
    class Two(Plain):
        def forward(self, x, table=None):
            return super().forward(x if table is None else x + table)

    class Many(Plain):
        def forward(self, *xs):
            return super().forward(sum(xs))

    net = (Many if variadic else Two)().eval()
    with pytest.raises(ValueError, match="expected a mapping of inputs by name"):
        quiet(net, [(torch.randn(8, 16), torch.randn(8, 16))], NM(2, 4))


def test_two_masks_for_one_layer_are_refused():
    mask = torch.rand(16, 16) < 0.5
    with pytest.raises(ValueError, match="expected one mask a layer, got two for one"):
        quiet(Plain().eval(), [torch.randn(8, 16)], None, select={"b": mask, "b.weight": ~mask})


def test_batchnorm_called_by_keyword():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.bn, self.b, self.c = (
                nn.Linear(16, 16),
                nn.BatchNorm1d(16),
                nn.Linear(16, 16),
                nn.Linear(16, 4),
            )

        def forward(self, x):
            return self.c(self.b(self.bn(input=self.a(x)).relu()).relu())

    net = Named().eval()
    found, _ = quiet(net, [torch.randn(32, 16) for _ in range(4)], NM(2, 4), only=lambda n, m: True)
    assert not torch.equal(found.bn.running_mean, net.bn.running_mean)


# ---------------------------------------------------------------- runs


class StopError(Exception):
    pass


def interrupted(net, batches, folder):
    done = 0

    def twice(weight, statistics, pattern):
        nonlocal done
        done += 1
        if done == 3:
            raise StopError
        return snows.magnitude(weight, statistics, pattern)

    twice.__name__, twice.__module__ = "magnitude", snows.magnitude.__module__
    with pytest.raises(StopError):
        quiet(net, batches, NM(2, 4), select=twice, out=folder)


def stack(activation):
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Sequential(nn.Linear(16, 16), activation()) for _ in range(6))).eval()


def test_a_run_does_not_go_on_with_another_network_or_other_inputs(tmp_path):
    batches = [torch.randn(16, 16) for _ in range(4)]
    interrupted(stack(nn.ReLU), batches, tmp_path)
    with pytest.raises(ValueError, match="a run with another model"):
        quiet(stack(nn.Tanh), batches, NM(2, 4), out=tmp_path, resume=True)
    with pytest.raises(ValueError, match="another set of calibration data"):
        quiet(stack(nn.ReLU), [{"input": x} for x in batches], NM(2, 4), out=tmp_path, resume=True)
    changed = stack(nn.ReLU)
    changed.register_buffer("scale", torch.ones(1), persistent=False)
    with pytest.raises(ValueError, match="a run with another model"):
        quiet(changed, batches, NM(2, 4), out=tmp_path, resume=True)
    quiet(stack(nn.ReLU), batches, NM(2, 4), out=tmp_path, resume=True)


@pytest.mark.parametrize("damage", ["another layer's", "a folder", "a fifo"])
def test_a_layers_file_that_is_not_its_own_is_not_taken(tmp_path, damage):
    batches = [torch.randn(16, 16) for _ in range(4)]
    whole, _ = quiet(stack(nn.ReLU), batches, NM(2, 4))
    interrupted(stack(nn.ReLU), batches, tmp_path)
    path = tmp_path / "layers" / "0001.safetensors"
    if damage == "another layer's":
        path.write_bytes((tmp_path / "layers" / "0000.safetensors").read_bytes())
        found, _ = quiet(stack(nn.ReLU), batches, NM(2, 4), out=tmp_path, resume=True)
        assert all(
            torch.equal(a, b)
            for a, b in zip(found.state_dict().values(), whole.state_dict().values(), strict=True)
        )
        return
    path.unlink()
    path.mkdir() if damage == "a folder" else os.mkfifo(path)
    if damage == "a folder":
        with pytest.raises(ValueError, match=r"out: .* cannot be written"):
            quiet(stack(nn.ReLU), batches, NM(2, 4), out=tmp_path, resume=True)
    else:
        found, _ = quiet(stack(nn.ReLU), batches, NM(2, 4), out=tmp_path, resume=True)
        assert torch.equal(found[2][0].weight, whole[2][0].weight)


@pytest.mark.parametrize(
    "text", ["[" * 200_000, json.dumps({"layers": [], "weights": 10**400})], ids=["deep", "digits"]
)
def test_json_that_is_no_report(text):
    with pytest.raises(ValueError, match=r"nested too deeply|below"):
        Report.from_json(text)


def test_a_deployment_of_zeros_prints():
    row = DeployedLayer("a", (4, 4), "2:4", "native", 1.0, 0.0, 0, 40)
    assert "nan" in str(Deployment([row], dense_ms=1.0, sparse_ms=0.0))
