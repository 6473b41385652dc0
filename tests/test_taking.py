"""Cut networks compute what masked ones do, are ordinary networks, and can be cut again from their file."""

import copy
import io
import json
from dataclasses import replace

import pytest
import torch
from torch import nn

import snows
from snows.networks.batches import Batch
from snows.networks.channels import Follow, Group
from snows.networks.edits import described, edits_of
from snows.networks.proving import Proof, proved
from snows.networks.taking import LEFT, Take, take
from snows.results.formats import read_edit


def numbers(units, each=1, first=0):
    return first + torch.arange(units * each).view(units, each)


class Attention(nn.Module):
    """Four heads of six in one projection, whose number and width are written down."""

    def __init__(self, width=24, heads=4):
        super().__init__()
        self.heads, self.inner = heads, width
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        b, t, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(1, 2).reshape(b, t, self.inner))


class Net(nn.Module):
    """A convolution with BatchNorm, a depthwise one with GroupNorm, a layer scale, attention and an MLP."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn = nn.Conv2d(3, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.norm = nn.GroupNorm(6, 12)
        self.conv2 = nn.Conv2d(12, 24, 2, 2)
        self.attention, self.scale = Attention(), nn.Parameter(torch.full((24,), 1e-6))
        self.fc1, self.gamma, self.fc2 = nn.Linear(24, 20), nn.Parameter(torch.rand(20)), nn.Linear(20, 24)
        self.head = nn.Linear(24, 5)

    def forward(self, x):
        x = torch.relu(self.bn(self.conv1(x)))
        x = self.conv2(torch.relu(self.norm(self.depthwise(x)))).flatten(2).transpose(1, 2)
        x = x + self.scale * self.attention(x)
        x = x + self.fc2(torch.nn.functional.gelu(self.fc1(x)) * self.gamma)
        return self.head(x.mean(1))


STEM = Group(
    "conv1",
    "channels",
    {"conv1": numbers(6, 2), "depthwise": numbers(6, 2)},
    {"depthwise": numbers(6, 2), "conv2": numbers(6, 2)},
    {(f"bn.{key}", 0): numbers(6, 2) for key in ("weight", "bias", "running_mean", "running_var")}
    | {(f"norm.{key}", 0): numbers(6, 2) for key in ("weight", "bias")},
)
HEADS = Group(
    "attention.qkv",
    "heads",
    {"attention.qkv": torch.cat([numbers(4, 6, 24 * i) for i in range(3)], 1)},
    {"attention.proj": numbers(4, 6)},
)
NEURONS = Group("fc1", "neurons", {"fc1": numbers(20)}, {"fc2": numbers(20)}, {("gamma", 0): numbers(20)})
KEPT = {
    "conv1": torch.tensor([0, 3, 5]),
    "attention.qkv": torch.tensor([1, 3]),
    "fc1": torch.arange(3, 20, 3),
}


@pytest.fixture
def net():
    torch.manual_seed(0)
    net = Net().eval()
    with torch.no_grad():
        net.bn.running_mean.uniform_(-1, 1)
        net.bn.running_var.uniform_(0.5, 2)
        net.norm.weight.uniform_(0.5, 2)
    return net


@pytest.fixture
def images():
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def masked(net, kept=KEPT, groups=(STEM, HEADS, NEURONS)):
    """The network with zeros in the columns that read what goes, written out by hand."""
    net = copy.deepcopy(net)
    with torch.no_grad():
        for group in groups:
            for unit in range(group.units):
                if group.name in kept and unit not in kept[group.name].tolist():
                    for name, columns in group.columns.items():
                        if name != "depthwise":
                            net.get_submodule(name).weight[:, columns[unit]] = 0
    return net


def cut(net, images, kept=KEPT, groups=(STEM, HEADS, NEURONS)):
    proof = Proof(net, Batch.of(images))
    found = [proof.alone(group) for group in groups]
    assert not any(x.reason for x in found)
    edit, declined = proved(net, Batch.of(images), found, kept)
    assert not declined
    small = copy.deepcopy(net)
    edit.apply(small)
    return small, edit


def test_a_cut_network_computes_what_the_masked_one_does(net, images):
    small, _ = cut(net, images)
    torch.testing.assert_close(small(images), masked(net)(images), rtol=1e-5, atol=1e-6)
    assert (small.attention.heads, small.attention.inner) == (2, 12)
    assert small.depthwise.groups == small.depthwise.in_channels == small.bn.num_features == 6
    assert (small.norm.num_groups, small.norm.num_channels) == (3, 6)
    assert small.conv2.in_channels == small.fc1.out_features == small.fc2.in_features == 6
    assert sum(p.numel() for p in small.parameters()) < 0.6 * sum(p.numel() for p in net.parameters())
    assert type(small) is Net


def test_attributes_are_found_that_hold_a_width(net, images):
    found = Proof(net, Batch.of(images)).alone(HEADS)
    assert set(found.follows) == {Follow("attention", "heads", 1), Follow("attention", "inner", 6)}


def test_a_wrong_group_is_declined_and_the_rest_is_cut(net, images):
    wrong = Group("fc1", "neurons", {"fc1": numbers(20)}, {"fc2": numbers(20).flip(0)}, NEURONS.entries)
    assert "fc2 differs from the masked network's by" in Proof(net, Batch.of(images)).alone(wrong).reason
    edit, declined = proved(net, Batch.of(images), [STEM, wrong], KEPT)
    assert list(declined) == ["fc1"]
    assert "fc2" in declined["fc1"].reason
    small = copy.deepcopy(net)
    edit.apply(small)
    expected = masked(net, {"conv1": KEPT["conv1"]})
    torch.testing.assert_close(small(images), expected(images), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"no unit can be taken out .fc1: the cut network's fc2 differs"):
        proved(net, Batch.of(images), [wrong], KEPT)


def test_a_layer_scale_of_a_millionth_hides_nothing(net, images):
    proof = Proof(net, Batch.of(images))
    wrong = replace(proof.alone(HEADS), columns={"attention.proj": numbers(4, 6).flip(0)})
    assert "attention.proj differs" in proof.fault([wrong], KEPT)
    assert not proof.fault([proof.alone(HEADS)], KEPT)
    late = replace(proof.alone(NEURONS), columns={"fc2": numbers(20).flip(0)})
    assert "fc2 differs" in proof.fault([late], KEPT)


def test_a_cut_network_is_an_ordinary_one(net, images):
    small, _ = cut(net, images)
    expected = small(images)
    assert torch.equal(copy.deepcopy(small)(images), expected)
    other, _ = cut(Net().eval(), images)
    other.load_state_dict(small.state_dict())
    assert torch.equal(other(images), expected)
    exported = torch.export.export(small, (images,))
    torch.testing.assert_close(exported.module()(images), expected)
    small.train()
    optimizer = torch.optim.SGD(small.parameters(), 1e-3)
    loss = small(images).square().sum()
    loss.backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in small.parameters())
    optimizer.step()
    assert small(images).square().sum() < loss


def test_a_cut_network_pickles_without_snows(net, images):
    small, _ = cut(net, images)
    buffer = io.BytesIO()
    torch.save(small.fc1, buffer)
    assert b"snows" not in buffer.getvalue()


def test_a_file_brings_the_cut(net, images, tmp_path):
    small, _ = cut(net, images)
    snows.save(small, tmp_path / "small.safetensors")
    for fresh in (Net(), Net().to("meta")):
        loaded = snows.load(tmp_path / "small.safetensors", fresh)
        assert torch.equal(loaded(images), small(images))
        assert edits_of(loaded) == edits_of(small)


def test_an_edit_is_read_as_it_was_written(net, images):
    _, edit = cut(net, images)
    assert read_edit(json.loads(json.dumps(described(edit)))) == edit


def test_cuts_of_a_cut_network_add_up(net, images, tmp_path):
    small, _ = cut(net, images, {"fc1": KEPT["fc1"]})
    again = Group("fc1", "neurons", {"fc1": numbers(6)}, {"fc2": numbers(6)}, {("gamma", 0): numbers(6)})
    edit, _ = proved(small, Batch.of(images), [again], {"fc1": torch.tensor([1, 2, 5])})
    edit.apply(small)
    expected = masked(net, {"fc1": KEPT["fc1"][[1, 2, 5]]})
    torch.testing.assert_close(small(images), expected(images), rtol=1e-5, atol=1e-6)
    snows.save(small, tmp_path / "small.safetensors")
    assert torch.equal(snows.load(tmp_path / "small.safetensors", Net())(images), small(images))


def test_another_architecture_is_refused_by_the_first_mismatch(net, images, tmp_path):
    small, edit = cut(net, images)
    snows.save(small, tmp_path / "small.safetensors")
    other = Net()
    other.fc1 = nn.Linear(24, 21)
    with pytest.raises(
        ValueError, match=r"expected fc1.weight to have 20 entries in dimension 0, got one of .21, 24."
    ):
        snows.load(tmp_path / "small.safetensors", other)
    before = {key: x.shape for key, x in other.state_dict().items()}
    with pytest.raises(ValueError, match="fc1"):
        edit.apply(other)
    assert before == {key: x.shape for key, x in other.state_dict().items()}
    assert LEFT not in other.conv1.__dict__


@pytest.mark.parametrize(
    "change",
    [
        {"left": [3, 1]},
        {"left": [0, 0]},
        {"left": [0, 99]},
        {"left": []},
        {"left": [0.5]},
        {"tensors": [["fc1.weight", -1]]},
        {"tensors": "fc1.weight"},
        {"size": "6"},
        {"more": 1},
    ],
)
def test_a_damaged_cut_is_refused(net, images, change):
    _, edit = cut(net, images)
    entry = json.loads(json.dumps(described(edit)))
    entry["selections"][0] |= change
    with pytest.raises(ValueError, match="selection"):
        read_edit(entry)


def test_masks_and_formats_are_cut_too(net, images):
    mask = torch.rand(24, 20) > 0.5
    net.fc2.register_buffer("pruning_mask", mask, persistent=False)
    net.fc2.weight.data *= mask
    net.to(memory_format=torch.channels_last)
    small, _ = cut(net, images)
    assert torch.equal(small.fc2.pruning_mask, mask[:, KEPT["fc1"]])
    assert small.conv2.weight.is_contiguous(memory_format=torch.channels_last)


def test_groups_that_would_not_stay_whole_are_refused(net):
    part = Group(
        "conv1", "channels", {"conv1": numbers(12)}, {"conv2": numbers(12)}, {("norm.weight", 0): numbers(12)}
    )
    with pytest.raises(ValueError, match="norm would not keep whole groups of its 6"):
        take(net, [part], {"conv1": torch.arange(7)})


def test_two_groups_cannot_want_an_attribute_to_be_two_things(net, images):
    follows = (Follow("attention", "inner", 1),)
    one, two = (
        Group(name, "neurons", {name: numbers(n)}, {}, {}, follows) for name, n in (("fc1", 20), ("fc2", 24))
    )
    with pytest.raises(ValueError, match=r"attention.inner would have to hold two widths"):
        take(net, [one, two], {"fc1": torch.arange(5), "fc2": torch.arange(5)})


def test_an_attention_that_lost_heads_stays_open(tmp_path):
    torch.manual_seed(0)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.head = nn.MultiheadAttention(24, 4, batch_first=True), nn.Linear(24, 5)

        def forward(self, x, y=None):
            return self.head(x + self.attention(x, *((x, x) if y is None else (y, y)), need_weights=False)[0])

    from snows.networks.attention import close_attention, open_attention

    net, x, y = Block().eval(), torch.randn(2, 5, 24), torch.randn(2, 7, 24)
    small = copy.deepcopy(net)
    open_attention(small)
    rows = torch.cat([numbers(4, 6, 24 * i) for i in range(3)], 1)
    heads = Group(
        "attention.in_proj", "heads", {"attention.in_proj": rows}, {"attention.out_proj": numbers(4, 6)}
    )
    heads = Proof(small, Batch.of(x)).alone(heads)
    assert heads.follows == (Follow("attention", "heads", 1),)
    edit, _ = proved(small, Batch.of(x), [heads], {heads.name: torch.tensor([0, 2])})
    edit.apply(small)
    close_attention(small)
    masked = copy.deepcopy(net)
    masked.attention.out_proj.weight.data[:, 6:12] = masked.attention.out_proj.weight.data[:, 18:] = 0
    for inputs in ((x,), (x, y)):
        torch.testing.assert_close(small(*inputs), masked(*inputs), rtol=1e-5, atol=1e-6)
    snows.save(small, tmp_path / "small.safetensors")
    loaded = snows.load(tmp_path / "small.safetensors", Block())
    assert torch.equal(loaded(x, y), small(x, y))
    assert isinstance(edits_of(loaded)[1], Take)
