"""Every op: its schema, and its derivative, made of ops again and so differentiable twice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.grad import conv2d_input

_ops = torch.ops.snows


def register(library: torch.library.Library, op: Op) -> None:
    """Give an op its derivative, if it has one."""
    if op.backward is not None:
        torch.library.register_autograd(
            f"snows::{op.name}", op.backward, setup_context=_remembering(op.setup), lib=library
        )


def _remembering(setup: Callable[..., None] | None) -> Callable[..., None]:
    def remember(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.set_materialize_grads(False)
        if setup is not None:
            setup(ctx, inputs, output)

    return remember


def _asked(ctx: Any, index: int) -> bool:
    """Say whether the pass that is running wants the gradient by input `index`.

    ``needs_input_grad`` only says that some pass might: a Gauss-Newton product goes through an adjoint by its
    cotangent alone, and the second derivative by the point would be thrown away. PyTorch's own formulas ask
    the engine the same question.
    """
    node = ctx.next_functions[index][0]
    if not ctx.needs_input_grad[index] or node is None:
        return False
    try:
        return bool(torch._C._will_engine_execute_node(node))
    # raised for a node that starts the graph (a leaf; under AOTAutograd any input) exactly where its gradient
    # is wanted
    except RuntimeError:
        return True


def _no_third(ctx: Any, *grads: Tensor) -> Any:
    raise NotImplementedError("snows: the ops have no third derivative")


def _masked_setup(ctx: Any, inputs: Any, output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _masked_backward(ctx: Any, g: Tensor | None) -> Any:
    return None if g is None else _ops.masked(g, *ctx.saved_tensors), None


def _gelu_setup(ctx: Any, inputs: Any, output: Any) -> None:
    x, ctx.approximate = inputs
    ctx.save_for_backward(x, output[1])


def _gelu_backward(ctx: Any, g: Tensor | None, g_slope: Tensor | None) -> Any:
    x, slope = ctx.saved_tensors
    total = None if g is None else g * slope
    if g_slope is not None:
        bent = _ops.gelu_curve(x, g_slope, ctx.approximate)
        total = bent if total is None else total + bent
    return total, None


def _affine_relu_setup(ctx: Any, inputs: Any, output: Tensor) -> None:
    ctx.save_for_backward(output, inputs[2])


def _affine_relu_backward(ctx: Any, g: Tensor | None) -> Any:
    return None if g is None else _ops.affine_relu_grad(g, *ctx.saved_tensors), None, None


def _affine_relu_grad_setup(ctx: Any, inputs: Any, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _layer_norm_setup(ctx: Any, inputs: Any, output: Any) -> None:
    x, weight, _, ctx.shape, _ = inputs
    ctx.save_for_backward(x, *output[1:], weight)
    ctx.mark_non_differentiable(*output[1:])


def _layer_norm_backward(ctx: Any, g: Tensor | None, *_: Any) -> Any:
    x, mean, rstd, weight = ctx.saved_tensors
    grad = None if g is None else _ops.layer_norm_grad(g, x, mean, rstd, weight, None, ctx.shape)
    return grad, None, None, None, None


def _layer_norm_grad_setup(ctx: Any, inputs: Any, output: Tensor) -> None:
    *tensors, ctx.shape = inputs
    ctx.save_for_backward(*tensors)


def _layer_norm_grad_backward(ctx: Any, v: Tensor | None) -> Any:
    g, x, mean, rstd, before, after = ctx.saved_tensors
    by_g = by_x = None
    if v is not None and _asked(ctx, 0):
        by_g = _ops.layer_norm_grad(v, x, mean, rstd, after, before, ctx.shape)
    if v is not None and _asked(ctx, 1):
        by_x = _ops.layer_norm_curve(g, v, x, mean, rstd, before, after, ctx.shape)
    return by_g, by_x, None, None, None, None, None


def _attention_setup(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, bias, ctx.scale, _ = inputs
    ctx.save_for_backward(*tensors, *output, bias)
    ctx.mark_non_differentiable(output[1])


def _attention_backward(ctx: Any, g: Tensor | None, _: Any) -> Any:
    grads = (None,) * 3 if g is None else _ops.attention_grad(g, *ctx.saved_tensors, ctx.scale)
    return *grads, None, None, None


def _attention_derivative_setup(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _attention_grad_backward(ctx: Any, *tangents: Tensor | None) -> Any:
    g, *point = ctx.saved_tensors
    by_g, by_point = None, (None,) * 3
    if any(t is not None for t in tangents):
        tangents = tuple(
            torch.zeros_like(x) if t is None else t for t, x in zip(tangents, point, strict=False)
        )
        if _asked(ctx, 0):
            by_g = _ops.attention_tangent(*tangents, *point, ctx.scale)
        if any(_asked(ctx, i) for i in (1, 2, 3)):
            by_point = _ops.attention_curve(g, *tangents, *point, ctx.scale)
    return by_g, *by_point, None, None, None, None


def _attention_tangent_backward(ctx: Any, g: Tensor | None) -> Any:
    tangents, point = ctx.saved_tensors[:3], ctx.saved_tensors[3:]
    by_tangents, by_point = (None,) * 3, (None,) * 3
    if g is not None and any(_asked(ctx, i) for i in (0, 1, 2)):
        by_tangents = _ops.attention_grad(g, *point, ctx.scale)
    if g is not None and any(_asked(ctx, i) for i in (3, 4, 5)):
        by_point = _ops.attention_curve(g, *tangents, *point, ctx.scale)
    return *by_tangents, *by_point, None, None, None, None


def _before_activation(
    op: str, saved: tuple[Tensor | None, ...], rest: tuple[Any, ...], grad: Tensor
) -> Tensor:
    """Return the gradient by what the activation was applied to, which is computed again."""
    if rest[-2] == "none":
        return grad
    inner = getattr(_ops, op)(*saved, *rest[:-2], "none", rest[-1])
    return grad * (inner > 0) if rest[-2] == "relu" else torch.ops.aten.gelu_backward(grad, inner)  # type: ignore[no-any-return]


def _packed_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.rest = inputs[4:]


def _sparse_linear_backward(context: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients of input and bias; the stored weights are not trained."""
    if grad is None:
        return (None,) * (4 + len(context.rest))
    saved, (shape, n, m, *_) = context.saved_tensors, context.rest  # which may be read once
    _, values, codes, bias = saved
    grad = _before_activation("sparse_linear", saved, context.rest, grad)
    to_bias = None if bias is None else grad.flatten(0, -2).sum(0) if grad.ndim > 1 else grad
    return grad @ _ops.unpack(values, codes, shape, n, m), None, None, to_bias, *(None for _ in context.rest)


def _sparse_conv2d_backward(context: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients of input and bias; the stored weights are not trained."""
    if grad is None:
        return (None,) * (4 + len(context.rest))
    saved, (shape, n, m, *settings) = context.saved_tensors, context.rest  # which may be read once
    input, values, codes, bias = saved
    grad = _before_activation("sparse_conv2d", saved, context.rest, grad)
    weight = _ops.unpack(values, codes, shape, n, m)
    to_input = conv2d_input(input.shape, weight, grad, *settings[:3])
    return to_input, None, None, None if bias is None else grad.sum((0, 2, 3)), *(None for _ in context.rest)


class Op(NamedTuple):
    """Declare an op: its schema, and where it lies on the path of a loss its derivative.

    Attributes:
        schema: tensors that take gradients come first; of several results the first is the op's own, the
            others are kept for its derivatives.
        backward: gives the gradients of the inputs from those of the results.
        setup: keeps what `backward` needs; None for nothing.
    """

    schema: str
    backward: Callable[..., Any] | None = None
    setup: Callable[..., None] | None = None

    @property
    def name(self) -> str:
        """The op's name."""
        return self.schema.partition("(")[0]


OPS = (
    Op("nm_mask(Tensor scores, int n, int m) -> Tensor"),
    Op("nm_select(Tensor scores, int n, int m) -> (Tensor bits, Tensor codes)"),
    Op("cg_direction(Tensor(a!) p, Tensor r, Tensor z, Tensor(b!) state) -> ()"),
    Op("cg_update(Tensor(a!) x, Tensor(b!) r, Tensor p, Tensor Ap, Tensor(c!) state, float rtol) -> ()"),
    Op(
        "batched_cg_update(Tensor(a!) x, Tensor(b!) r, Tensor(c!) p, Tensor(d!) rz, Tensor product, "
        "Tensor mask, Tensor inverse, Tensor target) -> ()"
    ),
    Op("masked(Tensor weight, Tensor bits) -> Tensor", _masked_backward, _masked_setup),
    Op("gelu(Tensor x, str approximate) -> (Tensor, Tensor)", _gelu_backward, _gelu_setup),
    Op("gelu_curve(Tensor x, Tensor g, str approximate) -> Tensor", _no_third),
    Op(
        "affine_relu(Tensor x, Tensor affine, Tensor scale) -> Tensor",
        _affine_relu_backward,
        _affine_relu_setup,
    ),
    Op(
        "affine_relu_grad(Tensor g, Tensor y, Tensor scale) -> Tensor",
        _affine_relu_backward,
        _affine_relu_grad_setup,
    ),
    Op(
        "layer_norm(Tensor x, Tensor? weight, Tensor? bias, SymInt[] shape, float eps) -> (Tensor, "
        "Tensor, Tensor)",
        _layer_norm_backward,
        _layer_norm_setup,
    ),
    Op(
        "layer_norm_grad(Tensor g, Tensor x, Tensor mean, Tensor rstd, Tensor? before, Tensor? after, "
        "SymInt[] shape) -> Tensor",
        _layer_norm_grad_backward,
        _layer_norm_grad_setup,
    ),
    Op(
        "layer_norm_curve(Tensor g, Tensor v, Tensor x, Tensor mean, Tensor rstd, Tensor? before, "
        "Tensor? after, SymInt[] shape) -> Tensor",
        _no_third,
    ),
    Op(
        "attention(Tensor q, Tensor k, Tensor v, Tensor? bias, float scale, bool keep) -> (Tensor, Tensor)",
        _attention_backward,
        _attention_setup,
    ),
    Op(
        "attention_grad(Tensor g, Tensor q, Tensor k, Tensor v, Tensor out, Tensor kept, Tensor? bias, "
        "float scale) -> (Tensor, Tensor, Tensor)",
        _attention_grad_backward,
        _attention_derivative_setup,
    ),
    Op(
        "attention_tangent(Tensor dq, Tensor dk, Tensor dv, Tensor q, Tensor k, Tensor v, Tensor out, "
        "Tensor kept, Tensor? bias, float scale) -> Tensor",
        _attention_tangent_backward,
        _attention_derivative_setup,
    ),
    Op(
        "attention_curve(Tensor g, Tensor dq, Tensor dk, Tensor dv, Tensor q, Tensor k, Tensor v, "
        "Tensor out, Tensor kept, Tensor? bias, float scale) -> (Tensor, Tensor, Tensor)",
        _no_third,
    ),
    Op("unpack(Tensor values, Tensor codes, int[] shape, int n, int m) -> Tensor"),
    Op("kernel_order(Tensor values, Tensor codes, int[] shape, int n, int m) -> Tensor"),
    Op(
        "sparse_linear(Tensor input, Tensor values, Tensor codes, Tensor? bias, int[] shape, int n, "
        "int m, str activation='none', Tensor? order=None) -> Tensor",
        _sparse_linear_backward,
        _packed_setup,
    ),
    Op(
        "sparse_conv2d(Tensor input, Tensor values, Tensor codes, Tensor? bias, int[] shape, int n, "
        "int m, int[2] stride, int[2] padding, int[2] dilation, str activation='none', "
        "Tensor? order=None) -> Tensor",
        _sparse_conv2d_backward,
        _packed_setup,
    ),
)
