"""Small networks with the shapes that break pruners: shared and functional activations, branches, odd convolutions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

import snows
from snows.choosing.measuring import Stopwatch


class Branches(nn.Module):
    """Parallel branches, a functional residual that is changed in place, one shared in-place activation, groups, dilation."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.left = nn.Conv2d(8, 8, 3, padding="same", dilation=2, groups=2, bias=False)
        self.right = nn.Sequential(nn.Conv2d(8, 8, (1, 3), padding=(0, 1)), nn.BatchNorm2d(8))
        self.depthwise = nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=8, padding_mode="reflect")
        self.point = nn.Conv2d(8, 12, 1)
        self.head = nn.Linear(12, 5)

    def forward(self, x):
        x = self.relu(self.norm(self.stem(x)))
        y = self.left(x)
        y += self.right(x)
        y = F.hardswish(y)
        y += x
        y = self.relu(self.depthwise(y))
        y = torch.sigmoid(self.point(y))
        return self.head(y.mean((2, 3)))


class PaddedConv(nn.Conv2d):
    """A subclass that pads for itself, as TensorFlow's "same" does."""

    def forward(self, x):
        return F.conv2d(
            F.pad(x, (0, 1, 0, 1)), self.weight, self.bias, self.stride, 0, self.dilation, self.groups
        )


class Mapped(nn.Module):
    """Takes a keyword, returns a mapping, like a transformers model; its attention is PyTorch's module."""

    def __init__(self, width=16, batch_first=True):
        super().__init__()
        self.patch = PaddedConv(3, width, 3, stride=4)
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=batch_first)
        self.batch_first = batch_first
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.head = nn.Linear(width, 6)

    def forward(self, pixel_values):
        x = self.patch(pixel_values).flatten(2).transpose(1, 2)
        y = self.norm(x)
        if not self.batch_first:
            y = y.transpose(0, 1)
        y = self.attention(y, y, y, need_weights=False)[0]
        x = x + (y if self.batch_first else y.transpose(0, 1))
        x = x + self.mlp(x)
        return {"logits": self.head(x.mean(1)), "hidden": x}


def settle(net):
    """Evaluation mode, with statistics and parameters that are not the initial ones."""
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
            nn.init.normal_(module.weight, 1, 0.2)
            nn.init.normal_(module.bias, 0, 0.2)
    return net.eval()


class Chain(nn.Module):
    """conv, BatchNorm, ReLU, twice; `tap` says what else is read."""

    def __init__(self, tap="", inplace=False):
        super().__init__()
        self.first, self.first_norm = nn.Conv2d(4, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.second, self.second_norm = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        self.act, self.last_act = nn.ReLU(inplace), nn.GELU()
        self.tap = tap

    def forward(self, x):
        a = self.first(x)
        b = self.first_norm(a)
        c = self.act(b)
        d = self.second_norm(self.second(c))
        y = self.last_act(d)
        return y + {"": 0, "conv": a, "norm": b, "last": d}[self.tap]


def masked(net, pattern=snows.NM(2, 4), skip=()):  # noqa: B008
    """Zeros by magnitude in every layer that the pattern fits; `in_proj` of attention included."""
    for name, p in net.named_parameters():
        fits = (
            p.ndim in (2, 4)
            and name.endswith("weight")
            and (not isinstance(pattern, snows.NM) or p.shape[1] % pattern.m == 0)
        )
        if fits and not any(part in name for part in skip):
            p.data *= pattern.mask(p.data.abs())
    return net.eval()


def packed_layer():
    """A network of one layer, packed at 2:4, of eight features to six."""
    dense = nn.Linear(8, 6)
    dense.weight.data *= snows.NM(2, 4).mask(dense.weight.data.abs())
    return nn.Sequential(snows.SparseLinear.from_dense(dense)).eval()


QUICK = Stopwatch(layer_seconds=0, network_seconds=0, rounds=2, repeats=1)  # for times that mean nothing


def small(net, example, **settings):
    return snows.deploy(net, example, objective="size", stopwatch=QUICK, progress=False, **settings)
