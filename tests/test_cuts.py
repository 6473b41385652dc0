"""Families of networks with half of every width cut: the cut network computes what the masked one does."""

import re
from collections import Counter

import pytest
import torch
from conftest import define_torchvision_schemas
from models import settle
from torch import nn

import snows
from snows.networks.batches import Batch, difference, outputs
from snows.networks.copies import working_copy
from snows.networks.proving import proved

define_torchvision_schemas()
torchvision = pytest.importorskip("torchvision", exc_type=ImportError)
timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")


def hf(name, kind="ForImageClassification", **config):
    return getattr(transformers, f"{name}{kind}")(
        getattr(transformers, f"{name}Config")(num_labels=5, **config)
    )


class PreAct(nn.Module):
    """A block of BatchNorm, ReLU and convolution, twice or as a bottleneck, before the addition (He et al. 2016)."""

    def __init__(self, inputs, outputs, stride, bottleneck):
        super().__init__()
        widths = [inputs, outputs // 4, outputs // 4, outputs] if bottleneck else [inputs, outputs, outputs]
        kernels = [1, 3, 1] if bottleneck else [3, 3]
        self.norms = nn.ModuleList(nn.BatchNorm2d(w) for w in widths[:-1])
        self.convs = nn.ModuleList(
            nn.Conv2d(a, b, k, stride if i == 1 - (not bottleneck) else 1, k // 2, bias=False)
            for i, (a, b, k) in enumerate(zip(widths[:-1], widths[1:], kernels, strict=True))
        )
        self.skip = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if inputs != outputs else nn.Identity()

    def forward(self, x):
        y = x
        for norm, conv in zip(self.norms, self.convs, strict=True):
            y = conv(torch.relu(norm(y)))
        return y + self.skip(x)


def cifar(widths, blocks, bottleneck=False):
    """HAP's networks: PreResNet-29 has bottlenecks, WideResNet-32 wide blocks."""
    layers, inputs = [nn.Conv2d(3, 16, 3, padding=1, bias=False)], 16
    for stage, width in enumerate(widths):
        for i in range(blocks):
            layers.append(PreAct(inputs, width, 2 if stage and not i else 1, bottleneck))
            inputs = width
    head = [nn.BatchNorm2d(inputs), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 10)]
    return nn.Sequential(*layers, *head)


class Basic(nn.Module):
    """The block of HAP's ResNet-56, whose shortcut pads with zeros."""

    def __init__(self, inputs, outputs):
        super().__init__()
        stride = 1 + (inputs != outputs)
        self.stride, self.more = stride, outputs - inputs
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs)

    def forward(self, x):
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        x = x[:, :, :: self.stride, :: self.stride]
        side = self.more // 2
        return torch.relu(y + nn.functional.pad(x, (0, 0, 0, 0, side, side)))


def resnet56():
    widths = [16] * 9 + [32] * 9 + [64] * 9
    blocks = [Basic(a, b) for a, b in zip([16, *widths[:-1]], widths, strict=True)]
    stem = [nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


class Yolo(nn.Module):
    """A backbone, and a head that concatenates what it sees at two scales, of which one is enlarged."""

    def __init__(self):
        super().__init__()

        def conv(a, b, k, s=1):
            return nn.Sequential(nn.Conv2d(a, b, k, s, k // 2, bias=False), nn.BatchNorm2d(b), nn.SiLU())

        self.stem, self.down = conv(3, 16, 3, 2), conv(16, 32, 3, 2)
        self.split, self.inner, self.join = conv(32, 32, 1), conv(16, 16, 3), conv(48, 32, 1)
        self.deep, self.lateral, self.mix = conv(32, 64, 3, 2), conv(64, 32, 1), conv(64, 32, 3)
        self.small, self.large = nn.Conv2d(32, 18, 1), nn.Conv2d(64, 18, 1)

    def forward(self, x):
        x = self.down(self.stem(x))
        a, b = self.split(x).chunk(2, 1)
        x = self.join(torch.cat([a, b, self.inner(b)], 1))
        deep = self.deep(x)
        up = nn.functional.interpolate(self.lateral(deep), scale_factor=2)
        return self.small(self.mix(torch.cat([x, up], 1))), self.large(deep)


slow = pytest.mark.slow
FAMILIES = {  # how it is made, pixels, groups that can lose units, why heads cannot if they cannot
    "resnet56": (resnet56, 32, {"channels": 29}, ""),
    "preresnet29": (lambda: cifar([64, 128, 256], 3, True), 16, {"channels": 22}, ""),
    "wideresnet": (lambda: cifar([64, 128], 2), 16, {"channels": 7}, ""),
    "yolo": (Yolo, 64, {"channels": 7}, ""),
    "timm vit": (
        lambda: timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2),
        64,
        {"heads": 2, "neurons": 2},
        "",
    ),
    "timm swin": (
        lambda: timm.create_model(
            "swin_tiny_patch4_window7_224", img_size=56, depths=(1, 2), embed_dim=24, num_heads=(2, 4)
        ),
        56,
        {"heads": 3, "neurons": 3},
        "",
    ),
    "timm beit": (
        lambda: timm.create_model("beit_base_patch16_224", img_size=64, depth=2, embed_dim=48, num_heads=3),
        64,
        {"neurons": 2},
        "does not run",
    ),
    "torchvision vit": (
        lambda: torchvision.models.VisionTransformer(32, 8, 2, 4, 48, 96),
        32,
        {"heads": 2, "neurons": 2},
        "",
    ),
    "torchvision swin": (
        lambda: torchvision.models.SwinTransformer([4, 4], 24, [2, 2], [2, 4], [4, 4]),
        64,
        {"neurons": 4},
        "does not run",
    ),
    "transformers vit": (
        lambda: hf(
            "ViT",
            image_size=32,
            patch_size=8,
            hidden_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=96,
        ),
        32,
        {"heads": 2, "neurons": 2},
        "",
    ),
    "transformers swin": (
        lambda: hf(
            "Swin", image_size=32, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4
        ),
        32,
        {"heads": 4, "neurons": 4},
        "",
    ),
    "transformers resnet": (
        lambda: hf("ResNet", embedding_size=16, hidden_sizes=[32, 64], depths=[2, 2], layer_type="basic"),
        32,
        {"channels": 7},
        "",
    ),
    "transformers segformer": (
        lambda: hf(
            "Segformer",
            "ForSemanticSegmentation",
            hidden_sizes=[16, 32, 40, 64],
            depths=[1, 1, 1, 1],
            decoder_hidden_size=32,
        ),
        64,
        None,
        "",
    ),
    "torchvision resnet50": (lambda: torchvision.models.resnet50(), 64, {"channels": 37}, ""),
    "torchvision vgg16_bn": (lambda: torchvision.models.vgg16_bn(), 224, {"channels": 13, "neurons": 2}, ""),
    "torchvision mobilenet_v3": (
        lambda: torchvision.models.mobilenet_v3_small(),
        64,
        {"channels": 26, "neurons": 1},
        "",
    ),
    "torchvision densenet121": (lambda: torchvision.models.densenet121(), 64, {"channels": 120}, ""),
    "torchvision shufflenet": (lambda: torchvision.models.shufflenet_v2_x0_5(), 64, None, ""),
    "torchvision regnet": (lambda: torchvision.models.regnet_y_400mf(), 64, {"channels": 37}, ""),
    "timm convnext": (lambda: timm.create_model("convnext_atto"), 64, {"channels": 12}, ""),
    "timm efficientnet": (lambda: timm.create_model("efficientnet_b0"), 64, {"channels": 40}, ""),
    "timm resnext50": (lambda: timm.create_model("resnext50_32x4d"), 64, {"channels": 21}, ""),
}
SMALL = ["yolo", "timm swin", "timm beit", "torchvision vit", "transformers vit"]


def masked(net, free, kept):
    """The network in which zeros stand in the columns that read what goes, written out unit by unit."""
    net, _ = working_copy(net)
    with torch.no_grad():
        for group in free:
            for unit in set(range(group.units)) - set(
                kept.get(group.name, torch.arange(group.units)).tolist()
            ):
                for name, columns in group.columns.items():
                    layer = net.get_submodule(name)
                    if getattr(layer, "groups", 1) == 1:
                        layer.weight[:, columns[unit]] = 0
    return net


@pytest.mark.parametrize("family", [x if x in SMALL else pytest.param(x, marks=slow) for x in FAMILIES])
def test_half_of_every_width_is_cut(family):
    make, size, kinds, why = FAMILIES[family]
    torch.manual_seed(0)
    net, x = settle(make()), torch.randn(2, 3, size, size)
    found = snows.groups(net, x)
    free = [group for group in found if not group.reason]
    if kinds is not None:
        assert Counter(group.kind for group in free) == kinds
    heads = [group.reason for group in found if group.kind == "heads" and group.units > 1 and group.reason]
    assert all(re.search(why, reason) for reason in heads)
    assert bool(heads) == bool(why) or kinds is None
    opened, _ = working_copy(net)
    kept = {group.name: torch.arange(group.units)[::2] for group in free}
    take, declined = proved(opened, Batch.of(x), free, kept)
    kept = {name: units for name, units in kept.items() if name not in declined}
    take.apply(opened)
    assert not declined or kinds is None
    assert difference(outputs(masked(net, free, kept), Batch.of(x)), outputs(opened, Batch.of(x))) <= 1e-5
    for (tensor, dim), units in take.kept.items():
        assert dict(opened.state_dict(keep_vars=True)).get(tensor, torch.empty(0)).shape[dim] == len(units)
