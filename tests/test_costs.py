"""What a network costs at any widths, against PyTorch's own counter on networks that are really that small."""

from __future__ import annotations

import copy
import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from snows import zoo
from snows.choosing.costs import Costs
from snows.networks.batches import Batch
from snows.networks.channels import Group
from snows.zoo.models import EncoderBlock


def own(n, each=1, start=0):
    """The entries of n units that stand one after the other."""
    return torch.arange(start, start + n * each).view(n, each)


def sliced(net, groups, widths):
    """The network with only the first units of each group."""
    net = copy.deepcopy(net)
    tensors = dict(net.named_parameters()) | dict(net.named_buffers())
    gone = {}
    for group in groups:
        lost = slice(widths[group.name], None)
        for layer, entries in group.rows.items():
            gone.setdefault((f"{layer}.weight", 0), []).append(entries[lost])
            if f"{layer}.bias" in tensors:
                gone.setdefault((f"{layer}.bias", 0), []).append(entries[lost])
        for layer, entries in group.columns.items():
            module = net.get_submodule(layer)
            if getattr(module, "groups", 1) > 1 and layer in group.rows:
                module.groups -= len(entries[lost])  # depthwise
            else:
                inner = module.weight.shape[1]  # the same columns of every group of a convolution
                gone.setdefault((f"{layer}.weight", 1), []).append(entries[lost] % inner)
        for (name, dim), entries in group.entries.items():
            gone.setdefault((name, dim), []).append(entries[lost])
    for (name, dim), entries in gone.items():
        x = tensors[name]
        keep = torch.ones(x.shape[dim], dtype=torch.bool)
        keep[torch.cat([e.flatten() for e in entries])] = False
        x.data = x.data.index_select(dim, keep.nonzero().flatten())
    return net


def counted(net, x):
    """Multiplications of one sample, parameters and bytes, counted without the package."""
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        net(x[:1])
    tensors = list(net.parameters()) + list(net.buffers())
    return (
        counter.get_total_flops() / 2,
        sum(p.numel() for p in net.parameters()),
        sum(t.numel() * t.element_size() for t in tensors),
    )


def norm(name, n):
    return {(f"{name}.{x}", 0): own(n) for x in ("weight", "bias", "running_mean", "running_var")}


def residual_groups(net):
    """Inner widths and residual streams of the zoo's ResNet-20."""
    groups, streams = [], {}
    readers = {1: ["layer1.0.conv1"], 2: [], 3: []}
    for stage in (1, 2, 3):
        width = 2 ** (3 + stage)
        makers = (
            [("conv1", "bn1")]
            if stage == 1
            else [(f"layer{stage}.0.downsample.0", f"layer{stage}.0.downsample.1")]
        )
        for block in range(3):
            path = f"layer{stage}.{block}"
            groups.append(
                Group(
                    f"{path}.conv1",
                    "channels",
                    {f"{path}.conv1": own(width)},
                    {f"{path}.conv2": own(width)},
                    norm(f"{path}.bn1", width),
                )
            )
            makers.append((f"{path}.conv2", f"{path}.bn2"))
            if block:
                readers[stage].append(f"{path}.conv1")
        readers[stage] += (
            [f"layer{stage + 1}.0.conv1", f"layer{stage + 1}.0.downsample.0"] if stage < 3 else ["fc"]
        )
        streams[stage] = Group(
            makers[0][0], "channels",
            {conv: own(width) for conv, _ in makers},
            dict.fromkeys(readers[stage], own(width)),
            {key: entries for _, bn in makers for key, entries in norm(bn, width).items()},
        )  # fmt: skip
    return groups + list(streams.values())


def vit_groups(net):
    groups = []
    for i in range(6):
        path = f"blocks.{i}"
        parts = torch.cat([own(4, 24, start) for start in (0, 96, 192)], 1)
        groups.append(Group(f"{path}.qkv", "heads", {f"{path}.qkv": parts}, {f"{path}.proj": own(4, 24)}))
        groups.append(Group(f"{path}.fc1", "neurons", {f"{path}.fc1": own(384)}, {f"{path}.fc2": own(384)}))
    return groups


def heads_of_24(self, x):
    """The zoo's encoder block for any number of heads of 24 features."""
    q, k, v = self.qkv(self.norm1(x)).view(*x.shape[:2], 3, -1, 24).permute(2, 0, 3, 1, 4)
    x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
    return x + self.fc2(self.gelu(self.fc1(self.norm2(x))))


class Attending(nn.Module):
    """Attention by hand, in one of several ways to write its products, with a convolution before it."""

    def __init__(self, way, heads=4, width=6, keys=6):
        super().__init__()
        self.way, self.width, self.keys = way, width, keys
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.depth = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.q, self.k = nn.Linear(8, heads * keys), nn.Linear(8, heads * keys)
        self.v, self.o = nn.Linear(8, heads * width), nn.Linear(heads * width, 5)

    def forward(self, x):
        x = F.hardswish(self.depth(F.relu(self.stem(x)))).flatten(2).mT
        q, k = (y.unflatten(-1, (-1, self.keys)).transpose(1, 2) for y in (self.q(x), self.k(x)))
        v = self.v(x).unflatten(-1, (-1, self.width)).transpose(1, 2)
        flat = (y.flatten(0, 1) for y in (q, k, v))
        if self.way == "matmul":
            y = torch.matmul(torch.softmax(q @ k.transpose(-2, -1) / 3, -1), v)
        elif self.way == "bmm":
            q1, k1, v1 = flat
            y = torch.bmm(q1.bmm(k1.mT).softmax(-1), v1).unflatten(0, (len(x), -1))
        elif self.way == "baddbmm":
            q1, k1, v1 = flat
            scores = torch.baddbmm(q1.new_zeros(1, 1, 1), q1, k1.mT, alpha=0.5)
            y = torch.bmm(scores.softmax(-1), v1).unflatten(0, (len(x), -1))
        elif self.way == "einsum":
            scores = torch.einsum("bhtd,bhsd->bhts", q, k).softmax(-1)
            y = torch.einsum("bhts,bhsd->bhtd", [scores, v])
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=torch.zeros(x.shape[1], x.shape[1]))
        return self.o(y.transpose(1, 2).flatten(2)).mean(1)


def attending_groups(heads=4, keys=6, width=6):
    return [
        Group(
            "stem",
            "channels",
            {"stem": own(8), "depth": own(8)},
            {"depth": own(8), **dict.fromkeys("qkv", own(8))},
        ),
        Group(
            "q",
            "heads",
            {"q": own(heads, keys), "k": own(heads, keys), "v": own(heads, width)},
            {"o": own(heads, width)},
        ),
    ]


class OneHead(nn.Module):
    """One head, whose keys and values have widths of their own; then attention over channels."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(4, 8)
        self.mix = nn.Linear(8, 7)
        self.a, self.b, self.o = nn.Linear(7, 5), nn.Linear(7, 9), nn.Linear(9, 2)

    def forward(self, x):
        y = self.mix((self.q(x) @ self.k(x).mT).softmax(-1) @ self.v(x))
        weights = (self.a(y).mT @ self.b(y)).tanh()  # (5, 9), a's channels by b's
        return self.o(weights.mean(-2))


def one_head_groups():
    return [
        Group("q", "neurons", {"q": own(6), "k": own(6)}, {}),
        Group("v", "neurons", {"v": own(8)}, {"mix": own(8)}),
        Group("a", "neurons", {"a": own(5)}, {}),
        Group("b", "neurons", {"b": own(9)}, {"o": own(9)}),
    ]


class Grouped(nn.Module):
    """A grouped convolution whose groups all lose the same inputs, and two widths side by side."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.grouped, self.last = nn.Conv2d(8, 6, 3, groups=2), nn.Conv2d(12, 4, 3, stride=2)

    def forward(self, x):
        one = self.one(x)
        return self.grouped(one).mean(), self.last(torch.cat([one, self.two(x)], 1))


def grouped_groups():
    pairs = torch.stack([torch.arange(4), torch.arange(4, 8)], 1)
    return [
        Group("one", "channels", {"one": pairs}, {"grouped": pairs, "last": pairs}),
        Group("two", "channels", {"two": own(4)}, {"last": own(4, 1, 8)}),
    ]


CASES = {
    "resnet20": lambda: (zoo.build("resnet20"), torch.randn(3, 1, 28, 28), residual_groups(None)),
    "vit": lambda: (zoo.build("vit"), torch.randn(3, 1, 28, 28), vit_groups(None)),
    "one head": lambda: (OneHead(), torch.randn(3, 11, 4), one_head_groups()),
    "grouped": lambda: (Grouped(), torch.randn(3, 3, 8, 8), grouped_groups()),
    **{
        way: lambda way=way: (Attending(way), torch.randn(3, 3, 5, 5), attending_groups())
        for way in ("matmul", "bmm", "baddbmm", "einsum", "attention")
    },
}


@pytest.mark.parametrize("case", CASES)
def test_costs_are_those_of_the_network_that_is_really_that_small(case, monkeypatch):
    monkeypatch.setattr(EncoderBlock, "forward", heads_of_24)
    net, x, groups = CASES[case]()
    net.eval()
    costs = Costs.of(net, Batch.of(x), groups)
    assert [costs.total(of) for of in ("macs", "params", "bytes")] == pytest.approx(
        counted(net, x), rel=1e-12
    )
    draw = random.Random(0)
    for _ in range(4):
        widths = {g.name: draw.randint(1, g.units) for g in groups}
        expected = counted(sliced(net, groups, widths), x)
        got = [costs.total(of, widths) for of in ("macs", "params", "bytes")]
        assert got == pytest.approx(expected, rel=1e-12), widths


def test_what_a_step_saves_is_the_difference_of_totals():
    net, x, groups = CASES["resnet20"]()
    costs = Costs.of(net, Batch.of(x), groups)
    widths = {"conv1": 9, "layer1.0.conv1": 5}
    to = torch.tensor([12, 8, 1])
    saved = costs.saved("macs", widths, "conv1", to)
    expected = [costs.total("macs", widths) - costs.total("macs", widths | {"conv1": int(x)}) for x in to]
    assert saved.tolist() == pytest.approx(expected, rel=1e-9)
    assert costs.beside("conv1") == {
        "conv1",
        *(f"layer1.{i}.conv1" for i in range(3)),
        "layer2.0.conv1",
        "layer2.0.downsample.0",
    }


def test_a_group_that_has_a_reason_to_stay_is_no_width():
    net, x, groups = CASES["grouped"]()
    fixed = Group("one", "channels", groups[0].rows, groups[0].columns, reason="it reaches the output")
    costs = Costs.of(net, Batch.of(x), [fixed, groups[1]])
    assert costs.full == {"two": 4}
    assert costs.total("macs", {"one": 1}) == costs.total("macs")


class Convolutions(nn.Module):
    """Convolutions that are no layers to prune."""

    def __init__(self):
        super().__init__()
        self.one = nn.Conv1d(4, 6, 3, stride=2, groups=2)
        self.up = nn.ConvTranspose2d(3, 4, 3, stride=2, groups=1)
        self.three, self.deep = nn.Conv3d(1, 2, 2), nn.ConvTranspose3d(2, 4, 2, groups=2)

    def forward(self, x):
        x = self.up(x)
        return self.one(x.flatten(2)).mean() + self.deep(self.three(x[:, None])).mean()


def test_other_convolutions_are_counted():
    net, x = Convolutions().eval(), torch.randn(2, 3, 5, 4)
    costs = Costs.of(net, Batch.of(x), [])
    assert tuple(costs.total(of) for of in ("macs", "params", "bytes")) == counted(net, x)


class Picky(nn.Module):
    """Refuses NaN."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x):
        y = self.a(x)
        if bool(y.isnan().any()):
            raise ValueError("NaN")
        return self.b(y @ y.mT @ y)


def test_a_network_that_refuses_nan_is_counted_with_products_that_do_not_shrink():
    net, x = Picky().eval(), torch.randn(2, 3, 4)
    costs = Costs.of(net, Batch.of(x), [Group("a", "neurons", {"a": own(6)}, {"b": own(6)})])
    assert costs.total("macs") == counted(net, x)[0]
    products = 2 * 3 * 3 * 6
    assert costs.total("macs", {"a": 3}) == (costs.total("macs") - products) / 2 + products
