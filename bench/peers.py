"""Torch-Pruning 1.6 beside snows: the channels that it takes out at a share of the multiplications.

`pip install torch-pruning`; `zoo.py` and `examples/efficientnet_lite0.py` call this. It is used as its README does:
group magnitude, the same share everywhere, widths of any number, the classifier's outputs left alone. It leaves
the weights as they were; BatchNorm's statistics are measured again on the calibration images, as its users do.
"""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

NAME = "Torch-Pruning, statistics alone"
STEPS = 8  # halvings of the ratio


def macs(net, x):
    """Count the multiplications of one sample, attention's products too, by PyTorch's own counter."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        net(x[:1])
    return counter.get_total_flops() // 2


def torch_pruning(model, batches, share, heads=0):
    """Cut a copy of a network, so that at most a share of its multiplications stays.

    Args:
        model: in evaluation mode.
        batches: calibration images.
        share: of the multiplications.
        heads: of the layers named qkv, if there are any.
    """
    whole, low, high = macs(model, batches[0]), 0.0, 1.0
    for _ in range(STEPS):
        ratio = (low + high) / 2
        small = _cut(model, batches[0][:1], ratio, heads)
        low, high = (low, ratio) if macs(small, batches[0]) <= share * whole else (ratio, high)
    small = _cut(model, batches[0][:1], high, heads)
    _measure_statistics(small, batches)
    return small


def _cut(model, x, ratio, heads):
    import torch_pruning

    small = copy.deepcopy(model)
    linear = [m for m in small.modules() if isinstance(m, nn.Linear)]
    torch_pruning.pruner.BasePruner(
        small,
        x,
        importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=ratio,
        ignored_layers=linear[-1:],
        num_heads={m: heads for name, m in small.named_modules() if name.endswith("qkv")},
    ).step()
    return small


def _measure_statistics(net, batches):
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean over the batches
        norm.train()
    with torch.no_grad():
        for x in batches:
            net(x)
    net.eval()
