"""Every op on the path of a loss: values against PyTorch, both derivatives against finite differences, what it refuses."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.attention import SDPBackend, sdpa_kernel

from snows import ops, reference
from snows.ops import derivatives
from snows.reference import sdpa


def double(*shape):
    return torch.randn(shape, dtype=torch.float64)


BITS = ops.pack_bits(torch.rand(3, 7, generator=torch.Generator().manual_seed(0)) < 0.5)


def causal(queries, keys):
    return torch.zeros(queries, keys).masked_fill_(torch.ones(queries, keys).triu(1).bool(), -torch.inf)


def affine(x, scale, shift):
    return x * scale.view(1, -1, 1) + shift.view(1, -1, 1)


def affine_relu(x, scale, shift):
    return ops.affine_relu(x, affine(x, scale, shift).detach(), scale)


def unmasked(w):
    return w * reference.unpack_bits(BITS, w.shape)


W, B, SCALE, SHIFT, BIAS = (double(*s) for s in ((5,), (5,), (4,), (4,), (2, 1, 2, 3)))
OPEN = [(2, 3, 3), (2, 4, 3), (2, 4, 2)]  # queries, keys, values

# name: the op, the same in eager PyTorch, the shapes of what is differentiated
CASES = {
    "masked": (lambda w: ops.masked(w, BITS), unmasked, [(3, 7)]),
    "gelu": (ops.gelu, F.gelu, [(4, 5)]),
    "gelu tanh": (lambda x: ops.gelu(x, "tanh"), lambda x: F.gelu(x, approximate="tanh"), [(4, 5)]),
    "affine_relu": (lambda x: affine_relu(x, SCALE, SHIFT), lambda x: affine(x, SCALE, SHIFT).relu(), [(2, 4, 3)]),
    "layer_norm": (lambda x: ops.layer_norm(x, (5,), W, B), lambda x: F.layer_norm(x, (5,), W, B), [(2, 3, 5)]),
    "layer_norm plain, large eps": (lambda x: ops.layer_norm(x, (5,), eps=0.3), lambda x: F.layer_norm(x, (5,), eps=0.3), [(3, 5)]),
    "layer_norm of two dimensions": (lambda x: ops.layer_norm(x, (3, 5)), lambda x: F.layer_norm(x, (3, 5)), [(2, 3, 5)]),
    "attention": (ops.attention, F.scaled_dot_product_attention, OPEN),
    "attention, scaled, with a bias that broadcasts": (
        lambda q, k, v: ops.attention(q, k, v, BIAS, 0.7), lambda q, k, v: F.scaled_dot_product_attention(q, k, v, BIAS, scale=0.7),
        [(2, 2, 2, 3), (2, 2, 3, 3), (2, 2, 3, 2)]),
    "attention, causal": (lambda q, k, v: ops.attention(q, k, v, causal(3, 4).to(q)),
                          lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), OPEN),
    "attention, one matrix": (lambda q: ops.attention(q, q, q), lambda q: F.scaled_dot_product_attention(q[None], q[None], q[None])[0],
                              [(4, 5)]),
    "attention, made again": (lambda q, k, v: torch.ops.snows.attention(q, k, v, None, 0.4, False)[0],
                              lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=0.4), OPEN),
}  # fmt: skip
cases = pytest.mark.parametrize("name", CASES)


def variables(name, dtype=torch.float64):
    return [double(*shape).to(dtype).requires_grad_() for shape in CASES[name][2]]


@cases
def test_derivatives_against_finite_differences(name):
    op, x = CASES[name][0], variables(name)
    assert gradcheck(op, x)
    assert gradgradcheck(op, x)


@cases
def test_values_and_both_derivatives_are_those_of_eager_pytorch(name):
    x = variables(name)
    found = []
    for f in CASES[name][:2]:
        torch.manual_seed(1)
        with sdpa_kernel(SDPBackend.MATH):
            y = f(*x)
            g = torch.randn_like(y).requires_grad_()
            first = torch.autograd.grad(y, x, g, create_graph=True)
            second = torch.autograd.grad(
                first, [g, *x], [torch.randn_like(a) for a in x], materialize_grads=True
            )
        found.append((y, *first, *second))
    for one, other in zip(*found, strict=True):
        assert (one - other).abs().max() <= 1e-12 * (1 + other.abs().max())


@cases
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_lower_precision_is_near_float64(name, dtype):
    """First derivatives to a few units in the last place of what is stored; 16-bit numbers are summed in float32."""
    op = {"attention, made again": ops.attention, "layer_norm": lambda x: ops.layer_norm(x, (5,), W.to(x), B.to(x)),
          "affine_relu": lambda x: affine_relu(x, SCALE.to(x), SHIFT.to(x)),
          "attention, scaled, with a bias that broadcasts": lambda q, k, v: ops.attention(q, k, v, BIAS.to(q), 0.7),
          "attention, causal": lambda q, k, v: ops.attention(q, k, v, causal(3, 4).to(q))}.get(name, CASES[name][0])  # fmt: skip
    x = variables(name, dtype)
    exact = [a.detach().double().requires_grad_() for a in x]
    y, wanted = op(*x), op(*exact)
    g = torch.randn_like(y)
    results = [y, *torch.autograd.grad(y, x, g)]
    oracles = [wanted, *torch.autograd.grad(wanted, exact, g.double())]
    for one, other in zip(results, oracles, strict=True):
        assert one.dtype == dtype
        assert (one - other).norm() <= (
            4e-6 if dtype == torch.float32 else 2e-2
        ) * other.norm()  # a few roundings in a second derivative


def test_opcheck():
    """Schemas, fakes and autograd registrations, as PyTorch's own checker sees them."""
    x, g = double(3, 4), double(3, 4)
    q, k, v = double(2, 4, 3), double(2, 5, 3), double(2, 5, 2)
    out, kept = torch.ops.snows.attention(q, k, v, None, 0.5, True)
    _, mean, rstd = torch.ops.snows.layer_norm(x, None, None, (4,), 1e-5)
    calls = {
        "masked": (double(3, 7), BITS), "gelu": (x, "none"), "gelu_curve": (x, g, "tanh"),
        "affine_relu": (x, g, double(4)), "affine_relu_grad": (g, x, double(4)),
        "layer_norm": (x, None, None, (4,), 1e-5), "layer_norm_grad": (g, x, mean, rstd, None, None, (4,)),
        "layer_norm_curve": (g, g, x, mean, rstd, None, None, (4,)),
        "attention": (q, k, v, None, 0.5, False), "attention_grad": (out, q, k, v, out, kept, None, 0.5),
        "attention_tangent": (q, k, v, q, k, v, out, kept, None, 0.5),
        "attention_curve": (out, q, k, v, q, k, v, out, kept, None, 0.5),
    }  # fmt: skip
    assert set(calls) == {op.name for op in derivatives.OPS if op.backward} - {
        "sparse_linear",
        "sparse_conv2d",
    }  # in test_layers.py
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own
        for name, args in calls.items():
            args = [
                a.clone().requires_grad_()
                if isinstance(a, torch.Tensor) and i == 0 and not name.endswith("curve")
                else a
                for i, a in enumerate(args)
            ]
            tests = (
                "test_schema",
                "test_autograd_registration",
                "test_faketensor",
                "test_aot_dispatch_dynamic",
            )
            old = torch.__version__.startswith(
                ("2.11", "2.12")
            )  # asserts in its own `bmm(out=)` of tensors of unknown size
            torch.library.opcheck(
                getattr(torch.ops.snows, name).default, args, test_utils=tests[:-1] if old else tests
            )


def test_third_derivatives_are_refused():
    x = double(3).requires_grad_()
    (first,) = torch.autograd.grad(ops.gelu(x).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="third derivative"):
        torch.autograd.grad(second.sum(), x)


CURVES = ("layer_norm_curve", "attention_curve", "gelu_curve")


@pytest.fixture
def curves(monkeypatch):
    """The names of the second derivatives by the point that were computed, in order."""
    called = []
    for name in CURVES:
        original = getattr(torch.ops.snows, name)
        monkeypatch.setattr(
            torch.ops.snows,
            name,
            lambda *a, name=name, original=original: (called.append(name), original(*a))[1],
        )
    return called


def test_a_product_by_the_cotangent_leaves_the_second_derivative_out(curves):
    """Gauss-Newton goes through an adjoint by its cotangent: what the Hessian alone needs is not computed."""
    w, g = double(4, 4).requires_grad_(), double(2, 3, 4).requires_grad_()
    x = double(2, 3, 4) @ w
    y = ops.attention(x, x, ops.gelu(ops.layer_norm(x, (4,))))
    (pulled,) = torch.autograd.grad(y, w, g, create_graph=True)
    torch.autograd.grad(pulled, g, double(4, 4), retain_graph=True)
    assert curves == []
    torch.autograd.grad(pulled, w, double(4, 4))
    assert set(curves) == set(CURVES)


def test_of_leaves_too_only_what_is_asked_is_computed(curves):
    """The engine answers of a leaf as of any node, by a refusal where its gradient is wanted."""
    x, g = double(3, 4).requires_grad_(), double(3, 4).requires_grad_()
    (first,) = torch.autograd.grad(ops.layer_norm(x, (4,)), x, g, create_graph=True)
    torch.autograd.grad(first, g, double(3, 4), retain_graph=True)
    assert curves == []
    torch.autograd.grad(first, x, double(3, 4), retain_graph=True)
    assert curves == ["layer_norm_curve"]
    first.sum().backward(inputs=[g], retain_graph=True)
    assert curves == ["layer_norm_curve"]
    first.sum().backward()
    assert curves == ["layer_norm_curve"] * 2
    assert x.grad is not None


@pytest.mark.parametrize("shape", [(), (0,), (1,), (8,), (3, 7), (2, 3, 3, 3)])
def test_bits_round_trip(shape):
    mask = torch.rand(shape) < 0.5
    bits = ops.pack_bits(mask)
    assert torch.equal(reference.unpack_bits(bits, shape), mask)
    for e, kept in enumerate(mask.flatten().tolist()):
        assert (int(bits[e // 8]) >> (e % 8)) & 1 == kept


def test_masked_zeros_are_plus_zero_whatever_stood_there():
    weight = torch.tensor([-1.0, torch.nan, -torch.inf, -0.0, 2.0]).requires_grad_()
    out = ops.masked(weight, ops.pack_bits(torch.tensor([False, False, False, False, True])))
    (grad,) = torch.autograd.grad(out, weight, -torch.ones(5))
    assert out.tolist() == [0, 0, 0, 0, 2]
    assert grad.tolist() == [0, 0, 0, 0, -1]
    assert not out.signbit().any()
    assert grad.signbit().tolist() == [False] * 4 + [True]


def test_a_view_is_masked_by_its_own_order_of_elements():
    weight, mask = torch.randn(4, 6).T, torch.rand(6, 4) < 0.5
    assert torch.equal(ops.masked(weight, ops.pack_bits(mask)), weight * mask)


def test_attention_with_no_key_left_gives_zeros_and_no_nan():
    q = double(2, 3, 4).requires_grad_()
    bias = torch.zeros(3, 3).double()
    bias[1] = -torch.inf
    for keep in (True, False):
        out = torch.ops.snows.attention(q, q, q, bias.expand(2, 3, 3), 0.5, keep)[0]
        (grad,) = torch.autograd.grad(out.square().sum(), q)
        assert not out[:, 1].any()
        assert out[:, 0].all()
        assert grad.isfinite().all()


def test_attention_by_parts_is_attention(monkeypatch):
    q, k, v = double(7, 4, 3), double(7, 5, 3), double(7, 5, 3)
    whole = ops.attention(q, k, v)
    monkeypatch.setattr(sdpa, "ATTENTION_BLOCK", 40)  # two heads at a time
    assert torch.allclose(ops.attention(q, k, v), whole, rtol=1e-13)


@pytest.mark.parametrize("call", [
    lambda e: ops.masked(e, ops.pack_bits(e > 0)), ops.gelu,
    lambda e: affine_relu(e, torch.ones(3), torch.ones(3)), lambda e: ops.layer_norm(e, (4,)), lambda e: ops.attention(e, e, e),
], ids=["masked", "gelu", "affine_relu", "layer_norm", "attention"])  # fmt: skip
@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 3, 4)])
def test_empty_tensors(call, shape):
    x = torch.randn(shape).requires_grad_()
    y = call(x)
    (g,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    assert y.shape == g.shape == shape


@pytest.mark.parametrize(("call", "words"), [
    (lambda x: ops.masked(x.int(), BITS), "masked: weight: expected floating point, got torch.int32"),
    (lambda x: ops.masked(x, BITS), r"masked: bits: expected \(2,\) torch.uint8 on cpu, got \(3,\)"),
    (lambda x: ops.masked(x, torch.zeros(2)), "masked: bits: .* got .* torch.float32"),
    (lambda x: ops.masked(x, torch.zeros(2, dtype=torch.uint8, device="meta")), "masked: bits: .* on cpu, got .* on meta"),
    (lambda x: ops.pack_bits(x), "pack_bits: mask: expected bool"),
    (lambda x: ops.gelu(x.long()), "gelu: x"),
    (lambda x: ops.gelu(x, "erf"), "gelu: approximate: .* got 'erf'"),
    (lambda x: ops.affine_relu(x[0], x[0], x[0]), "affine_relu: x"),
    (lambda x: ops.affine_relu(x, x[0], x[0]), r"affine_relu: affine: expected \(3, 4\).* got \(4,\)"),
    (lambda x: ops.affine_relu(x, x, torch.ones(3)), r"affine_relu: scale: expected \(4,\).* got \(3,\)"),
    (lambda x: ops.affine_relu(x, x, torch.ones(4, requires_grad=True)), "affine_relu: scale: expected a constant"),
    (lambda x: ops.layer_norm(x, (3,)), "layer_norm: x: expected .*3.* got"),
    (lambda x: ops.layer_norm(x, (4,), torch.ones(4).double()), "layer_norm: weight: .* torch.float32 .* torch.float64"),
    (lambda x: ops.attention(x, x[:, :2], x), "attention: k: expected width 4, got 2"),
    (lambda x: ops.attention(x, x, x[:2]), "attention: v: expected 3 keys, got 2"),
    (lambda x: ops.attention(x, x, x.double()), "attention: v: .* torch.float64"),
    (lambda x: ops.attention(x, x, x, torch.ones(2, 3)), "attention: bias: expected what broadcasts to"),
])  # fmt: skip
def test_a_callers_mistake_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call(torch.randn(3, 4))


class Everything(torch.nn.Module):
    """All ops in a row."""

    def forward(self, x):
        x = ops.layer_norm(x, (6,), torch.linspace(0.5, 2, 6))
        q = x.unflatten(-1, (2, 3)).transpose(1, 2)
        x = x + ops.attention(q, q, q, torch.linspace(-1, 1, 4).expand(4, 4)).transpose(1, 2).flatten(2)
        x = affine_relu(x, torch.linspace(0.5, 2, 4), torch.linspace(-0.5, 1, 4))
        return ops.gelu(ops.masked(x, torch.tensor([203, 94, 171, 85, 240, 15], dtype=torch.uint8)), "tanh")


def test_a_model_of_ops_is_traced_whole_and_exported():
    net, x = Everything(), torch.randn(2, 4, 6)
    wanted = net(x)
    assert torch.equal(torch.export.export(net, (x,)).module()(x), wanted)
    assert torch.equal(torch.compile(net, fullgraph=True, backend="aot_eager")(x), wanted)
    torch.compiler.reset()
