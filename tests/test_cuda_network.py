"""The whole way on a device, against the CPU's results: prune, evaluate, deploy, save, load. The CPU itself is one of the devices."""

import copy

import pytest
import torch

import snows
from snows import NM, Newton, zoo
from snows.evaluation import evaluate, logits_of

devices = pytest.mark.parametrize("device", [
    "cpu", pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]),
])  # fmt: skip
LAYERS = {
    "resnet20": ["layer1.0.conv1", "layer2.0.conv1", "layer3.2.conv2"],
    "vit": ["blocks.0.qkv", "blocks.2.fc1", "blocks.5.fc2"],
}


@pytest.fixture(autouse=True)
def _any_algorithm():
    torch.use_deterministic_algorithms(False)  # cuBLAS would ask for an environment variable


def images(split, count):
    x, labels = zoo.images(split)
    return x[:count], None if labels is None else labels[:count]


def pruned(name, device):
    """The zoo's network on the device, and three layers of it at 2:4. The batches stay on the host."""
    dense = zoo.load(name).to(device)
    batches = list(images("calibration", 192)[0].split(48))
    return dense, *snows.prune(
        dense,
        batches,
        NM(2, 4),
        only=lambda layer, _: layer in LAYERS[name],
        solver=Newton(max_iterations=4),
        progress=False,
    )


@devices
@pytest.mark.parametrize("name", LAYERS)
def test_a_network_on_a_device_comes_out_as_on_the_cpu(name, device, tmp_path):
    dense, net, report = pruned(name, device)
    _, expected, theirs = pruned(name, "cpu")
    assert {x.device.type for x in (*net.parameters(), *net.buffers())} == {device}
    rows, others = ([x for x in r.layers if not x.reason] for r in (report, theirs))
    assert [x.name for x in rows] == [x.name for x in others] == LAYERS[name]
    for found, wanted in zip(rows, others, strict=True):
        assert found.kept == wanted.kept
        assert found.before == pytest.approx(
            wanted.before, rel=0.05
        )  # a tie may fall the other way: other sums
        assert found.after == pytest.approx(wanted.after, rel=0.05)
    assert sum(x.after for x in rows) < 0.97 * sum(x.before for x in rows)
    own, reference = net.state_dict(), expected.state_dict()
    for layer in LAYERS[name]:
        same = (own[f"{layer}.weight"].cpu() != 0) == (reference[f"{layer}.weight"] != 0)
        assert same.double().mean() > 0.99

    test, labels = images("test", 400)
    host = [(x, y) for x, y in zip(test.split(100), labels.split(100), strict=True)]
    there = [(x.to(device), y) for x, y in host]  # and labels that stayed behind
    targets = [logits_of(dense, x) for x, _ in host]
    assert all(x.device.type == device for x in targets)
    scores = evaluate(net, host, targets)
    assert evaluate(net, there, [x.cpu() for x in targets]) == pytest.approx(scores, rel=1e-5, abs=1e-7)
    wanted = evaluate(expected, host, [logits_of(zoo.load(name), x) for x, _ in host])
    assert scores.top1 == pytest.approx(wanted.top1, abs=1)
    assert scores.divergence == pytest.approx(wanted.divergence, rel=0.2)
    assert scores.divergence < 0.02

    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    fast, _ = snows.deploy(net, test[:64], objective="size", dtype=dtype, progress=False)
    packed = [
        layer for layer, m in fast.named_modules() if isinstance(m, snows.SparseLinear | snows.SparseConv2d)
    ]
    assert packed == LAYERS[name]
    agreeing = evaluate(fast, [(x.to(dtype), y) for x, y in host], [logits_of(net, x) for x, _ in host])
    assert agreeing.agreement >= (100 if device == "cpu" else 97)
    snows.save(fast, tmp_path / "x.safetensors")
    loaded = snows.load(tmp_path / "x.safetensors", copy.deepcopy(dense).to(dtype))
    assert {x.device.type for x in (*loaded.parameters(), *loaded.buffers())} == {device}
    with torch.no_grad():
        x = test[:64].to(device, dtype)
        assert torch.equal(loaded(x), fast(x))
