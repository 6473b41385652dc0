"""Products of 2:4 weights by cuSPARSELt, the library that comes with PyTorch's builds for CUDA.

It stands among the ops because it is a way to run one, and no kernel of ours. What it is called through are
private functions of torch, used in this file alone: whether they are there and compute what they should is
tried on the device before the first weight is given to it. float32 would be rounded to TF32, so it takes 16
bits alone.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

log = logging.getLogger(__name__)
DTYPES = (torch.float16, torch.bfloat16)
WIDTHS, TOKENS = 16, 8  # it takes weights whose sides, and tokens whose number, are multiples of

_library = torch.library.Library("snows", "FRAGMENT")
_library.define("cusparselt_linear(Tensor input, Tensor compressed, Tensor? bias, SymInt out) -> Tensor")
_algorithms: dict[Any, int] = {}  # by all on which the fastest one depends


def takes(values: Tensor, shape: Sequence[int], n: int, m: int) -> bool:
    """Say whether it multiplies by a packed weight where the weight is.

    Args:
        values: of the packed weight.
        shape: of the weight.
        n: entries stored in each group.
        m: entries in a group.
    """
    fits = len(shape) == 2 and all(x > 0 and x % WIDTHS == 0 for x in shape)
    return (n, m) == (2, 4) and fits and values.dtype in DTYPES and _is_with(values)


def compress(weight: Tensor) -> Tensor:
    """Bring a 2:4 weight into the library's own form, which is opaque."""
    with torch.cuda.device_of(weight):
        compressed: Tensor = torch._cslt_compress(weight.contiguous())
        return compressed


def linear(input: Tensor, compressed: Tensor, bias: Tensor | None, out: int) -> Tensor:
    """Multiply by a compressed weight and add the bias; no gradients pass.

    Args:
        input: (..., in), of the weight's dtype.
        compressed: what `compress` made of an (out, in) weight.
        bias: (out,) or None.
        out: features.

    Returns:
        (..., out), contiguous.
    """
    output: Tensor = torch.ops.snows.cusparselt_linear(input, compressed, bias, out)
    return output


def _linear(input: Tensor, compressed: Tensor, bias: Tensor | None, out: int) -> Tensor:
    tokens = input.reshape(-1, input.shape[-1])
    count = len(tokens)
    if not count:
        return _like(input, compressed, bias, out)
    with torch.cuda.device_of(input):
        x = F.pad(tokens, (0, 0, 0, -count % TOKENS)).contiguous().T
        best = _algorithm(compressed, x, bias)
        y = torch._cslt_sparse_mm(compressed, x, bias=bias, transpose_result=True, alg_id=best)
    return y[:count].reshape(*input.shape[:-1], out)


def _like(input: Tensor, compressed: Tensor, bias: Tensor | None, out: int) -> Tensor:
    return input.new_empty((*input.shape[:-1], out))


_library.impl("cusparselt_linear", _linear, "CompositeExplicitAutograd")
torch.library.register_fake("snows::cusparselt_linear", _like, lib=_library)


def _algorithm(compressed: Tensor, x: Tensor, bias: Tensor | None) -> int:
    """Find the fastest algorithm, once for each number of tokens; the library's first while capturing."""
    key = (x.device, x.dtype, compressed.numel(), *x.shape, bias is None)
    if key not in _algorithms:
        if x.is_cuda and torch.cuda.is_current_stream_capturing():
            return 0
        _algorithms[key] = torch._cslt_sparse_mm_search(compressed, x, bias=bias, transpose_result=True)
    return _algorithms[key]


def _is_with(values: Tensor) -> bool:
    """Say whether the library is there for a tensor's device and dtype."""
    return values.is_cuda and _works(values.device, values.dtype)


@functools.cache
def _works(device: torch.device, dtype: torch.dtype) -> bool:
    """Try whether a small product comes out right, to the bit: all its sums are whole numbers."""
    side = torch.arange(2 * WIDTHS, device=device)
    kept = (side + side[:, None]) % 4 < 2
    weight = ((7 * side[:, None] + 5 * side) % 5 - 2).where(kept, 0).to(dtype)
    x, bias = ((3 * side + side[:5, None]) % 7 - 3).to(dtype), (side % 3).to(dtype)
    try:
        found = _linear(x, compress(weight), bias, len(weight))
    except Exception as error:  # whatever a torch without it raises
        log.debug("cuSPARSELt is not used: %s", error)
        return False
    return torch.equal(found.float(), F.linear(x.float(), weight.float(), bias.float()))
