"""Each op in plain PyTorch: the specification that every kernel is tested against.

What has a public function is described there, in `ops`; here is what only kernels and derivatives call.
"""

from snows.reference.cg import (  # noqa: I001 - side by side
    BB, CONVERGED, ITERATIONS, NEGATIVE_CURVATURE, NOT_FINITE, RR, RUNNING, RZ, STATUS, ZERO, batched_cg_update, cg_direction, cg_update,
)
from snows.reference.masks import masked, nm_mask, nm_select, pack_bits, unpack_bits
from snows.reference.nonlinear import affine_relu, affine_relu_grad, gelu, gelu_curve, layer_norm, layer_norm_curve, layer_norm_grad
from snows.reference.packed import (
    activate, code_bits, images_innermost, innermost_images, kernel_order, sparse_conv2d, sparse_linear, to_bits, unpack,
)
from snows.reference.sdpa import attention, attention_curve, attention_grad, attention_tangent

__all__ = [
    "BB", "CONVERGED", "ITERATIONS", "NEGATIVE_CURVATURE", "NOT_FINITE", "RR", "RUNNING", "RZ", "STATUS", "ZERO", "activate", "affine_relu",
    "affine_relu_grad", "attention", "attention_curve", "attention_grad", "attention_tangent", "batched_cg_update", "cg_direction", "cg_update",
    "code_bits", "gelu", "gelu_curve", "images_innermost", "innermost_images", "kernel_order", "layer_norm", "layer_norm_curve",
    "layer_norm_grad", "masked", "nm_mask", "nm_select", "pack_bits", "sparse_conv2d", "sparse_linear", "to_bits", "unpack", "unpack_bits",
]
