"""Layers that run on packed weights: drop-in for `nn.Linear` and `nn.Conv2d`, for inference.

A layer holds the packed tensors of `snows.packing`, which are its state, and the same weight in the order of the kernels
of the device it is on, which is not: that is made when the layer is built, loaded, copied or moved, and anew when the packed tensors were
changed in place or exchanged since. (PyTorch does not count changes through `.data`; those are not seen.) A program of `torch.compile`
refuses to run on a weight that was changed: call the layer itself once, or compile again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from snows import ops, packing, reference
from snows.packing import Packed
from snows.sparsity import NM, Unstructured

# Before 2.13 Dynamo says for torch.compile too that it exports; torch.export itself runs without Dynamo, unless it is told to be strict.
TELLS_EXPORT = tuple(int(x) for x in torch.__version__.split(".")[:2]) >= (2, 13)

PaddingMode: TypeAlias = Literal["zeros", "reflect", "replicate", "circular"]
Activation: TypeAlias = Literal["relu", "gelu"] | None


class _Sparse(nn.Module):
    """What both layers share: the packed weight, its kernel order, bias and activation."""

    values: Tensor
    codes: Tensor
    order: Tensor
    bias: Tensor | None

    def __init__(self, packed: Packed, bias: Tensor | None, activation: Activation) -> None:
        super().__init__()
        if activation not in (None, "relu", "gelu"):
            raise ValueError(f'{type(self).__name__}: expected an activation of None, "relu" or "gelu", got {activation!r}')
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
        if not isinstance(bias, Tensor) or (*bias.shape,) != (rows,) or bias.dtype != values.dtype or bias.device != values.device:
            got = f"{tuple(bias.shape)} {bias.dtype} on {bias.device}" if isinstance(bias, Tensor) else type(bias).__name__
            raise ValueError(f"{type(self).__name__}: expected a bias of ({rows},) {values.dtype} on {values.device}, got {got}")

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "bias" and "order" in self.__dict__:
            self._check_bias(value, self.shape[0], self.values)
        super().__setattr__(name, value)

    @property
    def packed(self) -> Packed:
        """The weight as it is stored."""
        return Packed(self.values, self.codes, self.pattern, self.shape)

    @property
    def kernel(self) -> str:
        """What runs the layer where it is: "native", or "reference" (unpack and multiply)."""
        return "native" if self.order.numel() else "reference"

    def _arrange(self) -> None:
        # No buffer, even a non-persistent one: torch.export would write that into its file.
        self.order = ops.kernel_order(self.values, self.codes, self.shape, *self.packed.group)
        self._arranged = self.values, self.codes, _changes(self.values), _changes(self.codes)

    def _kernel_order(self) -> Tensor | None:
        """An exported program carries the packed tensors alone, and runs on any machine."""
        if torch.compiler.is_compiling():
            exporting = torch.compiler.is_exporting() and (TELLS_EXPORT or not torch.compiler.is_dynamo_compiling())
            return None if exporting else self.order
        values, codes, *changes = self._arranged
        if values is not self.values or codes is not self.codes or changes != [_changes(values), _changes(codes)]:
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

    def _described(self) -> str:
        after = f", activation={self.activation}" if self.activation else ""
        return f"bias={self.bias is not None}, pattern={self.pattern}{after}"


class SparseLinear(_Sparse):
    """A Linear on a packed weight, with an activation behind it if wanted.

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
        cls, layer: nn.Linear, pattern: NM | Unstructured | None = None, mask: Tensor | None = None,
        activation: Activation = None,
    ) -> SparseLinear:
        """Pack a Linear.

        Args:
            layer: any Linear with zeros in its weight; left as it was.
            pattern: what the weight obeys; None looks for it.
            mask: weight.shape, bool, True where a weight is kept even if it is zero; None takes `weight != 0`.
            activation: the activation that follows, to be computed by this layer.

        Raises:
            ValueError: it is no Linear, breaks the pattern, has no zeros, or cannot be packed for another reason.
        """
        if not isinstance(layer, nn.Linear):
            raise ValueError(f"SparseLinear.from_dense: expected an nn.Linear, got {type(layer).__name__}")
        return cls(_pack(layer.weight, pattern, mask), layer.bias, activation).train(layer.training)

    def unpack(self) -> nn.Linear:
        """The dense Linear, exactly; the activation is not part of it."""
        out, inputs = self.shape
        layer = nn.Linear(inputs, out, bias=self.bias is not None, device="meta")
        return cast(nn.Linear, _fill(layer, self))

    def forward(self, input: Tensor) -> Tensor:
        return ops.sparse_linear(
            input, self.values, self.codes, self.bias, self.shape, *self.packed.group,
            self.activation or "none", self._kernel_order())

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self._described()}"


class SparseConv2d(_Sparse):
    """A Conv2d of one group on a packed weight, with an activation behind it if wanted.

    Args:
        packed: what `packing.pack` made of an (out, in, kernel height, kernel width) weight.
        bias: (out,) or None.
        stride: as for `nn.Conv2d`.
        padding: as for `nn.Conv2d`, "same" and "valid" included.
        dilation: as for `nn.Conv2d`.
        padding_mode: as for `nn.Conv2d`.
        activation: None, "relu" or "gelu" (by erf), applied to the output.
        innermost: bring the input of 16 images or a multiple of it into a layout with the images innermost in memory, which
            the output keeps, and element-wise functions too: the fastest on a CPU, where nothing converts in between.

    Raises:
        ValueError: they do not belong together.
    """

    def __init__(
        self, packed: Packed, bias: Tensor | None = None, stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0, dilation: int | tuple[int, int] = 1, padding_mode: PaddingMode = "zeros",
        activation: Activation = None, innermost: bool = False,
    ) -> None:
        if len(packed.shape) != 4:
            raise ValueError(f"SparseConv2d: expected a packed weight of (out, in, kernel height, kernel width), got {packed.shape}")
        super().__init__(packed, bias, activation)
        dense = nn.Conv2d(packed.shape[1], packed.shape[0], packed.shape[2:], stride, padding, dilation,
                          padding_mode=padding_mode, device="meta")  # it validates, and writes every setting as a pair
        for name, pair, least in (("a stride", dense.stride, 1), ("a padding", dense.padding, 0), ("a dilation", dense.dilation, 1)):
            if not isinstance(pair, str) and not (len(pair) == 2 and all(type(x) is int and x >= least for x in pair)):
                raise ValueError(f"SparseConv2d: expected {name} of whole numbers of at least {least}, got {pair}")
        self.out_channels, self.in_channels, *_ = packed.shape
        self.kernel_size, self.innermost = packed.shape[2:], innermost
        self.stride, self.padding, self.dilation, self.padding_mode = dense.stride, dense.padding, dense.dilation, padding_mode
        # F.pad's order: left, right, top, bottom. One op pads with zeros on both sides alike; anything else is padded before.
        left, right, top, bottom = dense._reversed_padding_repeated_twice
        self._inside = (top, left) if padding_mode == "zeros" and (left, top) == (right, bottom) else (0, 0)
        self._before = [left, right, top, bottom] if self._inside == (0, 0) else [0, 0, 0, 0]

    @classmethod
    def from_dense(
        cls, layer: nn.Conv2d, pattern: NM | Unstructured | None = None, mask: Tensor | None = None,
        activation: Activation = None,
    ) -> SparseConv2d:
        """Pack a Conv2d.

        Args:
            layer: any Conv2d of one group with zeros in its weight; left as it was.
            pattern: what the weight obeys; None looks for it.
            mask: weight.shape, bool, True where a weight is kept even if it is zero; None takes `weight != 0`.
            activation: the activation that follows, to be computed by this layer.

        Raises:
            ValueError: it is no Conv2d, has several groups, breaks the pattern, has no zeros, or cannot be packed for
                another reason.
        """
        if not isinstance(layer, nn.Conv2d):
            raise ValueError(f"SparseConv2d.from_dense: expected an nn.Conv2d, got {type(layer).__name__}")
        if layer.groups != 1:
            raise ValueError(f"SparseConv2d.from_dense: expected a convolution of 1 group, got {layer.groups}; leave it dense")
        sparse = cls(_pack(layer.weight, pattern, mask), layer.bias, layer.stride, layer.padding,  # type: ignore[arg-type]
                     layer.dilation, layer.padding_mode, activation)  # type: ignore[arg-type]
        return sparse.train(layer.training)

    def unpack(self) -> nn.Conv2d:
        """The dense Conv2d, exactly; the activation is not part of it."""
        layer = nn.Conv2d(
            self.in_channels, self.out_channels, self.kernel_size, self.stride, self.padding, self.dilation,  # type: ignore[arg-type]
            bias=self.bias is not None, padding_mode=self.padding_mode, device="meta")
        return cast(nn.Conv2d, _fill(layer, self))

    def forward(self, input: Tensor) -> Tensor:
        if any(self._before):
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            input = F.pad(input, self._before, mode)
        if self.innermost and input.ndim == 4 and input.shape[0] % 16 == 0 and not reference.images_innermost(input):
            input = reference.innermost_images(input)
        return ops.sparse_conv2d(
            input, self.values, self.codes, self.bias, self.shape, *self.packed.group,
            self.stride, self._inside, self.dilation, self.activation or "none", self._kernel_order())

    def extra_repr(self) -> str:
        return (f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
                f"padding={self.padding}, dilation={self.dilation}, padding_mode={self.padding_mode}, {self._described()}")


def _changes(x: Tensor) -> int:
    """How often a tensor was changed in place; PyTorch does not count that of a tensor made in inference mode."""
    return 0 if x.is_inference() else x._version


def _pack(weight: Tensor, pattern: NM | Unstructured | None, mask: Tensor | None) -> Packed:
    return packing.pack(weight, mask, packing.find_pattern(weight, mask) if pattern is None else pattern)


def _fill(layer: nn.Linear | nn.Conv2d, sparse: _Sparse) -> nn.Module:
    """Give a layer without storage the weight and bias of a packed one."""
    layer.weight = nn.Parameter(packing.unpack(sparse.packed))
    layer.bias = None if sparse.bias is None else nn.Parameter(sparse.bias.clone())
    return layer.train(sparse.training)
