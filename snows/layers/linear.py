"""A Linear on a packed weight."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from snows import ops
from snows.layers.base import Activation, PackedLayer, filled, packed_from
from snows.packing import Packed
from snows.sparsity import NM, Unstructured


class SparseLinear(PackedLayer):
    """Apply a Linear on a packed weight, with an activation behind it if wanted.

    Args:
        packed: what `packing.pack` made of an (out, in) weight.
        bias: (out,) or None.
        activation: None, "relu" or "gelu" (by erf), applied to the output.

    Raises:
        ValueError: they do not belong together.

    Example:
        >>> linear = nn.Linear(8, 2)
        >>> linear.weight.data *= NM(2, 4).mask(linear.weight.abs())
        >>> SparseLinear.from_dense(linear)
        SparseLinear(in_features=8, out_features=2, bias=True, pattern=2:4)
    """

    def __init__(self, packed: Packed, bias: Tensor | None = None, activation: Activation = None) -> None:
        if len(packed.shape) != 2:
            raise ValueError(f"SparseLinear: expected a packed weight of (out, in), got {packed.shape}")
        super().__init__(packed, bias, activation)
        self.out_features, self.in_features = packed.shape

    @classmethod
    def from_dense(
        cls,
        layer: nn.Linear,
        pattern: NM | Unstructured | None = None,
        mask: Tensor | None = None,
        activation: Activation = None,
    ) -> SparseLinear:
        """Pack a Linear.

        Args:
            layer: any Linear with zeros in its weight; left as it was.
            pattern: what the weight obeys; None looks for it.
            mask: weight.shape, bool, True where a weight is kept even if it is zero; None takes `weight !=
                0`.
            activation: the activation that follows, to be computed by this layer.

        Raises:
            ValueError: it is no Linear, breaks the pattern, has no zeros, or cannot be packed for another
                reason.
        """
        if not isinstance(layer, nn.Linear):
            raise ValueError(f"SparseLinear.from_dense: expected an nn.Linear, got {type(layer).__name__}")
        return cls(packed_from(layer.weight, pattern, mask), layer.bias, activation).train(layer.training)

    def unpack(self) -> nn.Linear:
        """Return the dense Linear, exactly; the activation is not part of it."""
        out, inputs = self.shape
        layer = nn.Linear(inputs, out, bias=self.bias is not None, device="meta")
        return cast(nn.Linear, filled(layer, self))

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer: (..., in_features) to (..., out_features)."""
        return ops.sparse_linear(
            input,
            self.values,
            self.codes,
            self.bias,
            self.shape,
            *self.packed.group,
            self.activation or "none",
            self.kernel_order(),
        )

    def extra_repr(self) -> str:
        """Describe the layer, for printing."""
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.described()}"
