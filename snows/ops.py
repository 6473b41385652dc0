"""The register of ops: a schema, the reference behind it, and one typed public function that validates.

The reference serves every device and is its own fake kernel; native kernels are registered over it for the devices
they serve, and PyTorch's dispatcher chooses. `SNOWS_REFERENCE=1`, set before the import, leaves the kernels out.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from snows import reference

_library = torch.library.Library("snows", "DEF")

# Tensors that take gradients come first; of several results the first is the op's own, the others are kept for its derivatives.
SCHEMAS = (
    "nm_mask(Tensor scores, int n, int m) -> Tensor",
    "masked(Tensor weight, Tensor bits) -> Tensor",
    "gelu(Tensor x, str approximate) -> (Tensor, Tensor)",
    "gelu_curve(Tensor x, Tensor g, str approximate) -> Tensor",
    "affine_relu(Tensor x, Tensor scale, Tensor shift) -> Tensor",
    "affine_relu_grad(Tensor g, Tensor y, Tensor scale) -> Tensor",
    "layer_norm(Tensor x, Tensor? weight, Tensor? bias, SymInt[] shape, float eps) -> (Tensor, Tensor, Tensor)",
    "layer_norm_grad(Tensor g, Tensor x, Tensor mean, Tensor rstd, Tensor? before, Tensor? after, SymInt[] shape) -> Tensor",
    "layer_norm_curve(Tensor g, Tensor v, Tensor x, Tensor mean, Tensor rstd, Tensor? before, Tensor? after, SymInt[] shape) -> Tensor",
    "attention(Tensor q, Tensor k, Tensor v, Tensor? bias, float scale, bool keep) -> (Tensor, Tensor)",
    "attention_grad(Tensor g, Tensor q, Tensor k, Tensor v, Tensor out, Tensor kept, Tensor? bias, float scale) -> (Tensor, Tensor, Tensor)",
    "attention_tangent(Tensor dq, Tensor dk, Tensor dv, Tensor q, Tensor k, Tensor v, Tensor out, Tensor kept, Tensor? bias, float scale)"
    " -> Tensor",
    "attention_curve(Tensor g, Tensor dq, Tensor dk, Tensor dv, Tensor q, Tensor k, Tensor v, Tensor out, Tensor kept, Tensor? bias,"
    " float scale) -> (Tensor, Tensor, Tensor)",
)
OPS = tuple(schema.split("(")[0] for schema in SCHEMAS)

for _schema, _name in zip(SCHEMAS, OPS, strict=True):
    _library.define(_schema)
    _library.impl(_name, getattr(reference, _name), "CompositeExplicitAutograd")

_ops = torch.ops.snows


def _load_native() -> str:
    """Load the compiled kernels if they were built; say in one phrase what happened."""
    if os.environ.get("SNOWS_REFERENCE") == "1":
        return "left out by SNOWS_REFERENCE=1"
    for path in sorted(Path(__file__).parent.glob("_native*.so")):
        try:
            torch.ops.load_library(str(path))
        except OSError as error:
            warnings.warn(f"snows: the native kernels in {path.name} do not load ({error}); "
                          "the reference runs instead. Reinstall snows with the torch in use.", stacklevel=3)
            return "built, but does not load"
        return "loaded"
    return "not built"


native = _load_native()

TRITON = {  # file in kernels/ -> the ops in it
    "masked": ("masked",),
    "gelu": ("gelu", "gelu_curve"),
    "affine_relu": ("affine_relu", "affine_relu_grad"),
    "layer_norm": ("layer_norm", "layer_norm_grad", "layer_norm_curve"),
    "attention": ("attention", "attention_grad", "attention_tangent"),
}


def _from_triton(file: str, name: str) -> Callable[..., Any]:
    """The op's launcher, imported when it is first called; the reference takes what the kernel does not."""

    def call(*args: Any) -> Any:
        kernel = importlib.import_module(f"snows.kernels.{file}")
        old = torch.cuda.get_device_capability(args[0].device) < (8, 0)
        large = any(isinstance(x, Tensor) and x.numel() >= 2**31 for x in args)
        run = reference if old or large or not kernel.takes(*args) else kernel
        with torch.cuda.device_of(args[0]):
            return getattr(run, name)(*args)

    return call


def _register_triton() -> str:
    """Register the Triton kernels for CUDA where both are there; say in one phrase what happened."""
    if os.environ.get("SNOWS_REFERENCE") == "1":
        return "left out by SNOWS_REFERENCE=1"
    if torch.version.cuda is None:
        return "not for this build of torch"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    for file, names in TRITON.items():
        for name in names:
            if not torch._C._dispatch_has_kernel_for_dispatch_key(f"snows::{name}", "CUDA"):
                _library.impl(name, _from_triton(file, name), "CUDA")
    return "registered"


triton = _register_triton()


def implementation(op: str, device: str = "CPU") -> str:
    """Name what runs `op` on `device`: "native", "triton" or "reference"."""
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"snows::{op}", device):
        return "reference"
    ours = device == "CUDA" and triton == "registered" and any(op in names for names in TRITON.values())
    return "triton" if ours else "native"


def nm_mask(scores: Tensor, n: int, m: int) -> Tensor:
    """Keep the `n` highest of every `m` consecutive scores of a row; the lower index wins a tie.

    Args:
        scores: (rows, columns), floating point.
        n: entries kept in each group, 0 < n < m.
        m: entries in a group.

    Returns:
        (rows, columns), bool.

    Raises:
        ValueError: `scores` is not a floating-point matrix or holds NaN, or `n` and `m` are out of order.

    Example:
        >>> nm_mask(torch.tensor([[3.0, 1.0, 3.0, 2.0]]), 2, 4).int().tolist()
        [[1, 0, 1, 0]]
    """
    if scores.ndim != 2 or not scores.is_floating_point():
        raise ValueError(f"nm_mask: expected a floating-point matrix of scores, got {tuple(scores.shape)} {scores.dtype}")
    if not 0 < n < m:
        raise ValueError(f"nm_mask: expected 0 < n < m, got n = {n}, m = {m}")
    if scores.isnan().any():
        raise ValueError("nm_mask: expected scores without NaN, got NaN; check the weights and the calibration images")
    mask: Tensor = torch.ops.snows.nm_mask(scores.contiguous(), n, m)
    return mask


# ---------------------------------------------------------------- gradients, made of ops again


def _asked(ctx: Any, index: int) -> bool:
    """Whether the pass that is running wants the gradient by input `index`.

    ``needs_input_grad`` only says that some pass might: a Gauss-Newton product goes through an adjoint by its cotangent alone,
    and the second derivative by the point would be thrown away. PyTorch's own formulas ask the engine the same question.
    """
    node = ctx.next_functions[index][0]
    if not ctx.needs_input_grad[index] or node is None:
        return False
    if node.name() == "torch::autograd::AccumulateGrad":  # the engine does not tell about leaves
        return True
    return bool(torch._C._will_engine_execute_node(node))


def _no_third(ctx: Any, *grads: Tensor) -> Any:
    raise NotImplementedError("snows: the ops have no third derivative")


def _register(name: str, backward: Callable[..., Any], setup: Callable[..., None] | None = None) -> None:
    def remember(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.set_materialize_grads(False)
        if setup is not None:
            setup(ctx, inputs, output)

    torch.library.register_autograd(f"snows::{name}", backward, setup_context=remember, lib=_library)


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
    ctx.save_for_backward(output, inputs[1])


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
        tangents = tuple(torch.zeros_like(x) if t is None else t for t, x in zip(tangents, point, strict=False))
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


_register("masked", _masked_backward, _masked_setup)
_register("gelu", _gelu_backward, _gelu_setup)
_register("gelu_curve", _no_third)
_register("affine_relu", _affine_relu_backward, _affine_relu_setup)
_register("affine_relu_grad", _affine_relu_backward, _affine_relu_grad_setup)
_register("layer_norm", _layer_norm_backward, _layer_norm_setup)
_register("layer_norm_grad", _layer_norm_grad_backward, _layer_norm_grad_setup)
_register("layer_norm_curve", _no_third)
_register("attention", _attention_backward, _attention_setup)
_register("attention_grad", _attention_grad_backward, _attention_derivative_setup)
_register("attention_tangent", _attention_tangent_backward, _attention_derivative_setup)
_register("attention_curve", _no_third)


# ---------------------------------------------------------------- what is called


def _expect(right: bool, op: str, argument: str, expected: str, got: object) -> None:
    if not right:
        raise ValueError(f"{op}: {argument}: expected {expected}, got {got}")


def _describe(x: Tensor) -> str:
    return f"{tuple(x.shape)} {x.dtype} on {x.device}"


def _check_real(op: str, argument: str, x: Tensor) -> None:
    _expect(x.is_floating_point(), op, argument, "floating point", x.dtype)


def _check_constant(op: str, argument: str, x: Tensor | None, shape: Sequence[int], like: Tensor) -> None:
    """A parameter of the op: this shape, `like`'s dtype and device, and no gradient asked of it."""
    if x is None:
        return
    right = tuple(x.shape) == tuple(shape) and x.dtype == like.dtype and x.device == like.device
    _expect(right, op, argument, f"{tuple(shape)} {like.dtype} on {like.device}", _describe(x))
    _expect(not (x.requires_grad and torch.is_grad_enabled()), op, argument, "a constant", "a tensor that requires grad")


def pack_bits(mask: Tensor) -> Tensor:
    """Pack a mask into bytes, as `masked` takes it: bit j of byte b is element 8 b + j of the flattened mask.

    Args:
        mask: any shape, bool.

    Returns:
        (ceil(elements / 8),), uint8.

    Raises:
        ValueError: `mask` is not bool.

    Example:
        >>> pack_bits(torch.tensor([True, False, True, False, False, False, False, False, True])).tolist()
        [5, 1]
    """
    _expect(mask.dtype == torch.bool, "pack_bits", "mask", "bool", mask.dtype)
    return reference.pack_bits(mask)


def masked(weight: Tensor, bits: Tensor) -> Tensor:
    """Keep the weight where its bit is set; +0.0 elsewhere, whatever stood there. Differentiable any number of times.

    Args:
        weight: any shape, floating point.
        bits: (ceil(elements / 8),), uint8, as `pack_bits` gives them.

    Returns:
        weight.shape, contiguous.

    Raises:
        ValueError: a dtype, shape or device is wrong.

    Example:
        >>> masked(torch.tensor([3.0, -2.0, 1.0]), torch.tensor([5], dtype=torch.uint8))
        tensor([3., 0., 1.])
    """
    _check_real("masked", "weight", weight)
    shape = (-(-weight.numel() // 8),)
    right = bits.shape == shape and bits.dtype == torch.uint8 and bits.device == weight.device
    _expect(right, "masked", "bits", f"{shape} torch.uint8 on {weight.device}", _describe(bits))
    result: Tensor = _ops.masked(weight, bits)
    return result


def gelu(x: Tensor, approximate: str = "none") -> Tensor:
    """GELU, ``x Φ(x)``, or its tanh approximation (Hendrycks & Gimpel 2016); differentiable twice.

    Args:
        x: any shape, floating point.
        approximate: "none" or "tanh".

    Returns:
        x.shape.

    Raises:
        ValueError: `x` is not floating point, or `approximate` is neither.
    """
    _check_real("gelu", "x", x)
    _expect(approximate in ("none", "tanh"), "gelu", "approximate", '"none" or "tanh"', repr(approximate))
    result: Tensor = _ops.gelu(x, approximate)[0]
    return result


def affine_relu(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """``max(0, scale x + shift)``, channel by channel; differentiable twice by x.

    Args:
        x: (batch, channels, ...), floating point.
        scale: (channels,), a constant.
        shift: (channels,), a constant.

    Returns:
        x.shape.

    Raises:
        ValueError: a dtype, shape or device is wrong, or a constant requires grad.
    """
    _check_real("affine_relu", "x", x)
    _expect(x.ndim >= 2, "affine_relu", "x", "(batch, channels, ...)", tuple(x.shape))
    _check_constant("affine_relu", "scale", scale, x.shape[1:2], x)
    _check_constant("affine_relu", "shift", shift, x.shape[1:2], x)
    result: Tensor = _ops.affine_relu(x, scale, shift)
    return result


def layer_norm(x: Tensor, shape: Sequence[int], weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """LayerNorm over the last dimensions (Ba et al. 2016); differentiable twice by x.

    Args:
        x: (..., *shape), floating point.
        shape: the last dimensions of x, one at least.
        weight: shape, a constant; None for ones.
        bias: shape, a constant; None for zeros.
        eps: added to the variance.

    Returns:
        x.shape.

    Raises:
        ValueError: a dtype, shape or device is wrong, or a constant requires grad.
    """
    _check_real("layer_norm", "x", x)
    shape = tuple(shape)
    _expect(0 < len(shape) <= x.ndim and tuple(x.shape[-len(shape):]) == shape, "layer_norm", "x", f"(..., *{shape})", tuple(x.shape))
    _check_constant("layer_norm", "weight", weight, shape, x)
    _check_constant("layer_norm", "bias", bias, shape, x)
    result: Tensor = _ops.layer_norm(x, weight, bias, shape, eps)[0]
    return result


# The devices on which a kernel makes attention's matrix again. Found once: what asks the dispatcher cannot be traced.
MADE_AGAIN = {device for device in ("cpu", "cuda") if implementation("attention", device.upper()) != "reference"}


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, scale: float | None = None) -> Tensor:
    """``softmax(scale q kᵀ + bias) v`` (Vaswani et al. 2017), differentiable twice by q, k and v.

    The reference, which fills the (queries, keys) matrix anyway, keeps it for the derivatives; a kernel makes it again.

    Args:
        q: (..., queries, width), floating point.
        k: (..., keys, width), leading dimensions as q's.
        v: (..., keys, depth), likewise.
        bias: broadcasts to (..., queries, keys); a constant, -inf for what is masked.
        scale: 1 / sqrt(width) without it.

    Returns:
        (..., queries, depth).

    Raises:
        ValueError: a dtype, shape or device is wrong, or the bias requires grad.
    """
    _check_real("attention", "q", q)
    _expect(q.ndim >= 2, "attention", "q", "(..., queries, width)", tuple(q.shape))
    for name, x in (("k", k), ("v", v)):
        right = x.ndim == q.ndim and x.shape[:-2] == q.shape[:-2] and x.dtype == q.dtype and x.device == q.device
        _expect(right, "attention", name, f"{(*q.shape[:-2], '...', '...')} {q.dtype} on {q.device}", _describe(x))
    _expect(k.shape[-1] == q.shape[-1], "attention", "k", f"width {q.shape[-1]}", k.shape[-1])
    _expect(v.shape[-2] == k.shape[-2], "attention", "v", f"{k.shape[-2]} keys", v.shape[-2])
    if bias is not None:
        full = (*q.shape[:-1], k.shape[-2])
        fits = bias.ndim <= len(full) and all(b in (1, f) for b, f in zip(bias.shape[::-1], full[::-1], strict=False))
        _expect(fits, "attention", "bias", f"what broadcasts to {full}", tuple(bias.shape))
        _check_constant("attention", "bias", bias, bias.shape, q)
        bias = bias.expand(full).reshape(-1, *full[-2:])
    lead = q.shape[:-2]
    q, k, v = (x.reshape(-1, *x.shape[-2:]) if x.numel() else x.reshape(lead.numel(), *x.shape[-2:]) for x in (q, k, v))
    keep = q.device.type not in MADE_AGAIN
    out: Tensor = _ops.attention(q, k, v, bias, q.shape[-1] ** -0.5 if scale is None else scale, keep)[0]
    return out.view(*lead, *out.shape[-2:])
