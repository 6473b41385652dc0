"""A layer and the operations after it, as a function of the layer's weight; and how far that is from the dense network.

An *operation* is one call, after the layer, of a convolution, linear, activation, LayerNorm or attention, as a module or
as a function, whose output depends on the layer's weight. Evaluated BatchNorm, dropout, flatten, pooling and residual
additions are not counted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from snows.network import Call, Finished, Inputs, Plan, Stream, Watch, arguments, learn_order, output_tensors, plain_forward
from snows.operators import half_inner
from snows.routes import reroute

OPERATIONS = {
    F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d, F.linear, F.bilinear,
    F.layer_norm, F.group_norm, F.rms_norm, F.scaled_dot_product_attention, F.multi_head_attention_forward,
    F.relu, F.relu_, F.relu6, F.gelu, F.silu, F.mish, F.elu, F.elu_, F.selu, F.celu, F.leaky_relu, F.leaky_relu_, F.prelu,
    F.hardswish, F.hardsigmoid, F.hardtanh, F.hardtanh_, F.softplus, F.softsign, F.tanhshrink, F.softmax, F.log_softmax,
    F.sigmoid, F.tanh, F.glu, F.logsigmoid,
    torch.relu, torch.relu_, torch.sigmoid, torch.sigmoid_, torch.tanh, torch.tanh_, torch.softmax, torch.selu, torch.prelu,
    Tensor.relu, Tensor.relu_, Tensor.sigmoid, Tensor.sigmoid_, Tensor.tanh, Tensor.tanh_, Tensor.softmax,
}  # fmt: skip


CHANNELS_SECOND = {
    F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d, F.batch_norm, F.group_norm, F.instance_norm,
}  # fmt: skip
CHANNELS_LAST = {F.linear, F.bilinear, F.layer_norm, F.rms_norm, F.scaled_dot_product_attention, F.multi_head_attention_forward}


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
        out = _convolution(args, kwargs) if func is F.conv2d and self.outputs else reroute(func, args, kwargs)
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


class Metric(NamedTuple):
    """How the mismatch e of one operation's output is measured: ``floor ‖e‖² + ‖e basis‖²`` at each position.

    Attributes:
        floor: the weight of every direction alike.
        basis: (channels, rank), directions that weigh more; None for none.
        channel: the dimension of an output that holds its channels; all others are positions.
    """

    floor: float
    basis: Tensor | None = None
    channel: int = -1

    @classmethod
    def plain(cls, y: Tensor, scaling: Literal["variance", "none"] = "variance") -> Metric:
        """The mean over all elements, divided by the variance of the target `y`, or, as the published code has it, not."""
        return cls(1.0 / (y.shape[-1] * (_variance(y) if scaling == "variance" else 1.0)))

    @classmethod
    def felt(cls, gradients: Tensor, channel: int, generator: torch.Generator | None = None, *, smoothing: float = 0.1,
             rank: int = 64) -> Metric:
        """By ``G = Σ g gᵀ`` over rows g, with its eigenvalues below 0.3 of the mean replaced by theirs.

        The larger ones by subspace iteration (Halko et al. 2011), so that a wide layer's G is never decomposed.

        Args:
            gradients: (positions, channels).
            channel: the dimension of an output that holds its channels.
            generator: source of the first subspace, on the CPU.
            smoothing: added to every eigenvalue, relative to their mean.
            rank: the most directions kept.
        """
        width = gradients.shape[1]
        trace = gradients.square().sum().item()
        mean = trace / width
        gram = gradients.T @ gradients if width <= len(gradients) else None
        Q = torch.randn(width, min(rank, width), generator=generator, dtype=gradients.dtype).to(gradients.device)
        for _ in range(5):
            product = gram @ Q if gram is not None else gradients.T @ (gradients @ Q)
            last, Q = Q, torch.linalg.qr(product).Q
        values, vectors = torch.linalg.eigh(last.T @ product)
        keep = values > 0.3 * mean
        rest = max(trace - values[keep].sum().item(), 0.0) / max(width - int(keep.sum()), 1)
        return cls(rest + smoothing * mean, last @ vectors[:, keep] * (values[keep] - rest).sqrt(), channel)

    @property
    def nothing(self) -> bool:
        """Whether no mismatch weighs anything."""
        return self.floor == 0 and (self.basis is None or not self.basis.any())

    def matrix(self, channels: int, groups: int = 1) -> Tensor:
        """The diagonal blocks of ``floor I + basis basisᵀ``: (groups, channels / groups, channels / groups)."""
        assert self.basis is not None
        parts = self.basis.view(groups, channels // groups, -1)
        return parts @ parts.mT + self.floor * torch.eye(channels // groups, dtype=parts.dtype, device=parts.device)


class _Feel(Watch):
    """Counts operations as a horizon does, and measures what gradient reaches the output of each."""

    def __init__(self, net: nn.Module, generator: torch.Generator) -> None:
        super().__init__(net)
        self.generator = generator
        self.metrics: list[Metric | None] = []
        self.starts: dict[str, int] = {}
        self.channel = -1  # where the last function that has channels keeps them

    def layer(self, name: str, call: Call, func: Any, args: Any, kwargs: Any) -> Any:
        self.starts.setdefault(name, len(self.metrics))
        return self.other(func, args, kwargs)

    def other(self, func: Any, args: Any, kwargs: Any) -> Any:
        out = func(*args, **kwargs)
        self.channel = 1 if func in CHANNELS_SECOND else -1 if func in CHANNELS_LAST else self.channel
        if func not in OPERATIONS:
            return out
        return (self.feel(out[0]), *out[1:]) if isinstance(out, tuple) else self.feel(out)

    def feel(self, out: Tensor) -> Tensor:
        index, channel = len(self.metrics), self.channel if self.channel < out.ndim else -1
        self.metrics.append(None)
        if not out.requires_grad:  # the first operation, with frozen weights before it: gradients end here; others may change it in place
            out = out.detach().requires_grad_().clone()

        def measure(g: Tensor) -> None:
            self.metrics[index] = Metric.felt(g.movedim(channel, -1).flatten(0, -2), channel, self.generator)

        out.register_hook(measure)
        return out


class Sensitivities:
    """How strongly a network's output feels each of its operations: one forward and one backward pass for all of them.

    Gaussian noise in place of the output's error is pulled back, divided so that for a mismatch e at one position ``Σ (gᵀ e)²``
    over the gradients g of all images and positions is in the mean the share of the output's variance that it makes up,
    where positions err independently.

    Args:
        net: in evaluation mode.
        inputs: a few dozen samples; memory grows with them as in training.
        generator: source of the noise, on the CPU.
    """

    def __init__(self, net: nn.Module, inputs: Inputs, generator: torch.Generator) -> None:
        watch = _Feel(net, generator)
        with torch.enable_grad(), _frozen(net), plain_forward():
            with watch:
                output = net(*inputs.args, **inputs.kwargs)
            ends = [y for y in output_tensors(output) if y.requires_grad]
            noise = [torch.randn(y.shape, generator=generator, dtype=y.dtype).to(y.device) / (y.numel() * _variance(y.detach())) ** 0.5
                     for y in ends]
            if ends:
                torch.autograd.backward(ends, noise)
        self._metrics, self._starts = watch.metrics, watch.starts

    def of(self, layer: str, ordinals: Sequence[int]) -> list[Metric]:
        """The metrics of a layer's output (ordinal 0) and of the operations called after it; empty if the output feels none."""
        start = self._starts[layer]
        found = [self._metrics[start + i] or Metric(0.0) for i in ordinals]
        return [] if all(metric.nothing for metric in found) else found


class Reconstruction:
    """One batch's loss: the mismatch of a horizon with its targets, summed over its terms.

    Each is the mean over images and positions of its metric. Without metrics that is
    ``Σ_k mean((f_k(W) - y_k)²) / var(y_k)``: every operation weighs alike whatever its scale and size.

    Args:
        horizon: f.
        x: the batch's stream, advanced to the layer.
        targets: y, as `Horizon.outputs` gives them.
        metrics: one a target; a term that weighs nothing is left out.
    """

    def __init__(self, horizon: Horizon, x: Stream, targets: Sequence[Tensor], metrics: Sequence[Metric] | None = None) -> None:
        self.horizon, self.x, self.targets = horizon, x, list(targets)
        metrics = list(metrics if metrics is not None else map(Metric.plain, targets))
        self._counts = [not metric.nothing for metric in metrics]
        self._weighers = [_weigher(metric, y) for metric, y in zip(metrics, targets, strict=True) if not metric.nothing]

    def __call__(self, weight: Tensor) -> Tensor:
        residuals = self.residuals(weight)
        if not residuals:
            return torch.zeros((), dtype=weight.dtype, device=weight.device)
        return half_inner(residuals, self.weigh(residuals))

    def residuals(self, weight: Tensor) -> list[Tensor]:
        outputs = self.horizon.outputs(weight, self.x)
        return [f - y for f, y, counts in zip(outputs, self.targets, self._counts, strict=True) if counts]

    def weigh(self, residuals: Sequence[Tensor]) -> list[Tensor]:
        return [weigh(e) for weigh, e in zip(self._weighers, residuals, strict=True)]


def _weigher(metric: Metric, y: Tensor) -> Callable[[Tensor], Tensor]:
    """The derivative of a metric's mean over the positions of y, as a function of the mismatch: in as few passes as it takes."""
    channel, width = metric.channel, y.shape[metric.channel]
    share = 2 * width / y.numel()  # of a position
    if metric.basis is None:
        return lambda e: e * (metric.floor * share)
    if 2 * metric.basis.shape[1] >= width:
        matrix = metric.matrix(width)[0] * share
        return lambda e: (e.movedim(channel, -1) @ matrix).movedim(-1, channel)
    basis, floor = metric.basis * share**0.5, metric.floor * share

    def weigh(e: Tensor) -> Tensor:
        e = e.movedim(channel, -1)
        flat = e.reshape(-1, width)
        return torch.addmm(flat, flat @ basis, basis.T, beta=floor).view(e.shape).movedim(-1, channel)

    return weigh


def _variance(y: Tensor) -> float:
    variance = y.double().var(unbiased=False).item() if y.numel() < 2**16 else y.var(unbiased=False).item()
    return variance if variance > 0 else 1.0
