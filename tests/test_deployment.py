"""Deployed networks compute what the masked ones computed, and the report says what was done."""

import copy
import io
import math
from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F
from models import QUICK, Branches, Chain, Mapped, PaddedConv, masked, settle, small
from torch import nn
from torch.nn.utils import prune as torch_prune

import snows
from snows import ops, reference, zoo
from snows.choosing.measuring import Race, Stopwatch
from snows.choosing.sketches import folded_and_packed
from snows.layers import SparseConv2d, SparseLinear
from snows.layers.conv2d import INNERMOST
from snows.networks.attention import OpenAttention
from snows.networks.batches import Batch, difference, outputs
from snows.networks.edits import Fold
from snows.networks.folding import proved
from snows.results.deployment import Deployment


def same(net, deployed, x):
    """Largest difference from the masked network in float64, relative."""
    oracle = copy.deepcopy(net).double()
    with torch.no_grad():
        want = outputs(
            oracle, Batch.of(x.double() if torch.is_tensor(x) else {k: v.double() for k, v in x.items()})
        )
        return difference(want, outputs(deployed, Batch.of(x)))


@pytest.mark.parametrize(
    ("tap", "folded"),
    [
        ("", {"first_norm", "second_norm", "act", "last_act"}),
        ("conv", {"second_norm", "last_act"}),  # ReLU follows a normalisation that had to stay
        ("norm", {"first_norm", "second_norm", "last_act"}),
        ("last", {"first_norm", "second_norm", "act"}),
    ],
)
def test_only_what_a_layer_alone_feeds_is_folded_into_it(tap, folded):
    net, x = masked(settle(Chain(tap))), torch.randn(3, 4, 7, 5)
    deployed = small(net, x)
    assert set(deployed.report.folded) == folded
    assert all(isinstance(deployed.network.get_submodule(name), nn.Identity) for name in folded)
    assert same(net, deployed.network, x) < 2e-6


def test_an_activation_in_place_is_folded_though_its_tensor_is_read_again():
    class Again(Chain):
        def forward(self, x):
            b = self.first_norm(self.first(x))
            self.act(b)
            return self.second_norm(self.second(b)) + b

    net, x = masked(settle(Again(inplace=True))), torch.randn(3, 4, 7, 5)
    deployed = small(net, x)
    assert {"first_norm", "act"} <= set(deployed.report.folded)
    assert same(net, deployed.network, x) < 2e-6


class NormAct(nn.BatchNorm2d):
    """As timm's: BatchNorm and what follows it in one module."""

    def __init__(self, channels, act, then=lambda y: y):
        super().__init__(channels)
        self.drop, self.act, self.then = nn.Identity(), act, then

    def forward(self, x):
        return self.then(self.act(self.drop(super().forward(x))))


@pytest.mark.parametrize("act", [nn.ReLU(), nn.ReLU6(), nn.SiLU()], ids=str)
def test_of_a_normalisation_with_an_activation_inside_the_activation_stays(act, tmp_path):
    net, x = settle(Chain()), torch.randn(3, 4, 7, 5)
    net.first_norm, net.act = settle(NormAct(net.first_norm.num_features, act)), nn.Identity().eval()
    net = masked(net)
    deployed = small(net, x)
    assert {"first_norm", "second_norm"} <= set(deployed.report.folded)
    assert ("first_norm.act" in deployed.report.folded) == isinstance(
        act, nn.ReLU
    )  # the packed layer computes it
    assert same(net, deployed.network, x) < 2e-6
    snows.save(deployed, tmp_path / "net.safetensors")
    back = snows.load(tmp_path / "net.safetensors", net)
    with torch.no_grad():
        assert torch.equal(back(x), deployed.network(x))
    net.stem = nn.Sequential(net.first, net.first_norm).eval()  # the same modules under second names
    deployed = small(net, x)
    snows.save(deployed, tmp_path / "net.safetensors")
    back = snows.load(tmp_path / "net.safetensors", net)
    with torch.no_grad():
        assert torch.equal(back(x), deployed.network(x))


@pytest.mark.parametrize(
    "then", [lambda y: 2 * y, lambda y: y.clamp(max=1e6)], ids=["seen", "not seen on the example"]
)
def test_a_normalisation_that_does_something_else_too_is_left_alone(then):
    net, x = settle(Chain()), torch.randn(3, 4, 7, 5)
    net.first_norm = settle(NormAct(net.first_norm.num_features, nn.Identity(), then))
    net = masked(net)
    deployed = small(net, x)
    assert "first_norm" not in deployed.report.folded
    assert "second_norm" in deployed.report.folded
    assert same(net, deployed.network, x) < 2e-6


def test_a_network_that_returns_a_layers_output_keeps_it():
    class Two(Chain):
        def forward(self, x):
            a = self.first(x)
            return {"features": a, "logits": self.second_norm(self.second(self.act(self.first_norm(a))))}

    net, x = masked(settle(Two())), torch.randn(2, 4, 6, 6)
    deployed = small(net, x)
    assert deployed.report.folded == ["second_norm"]
    assert same(net, deployed.network, x) < 2e-6


@dataclass
class Output:
    """What a detection network may return: tensors in objects of its own."""

    logits: torch.Tensor
    extra: dict = field(default_factory=dict)


class Slots:
    __slots__ = ("kept",)

    def __init__(self, kept):
        self.kept = kept


@pytest.mark.parametrize(
    "wrap",
    [
        lambda logits, raw: Output(logits, {"raw": raw}),
        lambda logits, raw: (logits, [Slots(raw)]),
        lambda logits, raw: {"a": {"b": (logits,)}, "c": Slots({"raw": raw})},
    ],
    ids=["dataclass", "slots", "nested"],
)
def test_tensors_in_any_object_are_seen(wrap):
    """A convolution whose raw output is returned too, inside an object, keeps its normalisation behind it."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.c, self.bn = (
                nn.Conv2d(3, 16, 3),
                nn.Conv2d(16, 16, 3, bias=False),
                nn.BatchNorm2d(16),
            )
            self.fc = nn.Linear(16, 10)

        def forward(self, x):
            raw = self.c(self.a(x).relu())
            return wrap(self.fc(self.bn(raw).relu().mean((2, 3))), raw)

    net, x = settle(Net()), torch.randn(4, 3, 12, 12)
    net.bn.running_var.fill_(4.0)
    net.c.weight.data *= snows.NM(2, 4).mask(net.c.weight.abs())
    deployed = small(net, x)
    assert deployed.report.folded == []
    assert len(outputs(deployed.network, Batch.of(x))) == 2
    assert same(net, deployed.network, x) < 2e-6
    assert 0 <= deployed.report.difference < 2e-6


class Wrong(Fold):
    """A fold that also changes what the network computes."""

    def apply(self, net):
        super().apply(net)
        net.get_submodule(self.convolution).weight.data += 0.1


def test_an_edit_that_changes_the_network_is_not_made_and_the_others_are():
    net, x = settle(Chain()), torch.randn(3, 4, 7, 5)
    before = copy.deepcopy(net.state_dict())
    wrong, right = Wrong("first", "first_norm"), Fold("second", "second_norm")
    assert proved(net, [wrong, right], Batch.of(x)) == [right]
    assert proved(net, [right, wrong], Batch.of(x)) == [right]
    assert proved(net, [Fold("first", "first_norm"), right], Batch.of(x)) == [
        Fold("first", "first_norm"),
        right,
    ]
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


FAMILIES = {
    "branches": (lambda: settle(Branches()), torch.Size([2, 3, 12, 12])),
    "mapped": (lambda: settle(Mapped()), torch.Size([2, 3, 16, 16])),
    "sequence first": (lambda: settle(Mapped(batch_first=False)), torch.Size([2, 3, 16, 16])),
    "resnet20": (lambda: zoo.load("resnet20"), torch.Size([2, 1, 28, 28])),
    "vit": (lambda: zoo.load("vit"), torch.Size([2, 1, 28, 28])),
}


@pytest.mark.parametrize("pattern", [snows.NM(2, 4), snows.NM(1, 4), snows.Unstructured(0.8)], ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_networks_compute_the_same_and_are_left_as_they_were(name, pattern):
    build, shape = FAMILIES[name]
    net = masked(build(), pattern)
    x = (
        torch.randn(shape)
        if name not in ("mapped", "sequence first")
        else {"pixel_values": torch.randn(shape)}
    )
    before = copy.deepcopy(net.state_dict())
    deployed = small(net, x)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert type(deployed.network) is type(net)
    assert same(net, deployed.network, x) < 1e-5
    packed = [m for m in deployed.network.modules() if isinstance(m, SparseLinear | SparseConv2d)]
    assert len(packed) == sum(not row.reason for row in deployed.report.layers) >= 2


def torchvision_net(name):
    from conftest import define_torchvision_schemas

    define_torchvision_schemas()
    import torchvision

    return torchvision.models.get_model(name, weights=None, num_classes=10)


@pytest.mark.parametrize(
    ("source", "least"),
    [
        ("torchvision:resnet50", 50),
        ("torchvision:mobilenet_v2", 30),
        ("torchvision:swin_t", 25),
        ("timm:convnext_atto", 25),
        ("timm:resnet18", 15),
        ("timm:vit_tiny_patch16_224", 45),
        ("transformers:vit", 12),
    ],
)
def test_public_networks(source, least):
    kind, _, name = source.partition(":")
    if kind == "torchvision":
        net = torchvision_net(name)
    elif kind == "timm":
        import timm

        net = timm.create_model(name, num_classes=10)
    else:
        from transformers import ViTConfig, ViTForImageClassification

        net = ViTForImageClassification(
            ViTConfig(
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=64,
                image_size=32,
                patch_size=16,
            )
        )
    net = masked(settle(net))
    x = torch.randn(
        1, 3, *([32, 32] if kind == "transformers" else [64, 64] if "vit" not in name else [224, 224])
    )
    deployed = small(net, x)
    assert sum(not row.reason for row in deployed.report.layers) >= least
    assert same(net, deployed.network, x) < 3e-5
    if name == "resnet50":
        assert len(deployed.report.folded) >= 53


def test_attention_of_a_transformer_encoder_runs_packed():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, activation="gelu")
    net, x = masked(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)), torch.randn(2, 5, 16)
    deployed = small(net, x)
    assert isinstance(deployed.network.layers[1].self_attn, OpenAttention)
    assert isinstance(deployed.network.layers[1].self_attn.in_proj, SparseLinear)
    assert not deployed.network.layers[1].self_attn.closed, "the dense projections are still held"
    with torch.no_grad():
        torch.testing.assert_close(deployed.network(x), net(x), rtol=1e-5, atol=1e-5)


class Odd(nn.Module):
    """Layers that calling another module in their place would break."""

    def __init__(self):
        super().__init__()
        self.plain, self.read, self.functional, self.hooked = (nn.Linear(8, 8) for _ in range(4))
        self.tied, self.twin = nn.Linear(8, 8), nn.Linear(8, 8)
        self.twin.weight = self.tied.weight
        self.padded, self.grouped = PaddedConv(4, 4, 2), nn.Conv2d(4, 4, 3, groups=2, padding=1)
        self.hooked.register_forward_hook(lambda module, args, output: 2 * output)

    def forward(self, x):
        x = self.padded(x.view(-1, 4, 2, 1)) + self.grouped(x.view(-1, 4, 2, 1))
        x = self.plain(x.flatten(1))
        x = self.hooked(self.read(x.to(self.read.weight.dtype)))
        return self.twin(self.tied(F.linear(x, self.functional.weight)))


def test_layers_that_are_not_simply_called_stay_dense_and_say_why():
    net, x = masked(Odd(), snows.Unstructured(0.5)), torch.randn(3, 8)
    deployed = small(net, x)
    reasons = {row.name: row.reason for row in deployed.report.layers}
    assert reasons == {
        "plain": "",
        "read": "its weight is read outside of it",
        "functional": "its weight is used without calling it",
        "hooked": "it has hooks",
        "tied": "it shares its weight with twin",
        "twin": "it shares its weight with tied",
        "padded": "its class does more than the layer's product",
        "grouped": "2 groups",
    }
    assert same(net, deployed.network, x) < 2e-6


def test_a_subclass_that_only_applies_itself_in_its_own_way_is_packed():
    class Own(nn.Conv2d):
        def forward(self, x):
            return F.conv2d(
                x, self.weight, self.bias, self.stride, (2, 1), self.dilation, self.groups
            )  # not its own padding

    net, x = masked(nn.Sequential(Own(4, 8, (5, 3), padding=0), nn.ReLU())), torch.randn(2, 4, 9, 9)
    deployed = small(net, x)
    assert type(deployed.network[0]) is SparseConv2d
    assert deployed.network[0].padding == (2, 1)
    assert same(net, deployed.network, x) < 2e-6


def test_a_subclass_that_pads_by_a_module_of_its_own_stays_dense():
    class Own(nn.Conv2d):
        def __init__(self, *args, pad):
            super().__init__(*args)
            self.pad = nn.ZeroPad2d(pad) if pad else nn.Identity()

        def forward(self, x):
            return F.conv2d(self.pad(x), self.weight, self.bias)

    net, x = (
        masked(nn.Sequential(Own(4, 8, 3, pad=(0, 1, 1, 2)), Own(8, 8, 1, pad=None))),
        torch.randn(2, 4, 9, 9),
    )
    deployed = small(net, x)
    assert [row.reason for row in deployed.report.layers] == [
        "its class does more than the layer's product",
        "",
    ]
    assert same(net, deployed.network, x) < 2e-6


def test_a_layer_called_twice_is_packed_but_takes_no_activation():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.act = nn.Linear(8, 8), nn.ReLU()

        def forward(self, x):
            return self.layer(self.act(self.layer(x)))

    net, x = masked(Twice()), torch.randn(3, 8)
    deployed = small(net, x)
    assert isinstance(deployed.network.layer, SparseLinear)
    assert deployed.network.layer.activation is None
    assert same(net, deployed.network, x) < 2e-6


def test_masks_of_torchs_own_pruning():
    net, x = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4)).eval(), torch.randn(3, 64)
    torch_prune.l1_unstructured(net[0], "weight", 0.75)
    net(x)  # the computed weight is not a leaf now
    deployed = small(net, x)
    assert [row.pattern for row in deployed.report.layers] == ["75.0 %"]
    with torch.no_grad():
        torch.testing.assert_close(deployed.network(x), net(x), rtol=1e-5, atol=1e-6)


def test_the_report_counts_bytes_and_operations():
    net = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.Flatten(), nn.Linear(8 * 5 * 5, 6)).eval()
    net[0].weight.data *= snows.NM(2, 4).mask(net[0].weight.abs())
    report = small(net, torch.randn(3, 4, 5, 5)).report
    assert report.samples == 3
    assert report.dense_flops == 2 * 3 * (25 * 8 * 36 + 6 * 200)
    assert report.sparse_flops == 2 * 3 * (25 * 8 * 18 + 6 * 200)
    assert report.dense_bytes == 4 * (288 + 8 + 1200 + 6)
    assert report.sparse_bytes == report.dense_bytes - 288 * 4 + 144 * 4 + 288 // 8
    assert [(row.name, row.pattern, row.dense_bytes, row.sparse_bytes) for row in report.layers] == [
        ("0", "2:4", 4 * 296, 4 * 152 + 36)
    ]
    again = Deployment.from_json(report.to_json())
    assert again == report
    assert "1 of 1 layers with zeros are packed" in str(report)


class Told(Stopwatch):
    """A stopwatch that shows what it is told: the times of layers and of networks, in turn."""

    def __init__(self, layers, wholes):
        super().__init__()
        self.__dict__.update(layers=iter(layers), wholes=iter(wholes))

    def layer(self, runs, undecided):
        return Race([tuple(next(self.layers))] * 5)

    def network(self, runs, undecided):
        found = next(self.wholes)
        assert len(runs) == len(found)
        return Race([tuple(found)] * 5)


def test_the_faster_one_stays_and_the_network_as_a_whole_decides(monkeypatch):
    net, x = masked(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 12), nn.Linear(12, 4))), torch.randn(3, 8)
    monkeypatch.setattr(SparseLinear, "kernel", "native")

    def deploy(*wholes):
        stopwatch = Told([[2.0, 1.0], [1.0, 1.1], [1.0, 0.9]], wholes)
        return snows.deploy(net, x, stopwatch=stopwatch, progress=False)

    deployed = deploy((3.0, 2.5, 2.0))
    assert [type(m) for m in deployed.network] == [SparseLinear, nn.Linear, SparseLinear]
    assert [row.reason for row in deployed.report.layers] == ["", "faster as it is", ""]
    assert (deployed.report.dense_ms, deployed.report.sparse_ms) == (3.0, 2.0)
    assert [(edit.kind, edit.layer) for edit in deployed.edits] == [("pack", "0"), ("pack", "2")]

    deployed = deploy((3.0, 1.5, 2.0), (3.0, 1.5, 1.4))  # faster with the layer that gains much alone
    assert [type(m) for m in deployed.network] == [SparseLinear, nn.Linear, nn.Linear]
    assert [row.reason for row in deployed.report.layers][1:] == [
        "faster as it is",
        "less than 1.3 times as fast: the network was faster without it",
    ]
    assert deployed.report.sparse_ms == 1.4
    assert not deployed.report.notes

    deployed = deploy((3.0, 1.5, 2.0), (3.0, 1.5, 2.0))
    assert [type(m) for m in deployed.network] == [nn.Linear] * 3
    assert deployed.report.sparse_ms == 1.5
    assert deployed.edits == []
    assert len(deployed.report.notes) == 1


def test_half_precision():
    net, x = masked(settle(Chain())), torch.randn(3, 4, 7, 5)
    deployed = small(net, x, dtype=torch.bfloat16)
    assert {p.dtype for p in deployed.network.state_dict().values() if p.is_floating_point()} == {
        torch.bfloat16
    }
    with torch.no_grad():
        assert difference([net(x)], [deployed.network(x.bfloat16())]) < 2e-2
    if deployed.report.device == "cpu" and ops.implementation("sparse_linear") == "native":
        assert {row.kernel for row in deployed.report.layers} == {"native"}
        fast = snows.deploy(net.double(), x.double(), stopwatch=QUICK, progress=False)
        assert {row.reason for row in fast.report.layers} == {"no packed kernel here for float64"}


def test_what_comes_back_copies_pickles_and_exports():
    net, x = masked(settle(Chain())), torch.randn(3, 4, 7, 5)
    deployed = small(net, x)
    buffer = io.BytesIO()
    torch.save(deployed.network, buffer)
    buffer.seek(0)
    with torch.no_grad():
        want = deployed.network(x)
        assert torch.equal(copy.deepcopy(deployed.network)(x), want)
        assert torch.equal(torch.load(buffer, weights_only=False)(x), want)
        torch.testing.assert_close(
            torch.export.export(deployed.network, (x,)).module()(x), want, rtol=1e-5, atol=1e-5
        )


def test_what_cannot_be_deployed_is_refused():
    net, x = masked(nn.Sequential(nn.Linear(8, 8), nn.ReLU())), torch.randn(3, 8)
    with pytest.raises(ValueError, match="training mode"):
        snows.deploy(copy.deepcopy(net).train(), x)
    with pytest.raises(ValueError, match="zeros in its Linear or Conv2d weights, got none"):
        snows.deploy(nn.Sequential(nn.Linear(8, 8)).eval(), x)
    with pytest.raises(ValueError, match="not packed yet, but 0 is packed already"):
        snows.deploy(small(net, x).network, x)
    with pytest.raises(ValueError, match="not packed yet, but 0 is packed already"):
        snows.prune(small(net, x).network, [x], snows.NM(2, 4))
    with pytest.raises(ValueError, match="cannot run a batch"):
        snows.deploy(net, torch.randn(3, 9))
    with pytest.raises(ValueError, match='"speed" or "size", got \'fast\''):
        snows.deploy(net, x, objective="fast")
    with pytest.raises(TypeError, match=r"nn\.Module, got Tensor"):
        snows.deploy(x, x)
    broken = copy.deepcopy(net)
    broken[0].weight.data[0, 0] = math.nan
    with pytest.raises(ValueError, match=r"NaN or infinity in 0\.weight"):
        snows.deploy(broken, x)
    with pytest.raises(ValueError, match="meta device"):
        snows.deploy(copy.deepcopy(net).to("meta"), x)


@pytest.mark.parametrize(
    "whole", [1.0, 3.0]
)  # of the network with images innermost; the ordinary one takes 2
@pytest.mark.parametrize("stem", [1.0, 3.0])
def test_one_layout_for_the_whole_network(stem, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(SparseConv2d, "kernel", "native")
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 1)
    ).eval()
    for layer in (net[2], net[4]):
        layer.weight.data *= snows.NM(1, 4).mask(layer.weight.data.abs())
    x = torch.randn(16, 1, 9, 7)
    ordinary, innermost = [(2, 1), (2, 1)], [(2, stem), (2, 1), (2, 1)]
    told = Told([*ordinary, *innermost], [(4, 3, 2, whole)])
    deployed = snows.deploy(net, x, stopwatch=told, progress=False)
    layers = [deployed.network[i] for i in (0, 2, 4)]
    assert same(net, deployed.network, x) < 2e-6
    assert [row.name for row in deployed.report.layers] == ["2", "4"]
    assert [isinstance(layer, SparseConv2d) for layer in layers] == [whole == stem == 1, True, True]
    assert [layer.innermost for layer in layers[1:]] == [whole == 1] * 2
    output = deployed.network(x)
    assert reference.images_innermost(output) == (whole == 1)
    file = tmp_path / "net.safetensors"
    snows.save(deployed.network, file)
    assert torch.equal(snows.load(file, copy.deepcopy(net))(x), output)


class Merges(nn.Module):
    """Takes a view that merges images with groups of channels, which images innermost do not allow."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(32, 64, 3, padding=1), nn.Conv2d(64, 64, 3, padding=1)

    def forward(self, x):
        y = self.b(self.a(x).relu())
        return y.view(-1, 16, y.shape[2], y.shape[3]).mean((2, 3))


def test_a_network_that_cannot_have_images_innermost_is_packed_in_the_ordinary_layout():
    net = Merges().eval()
    for layer in (net.a, net.b):
        layer.weight.data *= torch.rand_like(layer.weight) > 0.9
    x = torch.randn(INNERMOST, 32, 14, 14)
    found, _ = snows.deploy(net, x, progress=False)
    assert not any(getattr(module, "innermost", False) for module in found.modules())
    with torch.no_grad():
        assert torch.allclose(found(x), net(x), rtol=1e-4, atol=1e-4)
    _, packed = folded_and_packed(net, Batch.of(x), ["a", "b"])
    with torch.no_grad():
        assert torch.allclose(packed(x), net(x), rtol=1e-4, atol=1e-4)
