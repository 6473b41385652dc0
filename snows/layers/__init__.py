"""Layers that run on packed weights: drop-in for `nn.Linear` and `nn.Conv2d`, for inference."""

from snows.layers.base import PackedLayer
from snows.layers.conv2d import SparseConv2d
from snows.layers.linear import SparseLinear

__all__ = ["PackedLayer", "SparseConv2d", "SparseLinear"]
