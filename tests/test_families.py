"""One `prune` for every family: torchvision, timm and transformers, random weights, small inputs."""

import copy
from functools import partial

import pytest
import torch
from conftest import define_torchvision_schemas
from models import settle
from torch import nn

import snows
from snows import NM, Matching, Newton, Unstructured
from snows.networks.attention import open_attention
from snows.networks.batches import Batch, output_tensors
from snows.networks.layers import prunable
from snows.sparsity import rows

define_torchvision_schemas()
torchvision = pytest.importorskip("torchvision", exc_type=ImportError)
timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")


def images(batch, size):
    """Five batches of nearly the same images, so that what is learnt on three holds on the fourth and the fifth."""
    base = torch.randn(batch, 3, size, size)
    return [base + 0.1 * torch.randn_like(base) for _ in range(5)]


def error(net, dense, x):
    """How far the outputs are from the dense network's, on images that were not used, relative to those."""
    with torch.no_grad():
        found, wanted = (output_tensors(Batch.of(x).through(n))[0] for n in (net, dense))
    return ((found - wanted).norm() / wanted.norm()).item()


def hf(name, **config):
    made = getattr(transformers, f"{name}Config")(num_labels=5, **config)
    return getattr(transformers, f"{name}ForImageClassification")(made)


FAMILIES = {
    "torchvision resnet50": (
        lambda: torchvision.models.resnet50(num_classes=10),
        64,
        ["layer1.0.conv2", "layer2.0.downsample.0", "layer4.2.conv3"],
    ),
    "torchvision mobilenet_v2": (
        lambda: torchvision.models.mobilenet_v2(),
        64,
        ["features.2.conv.0.0", "features.10.conv.2", "features.18.0"],
    ),
    "torchvision vit_b_16": (
        lambda: torchvision.models.vit_b_16(image_size=32),
        32,
        [
            "encoder.layers.encoder_layer_0.self_attention.in_proj",
            "encoder.layers.encoder_layer_5.self_attention.out_proj",
            "encoder.layers.encoder_layer_11.mlp.0",
        ],
    ),
    "torchvision swin_t": (
        lambda: torchvision.models.swin_t(),
        64,
        ["features.1.0.attn.qkv", "features.2.reduction", "features.5.3.mlp.3"],
    ),
    "timm vit": (
        lambda: timm.create_model("vit_tiny_patch16_224", img_size=32, depth=3),
        32,
        ["blocks.0.attn.qkv", "blocks.2.mlp.fc2"],
    ),
    "timm convnext": (
        lambda: timm.create_model("convnext_atto"),
        64,
        ["stages.1.downsample.1", "stages.2.blocks.3.mlp.fc1"],
    ),
    "transformers vit": (
        lambda: hf(
            "ViT",
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            image_size=32,
            patch_size=8,
        ),
        32,
        3,
    ),
    "transformers resnet": (
        lambda: hf("ResNet", embedding_size=16, hidden_sizes=[16, 32], depths=[2, 2], layer_type="basic"),
        32,
        4,
    ),
    "transformers swin": (
        lambda: hf(
            "Swin", image_size=32, patch_size=4, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4
        ),
        32,
        4,
    ),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_prunes(name):
    make, size, wanted = FAMILIES[name]
    torch.manual_seed(0)
    net = settle(make())
    for module in net.modules():  # a head of zeros would give outputs of zeros
        if isinstance(module, nn.Linear) and not module.weight.any():
            nn.init.trunc_normal_(module.weight, std=0.02)
    before = copy.deepcopy(net.state_dict())
    *batches, unused = images(4, size)
    if name.startswith("transformers"):
        unused = {"pixel_values": unused}
        batches = [{"pixel_values": x} for x in batches]
    if isinstance(wanted, int):  # the middle of all that run
        layers = list(prunable(net))
        wanted = layers[len(layers) // 3 : len(layers) // 3 + wanted]
    prune = partial(
        snows.prune,
        net,
        batches,
        NM(2, 4),
        only=lambda n, m: n in wanted,
        select=snows.magnitude,
        recalibrate=False,
        progress=False,
    )
    sparse, report = prune(matching=Matching(5), solver=Newton(max_iterations=4))
    assert type(sparse) is type(net)
    assert list(sparse.state_dict()) == list(before)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert sorted(x.name for x in report.layers if not x.reason) == sorted(wanted)
    masks, _ = prune(solver=None)
    assert error(sparse, net, unused) < error(masks, net, unused)
    opened = copy.deepcopy(sparse)
    open_attention(opened)
    for layer in wanted:
        weight = opened.get_submodule(layer).weight
        assert (rows(weight).unflatten(1, (-1, 4)) != 0).sum(-1).le(2).all()
        assert (weight == 0).float().mean() == pytest.approx(0.5, abs=0.01)
    changed = {k for k, v in sparse.state_dict().items() if not torch.equal(v, before[k])}
    assert len(changed) == len(wanted)


def test_depthwise_layers_are_prunable_unstructured():
    net = settle(torchvision.models.mobilenet_v2())
    depthwise = "features.5.conv.1.0"
    _, report = snows.prune(
        net,
        images(4, 64)[:4],
        {depthwise: Unstructured(0.4)},
        matching=Matching(3),
        progress=False,
        solver=Newton(max_iterations=4),
    )
    (layer,) = [x for x in report.layers if not x.reason]
    assert layer.kept == layer.size - round(0.4 * layer.size)
    with pytest.raises(ValueError, match="depthwise"):
        snows.prune(net, images(4, 64), {depthwise: NM(2, 4)}, progress=False)


def test_one_block_of_vit_l_16_at_full_width():
    block = torchvision.models.vision_transformer.EncoderBlock(16, 1024, 4096, 0.0, 0.0).eval()
    base = torch.randn(8, 17, 1024)
    *batches, unused = [base + 0.1 * torch.randn_like(base) for _ in range(5)]
    prune = partial(
        snows.prune, block, batches, NM(2, 4), only=lambda n, m: True, select=snows.magnitude, progress=False
    )
    sparse, report = prune(solver=Newton(max_iterations=3, preconditioner="none"))
    names = ["self_attention.in_proj", "self_attention.out_proj", "mlp.0", "mlp.3"]
    assert [x.name for x in report.layers] == names
    assert error(sparse, block, unused) < 0.95 * error(prune(solver=None).network, block, unused)
    for weight in (sparse.self_attention.in_proj_weight, sparse.mlp[0].weight, sparse.mlp[3].weight):
        assert (weight.unflatten(1, (-1, 4)) != 0).sum(-1).eq(2).all()
    assert isinstance(sparse.self_attention, nn.MultiheadAttention)
