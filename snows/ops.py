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

from snows import derivatives, reference

_library = torch.library.Library("snows", "DEF")
_PACKED = "int[] shape, int n, int m"
_LAST = 'str activation="none", Tensor? order=None'

# Tensors that take gradients come first; of several results the first is the op's own, the others are kept for its derivatives.
SCHEMAS = (
    "nm_mask(Tensor scores, int n, int m) -> Tensor",
    "nm_select(Tensor scores, int n, int m) -> (Tensor bits, Tensor codes)",
    "cg_direction(Tensor(a!) p, Tensor r, Tensor z, Tensor(b!) state) -> ()",
    "cg_update(Tensor(a!) x, Tensor(b!) r, Tensor p, Tensor Ap, Tensor(c!) state, float rtol) -> ()",
    "batched_cg_update(Tensor(a!) x, Tensor(b!) r, Tensor(c!) p, Tensor(d!) rz, Tensor product, Tensor mask, Tensor inverse, Tensor target)"
    " -> ()",
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
    f"unpack(Tensor values, Tensor codes, {_PACKED}) -> Tensor",
    f"kernel_order(Tensor values, Tensor codes, {_PACKED}) -> Tensor",
    f"sparse_linear(Tensor input, Tensor values, Tensor codes, Tensor? bias, {_PACKED}, {_LAST}) -> Tensor",
    f"sparse_conv2d(Tensor input, Tensor values, Tensor codes, Tensor? bias, {_PACKED}, int[2] stride, int[2] padding, int[2] dilation,"
    f" {_LAST}) -> Tensor",
)
OPS = tuple(schema.split("(")[0] for schema in SCHEMAS)

for _schema, _name in zip(SCHEMAS, OPS, strict=True):
    _library.define(_schema)
    _library.impl(_name, getattr(reference, _name), "CompositeExplicitAutograd")
derivatives.register(_library)

_ops = torch.ops.snows


def _autocast(op: str, device: str) -> Callable[..., Tensor]:
    """Under autocast a packed layer computes in its own precision and rounds its output to autocast's."""
    key = getattr(torch._C.DispatchKey, f"Autocast{device}")

    def cast(input: Tensor, values: Tensor, *rest: Any, **named: Any) -> Tensor:
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
            output: Tensor = getattr(torch.ops.snows, op)(input.to(values.dtype), values, *rest, **named)
            return output if values.dtype == torch.float64 else output.to(torch.get_autocast_dtype(device.lower()))

    return cast


for _op in ("sparse_linear", "sparse_conv2d"):
    for _device in ("CPU", "CUDA"):
        _library.impl(_op, _autocast(_op, _device), f"Autocast{_device}")


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

_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)

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


def _check_selection(op: str, scores: Tensor, n: int, m: int) -> None:
    if scores.ndim != 2 or scores.dtype not in _FLOATS:
        raise ValueError(f"{op}: expected scores to be a matrix of float16, bfloat16, float32 or float64, "
                         f"got {tuple(scores.shape)} {scores.dtype}")
    if not 0 < n < m:
        raise ValueError(f"{op}: expected 0 < n < m, got n = {n}, m = {m}")
    if scores.isnan().any():
        raise ValueError(f"{op}: expected scores without NaN, got NaN; check the weights and the calibration images")


def _check_like(op: str, name: str, value: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    if (*value.shape,) != shape or value.dtype != dtype or value.device != device:
        raise ValueError(f"{op}: expected {name} to be {shape} {dtype} on {device}, "
                         f"got {tuple(value.shape)} {value.dtype} on {value.device}")


def _check_vectors(op: str, changed: dict[str, Tensor], read: dict[str, Tensor]) -> None:
    """All alike, and what is changed contiguous."""
    first, lead = next(iter(changed.items()))
    if lead.dtype not in _FLOATS:
        raise ValueError(f"{op}: expected {first} to be floating point, got {lead.dtype}")
    for name, value in (changed | read).items():
        _check_like(op, name, value, (*lead.shape,), lead.dtype, lead.device)
    for name, value in changed.items():
        _check_contiguous(op, name, value)


def _check_contiguous(op: str, name: str, value: Tensor) -> None:
    if not value.is_contiguous():
        raise ValueError(f"{op}: expected {name} to be contiguous, since it is changed in place, got strides {value.stride()}")


def nm_mask(scores: Tensor, n: int, m: int) -> Tensor:
    """Keep the `n` highest of every `m` consecutive scores of a row; the lower index wins a tie.

    Args:
        scores: (rows, columns), floating point.
        n: entries kept in each group, 0 < n < m.
        m: entries in a group; above 32 the reference does it.

    Returns:
        (rows, columns), bool.

    Raises:
        ValueError: `scores` is not a floating-point matrix or holds NaN, or `n` and `m` are out of order.

    Example:
        >>> nm_mask(torch.tensor([[3.0, 1.0, 3.0, 2.0]]), 2, 4).int().tolist()
        [[1, 0, 1, 0]]
    """
    _check_selection("nm_mask", scores, n, m)
    select = torch.ops.snows.nm_mask if m <= 32 else reference.nm_mask
    mask: Tensor = select(scores.contiguous(), n, m)
    return mask


def nm_select(scores: Tensor, n: int, m: int) -> tuple[Tensor, Tensor]:
    """Make the mask of `nm_mask` as packed bits, and for 2:4 the codes that sparse matrix units read.

    Args:
        scores: (rows, columns), floating point.
        n: entries kept in each group, 0 < n < m.
        m: entries in a group; above 32 the reference does it.

    Returns:
        bits: (rows, ceil(columns / 8)), uint8: bit j of byte b is column 8 b + j.
        codes: of the same shape for 2:4, (rows, 0) otherwise: a nibble a group, lower first: its first kept index | the
            second << 2.

    Raises:
        ValueError: as in `nm_mask`.

    Example:
        >>> bits, codes = nm_select(torch.tensor([[3.0, 1.0, 3.0, 2.0, 0.0, 0.0, 1.0, 2.0]]), 2, 4)
        >>> f"{bits.item():08b} {codes.item():08b}"
        '11000101 11101000'
    """
    _check_selection("nm_select", scores, n, m)
    select = torch.ops.snows.nm_select if m <= 32 else reference.nm_select
    bits, codes = select(scores.contiguous(), n, m)
    return bits, codes


def cg_direction(p: Tensor, r: Tensor, z: Tensor, state: Tensor) -> None:
    """Turn the direction of conjugate gradients in place: ``p = z + β p``, β from r·z and the last one.

    Args:
        p: the last direction, zero at first; changed, contiguous.
        r: the residual.
        z: the preconditioned residual.
        state: (5,), float64: the scalars, as `reference` names them; changed. Nothing is unless it says RUNNING.

    Raises:
        ValueError: the tensors do not fit together.
    """
    _check_vectors("cg_direction", {"p": p}, {"r": r, "z": z})
    _check_like("cg_direction", "state", state, (5,), torch.float64, p.device)
    _check_contiguous("cg_direction", "state", state)
    torch.ops.snows.cg_direction(p, r.contiguous(), z.contiguous(), state)


def cg_update(x: Tensor, r: Tensor, p: Tensor, Ap: Tensor, state: Tensor, rtol: float) -> None:
    """Make one step of conjugate gradients in place: ``x += α p`` and ``r -= α Ap``, and take down how it went.

    Args:
        x: the solution so far, zero at first; changed, contiguous.
        r: the residual, likewise.
        p: the direction.
        Ap: the product with it.
        state: (5,), float64: the scalars, as `reference` names them; changed. Nothing is unless it says RUNNING.
        rtol: relative residual at which the status becomes CONVERGED.

    Raises:
        ValueError: the tensors do not fit together.
    """
    _check_vectors("cg_update", {"x": x, "r": r}, {"p": p, "Ap": Ap})
    _check_like("cg_update", "state", state, (5,), torch.float64, x.device)
    _check_contiguous("cg_update", "state", state)
    torch.ops.snows.cg_update(x, r, p.contiguous(), Ap.contiguous(), state, rtol)


def batched_cg_update(x: Tensor, r: Tensor, p: Tensor, rz: Tensor, product: Tensor, mask: Tensor, inverse: Tensor,
                      target: Tensor) -> None:
    """Make one step of conjugate gradients in place, in every row that is not done.

    Args:
        x: (groups, rows, columns), the solutions so far; changed, contiguous.
        r: the residuals, likewise.
        p: the directions, likewise.
        rz: (groups, rows), float64: r·z, 0 where a row is done; likewise.
        product: p times the row's matrix, before the mask.
        mask: bool, the entries that a row may change.
        inverse: (groups, columns), the preconditioner: one over the matrix's diagonal.
        target: (groups, rows), float64, the r·r at which a row is done.

    Raises:
        ValueError: the tensors do not fit together.
    """
    op = "batched_cg_update"
    if x.ndim != 3:
        raise ValueError(f"{op}: expected x to be (groups, rows, columns), got {tuple(x.shape)}")
    _check_vectors(op, {"x": x, "r": r, "p": p}, {"product": product})
    groups, rows, columns = x.shape
    _check_like(op, "mask", mask, (groups, rows, columns), torch.bool, x.device)
    _check_like(op, "inverse", inverse, (groups, columns), x.dtype, x.device)
    for name, value in (("rz", rz), ("target", target)):
        _check_like(op, name, value, (groups, rows), torch.float64, x.device)
    _check_contiguous(op, "rz", rz)
    torch.ops.snows.batched_cg_update(x, r, p, rz, product.contiguous(), mask.contiguous(), inverse.contiguous(), target.contiguous())


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


ACTIVATIONS = ("none", "relu", "gelu")


def unpack(values: Tensor, codes: Tensor, shape: Sequence[int], n: int, m: int) -> Tensor:
    """Put the stored values of a packed weight back at their places; see `snows.packing` for the format.

    Returns:
        The weight, `shape`.
    """
    weight: Tensor = torch.ops.snows.unpack(values, codes, shape, n, m)
    return weight


def kernel_order(values: Tensor, codes: Tensor, shape: Sequence[int], n: int, m: int) -> Tensor:
    """A packed weight in the order in which the kernels of its device read it; empty where there is no kernel.

    Returns:
        int32, opaque: for `sparse_linear` and `sparse_conv2d` in the same process, on the same device. Never saved.
    """
    order: Tensor = torch.ops.snows.kernel_order(values, codes, shape, n, m)
    return order


def _check_input(op: str, input: Tensor, values: Tensor, channels: int, expected: int, activation: str) -> None:
    if channels != expected:
        raise ValueError(f"{op}: expected an input with {expected} channels, got {channels} in {tuple(input.shape)}")
    if input.dtype != values.dtype and not torch.is_autocast_enabled(input.device.type):
        raise ValueError(f"{op}: expected an input of the weight's {values.dtype}, got {input.dtype}; convert one of them")
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: expected an activation of {', '.join(ACTIVATIONS)}, got {activation!r}")


def sparse_linear(
    input: Tensor, values: Tensor, codes: Tensor, bias: Tensor | None, shape: Sequence[int], n: int, m: int,
    activation: str = "none", order: Tensor | None = None,
) -> Tensor:
    """Multiply by a packed weight, add the bias, apply the activation; gradients pass to input and bias.

    Args:
        input: (..., in), of the weight's dtype.
        values: the stored weights and `codes` their positions, as `packing.pack` gives them; so are `shape`, `n`, `m`.
        codes: uint8.
        bias: (out,) or None.
        shape: (out, in).
        n: entries stored in each group, 0 for unstructured.
        m: entries in a group, 0 for unstructured.
        activation: "none", "relu" or "gelu".
        order: what `kernel_order` made of the weight; without it a kernel does not run, or runs slower.

    Returns:
        (..., out), contiguous.

    Raises:
        ValueError: the input's channels or dtype are not the weight's, or the activation is unknown.
    """
    if input.ndim == 0:
        raise ValueError("sparse_linear: expected an input of at least one dimension, got a scalar")
    _check_input("sparse_linear", input, values, input.shape[-1], shape[1], activation)
    output: Tensor = torch.ops.snows.sparse_linear(input, values, codes, bias, shape, n, m, activation, order)
    return output


def sparse_conv2d(
    input: Tensor, values: Tensor, codes: Tensor, bias: Tensor | None, shape: Sequence[int], n: int, m: int,
    stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int],
    activation: str = "none", order: Tensor | None = None,
) -> Tensor:
    """Convolve with a packed weight, add the bias, apply the activation; gradients pass to input and bias.

    Args:
        input: (images, in, height, width) or (in, height, width), of the weight's dtype.
        values: see `sparse_linear`, as `codes`, `bias`, `n`, `m`, `activation` and `order`.
        codes: uint8.
        bias: (out,) or None.
        shape: (out, in, kernel height, kernel width).
        n: entries stored in each group.
        m: entries in a group.
        stride: vertical, horizontal; likewise `padding` (zeros on both sides) and `dilation`.
        padding: see `stride`.
        dilation: see `stride`.
        activation: "none", "relu" or "gelu".
        order: what `kernel_order` made of the weight.

    Returns:
        (images, out, output height, output width), or without images as the input; contiguous, channels last where the input is.

    Raises:
        ValueError: the input's dimensions, channels or dtype are not the weight's, it is smaller than the kernel, or
            the activation is unknown.
    """
    if input.ndim not in (3, 4):
        raise ValueError(f"sparse_conv2d: expected an input of 3 or 4 dimensions, got {tuple(input.shape)}")
    _check_input("sparse_conv2d", input, values, input.shape[-3], shape[1], activation)
    for axis in (0, 1):
        extent = (shape[2 + axis] - 1) * dilation[axis] + 1
        if input.shape[axis - 2] + 2 * padding[axis] < extent:
            raise ValueError(f"sparse_conv2d: expected a padded input no smaller than the kernel's extent of {extent}, "
                             f"got {tuple(input.shape)} with padding {tuple(padding)}")
    images = input if input.ndim == 4 else input[None]
    output: Tensor = torch.ops.snows.sparse_conv2d(
        images, values, codes, bias, shape, n, m, stride, padding, dilation, activation, order)
    return output if input.ndim == 4 else output[0]
