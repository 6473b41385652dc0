"""What both packed layers share.

A layer holds the packed tensors of `snows.packing`, which are its state, and the same weight in the order of
the
kernels of the device it is on, which is not: that is made when the layer is built, loaded, copied or moved,
and anew when the packed tensors were changed in place or exchanged since. (PyTorch does not count changes
through `.data`; those are not seen.) A program of `torch.compile` refuses to run on a weight that was
changed: call the layer itself once, or compile again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from snows import ops, packing
from snows.packing import Packed
from snows.sparsity import NM, Unstructured

# Before 2.13 Dynamo says for torch.compile too that it exports; torch.export itself runs without Dynamo,
# unless it is told to be strict.
TELLS_EXPORT = tuple(int(x) for x in torch.__version__.split(".")[:2]) >= (2, 13)

Activation: TypeAlias = Literal["relu", "gelu"] | None


class PackedLayer(nn.Module):
    """Hold what both layers share: the packed weight, its kernel order, bias and activation."""

    values: Tensor
    codes: Tensor
    order: Tensor
    bias: Tensor | None

    def __init__(self, packed: Packed, bias: Tensor | None, activation: Activation) -> None:
        super().__init__()
        if activation not in (None, "relu", "gelu"):
            raise ValueError(
                f'{type(self).__name__}: expected an activation of None, "relu" or "gelu", got {activation!r}'
            )
        packing.check(packed)
        self._check_bias(bias, packed.shape[0], packed.values)
        self.pattern = packed.pattern
        self.shape = packed.shape
        self.activation = activation
        self.register_buffer("values", packed.values)
        self.register_buffer("codes", packed.codes)
        self.register_buffer("bias", None if bias is None else bias.detach().clone())
        self._arrange()

    def _check_bias(self, bias: Any, rows: int, values: Tensor) -> None:
        if bias is None:
            return
        if (
            not isinstance(bias, Tensor)
            or (*bias.shape,) != (rows,)
            or bias.dtype != values.dtype
            or bias.device != values.device
        ):
            got = (
                f"{tuple(bias.shape)} {bias.dtype} on {bias.device}"
                if isinstance(bias, Tensor)
                else type(bias).__name__
            )
            raise ValueError(
                f"{type(self).__name__}: expected a bias of ({rows},) {values.dtype} on {values.device}, "
                f"got {got}"
            )

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "bias" and "order" in self.__dict__:
            self._check_bias(value, self.shape[0], self.values)
        super().__setattr__(name, value)

    @property
    def packed(self) -> Packed:
        """The packed weight."""
        return Packed(self.values, self.codes, self.pattern, self.shape)

    @property
    def kernel(self) -> str:
        """What runs the layer where it is: "native", or "reference" (unpack and multiply)."""
        return "native" if self.order.numel() else "reference"

    def _arrange(self) -> None:
        # No buffer, even a non-persistent one: torch.export would write that into its file.
        self.order = self._ordered()
        self._arranged = self.values, self.codes, version_of(self.values), version_of(self.codes)

    def _ordered(self) -> Tensor:
        return ops.kernel_order(self.values, self.codes, self.shape, *self.packed.group)

    def kernel_order(self) -> Tensor | None:
        """Return the kernel order, made anew if the weight was changed; None for an exported program.

        An exported program carries the packed tensors alone, and runs on any machine.
        """
        if torch.compiler.is_compiling():
            exporting = torch.compiler.is_exporting() and (
                TELLS_EXPORT or not torch.compiler.is_dynamo_compiling()
            )
            return None if exporting else self.order
        values, codes, *changes = self._arranged
        if (
            values is not self.values
            or codes is not self.codes
            or changes != [version_of(values), version_of(codes)]
        ):
            packing.check(self.packed)
            self._arrange()
        return self.order

    def _apply(self, *args: Any, **kwargs: Any) -> Any:  # every move and every change of dtype passes here
        super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]
        self._arrange()
        return self

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *rest)
        *_, errors = rest
        try:
            packing.check(self.packed)
        except ValueError as error:
            errors.append(f"{prefix.removesuffix('.') or type(self).__name__}: {error}")
        self._arrange()

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("order", "_arranged")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._arrange()

    def described(self) -> str:
        """Describe what both layers have, for printing."""
        after = f", activation={self.activation}" if self.activation else ""
        return f"bias={self.bias is not None}, pattern={self.pattern}{after}"


def version_of(x: Tensor) -> int:
    """Count how often a tensor was changed in place.

    PyTorch does not count that of a tensor made in inference mode.
    """
    return 0 if x.is_inference() else x._version


def check_weight(packed: object, kind: str, sizes: str, dims: int) -> None:
    """Refuse what is no packed weight, or one of another layer.

    Args:
        packed: what was given.
        kind: of the layer, for the sentence.
        sizes: of the weight, for the sentence.
        dims: that the weight has.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(packed, Packed) or len(packed.shape) != dims:
        got = packed.shape if isinstance(packed, Packed) else type(packed).__name__
        raise ValueError(
            f"{kind}: expected a packed weight of {sizes}, got {got}; {kind}.from_dense makes the layer of a "
            "dense one"
        )


def packed_from(weight: Tensor, pattern: NM | Unstructured | None, mask: Tensor | None) -> Packed:
    """Pack a weight, by the pattern that its mask obeys where none is given."""
    return packing.pack(weight, mask, packing.find_pattern(weight, mask) if pattern is None else pattern)


def filled(layer: nn.Linear | nn.Conv2d, sparse: PackedLayer) -> nn.Module:
    """Give a layer without storage the weight and bias of a packed one."""
    layer.weight = nn.Parameter(packing.unpack(sparse.packed))
    layer.bias = None if sparse.bias is None else nn.Parameter(sparse.bias.clone())
    return layer.train(sparse.training)
