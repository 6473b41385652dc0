"""A packed layer whose weight changes computes with what it is now, or refuses."""

import copy

import pytest
import torch
import torch.nn.functional as F
from test_layers import sparsify
from torch import nn
from torch.func import functional_call

from snows import NM, SparseConv2d, SparseLinear, ops


@pytest.fixture(params=["linear", "conv"])
def layer(request):
    if request.param == "linear":
        return SparseLinear.from_dense(sparsify(nn.Linear(64, 24), NM(2, 4))).eval()
    return SparseConv2d.from_dense(sparsify(nn.Conv2d(16, 12, 3, padding=1), NM(2, 4))).eval()


@pytest.fixture
def x(layer):
    return torch.randn(5, 64) if isinstance(layer, SparseLinear) else torch.randn(2, 16, 6, 6)


def expected(layer, x):
    """By the dense layer, which is unpacked from what the layer holds now, in float64."""
    return layer.unpack().double()(x.double())


def close(found, wanted):
    return ((found.double() - wanted).norm() / wanted.norm()).item() < 1e-6


def other_codes(layer):
    """The codes of another weight, of as many values."""
    shape = layer.shape
    dense = nn.Linear(*reversed(shape)) if len(shape) == 2 else nn.Conv2d(shape[1], shape[0], shape[2:])
    return type(layer).from_dense(sparsify(dense, NM(2, 4)), NM(2, 4)).codes


CHANGES = {
    "in place": lambda layer: layer.values.mul_(2),
    "one number in place": lambda layer: layer.values.flatten()[7:8].mul_(-3),
    "copied into": lambda layer: layer.values.copy_(torch.randn_like(layer.values)),
    "codes in place": lambda layer: layer.codes.copy_(other_codes(layer)),
    "assigned": lambda layer: setattr(layer, "values", torch.randn_like(layer.values)),
    "codes assigned": lambda layer: setattr(layer, "codes", other_codes(layer)),
    "a bias in place": lambda layer: layer.bias.add_(1),
    "a bias assigned": lambda layer: setattr(layer, "bias", torch.randn_like(layer.bias)),
    "no bias": lambda layer: setattr(layer, "bias", None),
    "loaded": lambda layer: layer.load_state_dict(
        {k: torch.randn_like(v) if v.is_floating_point() else v for k, v in layer.state_dict().items()}
    ),
    "assigned by loading": lambda layer: layer.load_state_dict(
        {k: torch.randn_like(v) if v.is_floating_point() else v for k, v in layer.state_dict().items()},
        assign=True,
    ),
}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_weight_is_what_a_layer_computes_with(layer, x, change, mode):
    with mode():
        before = layer(x)
        CHANGES[change](layer)
        after = layer(x)
        assert close(after, expected(layer, x))
        assert torch.equal(layer(x), after)
        assert not torch.equal(after, before)


def test_functional_call_computes_with_what_it_is_given(layer, x):
    with torch.no_grad():
        before, given = (
            layer(x),
            {"values": torch.randn_like(layer.values), "bias": torch.randn_like(layer.bias)},
        )
        found = functional_call(layer, given, (x,))
        twin = copy.deepcopy(layer)
        twin.load_state_dict({**layer.state_dict(), **given})
        assert close(found, expected(twin, x))
        assert torch.equal(layer(x), before)


def test_a_compiled_program_refuses_a_weight_that_was_changed_behind_it(layer, x):
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert close(compiled(x), expected(layer, x))
        layer.bias.add_(1)
        assert close(compiled(x), expected(layer, x))
        layer.values.mul_(2)
        if layer.kernel == "reference":  # no order that could be old
            assert close(compiled(x), expected(layer, x))
            return
        with pytest.raises(
            ValueError,
            match="order that kernel_order makes of this weight, got that of another, or of what it was before",
        ):
            compiled(x)
        layer(x)  # makes the order anew
        assert close(compiled(x), expected(layer, x))


@pytest.mark.parametrize(
    ("bias", "got"),
    [
        (torch.zeros(3), r"\(3,\) torch.float32 on cpu"),
        (torch.zeros(24, 1), r"\(24, 1\)"),
        (torch.zeros(24).double(), "torch.float64"),
        (torch.zeros(24, device="meta"), "on meta"),
        (3.0, "float"),
    ],
    ids=["length", "shape", "dtype", "device", "number"],
)
def test_a_bias_that_does_not_belong_is_refused(bias, got):
    layer = SparseLinear.from_dense(sparsify(nn.Linear(64, 24), NM(2, 4)))
    before = layer.bias
    with pytest.raises(
        ValueError, match=rf"SparseLinear: expected a bias of \(24,\) torch.float32 on cpu, got .*{got}"
    ):
        layer.bias = bias
    assert layer.bias is before
    with pytest.raises(ValueError, match="expected a bias"):
        SparseLinear(layer.packed, bias)


def test_a_weight_that_no_longer_fits_is_refused(layer, x):
    layer.values = layer.values[:-1]
    with pytest.raises(ValueError, match="expected"):
        layer(x)


def test_the_order_of_another_weight_is_refused():
    first, second = (SparseLinear.from_dense(sparsify(nn.Linear(64, 24), NM(2, 4))) for _ in range(2))
    if first.kernel == "reference":
        pytest.skip("without a kernel there is no order")
    x = torch.randn(3, 64)
    args = first.values, first.codes, first.bias, first.shape, 2, 4, "none"
    wanted = F.linear(x, first.unpack().weight, first.bias)
    assert torch.allclose(ops.sparse_linear(x, *args, first.order), wanted, atol=1e-5)
    assert torch.allclose(
        ops.sparse_linear(x, first.values.clone(), *args[1:], first.order), wanted, atol=1e-5
    )  # a copy is the same weight
    for order in (
        second.order,
        first.order[:-1].clone(),
        first.order.long(),
        first.order[::2],
        torch.zeros(3, dtype=torch.int32),
    ):
        with pytest.raises(ValueError, match=r"expected (the order|an order)"):
            ops.sparse_linear(x, *args, order)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"stride": 0}, "a stride of whole numbers of at least 1"),
        ({"stride": (1, -1)}, "a stride"),
        ({"padding": -1}, "a padding"),
        ({"dilation": 0}, "a dilation"),
        ({"dilation": (2, 0)}, "a dilation"),
        ({"stride": 1.5}, "a stride"),
    ],
)
def test_settings_that_no_convolution_has_are_refused(settings, sentence):
    packed = SparseConv2d.from_dense(sparsify(nn.Conv2d(16, 12, 3), NM(2, 4))).packed
    with pytest.raises(ValueError, match=f"SparseConv2d: expected {sentence}"):
        SparseConv2d(packed, **settings)
    pairs = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1)} | {
        k: v if isinstance(v, tuple) else (v, v) for k, v in settings.items()
    }
    if not any(isinstance(v, float) for v in pairs["stride"]):
        with pytest.raises(ValueError, match="sparse_conv2d: expected"):
            ops.sparse_conv2d(
                torch.randn(1, 16, 6, 6),
                packed.values,
                packed.codes,
                None,
                packed.shape,
                2,
                4,
                *pairs.values(),
            )
