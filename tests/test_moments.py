import pytest
import torch
import torch.nn.functional as F
from oracles import unfold_rows
from torch import nn

from snows.matching import moments
from snows.networks.watching import Call
from snows.sparsity import rows

CASES = [
    dict(kernel=(3, 3), stride=1, padding=1, dilation=1, groups=1),
    dict(kernel=(3, 2), stride=2, padding=0, dilation=1, groups=2),
    dict(kernel=(2, 3), stride=1, padding=2, dilation=2, groups=4),
    dict(kernel=(1, 1), stride=3, padding=0, dilation=1, groups=1),
    dict(kernel=(5, 3), stride=2, padding=2, dilation=1, groups=1),
    dict(kernel=(7, 7), stride=2, padding=3, dilation=1, groups=2),
    dict(kernel=(3, 2), stride=1, padding=0, dilation=1, groups=2),
    dict(kernel=(5, 1), stride=1, padding=0, dilation=1, groups=1),
    dict(kernel=(7, 3), stride=(1, 2), padding=3, dilation=2, groups=1),
    dict(kernel=(3, 3), stride=2, padding=3, dilation=3, groups=1),
    dict(kernel=(3, 3), stride=(3, 1), padding=(0, 1), dilation=(2, 1), groups=4),
]


def convolution(kernel, stride, padding, dilation, groups, size=(7, 8)):
    x = torch.randn(3, 4, *size, dtype=torch.float64)
    conv = (
        nn.Conv2d(4, 8, kernel, stride, padding, dilation, groups, bias=False).double().requires_grad_(False)
    )
    return conv, Call(
        F.conv2d, x, kernel, {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    )


@pytest.mark.parametrize("case", CASES, ids=str)
def test_patches_are_the_rows_a_convolution_multiplies(case):
    conv, call = convolution(**case)
    found = torch.cat(list(moments.patches(call)), dim=1)
    expected = unfold_rows(
        call.x, case["kernel"], case["stride"], case["padding"], case["dilation"], case["groups"]
    )
    assert torch.equal(found, expected)
    assert moments.positions(call) == found.shape[1]
    weight = rows(conv.weight).view(case["groups"], -1, found.shape[2])
    out = (found @ weight.transpose(1, 2)).transpose(0, 1).flatten(1)
    assert torch.allclose(out, conv(call.x).movedim(1, -1).flatten(0, -2), atol=1e-12)


@pytest.mark.parametrize("chunk", [moments.CHUNK, 100], ids=["in one", "image by image"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_second_moments_are_sums_over_those_rows(case, chunk, monkeypatch):
    monkeypatch.setattr(moments, "CHUNK", chunk)
    conv, call = convolution(**case)
    X = unfold_rows(call.x, case["kernel"], case["stride"], case["padding"], case["dilation"], case["groups"])
    found = moments.gram(call)
    assert torch.allclose(found, X.mT @ X, rtol=0, atol=1e-12 * X.square().sum().item())
    y = torch.randn_like(conv(call.x))
    Y = y.permute(0, 2, 3, 1).reshape(-1, case["groups"], 8 // case["groups"]).permute(1, 2, 0)
    assert torch.allclose(moments.cross(call, y), Y @ X, atol=1e-12)


@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_moments_of_padding_by_name(padding):
    conv, call = convolution((2, 4), 1, padding, 1, 1)
    X = unfold_rows(F.pad(call.x, (1, 2, 0, 1)) if padding == "same" else call.x, (2, 4), 1, 0, 1, 1)
    y = torch.randn_like(conv(call.x))
    assert torch.allclose(moments.gram(call), X.mT @ X, atol=1e-12)
    assert torch.allclose(moments.cross(call, y), y.permute(1, 0, 2, 3).reshape(1, 8, -1) @ X, atol=1e-12)
    assert moments.positions(call) == X.shape[1]


def test_moments_of_a_linear_count_every_token():
    x, y = torch.randn(2, 5, 6, dtype=torch.float64), torch.randn(2, 5, 3, dtype=torch.float64)
    call = Call(F.linear, x)
    assert moments.positions(call) == 10
    assert torch.allclose(moments.gram(call)[0], torch.einsum("bti,btj->ij", x, x))
    assert torch.allclose(moments.cross(call, y)[0], torch.einsum("bto,bti->oi", y, x))


def test_moments_of_a_wide_layer_are_made_in_pieces(monkeypatch):
    x = torch.randn(2, 5, 7)
    monkeypatch.setattr(moments, "WIDE", 3)
    found = moments.gram(Call(F.linear, x))
    assert found.dtype == torch.float64
    assert torch.allclose(found[0], torch.einsum("bti,btj->ij", x, x).double(), rtol=1e-5, atol=1e-6)


def test_moments_of_float32_are_as_exact_as_the_numbers():
    _, call = convolution((3, 3), 1, 1, 1, 1, size=(28, 28))
    exact = moments.gram(call)
    found = moments.gram(Call(F.conv2d, call.x.float(), call.kernel, call.settings))
    assert (found - exact).norm() <= 1e-6 * exact.norm()
