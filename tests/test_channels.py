"""Groups of units, found by tainting, against brute force: one perturbed output or entry after the other."""

from collections import defaultdict

import pytest
import torch
import torch.nn.functional as F
from conftest import define_torchvision_schemas
from torch import nn

from snows import zoo
from snows.networks.attention import open_attention
from snows.networks.batches import Batch, output_tensors
from snows.networks.channels import tainted_groups as groups
from snows.networks.coding import links
from snows.networks.layers import prunable

# ---------------------------------------------------------------- brute force


DRAWS = 6  # of noise, up and down in turn: what an activation hides of one it shows of the other


class Oracle:
    """Perturb one output of a layer at its call, or one entry of a tensor, and see which inputs of layers change.

    Written over the functions of torch.nn.functional, and not over what the package sees.
    """

    def __init__(self, net, x, monkeypatch):
        self.net, self.x = net, x
        self.names = {}
        for name, layer in prunable(net).items():
            self.names.setdefault(id(layer.weight), name)
        self.clean, self.calls, self.source, self.seen = [], None, None, set()
        self.order, self.sign = [], 1
        for function, channel in ((F.linear, -1), (F.conv2d, -3)):
            monkeypatch.setattr(F, function.__name__, self.watched(function, channel))
        self.y = output_tensors(net(x.clone()))
        self.recorded, self.calls = self.clean, 0

    def watched(self, function, channel):
        def call(x, weight, bias=None, *args, **kwargs):
            name = self.names.get(id(weight))
            if name is None:
                return function(x, weight, bias, *args, **kwargs)
            if self.calls is None:
                y = function(x, weight, bias, *args, **kwargs)
                self.clean.append((x.clone(), None if bias is None else bias.clone(), y.clone()))
                self.order.append((name, x.shape[channel], weight.shape))
                return y
            before, constant, y = self.recorded[self.calls]
            self.calls += 1
            for i in self.changed(x, before, channel):
                self.seen.add((name, 1, i))
            if bias is not None:
                for i in self.changed(bias, constant, -1):
                    self.seen.add((name, 0, i))
            y = y.clone()
            if self.source is not None and self.source[0] == name:
                row = y.select(channel, self.source[1])
                row += self.noise(row)
            return y

        return call

    def noise(self, x):
        self.sign = -self.sign
        return self.sign * (2 + 8 * torch.rand_like(x))

    @staticmethod
    def changed(a, b, channel):
        different = (a != b).movedim(channel, 0).flatten(1) if a.ndim > 1 else (a != b)[:, None]
        return different.any(1).nonzero()[:, 0].tolist()

    def draw(self):
        """Run once, perturbed, and return what changed."""
        self.calls, self.seen = 0, set()
        y = output_tensors(self.net(self.x.clone()))
        if any(a.shape != b.shape or (a != b).any() for a, b in zip(y, self.y, strict=True)):
            self.seen.add("output")
        return self.seen

    def row(self, name, i):
        self.source = (name, i)
        found = set().union(*(self.draw() for _ in range(4)))
        self.source = None
        return found

    def entry(self, tensor, dim, i):
        data, found = tensor.data, set()
        for _ in range(DRAWS):
            tensor.data = data.clone()
            part = tensor.data.select(dim, i)
            part += self.noise(part)
            found |= self.draw()
        tensor.data = data
        return found


def closed(sets):
    """Merge sets that share a member, until none do."""
    merged = []
    for one in sets:
        one = set(one)
        for other in [m for m in merged if m & one]:
            merged.remove(other)
            one |= other
        merged.append(one)
    return merged


def by_force(net, x, monkeypatch):
    """Find every unit: a set of (layer, 0, output), (layer, 1, input) and (tensor, dim, entry); and if it is fixed."""
    oracle = Oracle(net, x, monkeypatch)
    sets, out = [], set()
    layers = {name: (columns, shape) for name, columns, shape in oracle.order}
    for name, (columns, shape) in layers.items():
        count = columns // shape[1]
        for i in range(shape[0]):
            found = oracle.row(name, i)
            if "output" in found:
                out.add((name, 0, i))
            tie = i // (shape[0] // count)
            grouped = {(name, 1, tie * shape[1] + j) for j in range(shape[1])} if count > 1 else set()
            part = shape[0] // count
            grouped |= {(name, 0, tie * part + j) for j in range(part)} if count > 1 else set()
            sets.append({(name, 0, i)} | (found - {"output"}) | grouped)
    units = closed(sets)
    called = [m for m in prunable(net).values() if oracle.names[id(m.weight)] in layers]
    own = {id(t) for module in called for t in module.parameters(recurse=False)}
    live = [u for u in units if not u & out and not any(whole(u, n, s[0]) for n, (_, s) in layers.items())]
    live = set().union(*live)
    for tensors in (net.named_parameters(), net.named_buffers()):
        for name, tensor in tensors:
            for dim, size in enumerate(tensor.shape):
                if id(tensor) in own or size == 1 or not tensor.is_floating_point():
                    continue
                found = [oracle.entry(tensor, dim, i) for i in range(size)]
                everything = set().union(*found)
                if any(x == everything for x in found) or not everything & live:
                    continue
                sets += [{(name, dim, i)} | (x - {"output"}) for i, x in enumerate(found)]
                out |= {(name, dim, i) for i, x in enumerate(found) if "output" in x}
    units = closed(sets)
    fixed = [bool(u & out) or any(whole(u, n, s[0]) for n, (_, s) in layers.items()) for u in units]
    return [
        (u, f)
        for u, f in zip(units, fixed, strict=True)
        if any((n, 0, i) in u for n in layers for i in entries(u, n))
    ]


def entries(unit, name):
    return [i for n, dim, i in unit if n == name and dim == 0]


def whole(unit, name, size):
    return sum(n == name and dim == 0 for n, dim, _ in unit) == size


def units_of(group):
    """Give the units of a group as the brute force writes them."""
    for u in range(group.units):
        unit = {(name, 0, i) for name, x in group.rows.items() for i in x[u].tolist()}
        unit |= {(name, 1, i) for name, x in group.columns.items() for i in x[u].tolist()}
        yield unit | {(name, dim, i) for (name, dim), x in group.entries.items() for i in x[u].tolist()}


# ---------------------------------------------------------------- networks of every kind


def conv(a, b, k=3, **settings):
    return nn.Conv2d(a, b, k, padding=k // 2, **settings)


def plain():
    return nn.Sequential(
        conv(3, 6), nn.BatchNorm2d(6), nn.ReLU(True), nn.MaxPool2d(2), conv(6, 5), nn.ReLU(), nn.Flatten(),
        nn.Linear(5 * 16, 7), nn.ReLU(), nn.Linear(7, 3),
    )  # fmt: skip


class Residual(nn.Module):
    """Adds in place, with one in-place activation for all."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = conv(3, 6), nn.BatchNorm2d(6)
        self.a, self.b, self.relu = conv(6, 4), conv(4, 6), nn.ReLU(True)
        self.fc = nn.Linear(6, 3)

    def forward(self, x):
        x = self.relu(self.norm(self.stem(x)))
        y = self.b(self.relu(self.a(x)))
        y += x
        return self.fc(self.relu(y).mean((2, 3)))


def depthwise():
    return nn.Sequential(
        conv(3, 6), nn.ReLU6(), conv(6, 6, groups=6), nn.BatchNorm2d(6), nn.Hardswish(), conv(6, 4, 1),
        conv(4, 8, groups=4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2),
    )  # fmt: skip


def mobile():
    return nn.Sequential(
        conv(3, 6, bias=False), nn.BatchNorm2d(6), nn.ReLU6(), conv(6, 6, groups=6), nn.BatchNorm2d(6), nn.Hardswish(),
        conv(6, 4, 1), conv(4, 4, groups=4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2),
    )  # fmt: skip


def grouped():
    return nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 12, groups=4), nn.BatchNorm2d(12), conv(12, 2))


class Squeezed(nn.Module):
    """Squeeze and excitation by 1 x 1 convolutions."""

    def __init__(self):
        super().__init__()
        self.stem, self.down, self.up, self.last = conv(3, 6), conv(6, 3, 1), conv(3, 6, 1), conv(6, 2)

    def forward(self, x):
        x = F.silu(self.stem(x))
        gate = self.up(F.relu(self.down(F.adaptive_avg_pool2d(x, 1))))
        return self.last(x * F.hardsigmoid(gate))


class Concatenated(nn.Module):
    """Grows by concatenation, with a normalisation of all, and shuffles."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.norm, self.c, self.d = (
            conv(3, 4),
            conv(4, 3),
            nn.BatchNorm2d(7),
            conv(7, 6),
            conv(6, 2),
        )

    def forward(self, x):
        x = self.a(x)
        y = self.c(F.relu(self.norm(torch.cat([self.b(F.relu(x)), x], 1))))
        return self.d(y.unflatten(1, (2, 3)).transpose(1, 2).flatten(1, 2))


class Attention(nn.Module):
    """A block of a transformer with a residual stream under LayerNorm."""

    def __init__(self, fused, width=12, heads=3):
        super().__init__()
        self.heads, self.fused = heads, fused
        self.embed, self.position = nn.Linear(5, width), nn.Parameter(torch.randn(1, 4, width))
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        if fused:
            self.qkv = nn.Linear(width, 3 * width, bias=False)
            self.q_bias, self.v_bias = nn.Parameter(torch.randn(width)), nn.Parameter(torch.randn(width))
            self.table = nn.Parameter(torch.randn(4, heads))
        else:
            self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.proj, self.fc1, self.fc2 = nn.Linear(width, width), nn.Linear(width, 8), nn.Linear(8, width)
        self.gamma, self.head = nn.Parameter(torch.ones(width)), nn.Linear(width, 3)

    def attend(self, x):
        if self.fused:
            bias = torch.cat([self.q_bias, torch.zeros_like(self.v_bias), self.v_bias])
            qkv = F.linear(x, self.qkv.weight, bias).unflatten(-1, (3, self.heads, -1))
            q, k, v = qkv.permute(2, 0, 3, 1, 4)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=self.table.T[None, :, None])
        else:
            q, k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
            y = (q @ k.mT).softmax(-1) @ v
        return self.proj(y.transpose(1, 2).flatten(2))

    def forward(self, x):
        x = self.embed(x.flatten(2)[:, :, :5].repeat(1, 2, 1)[:, :4]) + self.position
        x = x + self.gamma * self.attend(self.norm1(x))
        x = x + self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return self.head(x[:, 0])


class Gated(nn.Module):
    """Holds gate and value of a gated unit in one layer."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 12), nn.Linear(6, 2)

    def forward(self, x):
        gate, value = self.a(x).chunk(2, -1)
        return self.b(F.silu(gate) * value)


class Opened(nn.Module):
    """Holds PyTorch's own attention, which is opened."""

    def __init__(self):
        super().__init__()
        self.embed, self.attention, self.head = (
            nn.Linear(5, 8),
            nn.MultiheadAttention(8, 2, batch_first=True),
            nn.Linear(8, 2),
        )

    def forward(self, x):
        x = self.embed(x.flatten(2)[:, :, :5])
        return self.head(F.layer_norm(x + self.attention(x, x, x)[0], (8,)).mean(1))


def group_norm():
    return nn.Sequential(conv(3, 8), nn.GroupNorm(4, 8), nn.SiLU(), conv(8, 2))


def mixer():
    return nn.Sequential(conv(3, 6), nn.GroupNorm(1, 6), conv(6, 2))


class Twice(nn.Module):
    """Calls one layer twice, and has two layers with one weight."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d, self.e = conv(3, 6), conv(6, 6), conv(6, 4), conv(6, 4), conv(4, 2)
        self.d.weight = self.c.weight

    def forward(self, x):
        x = self.b(F.relu(self.b(F.relu(self.a(x)))))
        return self.e(F.relu(self.c(x)) + self.d(x))


def flattened():
    return nn.Sequential(
        conv(3, 4), nn.AdaptiveAvgPool2d(7), nn.Flatten(), nn.BatchNorm1d(4 * 49), nn.Linear(4 * 49, 5), nn.ReLU(),
        nn.Linear(5, 2),
    )  # fmt: skip


def pixel_shuffle():
    return nn.Sequential(conv(3, 8), nn.PixelShuffle(2), nn.PReLU(2), conv(2, 3), nn.PReLU(), conv(3, 2))


def transposed():
    return nn.Sequential(
        conv(3, 4), nn.ConvTranspose2d(4, 6, 2, 2), nn.ReLU(), conv(6, 5), nn.ReLU(), conv(5, 2)
    )


class Raw(nn.Module):
    """Multiplies by raw parameters, and uses layers' weights without calling them."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d, self.e = (nn.Linear(4, 4) for _ in range(5))
        self.weight, self.scale = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4))
        self.tied, self.never = nn.Linear(4, 6), nn.Linear(2, 3)

    def forward(self, x):
        x = F.linear(x.flatten(2)[..., :4], self.a.weight, self.a.bias)
        x = self.c(F.relu(self.b(F.relu(x) * self.scale.exp())) @ self.weight)
        x = self.d(F.relu(x))
        return self.e(F.relu(x)).mean(1) + (self.tied(x) @ self.tied.weight).mean(1)


class Chosen(nn.Module):
    """Returns some of its features beside the result, and computes some that nobody reads."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.unread = conv(3, 6), conv(6, 2), conv(3, 4)

    def forward(self, x):
        self.unread(x)
        x = F.relu(self.a(x))
        return {"result": self.b(x), "features": [x[:, :2]]}


# name -> network, and what can go: (first layer, kind, units, outputs of it that each is)
NETWORKS = {
    "plain": (plain, [("0", "channels", 6, 1), ("4", "channels", 5, 1), ("7", "neurons", 7, 1)]),
    "residual": (Residual, [("stem", "channels", 6, 1), ("a", "channels", 4, 1)]),
    "depthwise": (depthwise, [("0", "channels", 6, 1), ("5", "channels", 4, 1)]),
    "mobile": (mobile, [("0", "channels", 6, 1), ("6", "channels", 4, 1)]),
    "grouped": (grouped, [("0", "channels", 4, 2)]),
    "squeezed": (Squeezed, [("stem", "channels", 6, 1), ("down", "channels", 3, 1)]),
    "concatenated": (
        Concatenated,
        [("a", "channels", 4, 1), ("b", "channels", 3, 1), ("c", "channels", 6, 1)],
    ),
    "fused attention": (lambda: Attention(True), [("qkv", "heads", 3, 12), ("fc1", "neurons", 8, 1)]),
    "separate attention": (lambda: Attention(False), [("q", "heads", 3, 4), ("fc1", "neurons", 8, 1)]),
    "gated": (Gated, [("a", "neurons", 6, 2)]),
    "opened": (Opened, [("attention.in_proj", "heads", 2, 12)]),
    "group norm": (group_norm, [("0", "channels", 4, 2)]),
    "mixer": (mixer, []),
    "twice": (Twice, [("a", "channels", 6, 1), ("c", "channels", 4, 1)]),
    "flattened": (flattened, [("0", "channels", 4, 1), ("4", "neurons", 5, 1)]),
    "pixel shuffle": (pixel_shuffle, [("0", "channels", 2, 4), ("3", "channels", 3, 1)]),
    "transposed": (transposed, [("3", "channels", 5, 1)]),
    "raw": (Raw, [("a", "neurons", 4, 1), ("c", "neurons", 4, 1)]),
    "chosen": (Chosen, [("a#1", "channels", 4, 1)]),
}


def made(name):
    net = NETWORKS[name][0]().double().eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    open_attention(net)
    return net.requires_grad_(False), torch.randn(2, 3, 8, 8, dtype=torch.float64)


@pytest.mark.parametrize("name", NETWORKS)
def test_groups_are_those_of_brute_force(name, monkeypatch):
    net, x = made(name)
    if name == "raw":  # the oracle would have to know that this weight is read by something else too
        monkeypatch.setattr(net.tied, "weight", nn.Parameter(net.tied.weight.data, False))
    before = {key: value.clone() for key, value in net.state_dict().items()}
    found = groups(net, Batch((x,), {}))
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert [(g.name, g.kind, g.units, g.each) for g in found if not g.reason] == NETWORKS[name][1]
    shared = {
        n
        for n, m in prunable(net).items()
        if any(m.weight is o.weight for k, o in prunable(net).items() if k < n)
    }
    skip = shared | {"never"}  # a second name of a weight, and a layer that never runs: not the oracle's
    got = {}
    for group in found:
        for unit in units_of(group):
            unit = {x for x in unit if x[0] not in skip}
            if group.reason:  # entries of other tensors are looked for where units can go
                unit = {x for x in unit if x[0] in prunable(net)}
            if unit:
                got[frozenset(unit)] = bool(group.reason)
    expected = {}
    for unit, fixed in by_force(net, x[:1], monkeypatch):
        unread = not any(dim == 1 and n in prunable(net) for n, dim, _ in unit)
        fixed = fixed or unread or (name == "raw" and any(n == "tied" for n, _, _ in unit))
        unit = {x for x in unit if x[0] in prunable(net)} if fixed else unit
        expected[frozenset(unit)] = fixed
    assert got == expected
    rows = defaultdict(list)
    for group in found:
        for layer, x in group.rows.items():
            rows[layer] += x.flatten().tolist()
    assert {k: sorted(v) for k, v in rows.items()} == {
        k: list(range(len(m.weight))) for k, m in prunable(net).items()
    }


@pytest.mark.parametrize(
    ("name", "layer", "reason"),
    [
        ("plain", "9", "its units reach the network's output"),
        ("mixer", "0", "every unit reaches all columns of 2"),
        ("raw", "tied", "the weight of tied is read outside of its calls"),
        ("raw", "never", "the network does not apply it as a layer on this batch"),
        ("raw", "b", "every unit reaches all columns of c"),
        ("chosen", "unread", "nothing reads its units"),
        ("chosen", "a", "its units reach the network's output"),
        ("fused attention", "embed", "every unit reaches all columns of qkv"),
    ],
)
def test_groups_that_cannot_go_say_why(name, layer, reason):
    net, x = made(name)
    assert reason in [g.reason for g in groups(net, Batch((x,), {})) if layer in g.rows]


def test_entries_of_other_tensors_go_with_their_units():
    net, x = made("fused attention")
    heads, neurons = [g for g in groups(net, Batch((x,), {})) if not g.reason]
    assert {key: tuple(x.shape) for key, x in heads.entries.items()} == {
        ("q_bias", 0): (3, 4),
        ("v_bias", 0): (3, 4),
        ("table", 1): (3, 1),
    }
    assert heads.rows["qkv"][1].tolist() == [*range(4, 8), *range(16, 20), *range(28, 32)]
    assert neurons.entries == {}
    net, x = made("flattened")
    channels = groups(net, Batch((x,), {}))[0]
    assert set(channels.entries) == {
        (f"3.{key}", 0) for key in ("weight", "bias", "running_mean", "running_var")
    }
    assert (
        channels.columns["4"][2].tolist() == channels.entries["3.bias", 0][2].tolist() == list(range(98, 147))
    )


def test_entries_that_an_activation_hides_are_found():
    """A PReLU reads its weight where its input is negative: here in two of five units."""
    net = nn.Sequential(nn.Linear(4, 5), nn.PReLU(5), nn.Linear(5, 2)).eval().requires_grad_(False)
    net[0].bias.copy_(torch.tensor([9.0, -9, 9, -9, 9]))
    found = groups(net, Batch((torch.randn(1, 4),), {}))[0]
    assert found.units == 5
    assert found.entries["1.weight", 0].tolist() == [[0], [1], [2], [3], [4]]


def test_a_network_that_refuses_nan_loses_nothing():
    class Careful(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = conv(3, 4), conv(4, 2)

        def forward(self, x):
            x = self.a(x)
            if not x.isfinite().all():
                raise ValueError("not finite")
            return self.b(x)

    assert all(g.reason for g in groups(Careful().eval(), Batch((torch.randn(1, 3, 8, 8),), {})))


def test_what_a_pass_writes_into_buffers_is_undone():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = conv(3, 4), conv(4, 2)
            self.register_buffer("mean", torch.zeros(4))

        def forward(self, x):
            x = self.a(x)
            self.mean.lerp_(x.mean((0, 2, 3)), 0.1)
            return self.b(x - self.mean[:, None, None])

    net = Counting().eval().requires_grad_(False)
    found = groups(net, Batch((torch.randn(1, 3, 8, 8),), {}))
    assert not net.mean.any()
    assert [g.reason for g in found] == ["", "its units reach the network's output"]
    assert found[0].entries["mean", 0].tolist() == [[0], [1], [2], [3]]


def test_biases_of_layers_that_share_a_weight_are_in_their_rows_alone():
    net, x = made("twice")
    group = next(g for g in groups(net, Batch((x,), {})) if "c" in g.rows)
    assert torch.equal(group.rows["c"], group.rows["d"])
    assert torch.equal(group.columns["e"], group.rows["d"])
    assert group.entries == {}


@pytest.mark.parametrize("net", [nn.Linear(3, 3), nn.Sequential(), nn.Sequential(nn.ReLU(), nn.Linear(3, 1))])
def test_networks_of_next_to_nothing(net):
    if not list(net.parameters()):
        net.register_parameter("unused", nn.Parameter(torch.zeros(2)))
    assert all(g.reason for g in groups(net.eval(), Batch((torch.randn(2, 3),), {})))


# ---------------------------------------------------------------- the search


@pytest.mark.parametrize("gaps", [False, True])
@pytest.mark.parametrize("seed", range(10))
def test_links_are_those_of_brute_force(seed, gaps):
    """Some entries reach nodes of their own, some a block's, some nothing; blocks come again, in any order."""
    draw = torch.Generator().manual_seed(seed)
    size, nodes = 40 + 7 * seed, 300
    table = torch.zeros(size, nodes, dtype=torch.bool)
    at = 0
    while at < size:
        kind, length = (int(torch.randint(top, (), generator=draw)) for top in (4, 30))
        kind, length = (kind, length + 1) if gaps else (kind % 2 * 2, 12)
        block = int(torch.randint(5, (), generator=draw))
        part = slice(at, at + length)
        if kind == 0:
            table[part, 20 * block : 20 * block + 20] = True
        elif kind == 1:
            table[
                range(at, min(at + length, size)),
                [100 + i for i in range(at, min(at + length, size))][:length],
            ] = True
        elif kind == 2:
            table[part, 20 * block + int(torch.randint(20, (), generator=draw))] = True
        at += length
    passes = 0

    def reach(entries):
        nonlocal passes
        passes += 1
        return table[entries].any(0)

    found = links(size, table.any(0), reach)
    assert passes < 4 * size  # it never asks much more than one by one
    ties = [{("row", i) for i in x.entries} | {("node", i) for i in x.nodes.tolist()} for x in found]
    truth = [
        {("row", i)} | {("node", j) for j in table[i].nonzero()[:, 0].tolist()}
        for i in range(size)
        if table[i].any()
    ]
    ties, truth = closed(ties), closed(truth)
    if (
        gaps
    ):  # what lies between two parts of a unit may be taken for its own; what belongs together always is
        assert all(any(unit <= other for other in ties) for unit in truth)
    else:
        assert sorted(map(sorted, ties)) == sorted(map(sorted, truth))


def test_heads_take_few_passes():
    """The outputs of a fused projection of 12 heads: q and k reach all of a head, v one column each."""
    table = torch.zeros(3 * 768, 768, dtype=torch.bool)
    for i in range(768):
        table[[i, 768 + i], i // 64 * 64 : i // 64 * 64 + 64] = True
        table[2 * 768 + i, i] = True
    calls = []
    found = links(len(table), table.any(0), lambda entries: calls.append(entries) or table[entries].any(0))
    units = closed([{("row", i) for i in x.entries} | set(x.nodes.tolist()) for x in found])
    assert len(units) == 12
    assert len(calls) < 150


# ---------------------------------------------------------------- networks of others


def test_the_zoo_has_the_groups_that_it_should():
    found = [
        g for g in groups(zoo.build("resnet20"), Batch((torch.randn(1, 1, 28, 28),), {})) if not g.reason
    ]
    assert (len(found), sum(g.units for g in found)) == (12, 448)
    assert all(g.kind == "channels" and g.each == 1 for g in found)
    found = [g for g in groups(zoo.build("vit"), Batch((torch.randn(1, 1, 28, 28),), {})) if not g.reason]
    kinds = [(g.kind, g.units, g.each) for g in found]
    assert kinds == [("channels", 32, 1), *[("heads", 4, 72), ("neurons", 384, 1)] * 6]


@pytest.mark.parametrize("name", ["plain", "residual", "mobile", "squeezed", "concatenated"])
def test_torch_pruning_finds_the_same(name):
    """Its graph of dependencies (Fang et al. 2023) names the same layers and indices for a first unit."""
    tp = pytest.importorskip("torch_pruning")
    net, x = made(name)
    names = {module: key for key, module in net.named_modules()}
    graph = tp.DependencyGraph().build_dependency(net.requires_grad_(True), example_inputs=x)
    for group in groups(net, Batch((x,), {})):
        if group.reason:
            continue
        first = next(iter(group.rows))
        module = net.get_submodule(first)
        cut = tp.prune_conv_out_channels if isinstance(module, nn.Conv2d) else tp.prune_linear_out_channels
        rows, columns = defaultdict(set), defaultdict(set)
        for dependency, entries in graph.get_pruning_group(module, cut, group.rows[first][0].tolist()):
            target = names.get(dependency.target.module)
            if target in prunable(net):
                into = graph.is_out_channel_pruning_fn(dependency.handler)
                (rows if into else columns)[target].update(entries)
                if getattr(dependency.target.module, "groups", 1) == len(dependency.target.module.weight):
                    columns[target].update(entries)
        assert rows == {key: set(x[0].tolist()) for key, x in group.rows.items()}
        assert columns == {key: set(x[0].tolist()) for key, x in group.columns.items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("resnet50", {"channels": 37}),
        ("vgg16_bn", {"channels": 13, "neurons": 2}),
        ("vit_b_16", {"heads": 12, "neurons": 12}),
        ("swin_t", {"heads": 12, "neurons": 12}),
    ],
)
def test_families_of_torchvision(name, kinds):
    define_torchvision_schemas()
    models = pytest.importorskip("torchvision.models")
    net = models.get_model(name, weights=None).eval()
    open_attention(net)
    found = defaultdict(int)
    for group in groups(net, Batch((torch.randn(1, 3, 224, 224),), {})):
        found[group.kind] += not group.reason
    assert {k: n for k, n in found.items() if n} == kinds
