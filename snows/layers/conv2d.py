"""A Conv2d on a packed weight."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from snows import ops, reference
from snows.layers.base import Activation, PackedLayer, check_weight, filled, packed_from
from snows.packing import Packed
from snows.sparsity import NM, Unstructured

PaddingMode: TypeAlias = Literal["zeros", "reflect", "replicate", "circular"]
Pair: TypeAlias = int | tuple[int, ...]
# images, of which the CPU's kernels take a multiple innermost: a vector of them
INNERMOST = 16 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 8
_Conv2d: Any = nn.Conv2d  # whose annotations ask for pairs: what is given here is checked by `SparseConv2d`


class SparseConv2d(PackedLayer):
    """Apply a Conv2d of one group on a packed weight, with an activation behind it if wanted.

    Args:
        packed: what `packing.pack` made of an (out, in, kernel height, kernel width) weight.
        bias: (out,) or None.
        stride: as for `nn.Conv2d`.
        padding: as for `nn.Conv2d`, "same" and "valid" included.
        dilation: as for `nn.Conv2d`.
        padding_mode: as for `nn.Conv2d`.
        activation: None, "relu" or "gelu" (by erf), applied to the output.
        innermost: bring the input of 8 images or a multiple of it (16 with AVX-512) into a layout with the
            images innermost in memory, which the output keeps, and element-wise functions too: the fastest on
            a CPU, where nothing converts in between.

    Raises:
        ValueError: they do not belong together.
    """

    def __init__(
        self,
        packed: Packed,
        bias: Tensor | None = None,
        stride: Pair = 1,
        padding: Pair | str = 0,
        dilation: Pair = 1,
        padding_mode: PaddingMode = "zeros",
        activation: Activation = None,
        innermost: bool = False,
    ) -> None:
        check_weight(packed, "SparseConv2d", "(out, in, kernel height, kernel width)", 4)
        super().__init__(packed, bias, activation)
        dense = _Conv2d(
            packed.shape[1],
            packed.shape[0],
            packed.shape[2:],
            stride,
            padding,
            dilation,
            # it validates, and writes every setting as a pair
            padding_mode=padding_mode,
            device="meta",
        )
        for name, pair, least in (
            ("a stride", dense.stride, 1),
            ("a padding", dense.padding, 0),
            ("a dilation", dense.dilation, 1),
        ):
            if not isinstance(pair, str) and not (
                len(pair) == 2 and all(type(x) is int and x >= least for x in pair)
            ):
                raise ValueError(
                    f"SparseConv2d: expected {name} of whole numbers of at least {least}, got {pair}"
                )
        self.out_channels, self.in_channels, *_ = packed.shape
        self.kernel_size, self.innermost = packed.shape[2:], innermost
        self.stride, self.padding, self.dilation, self.padding_mode = (
            dense.stride,
            dense.padding,
            dense.dilation,
            padding_mode,
        )
        # F.pad's order: left, right, top, bottom. One op pads with zeros on both sides alike; anything else
        # is padded before.
        left, right, top, bottom = dense._reversed_padding_repeated_twice
        self._inside = (top, left) if padding_mode == "zeros" and (left, top) == (right, bottom) else (0, 0)
        self._before = [left, right, top, bottom] if self._inside == (0, 0) else [0, 0, 0, 0]

    @classmethod
    def from_dense(
        cls,
        layer: nn.Conv2d,
        pattern: NM | Unstructured | None = None,
        mask: Tensor | None = None,
        activation: Activation = None,
    ) -> SparseConv2d:
        """Pack a Conv2d.

        Args:
            layer: any Conv2d of one group with zeros in its weight; left as it was.
            pattern: what the weight obeys; None looks for it.
            mask: weight.shape, bool, True where a weight is kept even if it is zero; None takes `weight !=
                0`.
            activation: the activation that follows, to be computed by this layer.

        Raises:
            ValueError: it is no Conv2d, has several groups, breaks the pattern, has no zeros, or cannot be
                packed for another reason.
        """
        if not isinstance(layer, nn.Conv2d):
            raise ValueError(f"SparseConv2d.from_dense: expected an nn.Conv2d, got {type(layer).__name__}")
        if layer.groups != 1:
            raise ValueError(
                f"SparseConv2d.from_dense: expected a convolution of 1 group, got {layer.groups}; "
                "leave it dense"
            )
        sparse = cls(
            packed_from(layer.weight, pattern, mask),
            layer.bias,
            layer.stride,
            layer.padding,
            layer.dilation,
            layer.padding_mode,
            activation,
        )
        return sparse.train(layer.training)

    def unpack(self) -> nn.Conv2d:
        """Return the dense Conv2d, exactly; the activation is not part of it."""
        layer = _Conv2d(
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            bias=self.bias is not None,
            padding_mode=self.padding_mode,
            device="meta",
        )
        return cast(nn.Conv2d, filled(layer, self))

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer: (images, in, height, width) to (images, out, height, width)."""
        if any(self._before):
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            input = F.pad(input, self._before, mode)
        order = self.kernel_order()
        if self.innermost and order is not None:  # an exported program takes any number of images
            input = laid_out(input)
        return ops.sparse_conv2d(
            input,
            self.values,
            self.codes,
            self.bias,
            self.shape,
            *self.packed.group,
            self.stride,
            self._inside,
            self.dilation,
            self.activation or "none",
            order,
        )

    def extra_repr(self) -> str:
        """Describe the layer, for printing."""
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, dilation={self.dilation}, padding_mode={self.padding_mode}, "
            f"{self.described()}"
        )


def laid_out(images: Tensor) -> Tensor:
    """Lay images out innermost in memory, if there are as many as the kernels take so."""
    fits = images.ndim == 4 and images.shape[0] % INNERMOST == 0
    return reference.innermost_images(images) if fits and not reference.images_innermost(images) else images
