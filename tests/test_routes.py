"""What the horizon's pass reroutes: same numbers, same operations, and both curvatures exact through every op."""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from oracles import dense_gauss_newton, dense_hessian
from torch import nn

from snows import ops
from snows.matching.horizon import Horizon
from snows.matching.losses import Reconstruction
from snows.networks.attention import open_attention
from snows.networks.batches import Batch
from snows.networks.stream import Schedule, Stream
from snows.networks.trace import Trace
from snows.ops import routes
from snows.solving.operators import GaussNewton, Hessian

PLAIN = {func: func for func in routes.ROUTES}


class Functional(nn.Module):
    """Every rerouted function, called as a function: masks of both kinds, causal, cross attention, GELU's approximation."""

    def __init__(self):
        super().__init__()
        self.first, self.last, self.context = (
            nn.Linear(4, 6),
            nn.Linear(6, 3),
            nn.Parameter(torch.randn(2, 2, 5, 3)),
        )
        self.scale = nn.Parameter(torch.rand(6) + 0.5)
        self.register_buffer("some", torch.rand(5, 5) < 0.7)

    def forward(self, x):
        x = F.gelu(self.first(x), approximate="tanh")
        x = F.layer_norm(x, (6,), weight=self.scale, eps=1e-3)
        q = x.unflatten(-1, (2, 3)).transpose(1, 2)
        q = q + F.scaled_dot_product_attention(q, self.context, q, attn_mask=self.some)
        q = q + F.scaled_dot_product_attention(q, q, q, is_causal=True, scale=0.8)
        q = q + F.scaled_dot_product_attention(
            query=q, key=q, value=self.context, attn_mask=torch.log(0.1 + self.some)
        )
        return self.last(F.gelu(q.transpose(1, 2).flatten(2)))


class Closed(nn.Module):
    """An attention module that cannot be opened into linear layers: it adds a key of its own."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 2)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True, add_bias_kv=True, add_zero_attn=True)

    def forward(self, x):
        x = self.first(x)
        return self.last(x + self.attention(x, x, x, need_weights=False)[0])


class Residual(nn.Module):
    """BatchNorm and ReLU in all spellings; one in place, one on a tensor that was changed after its BatchNorm."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 3, 1), nn.Conv2d(3, 3, 3, padding=1)
        self.bn, self.last, self.relu = nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1), nn.ReLU(inplace=True)

    def forward(self, x):
        x = self.bn(self.first(x))
        y = F.relu(x) + x
        y = torch.tanh(self.second(y))
        y = y + torch.relu(self.bn(y)) + self.bn(y).relu()
        z = self.bn(y)
        z += y
        return self.last(self.relu(self.bn(z)) + F.relu(z).square())


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.bn = nn.Conv2d(2, 6, 2, stride=2), nn.BatchNorm2d(6)
        self.norm, self.attention = nn.LayerNorm(6), nn.MultiheadAttention(6, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(6, 9), nn.GELU(), nn.Linear(9, 6))

    def forward(self, x):
        x = self.bn(self.embed(x)).flatten(2).transpose(1, 2)
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.norm(x))


def tokens():
    return torch.randn(2, 5, 4).double()


CASES = {  # network, its input, the layer, the ops that must run
    "functional": (Functional, tokens, "first", {"gelu": 2, "layer_norm": 1, "attention": 3}),
    "closed attention": (Closed, tokens, "first", {"attention": 1}),
    "residual": (Residual, lambda: torch.randn(2, 2, 4, 4).double(), "first", {"affine_relu": 3}),
    "block": (
        Block,
        lambda: torch.randn(2, 2, 4, 6).double(),
        "embed",
        {"gelu": 1, "layer_norm": 2, "attention": 1},
    ),
}
cases = pytest.mark.parametrize("name", CASES)


def horizon(name, k="end"):
    make, sample, layer, _ = CASES[name]
    net = make().double().eval()
    for p in net.parameters():
        nn.init.normal_(p, 0, 0.5)
    open_attention(net)
    inputs = Batch.of(sample())
    stream = Stream(Schedule(net, Trace.of(net, inputs)), inputs)
    stream.advance(layer)
    return Horizon(net, layer, k, stream), stream, net.get_submodule(layer).weight.detach()


@cases
def test_curvature_through_every_op_against_dense_matrices_of_eager_pytorch(name, monkeypatch):
    found, stream, at = horizon(name)
    targets = {key: y + torch.randn_like(y) for key, y in found.outputs(at, stream).items()}
    loss, probe = Reconstruction(found, stream, targets), torch.randn_like(at)
    products = [operator(loss, at) @ probe for operator in (GaussNewton, Hessian)]
    values = [loss(at.requires_grad_()).item()]
    monkeypatch.setattr(routes, "ROUTES", PLAIN)
    for product, oracle in zip(products, (dense_gauss_newton, dense_hessian), strict=True):
        expected = oracle(loss, at.detach()) @ probe.flatten()
        assert expected.norm() > 0
        assert (product.flatten() - expected).norm() <= 1e-8 * expected.norm()
    assert values == pytest.approx([loss(at.detach()).item()], rel=1e-12)


@cases
def test_the_ops_run_where_gradients_flow_and_the_operations_are_the_same(name, monkeypatch):
    called = Counter()
    for op in ("gelu", "layer_norm", "attention", "affine_relu"):
        original = getattr(ops, op)
        monkeypatch.setattr(
            ops, op, lambda *a, op=op, original=original: (called.update([op]), original(*a))[1]
        )
    found, stream, at = horizon(name)
    called.clear()
    outputs = found.outputs(at.requires_grad_(), stream)
    assert called == CASES[name][3]
    called.clear()
    with torch.no_grad():
        found.outputs(at, stream)
    assert not called
    monkeypatch.setattr(routes, "ROUTES", PLAIN)
    plain = Horizon(found.net, found.name, "end", stream)
    assert plain.operations == found.operations
    for key, other in plain.outputs(at, stream).items():
        assert (outputs[key] - other).abs().max() <= 1e-12


def test_gradients_of_other_things_keep_pytorchs_own_functions(monkeypatch):
    """A weight, a bias of attention, dropout, grouped heads: what the ops do not differentiate or do."""
    monkeypatch.setattr(ops, "layer_norm", None)
    monkeypatch.setattr(ops, "attention", None)
    x, weight = torch.randn(2, 4, 3, 6, requires_grad=True), torch.randn(6, requires_grad=True)
    few = torch.randn(2, 2, 3, 6)
    with routes.Rerouted():
        assert torch.autograd.grad(F.layer_norm(x, (6,), weight).sum(), weight)[0].norm() > 0
        bias = torch.randn(3, 3, requires_grad=True)
        assert torch.autograd.grad(F.scaled_dot_product_attention(x, x, x, bias).sum(), bias)[0].shape == (
            3,
            3,
        )
        assert F.scaled_dot_product_attention(x, x, x, dropout_p=0.5).shape == x.shape
        assert F.scaled_dot_product_attention(x, few, few, enable_gqa=True).shape == x.shape
        training = F.batch_norm(x, torch.zeros(4), torch.ones(4), training=True)
    assert training.mean((0, 2, 3)).abs().max() < 1e-6
