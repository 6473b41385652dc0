"""A Linear on a packed weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from snows import ops, packing
from snows.layers.base import Activation, PackedLayer, check_weight, filled, packed_from
from snows.ops import cusparselt
from snows.packing import Packed
from snows.sparsity import NM, Unstructured

AFTER: dict[Activation, Callable[[Tensor], Tensor]] = {None: lambda x: x, "relu": F.relu, "gelu": F.gelu}


class SparseLinear(PackedLayer):
    """Apply a Linear on a packed weight, with an activation behind it if wanted.

    Args:
        packed: what `packing.pack` made of an (out, in) weight.
        bias: (out,) or None.
        activation: None, "relu" or "gelu" (by erf), applied to the output.
        cusparselt: multiply by cuSPARSELt for inference wherever it is there and takes this weight. What is
            packed is the same, so that the layer runs on any machine.

    Raises:
        ValueError: they do not belong together.

    Example:
        >>> linear = nn.Linear(8, 2)
        >>> linear.weight.data *= NM(2, 4).mask(linear.weight.abs())
        >>> SparseLinear.from_dense(linear)
        SparseLinear(in_features=8, out_features=2, bias=True, pattern=2:4)
    """

    cusparselt = False

    def __init__(
        self,
        packed: Packed,
        bias: Tensor | None = None,
        activation: Activation = None,
        cusparselt: bool = False,
    ) -> None:
        check_weight(packed, "SparseLinear", "(out, in)", 2)
        super().__init__(packed, bias, activation)
        self.out_features, self.in_features = packed.shape
        if cusparselt:
            self.cusparselt = True
            self._arrange()

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

    def _ordered(self) -> Tensor:
        group = self.packed.group
        self._by_library = self.cusparselt and cusparselt.takes(self.values, self.shape, *group)
        return cusparselt.compress(packing.unpack(self.packed)) if self._by_library else super()._ordered()

    @property
    def kernel(self) -> str:
        """What runs the layer where it is: "cuSPARSELt", "native", or "reference" (unpack and multiply)."""
        return "cuSPARSELt" if self._by_library else super().kernel

    def _is_plain(self, input: Tensor) -> bool:
        """Say whether the library computes all that is wanted: no gradients, no dtypes of autocast."""
        learns = input.requires_grad or (self.bias is not None and self.bias.requires_grad)
        return (
            input.shape[-1:] == (self.in_features,)
            and input.dtype == self.values.dtype
            and not torch.is_autocast_enabled(input.device.type)
            and not (learns and torch.is_grad_enabled())
        )

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer: (..., in_features) to (..., out_features)."""
        order = self.kernel_order()
        if order is not None and self._by_library:
            if self._is_plain(input):
                return AFTER[self.activation](cusparselt.linear(input, order, self.bias, self.out_features))
            order = None  # what is compressed is no order of ours
        return ops.sparse_linear(
            input,
            self.values,
            self.codes,
            self.bias,
            self.shape,
            *self.packed.group,
            self.activation or "none",
            order,
        )

    def extra_repr(self) -> str:
        """Describe the layer, for printing."""
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.described()}"
