"""A layer and the operations after it, as a function of the layer's weight; and how far that is from the dense network.

An *operation* is one call, after the layer, of a convolution, linear, activation, LayerNorm or attention, as a module or
as a function, whose output depends on the layer's weight. Evaluated BatchNorm, dropout, flatten, pooling and residual
additions are not counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from snows.network import Call, Finished, Inputs, Plan, Stream, Watch, arguments, learn_order, output_tensors, plain_forward

OPERATIONS = {
    F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d, F.linear, F.bilinear,
    F.layer_norm, F.group_norm, F.rms_norm, F.scaled_dot_product_attention, F.multi_head_attention_forward,
    F.relu, F.relu_, F.relu6, F.gelu, F.silu, F.mish, F.elu, F.elu_, F.selu, F.celu, F.leaky_relu, F.leaky_relu_, F.prelu,
    F.hardswish, F.hardsigmoid, F.hardtanh, F.hardtanh_, F.softplus, F.softsign, F.tanhshrink, F.softmax, F.log_softmax,
    F.sigmoid, F.tanh, F.glu, F.logsigmoid,
    torch.relu, torch.relu_, torch.sigmoid, torch.sigmoid_, torch.tanh, torch.tanh_, torch.softmax, torch.selu, torch.prelu,
    Tensor.relu, Tensor.relu_, Tensor.sigmoid, Tensor.sigmoid_, Tensor.tanh, Tensor.tanh_, Tensor.softmax,
}  # fmt: skip


class _Window(Watch):
    """Puts a weight in place of the layer's own and gathers the operations after it."""

    def __init__(self, net: nn.Module, layer: str, weight: Tensor) -> None:
        super().__init__(net)
        self.target, self.weight = layer, weight
        self.outputs: list[Tensor] = []
        self.ordinal = 0  # operations called since the layer ran

    def layer(self, name: str, call: Call, func: Any, args: Any, kwargs: Any) -> Any:
        if name != self.target:
            return self.other(func, args, kwargs)
        if len(args) > 1:
            args = (args[0], self.weight, *args[2:])
        else:
            kwargs = {**kwargs, "weight": self.weight}
        out = _convolution(args, kwargs) if func is F.conv2d else func(*args, **kwargs)
        return self.gather(out)

    def other(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func is F.batch_norm and not _bound(args, kwargs, 5, "training", False):
            out = _affine(*args, **kwargs)
        elif func is F.conv2d and self.outputs:
            out = _convolution(args, kwargs)
        else:
            out = func(*args, **kwargs)
        if self.outputs and func in OPERATIONS:
            self.ordinal += 1
            self.operation(out)
        return out

    def gather(self, out: Tensor) -> Tensor:
        """Note an output, and return what the network goes on with."""
        self.outputs.append(out)
        return out

    def operation(self, out: Any) -> None:
        raise NotImplementedError


class _Learn(_Window):
    """Counts an operation where its output needs the weight's gradient."""

    def __init__(self, net: nn.Module, layer: str, weight: Tensor, k: float) -> None:
        super().__init__(net, layer, weight)
        self.k, self.counted = k, [0]
        self.versions: list[int] = []

    def gather(self, out: Tensor) -> Tensor:
        self.versions.append(out._version)
        super().gather(out)
        if len(self.outputs) > self.k:
            raise Finished
        return out

    def operation(self, out: Any) -> None:
        out = out[0] if isinstance(out, tuple) else out
        if out.requires_grad:
            self.counted.append(self.ordinal)
            self.gather(out)


class _Follow(_Window):
    """Gathers the operations that were counted, and ends the pass after the last."""

    def __init__(self, net: nn.Module, layer: str, weight: Tensor, horizon: Horizon) -> None:
        super().__init__(net, layer, weight)
        self.horizon = horizon

    def gather(self, out: Tensor) -> Tensor:
        changed = self.ordinal in self.horizon.changed  # later, in place
        super().gather(out.clone() if changed and self.ordinal else out)
        if changed and not self.ordinal:  # the layer's own output stays on the path of the gradients: the network gets the copy
            out = out.clone()
        if not self.horizon.to_end and self.ordinal == self.horizon.counted[-1]:
            raise Finished
        return out

    def operation(self, out: Any) -> None:
        if self.ordinal in self.horizon.counted:
            self.gather(out[0] if isinstance(out, tuple) else out)


class Horizon:
    """A layer and the `k` operations after it, as a function of the layer's weight.

    The forward pass is the network's own, from its input; modules that ran before the layer answer from the stream's
    memory. One pass over `sample` learns which operations depend on the weight.

    Args:
        net: the network, in evaluation mode.
        layer: name of a Linear or Conv2d.
        k: operations to match after the layer's own output; "end" takes all and the network's output too.
        sample: a batch, or a stream that was advanced to the layer.
    """

    def __init__(self, net: nn.Module, layer: str, k: int | Literal["end"], sample: Stream | Inputs) -> None:
        self.net, self.name = net, layer
        self.to_end = k == "end"
        self.parameter: nn.Parameter = net.get_submodule(layer).weight  # type: ignore[assignment]
        self.counted: list[int] = [0]
        self.changed: set[int] = set()
        stream = sample if isinstance(sample, Stream) else self.stream(sample)
        weight = self.parameter.detach().clone().requires_grad_()
        watch = _Learn(net, layer, weight, float("inf") if k == "end" else int(k))
        output = None
        with torch.enable_grad(), _frozen(net), plain_forward(), stream.answering(copies=True), watch, suppress(Finished):
            output = net(*stream.inputs.args, **stream.inputs.kwargs)
        self.counted = watch.counted
        self.ends = [i for i, x in enumerate(output_tensors(output)) if x.requires_grad]  # outputs that depend on the weight
        self.changed = {o for o, x, v in zip(watch.counted, watch.outputs, watch.versions, strict=True) if x._version != v}

    def stream(self, inputs: Inputs) -> Stream:
        """A stream through this network, advanced to the layer."""
        stream = Stream(Plan(self.net, learn_order(self.net, inputs)), inputs)
        stream.advance(self.name)
        return stream

    def outputs(self, weight: Tensor, x: Stream) -> list[Tensor]:
        """The layer's own output first, then those of the operations after it, with `weight` in the layer's place.

        Args:
            weight: the layer's shape; gradients flow to it alone.
            x: a stream advanced to the layer, through this network or through another copy of it.
        """
        net = x.plan.net
        watch = _Follow(net, self.name, weight, self)
        output = None
        with _frozen(net), plain_forward(), x.answering(), watch, suppress(Finished):
            output = net(*x.inputs.args, **x.inputs.kwargs)
        if self.to_end:
            seen, tensors = {id(x) for x in watch.outputs}, output_tensors(output)
            watch.outputs += [tensors[i] for i in self.ends if id(tensors[i]) not in seen]
        return watch.outputs


class _frozen:  # noqa: N801 - reads as a verb where it is used
    """Keep gradients from flowing to a network's own parameters."""

    def __init__(self, net: nn.Module) -> None:
        self.parameters = [p for p in net.parameters() if p.requires_grad]

    def __enter__(self) -> None:
        for p in self.parameters:
            p.requires_grad_(False)

    def __exit__(self, *exc: object) -> None:
        for p in self.parameters:
            p.requires_grad_(True)


def _bound(args: Any, kwargs: Any, index: int, name: str, default: Any) -> Any:
    return args[index] if len(args) > index else kwargs.get(name, default)


def _affine(x: Tensor, running_mean: Tensor, running_var: Tensor, weight: Tensor | None = None, bias: Tensor | None = None,
            training: bool = False, momentum: float = 0.1, eps: float = 1e-5) -> Tensor:
    """Evaluated BatchNorm as the one multiplication and addition per channel that it is; cheap to differentiate twice."""
    scale = (running_var + eps).rsqrt()
    if weight is not None:
        scale = scale * weight
    shift = -running_mean * scale if bias is None else bias - running_mean * scale
    shape = (1, -1) + (1,) * (x.ndim - 2)
    return torch.addcmul(shift.view(shape), x, scale.view(shape))


def _apply(function: type[torch.autograd.Function], *args: Any) -> Tensor:
    result: Tensor = function.apply(*args)
    return result


class _ByInput(torch.autograd.Function):
    """A convolution as a linear map of its input, its weight a constant: one convolution each way, however often differentiated.

    (PyTorch's own double backward also computes the weight's gradient, which nobody asks for here.)
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, *settings: Any) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.shape, ctx.settings = x.shape, settings
        return F.conv2d(x, weight, None, *settings)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (weight,) = ctx.saved_tensors
        return _apply(_ByInputAdjoint, grads[0], weight, ctx.shape, *ctx.settings), None, None, None, None, None


class _ByInputAdjoint(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, g: Tensor, weight: Tensor, shape: torch.Size, *settings: Any) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.settings = settings
        layout = torch.channels_last if g.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
        like = torch.empty(shape, dtype=g.dtype, device=g.device, memory_format=layout)  # never read: shape and layout count
        return _convolution_backward(g, like, weight, settings, by_input=True)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (weight,) = ctx.saved_tensors
        return _apply(_ByInput, grads[0], weight, *ctx.settings), None, None, None, None, None, None


class _ByWeight(torch.autograd.Function):
    """A convolution as a linear map of its weight, its input a constant."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, x: Tensor, *settings: Any) -> Tensor:
        ctx.save_for_backward(x)
        ctx.shape, ctx.settings = weight.shape, settings
        return F.conv2d(x, weight, None, *settings)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return _apply(_ByWeightAdjoint, grads[0], x, ctx.shape, *ctx.settings), None, None, None, None, None


class _ByWeightAdjoint(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, shape: torch.Size, *settings: Any) -> Tensor:
        ctx.save_for_backward(x)
        ctx.settings = settings
        return _convolution_backward(g, x, x.new_empty(shape), settings, by_input=False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return _apply(_ByWeight, grads[0], x, *ctx.settings), None, None, None, None, None, None


def _convolution_backward(g: Tensor, x: Tensor, weight: Tensor, settings: Any, by_input: bool) -> Tensor:
    stride, padding, dilation = ([v, v] if isinstance(v, int) else list(v) for v in settings[:3])
    grads = torch.ops.aten.convolution_backward(g, x, weight, None, stride, padding, dilation, False, [0, 0], settings[3],
                                                [by_input, not by_input, False])
    result: Tensor = grads[0 if by_input else 1]
    return result


def _convolution(args: Any, kwargs: Any) -> Tensor:
    """``F.conv2d`` through the function that differentiates by what needs it, input or weight."""
    bound: dict[str, Any] = {"bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1} | (arguments(F.conv2d, args, kwargs) or {})
    x, weight, bias = bound["input"], bound["weight"], bound["bias"]
    if isinstance(bound["padding"], str) or x.ndim != 4 or (x.requires_grad and weight.requires_grad):
        return F.conv2d(*args, **kwargs)
    settings = (bound["stride"], bound["padding"], bound["dilation"], bound["groups"])
    out = _apply(_ByInput, x, weight, *settings) if x.requires_grad else _apply(_ByWeight, weight, x, *settings)
    return out if bias is None else out + bias.view(-1, 1, 1)


class Reconstruction:
    """One batch's loss: the mismatch of a horizon with its targets, each term divided by its target's variance.

    ``Σ_k mean((f_k(W) - y_k)²) / var(y_k)``, so that every operation weighs alike whatever its scale and size.

    Args:
        horizon: f.
        x: the batch's stream, advanced to the layer.
        targets: y, as `Horizon.outputs` gives them.
        variances: one a target, measured on these targets unless given; ones leave the terms as they are, as the
            published code does.
    """

    def __init__(self, horizon: Horizon, x: Stream, targets: Sequence[Tensor], variances: Sequence[float] | None = None) -> None:
        self.horizon, self.x, self.targets = horizon, x, list(targets)
        self.variances = list(variances) if variances is not None else [_variance(y) for y in targets]
        self.weights = [1.0 / (y.numel() * v) for y, v in zip(self.targets, self.variances, strict=True)]

    def __call__(self, weight: Tensor) -> Tensor:
        total = torch.zeros((), dtype=weight.dtype, device=weight.device)
        for f, y, scale in zip(self.horizon.outputs(weight, self.x), self.targets, self.weights, strict=True):
            total = total + scale * F.mse_loss(f, y, reduction="sum")
        return total

    def residuals(self, weight: Tensor) -> list[Tensor]:
        return [f - y for f, y in zip(self.horizon.outputs(weight, self.x), self.targets, strict=True)]

    def output_factor(self, weight: Tensor, groups: int, generator: torch.Generator | None = None) -> Tensor:
        """Second moment of ``∂loss/∂(layer output)`` under random residuals, per group: (groups, out, out) / groups².

        One backward pass with a Gaussian vector in place of the residuals; the mean over images and positions of ``g gᵀ``.

        Args:
            weight: where.
            groups: of the convolution.
            generator: source of the vector, on the CPU.
        """
        with torch.enable_grad():
            outputs = self.horizon.outputs(weight.detach().clone().requires_grad_(), self.x)
            noise = [scale**0.5 * torch.randn(f.shape, generator=generator, dtype=f.dtype).to(f.device)
                     for f, scale in zip(outputs, self.weights, strict=True)]
            (g,) = torch.autograd.grad(outputs, outputs[0], noise)
        channels = g.flatten(0, -2) if self.horizon.parameter.ndim == 2 else g.movedim(1, -1).flatten(0, -2)
        grouped = channels.view(len(channels), groups, -1).transpose(0, 1)  # (groups, positions, out / groups)
        return grouped.transpose(1, 2) @ grouped


def _variance(y: Tensor) -> float:
    variance = y.double().var(unbiased=False).item() if y.numel() < 2**16 else y.var(unbiased=False).item()
    return variance if variance > 0 else 1.0
