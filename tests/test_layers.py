import copy
import io
import math
import os
import pickle
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from snows import NM, SparseConv2d, SparseLinear, Unstructured, ops, parse_pattern, reference
from snows.layers.conv2d import INNERMOST
from snows.packing import pack

PATTERNS = ["2:4", "1:4", "2:8", "4:8", "3:5", "0.9", "0.5"]
ACTIVATIONS = {None: lambda y: y, "relu": F.relu, "gelu": F.gelu}

ORIGIN = 16  # words of an order's header, which say of which tensors it was made


def sparsify(layer, pattern):
    """Zero a layer's weight to a pattern (ragged last groups too); some kept weights are zeros."""
    with torch.no_grad():
        scores = layer.weight.abs() + torch.rand_like(layer.weight)
        if isinstance(pattern, NM) and pattern.fits(scores.shape):
            mask = reference.nm_mask(scores.flatten(1), pattern.n, pattern.m).view(scores.shape)
        else:
            mask = pattern.mask(scores)
        layer.weight.mul_(mask)
    return layer


def error(output, layer, x, activation=None):
    """Relative to float64 computed from the dense layer, by PyTorch."""
    exact = ACTIVATIONS[activation](copy.deepcopy(layer).double()(x.double())).detach()
    return float((output.double() - exact).norm() / exact.norm().clamp(min=1e-30))


@pytest.fixture(scope="module")
def linear():
    torch.manual_seed(0)
    dense = sparsify(nn.Linear(72, 40), NM(2, 4))
    return dense, SparseLinear.from_dense(dense, activation="relu"), torch.randn(3, 5, 72)


@pytest.fixture(scope="module")
def conv():
    torch.manual_seed(0)
    dense = sparsify(nn.Conv2d(8, 20, 3, padding=1), NM(1, 4))
    return dense, SparseConv2d.from_dense(dense, activation="relu"), torch.randn(3, 8, 9, 7)


@pytest.mark.parametrize("text", PATTERNS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_linear_against_float64(text, activation):
    pattern = parse_pattern(text)
    for out, inputs, tokens in ((96, 160, 300), (33, 67, 17), (1, 1, 1), (5, 256, 1), (513, 64, 40)):
        dense = sparsify(nn.Linear(inputs, out, bias=out != 33), pattern)
        x = torch.randn(tokens, inputs)
        sparse = SparseLinear.from_dense(dense, pattern, activation=activation)
        assert error(sparse(x), dense, x, activation) < 2e-6, (out, inputs, tokens)


@pytest.mark.parametrize("text", PATTERNS)
def test_one_token_against_float64(text):
    pattern = parse_pattern(text)
    for out, inputs in ((64, 768), (7, 128), (50, 100), (3, 4)):
        dense = sparsify(nn.Linear(inputs, out), pattern)
        x = torch.randn(1, inputs)
        for activation in ACTIVATIONS:
            assert (
                error(SparseLinear.from_dense(dense, pattern, activation=activation)(x), dense, x, activation)
                < 2e-6
            ), (out, inputs)


@pytest.mark.parametrize("tokens", [0, 1, 2, 15, 16, 31, 127, 128, 129])
def test_linear_of_any_number_of_tokens(tokens):
    dense = sparsify(nn.Linear(132, 37), NM(2, 4))
    x = torch.randn(tokens, 132)
    assert error(SparseLinear.from_dense(dense)(x), dense, x) < 2e-6


def test_linear_of_views_and_all_six_codes():
    pairs = [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
    dense = nn.Linear(24, 6, bias=False)
    with torch.no_grad():
        mask = torch.zeros(6, 6, 4, dtype=torch.bool)
        for row in range(6):
            for group in range(6):
                mask[row, group, pairs[(row + group) % 6]] = True
        dense.weight.mul_(mask.view(6, 24))
    sparse = SparseLinear.from_dense(dense)
    for x in (torch.randn(24, 50).T, torch.randn(2, 3, 4, 24), torch.randn(24), torch.randn(9, 48)[:, ::2]):
        assert sparse(x).shape == dense(x).shape
        assert error(sparse(x), dense, x) < 2e-6


def test_kept_zeros_and_empty_rows():
    weight, mask = torch.randn(10, 16), NM(2, 4).mask(torch.rand(10, 16))
    mask[3] = False
    weight = weight.masked_fill(~mask, 0.0)
    weight[5] = 0.0
    for pattern in (NM(2, 4), Unstructured(0.5)):
        sparse, x = SparseLinear(pack(weight, mask, pattern), torch.ones(10)), torch.randn(4, 16)
        exact = x.double() @ weight.double().T + 1
        assert (sparse(x) - exact).abs().max() < 2e-6
        assert sparse(x)[:, [3, 5]].eq(1).all()


@pytest.mark.parametrize("text", ["2:4", "1:4", "0.9"])
@pytest.mark.parametrize(
    "settings",
    [
        dict(kernel_size=3, padding=1),
        dict(kernel_size=1),
        dict(kernel_size=3, stride=2, padding=1),
        dict(kernel_size=(3, 5), padding=(1, 2), dilation=2),
        dict(kernel_size=1, stride=2),
        dict(kernel_size=(2, 4), padding="same"),
        dict(kernel_size=3, padding="valid", bias=False),
        dict(kernel_size=3, padding=2, padding_mode="reflect"),
        dict(kernel_size=(3, 2), padding=(1, 2), padding_mode="circular"),
        dict(kernel_size=3, padding=3, stride=(1, 3)),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")  # the dense layer's own
def test_convolution_against_float64(text, settings):
    pattern = parse_pattern(text)
    for channels, out, images, height, width in ((8, 24, 2, 13, 11), (16, 5, 3, 7, 7), (4, 9, 1, 20, 33)):
        dense = sparsify(nn.Conv2d(channels, out, **settings), pattern)
        x = torch.randn(images, channels, height, width)
        sparse = SparseConv2d.from_dense(dense, pattern)
        assert sparse(x).shape == dense(x).shape
        assert error(sparse(x), dense, x) < 2e-6, (channels, out)
        fused = SparseConv2d.from_dense(dense, pattern, activation="gelu")
        assert error(fused(x), dense, x, "gelu") < 2e-6


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(1, 4), Unstructured(0.9)], ids=str)
@pytest.mark.parametrize(
    ("images", "channels", "size", "kernel", "stride", "padding", "dilation"),
    [
        (16, 8, (9, 7), 3, 1, 1, 1),
        (32, 8, (9, 7), 3, 2, 1, 1),
        (48, 16, (20, 33), (3, 5), (1, 2), (1, 2), (2, 1)),
        (16, 8, (7, 7), 1, 1, 0, 1),
        (32, 8, (7, 8), 1, 2, 0, 1),
        (16, 4, (56, 56), 3, 1, 1, 1),
        (16, 4, (5, 5), 3, 1, 4, 1),
        (8, 8, (9, 7), 3, 1, 1, 1),
        (24, 12, (9, 30), (3, 5), (2, 1), (1, 2), (1, 2)),
        (8, 20, (28, 28), 3, 1, 1, 1),
        (40, 8, (7, 7), 1, 2, 0, 1),
        (8, 4, (5, 6), (2, 3), (3, 2), 3, 2),
    ],
)
def test_images_innermost_stay_so(pattern, images, channels, size, kernel, stride, padding, dilation):
    conv = nn.Conv2d(channels, 12, kernel, stride, padding, dilation)
    conv.weight.data *= pattern.mask(conv.weight.data.abs())
    sparse = SparseConv2d.from_dense(conv, pattern, activation="relu")
    x = torch.randn(images, channels, *size)
    laid = reference.innermost_images(x)
    assert torch.equal(laid, x)
    assert laid.stride()[0] == 1
    with torch.no_grad():
        want, found = conv.double()(x.double()).relu(), sparse(laid)
        assert found.permute(1, 2, 3, 0).is_contiguous()
        assert ((found - want).norm() / want.norm()).item() < 2e-6
        threads = torch.get_num_threads()
        try:  # a portion for each, or one that they share
            torch.set_num_threads(3)
            assert torch.equal(sparse(laid), found)
        finally:
            torch.set_num_threads(threads)
        sparse.innermost = True  # brings its input into the layout, where it is of use
        assert sparse(x).is_contiguous() == (images % INNERMOST > 0)
        assert ((sparse(x) - want).norm() / want.norm()).item() < 2e-6
        assert sparse(x[:3]).is_contiguous()  # too few
        assert torch.equal(
            sparse(x[:3]), SparseConv2d.from_dense(conv.float(), pattern, activation="relu")(x[:3])
        )


def test_convolution_of_views_one_image_and_none():
    dense = sparsify(nn.Conv2d(8, 6, 3, padding=1), NM(2, 4))
    sparse = SparseConv2d.from_dense(dense)
    for x in (
        torch.randn(8, 9, 9),
        torch.randn(2, 8, 9, 9).contiguous(memory_format=torch.channels_last),
        torch.randn(2, 8, 18, 9)[:, :, ::2],
        torch.randn(1, 8, 1, 1),
    ):
        assert sparse(x).shape == dense(x).shape
        assert error(sparse(x), dense, x) < 2e-6
    assert sparse(torch.randn(0, 8, 9, 9)).shape == (0, 6, 9, 9)
    last = torch.randn(2, 8, 9, 9).contiguous(memory_format=torch.channels_last)
    for dtype in (
        torch.float32,
        torch.float64,
        torch.bfloat16,
    ):  # by a kernel, by the reference, by the kernel, widened
        assert sparse.to(dtype)(last.to(dtype)).is_contiguous(memory_format=torch.channels_last)
        assert sparse(last.to(dtype).contiguous()).is_contiguous()
    weight = (sparse.values, sparse.codes, sparse.bias, sparse.shape, 2, 4)
    torch.library.opcheck(
        torch.ops.snows.sparse_conv2d.default,
        (last.bfloat16(), *weight, (1, 1), (1, 1), (1, 1), "none", sparse.order),
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(dtype):
    limit = {torch.float16: 2e-3, torch.bfloat16: 1e-2, torch.float64: 1e-14}[dtype]
    dense = sparsify(nn.Linear(64, 32), NM(2, 4)).to(dtype)
    x = torch.randn(20, 64, dtype=dtype)
    assert error(SparseLinear.from_dense(dense, activation="gelu")(x), dense, x, "gelu") < limit
    moved = SparseLinear.from_dense(dense.float()).to(dtype)
    assert moved.values.dtype == dtype
    assert moved.codes.dtype == torch.uint8
    assert error(moved(x), dense, x) < limit
    assert error(moved.float()(x.float()), dense, x) < max(limit, 2e-6)


def test_unpack_gives_the_dense_layer_back():
    for dense in (nn.Linear(24, 7), nn.Linear(24, 7, bias=False)):
        back = SparseLinear.from_dense(sparsify(dense, NM(2, 4)).eval()).unpack()
        assert type(back) is nn.Linear
        assert not back.training
        assert {k: v.tolist() for k, v in back.state_dict().items()} == {
            k: v.tolist() for k, v in dense.state_dict().items()
        }
    dense = sparsify(nn.Conv2d(8, 6, (2, 3), (2, 1), "valid", (1, 2), padding_mode="replicate"), NM(1, 4))
    back = SparseConv2d.from_dense(dense).unpack()
    assert repr(back) == repr(dense)
    assert torch.equal(back.weight, dense.weight)
    assert torch.equal(back.bias, dense.bias)


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_copies_files_and_moves(kind, request):
    dense, sparse, x = request.getfixturevalue(kind)
    expected = sparse(x)
    assert error(expected, dense, x, "relu") < 2e-6
    assert set(sparse.state_dict()) == {"values", "codes", "bias"}
    file = io.BytesIO()
    torch.save(sparse, file)
    file.seek(0)
    for other in (
        copy.deepcopy(sparse),
        pickle.loads(pickle.dumps(sparse)),
        torch.load(file, weights_only=False),
        copy.deepcopy(sparse).to("meta").to_empty(device="cpu"),
        copy.deepcopy(sparse).double().float(),
    ):
        other.load_state_dict(sparse.state_dict())
        assert torch.equal(other(x), expected)
        assert torch.equal(other.order[ORIGIN:], sparse.order[ORIGIN:])
    assert sparse.order.numel() < 2 or sparse.order.numpy().tobytes() not in pickle.dumps(sparse)
    with torch.inference_mode():
        assert torch.equal(sparse(x), expected)


def test_loading_arranges_anew_and_checks():
    first, second = (sparsify(nn.Linear(32, 8), NM(2, 4)) for _ in range(2))
    x, sparse = torch.randn(4, 32), SparseLinear.from_dense(first)
    state = SparseLinear.from_dense(second).state_dict()
    for assign in (False, True):
        sparse = SparseLinear.from_dense(first)
        sparse.load_state_dict(state, assign=assign)
        assert error(sparse(x), second, x) < 2e-6
    broken = nn.Sequential(SparseLinear.from_dense(first))
    state = broken.state_dict()
    state["0.codes"] = torch.zeros_like(state["0.codes"])
    with pytest.raises(
        RuntimeError, match="0: packed weight: expected codes for 128 stored values, got codes for 0"
    ):
        broken.load_state_dict(state)


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_autocast_rounds_the_output_only(kind, request):
    _, sparse, x = request.getfixturevalue(kind)
    with torch.autocast("cpu", torch.bfloat16):
        high, low = sparse(x), sparse(x.bfloat16())
    assert torch.equal(high, sparse(x).bfloat16())
    assert torch.equal(low, sparse(x.bfloat16().float()).bfloat16())


@pytest.mark.filterwarnings(
    "ignore:The given buffer is not writable:UserWarning"
)  # torch 2.11 of its own files
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_compile_and_export(kind, request):
    _, sparse, x = request.getfixturevalue(kind)
    expected = sparse(x)
    torch._dynamo.reset()
    compiled = torch.compile(sparse, fullgraph=True, backend="aot_eager")
    for images in (x, x[:2], x[:1]):
        assert (compiled(images) - expected[: len(images)]).abs().max() < 2e-6
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(compiled(x), expected.bfloat16())
    program = torch.export.export(sparse, (x,), dynamic_shapes=({0: torch.export.Dim("images")},))
    assert set(program.state_dict) == {"values", "codes", "bias"}
    assert not program.constants
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for images in (x, x[:2]):
        assert (loaded(images) - expected[: len(images)]).abs().max() < 2e-6


@pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None
    or not Path(sysconfig.get_path("include"), "Python.h").exists(),
    reason="inductor needs a C++ compiler and Python's headers",
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inductor's own imports
def test_compile_with_inductor(linear):
    _, sparse, x = linear
    model = nn.Sequential(sparse, nn.Tanh())
    assert (torch.compile(model, fullgraph=True)(x) - sparse(x).tanh()).abs().max() < 2e-6


def test_the_ops_pass_opcheck():
    def arguments(layer):
        return (layer.values, layer.codes, layer.bias, layer.shape, *layer.packed.group)

    linear = SparseLinear.from_dense(sparsify(nn.Linear(8, 6), NM(2, 4)))
    conv = SparseConv2d.from_dense(sparsify(nn.Conv2d(4, 6, 3), NM(2, 4)))
    for order in (None, linear.order):
        torch.library.opcheck(
            torch.ops.snows.sparse_linear.default, (torch.randn(3, 8), *arguments(linear), "relu", order)
        )
    for order in (None, conv.order):
        torch.library.opcheck(
            torch.ops.snows.sparse_conv2d.default,
            (torch.randn(2, 4, 5, 5), *arguments(conv), (1, 1), (1, 1), (1, 1), "gelu", order),
        )


def test_kernels_and_references_are_one_definition(linear, conv):
    _, sparse, x = linear
    weight = reference.unpack(sparse.values, sparse.codes, sparse.shape, 2, 4)
    assert torch.equal(weight, linear[0].weight)
    args = (sparse.values, sparse.codes, sparse.bias, sparse.shape, 2, 4)
    assert (
        reference.sparse_linear(x, *args, "gelu") - ops.sparse_linear(x, *args, "gelu", sparse.order)
    ).abs().max() < 2e-6
    _, sparse, x = conv
    args = (sparse.values, sparse.codes, sparse.bias, sparse.shape, 1, 4, (2, 1), (1, 0), (1, 2))
    assert (
        reference.sparse_conv2d(x, *args, "gelu") - ops.sparse_conv2d(x, *args, "gelu", sparse.order)
    ).abs().max() < 2e-6


def test_nan_stays_in_its_token():
    sparse, x = SparseLinear.from_dense(sparsify(nn.Linear(16, 8), NM(2, 4))), torch.randn(5, 16)
    clean = sparse(x)
    x[2] = torch.nan
    assert sparse(x)[2].isnan().all()
    keep = [0, 1, 3, 4]
    assert torch.equal(sparse(x)[keep], clean[keep])


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: SparseLinear.from_dense(nn.Linear(8, 4)), "expected a weight with zeros"),
        (lambda: SparseLinear.from_dense(nn.Linear(8, 4), NM(2, 4)), "got 4 in row 0, group 0"),
        (lambda: SparseLinear.from_dense(nn.Conv2d(4, 4, 1)), "expected an nn.Linear, got Conv2d"),
        (lambda: SparseConv2d.from_dense(nn.Linear(8, 4)), "expected an nn.Conv2d, got Linear"),
        (
            lambda: SparseConv2d.from_dense(nn.Conv2d(8, 8, 3, groups=8)),
            "expected a convolution of 1 group, got 8",
        ),
        (
            lambda: SparseLinear.from_dense(sparsify(nn.Linear(8, 4), NM(2, 4)), activation="tanh"),
            "expected an activation of None",
        ),
        (
            lambda: SparseLinear(pack(torch.eye(8), None, NM(2, 4)), torch.zeros(7)),
            r"expected a bias of \(8,\)",
        ),
        (
            lambda: SparseConv2d(pack(torch.eye(8), None, NM(2, 4))),
            "expected a packed weight of .out, in, kernel",
        ),
        (
            lambda: SparseLinear(100, 37),
            "expected a packed weight of .out, in., got int; SparseLinear.from_dense",
        ),
        (lambda: SparseLinear.from_dense(sparsify(nn.Linear(8, 4), NM(2, 4)), "2:4"), "got '2:4'"),
        (
            lambda: SparseLinear(pack(torch.eye(8), None, NM(2, 4)))(torch.ones(2, 7)),
            "an input with 8 channels, got 7",
        ),
        (
            lambda: SparseLinear(pack(torch.eye(8), None, NM(2, 4)))(torch.ones(2, 8).double()),
            "weight's torch.float32, got torch.float64",
        ),
        (
            lambda: SparseConv2d(pack(torch.eye(8)[..., None, None], None, NM(2, 4)))(torch.ones(8, 2)),
            "3 or 4 dimensions",
        ),
        (
            lambda: SparseConv2d(pack(torch.zeros(4, 4, 3, 3), None, NM(2, 4)))(torch.ones(1, 4, 2, 5)),
            "no smaller than the kernel",
        ),
    ],
)
def test_mistakes_are_one_sentence(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_a_layer_s_bytes():
    sparse = SparseLinear.from_dense(sparsify(nn.Linear(64, 64, bias=False), NM(2, 4)))
    saved = io.BytesIO()
    torch.save(sparse.state_dict(), saved)
    assert sum(v.nbytes for v in sparse.state_dict().values()) <= 0.54 * 4 * 64 * 64
    assert math.isclose(sparse.packed.nbytes, 64 * 64 * (2 + 1 / 8))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_of_input_and_bias_are_the_dense_layer_s(activation):
    for dense, build, x in (
        (sparsify(nn.Linear(8, 3), NM(2, 4)), SparseLinear, torch.randn(1, 2, 8)),
        (sparsify(nn.Conv2d(4, 2, 3, 2, 1), NM(1, 4)), SparseConv2d, torch.randn(1, 4, 3, 4)),
    ):
        sparse, there, here = (
            build.from_dense(dense, activation=activation),
            x.clone().requires_grad_(),
            x.clone().requires_grad_(),
        )
        sparse.bias.requires_grad_()
        ACTIVATIONS[activation](dense(there)).square().sum().backward()
        sparse(here).square().sum().backward()
        assert (here.grad - there.grad).abs().max() < 1e-5
        assert (sparse.bias.grad - dense.bias.grad).abs().max() < 1e-4
        exact = build.from_dense(dense.double(), activation=activation)
        assert torch.autograd.gradcheck(exact, x.double().requires_grad_())
        assert torch.autograd.gradgradcheck(exact, x.double().requires_grad_())


def kernels():
    return ops.implementation("sparse_linear") == "native"


@pytest.mark.skipif(not kernels(), reason="the native kernels were not built")
def test_kernels_take_float32_and_not_float64():
    sparse = SparseLinear.from_dense(sparsify(nn.Linear(64, 32), NM(2, 4)))
    assert sparse.order.numel() > 0
    assert copy.deepcopy(sparse).double().order.numel() == 0
    x = torch.randn(9, 64)
    direct = ops.sparse_linear(
        x, sparse.values, sparse.codes, sparse.bias, sparse.shape, 2, 4
    )  # without an order: unpacked
    assert torch.allclose(direct, sparse(x), atol=1e-5)


@pytest.mark.skipif(not kernels(), reason="the native kernels were not built")
@pytest.mark.parametrize(("out", "inputs", "tokens"), [(1104, 64, 1000), (1040, 1200, 1100), (2600, 96, 7)])
def test_wide_layers_on_one_thread_and_two(out, inputs, tokens):
    """More rows than one pass has sums for; panels kept and not; outputs large enough to pass the caches."""
    dense = sparsify(nn.Linear(inputs, out), NM(2, 4))
    sparse, x = SparseLinear.from_dense(dense), torch.randn(tokens, inputs)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            assert error(sparse(x), dense, x) < 2e-6
    finally:
        torch.set_num_threads(threads)


@pytest.mark.skipif(not kernels(), reason="the native kernels were not built")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("text", PATTERNS)
def test_kernels_compute_16_bits_in_float32(text, dtype):
    pattern = parse_pattern(text)
    multiplies = torch.backends.cpu.get_cpu_capability() == "AVX512" and torch.cpu._is_avx512_bf16_supported()
    for kind, dense, shapes in (
        (SparseLinear, nn.Linear(128, 40), [(128,), (1, 128), (33, 128)]),
        (SparseLinear, nn.Linear(67, 5, bias=False), [(67,), (17, 67)]),
        (SparseConv2d, nn.Conv2d(8, 6, 3, padding=1), [(2, 8, 9, 7), (16, 8, 5, 5)]),
        (SparseConv2d, nn.Conv2d(8, 6, 1, 2), [(3, 8, 9, 7)]),
    ):
        if kind is SparseConv2d and isinstance(pattern, NM) and pattern.fits(dense.weight.shape):
            continue
        short = kind.from_dense(sparsify(dense, pattern), pattern, activation="relu").to(dtype)
        wide = copy.deepcopy(short).float()
        assert short.kernel == "native"
        itself = (
            multiplies and dtype == torch.bfloat16 and (kind is SparseConv2d or dense.in_features % 2 == 0)
        )  # by the next tests
        assert torch.equal(short.order[ORIGIN:], wide.order[ORIGIN:]) != itself
        for shape in shapes:
            x = torch.randn(shape).to(dtype)
            layouts = [x] if x.ndim < 4 else [x, x.contiguous(memory_format=torch.channels_last)]
            layouts += [reference.innermost_images(x)] if len(shape) == 4 and shape[0] % 8 == 0 else []
            for laid in layouts:
                found = short(laid)
                assert found.dtype == dtype
                assert torch.equal(found, wide(laid.float()).to(dtype)) or itself
                assert found.stride() == wide(laid.float()).stride()


@pytest.mark.parametrize("text", PATTERNS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_linear_in_bfloat16_against_float64(text, activation):
    """Sums in float32, rounded once, of exact products: whether the processor multiplies bfloat16 or widens it."""
    pattern = parse_pattern(text)
    for out, inputs, tokens in (
        (96, 160, 300),
        (34, 68, 17),
        (2, 2, 3),
        (1026, 768, 95),
        (770, 130, 257),
        (33, 66, 40),
        (64, 67, 33),
        (6, 256, 1),
    ):
        dense = sparsify(nn.Linear(inputs, out, bias=out != 34), pattern).bfloat16()
        x = torch.randn(tokens + 1, inputs).bfloat16()[1:]
        found = SparseLinear.from_dense(dense, pattern, activation=activation)(x)
        wide = copy.deepcopy(dense).double()
        exact = ACTIVATIONS[activation](wide(x.double()))
        size = x.double().abs() @ wide.weight.abs().T + (1 if dense.bias is None else wide.bias.abs())
        rounded = (
            0 if kernels() else 2**-8 * wide(x.double()).abs()
        )  # the reference rounds before its activation too
        assert found.dtype == torch.bfloat16
        assert ((found.double() - exact).abs() <= 2**-8 * exact.abs() + rounded + 1e-6 * size).all(), (
            out,
            inputs,
            tokens,
        )


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(1, 4), Unstructured(0.9), Unstructured(0.5)], ids=str)
@pytest.mark.parametrize(
    ("images", "channels", "out", "size", "kernel", "stride", "padding", "dilation"),
    [
        (3, 8, 7, (13, 11), 3, 1, 1, 1),
        (16, 8, 12, (9, 7), 3, 1, 1, 1),
        (32, 8, 12, (9, 7), 3, 2, 1, 1),
        (48, 16, 12, (20, 33), (3, 5), (1, 2), (1, 2), (2, 1)),
        (16, 8, 12, (7, 7), 1, 1, 0, 1),
        (32, 8, 5, (7, 8), 1, 2, 0, 1),
        (16, 4, 12, (56, 56), 3, 1, 1, 1),
        (40, 4, 12, (5, 5), 3, 1, 4, 1),
    ],
)
def test_convolution_in_bfloat16_against_float64(
    pattern, images, channels, out, size, kernel, stride, padding, dilation
):
    dense = sparsify(nn.Conv2d(channels, out, kernel, stride, padding, dilation), pattern).bfloat16()
    sparse, wide = SparseConv2d.from_dense(dense, pattern, activation="relu"), copy.deepcopy(dense).double()
    x = torch.randn(images, channels, *size).bfloat16()
    exact = wide(x.double())
    largest = F.conv2d(x.double().abs(), wide.weight.abs(), wide.bias.abs(), stride, padding, dilation)
    for given in (
        x,
        x.contiguous(memory_format=torch.channels_last),
        *([reference.innermost_images(x)] if images % 8 == 0 else []),
    ):
        found = sparse(given)
        assert found.dtype == torch.bfloat16
        assert reference.images_innermost(found) == reference.images_innermost(given)
        assert ((found.double() - exact.relu()).abs() <= 2**-8 * exact.abs() + 1e-6 * largest).all()


@pytest.mark.skipif(not kernels(), reason="the native kernels were not built")
@pytest.mark.parametrize("capability", ["avx2", "default"])
def test_the_other_instruction_sets(capability):
    script = """
import torch, torch.nn.functional as F
from snows import NM, SparseConv2d, SparseLinear, Unstructured, reference
from snows.packing import pack
torch.manual_seed(0)
def close(y, exact):
    assert float((y - exact).norm() / exact.norm()) < 2e-6
for pattern in (NM(2, 4), NM(1, 4), NM(3, 8), Unstructured(0.9)):
    for out, inputs, tokens in ((70, 160, 150), (300, 64, 1), (33, 40, 17)):
        w, b, x = torch.randn(out, inputs), torch.randn(out), torch.randn(tokens, inputs)
        w *= pattern.mask(w.abs())
        close(SparseLinear(pack(w, None, pattern), b)(x), F.linear(x.double(), w.double(), b.double()))
    w, x = torch.randn(20, 16, 3, 3), torch.randn(3, 16, 9, 9)
    w *= pattern.mask(w.abs())
    close(SparseConv2d(pack(w, None, pattern), stride=2, padding=1)(x), F.conv2d(x.double(), w.double(), stride=2, padding=1))
    for images in (8, 16, 24):
        x = torch.randn(images, 16, 9, 30)
        close(SparseConv2d(pack(w, None, pattern), padding=1)(reference.innermost_images(x)), F.conv2d(x.double(), w.double(), padding=1))
print(torch.backends.cpu.get_cpu_capability())
"""
    package = str(Path(ops.__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env={**os.environ, "ATEN_CPU_CAPABILITY": capability, "PYTHONPATH": package},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().upper() == capability.upper()


@pytest.mark.skipif(
    not kernels() or not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2,
    reason="needs the native kernels and two cores",
)
def test_two_threads_share_the_work():
    dense = sparsify(nn.Linear(512, 512), NM(2, 4))
    sparse, x, threads = SparseLinear.from_dense(dense), torch.randn(1024, 512), torch.get_num_threads()
    expected = sparse(x)
    try:
        torch.set_num_threads(2)
        for _ in range(
            500
        ):  # a thread that finds its core busy leaves its share to the other; on a busy machine that may take a while
            everyone, mine = time.process_time(), time.thread_time()
            for _ in range(20):
                output = sparse(x)
            everyone, mine = time.process_time() - everyone, time.thread_time() - mine
            if everyone - mine > 0.25 * everyone:
                break
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(output, expected)
    assert everyone - mine > 0.25 * everyone


def test_without_the_kernels_everything_is_the_reference():
    script = """
import torch
from snows import NM, SparseLinear, ops
from snows.packing import pack
assert ops.implementation("sparse_linear") == "reference"
w, x = torch.randn(6, 8), torch.randn(3, 8)
w *= NM(2, 4).mask(w.abs())
assert (SparseLinear(pack(w, None, NM(2, 4)))(x) - x @ w.T).abs().max() < 1e-6
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env={**os.environ, "SNOWS_REFERENCE": "1", "PYTHONPATH": str(Path(ops.__file__).parents[2])},
    )
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------- what PyTorch differentiates and rewrites


def sparse_pair():
    """A convolution and a linear layer with their packed copies, each with an input."""
    for dense, x in ((nn.Linear(16, 12), torch.randn(5, 16)), (nn.Conv2d(4, 8, 3), torch.randn(2, 4, 6, 6))):
        dense.weight.data *= torch.rand_like(dense.weight) > 0.6
        kind = SparseLinear if isinstance(dense, nn.Linear) else SparseConv2d
        yield dense, kind.from_dense(dense, activation="relu"), x


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_packed_layer_gives_gradients(backend):
    for dense, packed, x in sparse_pair():
        given, wanted = (x.clone().requires_grad_() for _ in range(2))
        torch.compile(packed, backend=backend)(given).square().sum().backward()
        dense(wanted).relu().square().sum().backward()
        assert torch.allclose(given.grad, wanted.grad, rtol=1e-4, atol=1e-5)


def test_checkpointed_packed_layers_give_gradients():
    for dense, packed, x in sparse_pair():
        given, wanted = (x.clone().requires_grad_() for _ in range(2))
        checkpoint(packed, given, use_reentrant=False).square().sum().backward()
        dense(wanted).relu().square().sum().backward()
        assert torch.allclose(given.grad, wanted.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.skipif(not ops.native.startswith("loaded"), reason="PyTorch's own registration gives zeros")
def test_a_forward_derivative_is_refused():
    for _, packed, x in sparse_pair():
        with pytest.raises(NotImplementedError, match="expected no forward-mode derivative"):
            torch.func.jvp(packed, (x,), (torch.ones_like(x),))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_an_exported_layer_with_images_innermost_takes_any_number_of_images():
    _, (dense, packed, _) = sparse_pair()
    packed.innermost = True
    any_number = ({0: torch.export.Dim("images", min=1, max=64)},)
    program = torch.export.export(packed, (torch.randn(16, 4, 6, 6),), dynamic_shapes=any_number).module()
    for images in (3, 16):
        x = torch.randn(images, 4, 6, 6)
        assert torch.allclose(program(x), dense(x).relu(), rtol=1e-4, atol=1e-5)
