"""The ops: typed public functions that validate once for all devices, one module a family.

`register` holds the schemas and chooses what runs; `reference` says in plain PyTorch what has to come out.
"""

from snows import reference
from snows.ops.cg import batched_cg_update, cg_direction, cg_update
from snows.ops.masks import masked, nm_mask, nm_select, pack_bits
from snows.ops.nonlinear import affine_relu, gelu, layer_norm
from snows.ops.packed import ACTIVATIONS, kernel_order, sparse_conv2d, sparse_linear, unpack
from snows.ops.register import OPS, TRITON, implementation, native, triton
from snows.ops.sdpa import attention

__all__ = [
    "ACTIVATIONS",
    "OPS",
    "TRITON",
    "affine_relu",
    "attention",
    "batched_cg_update",
    "cg_direction",
    "cg_update",
    "gelu",
    "implementation",
    "kernel_order",
    "layer_norm",
    "masked",
    "native",
    "nm_mask",
    "nm_select",
    "pack_bits",
    "reference",
    "sparse_conv2d",
    "sparse_linear",
    "triton",
    "unpack",
]
