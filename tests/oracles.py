"""Slow, obvious answers in float64: what everything else is compared with."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from snows.solving.operators import LinearOperator


def dense_hessian(f: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    """The (n, n) Hessian of a scalar function, by PyTorch's functional API, entry by entry of the gradient."""
    with sdpa_kernel(SDPBackend.MATH):  # attention's fused kernels have no second derivative
        return torch.autograd.functional.hessian(f, at).reshape(at.numel(), at.numel())


def dense_gauss_newton(loss: Any, at: Tensor) -> Tensor:
    """``Σ Jᵀ M J`` with J formed row by row and M applied to one of J's columns after the other."""
    total = torch.zeros(at.numel(), at.numel(), dtype=at.dtype)
    jacobians = torch.autograd.functional.jacobian(lambda weight: tuple(loss.residuals(weight)), at)
    columns = [J.flatten(-at.ndim).unbind(-1) for J in jacobians]
    weighed = [loss.weigh(tangents) for tangents in zip(*columns, strict=True)]
    for k, J in enumerate(columns):
        total += torch.stack(J).flatten(1) @ torch.stack([w[k] for w in weighed]).flatten(1).T
    return total


def matrix_of(operator: object, like: Tensor) -> Tensor:
    """An operator's matrix, one product a column."""
    columns = []
    for i in range(like.numel()):
        e = torch.zeros(like.numel(), dtype=like.dtype)
        e[i] = 1
        columns.append((operator @ e.view(like.shape)).flatten())  # type: ignore[operator]
    return torch.stack(columns, dim=1)


def masked_least_squares(X: Tensor, Y: Tensor, mask: Tensor) -> Tensor:
    """Row by row ``min ‖X w - y‖²`` over the kept entries of w: X (n, in), Y (n, out), mask (out, in)."""
    W = torch.zeros(mask.shape, dtype=X.dtype)
    for i, keep in enumerate(mask):
        W[i, keep] = torch.linalg.lstsq(X[:, keep], Y[:, i], driver="gelsd").solution
    return W


def best_nm(row: Tensor, n: int, m: int) -> Tensor:
    """The n:m mask of one row by trying every choice; among equal sums the lexicographically first."""
    mask = torch.zeros(row.numel(), dtype=torch.bool)
    for start in range(0, row.numel(), m):
        group = row[start : start + m]
        size = min(n, group.numel())
        best = max(
            itertools.combinations(range(group.numel()), size),
            key=lambda c: float(sum(sorted(group[i].item() for i in c))),
        )
        mask[[start + i for i in best]] = True
    return mask


def unfold_rows(
    x: Tensor, kernel: tuple[int, int], stride: Any, padding: Any, dilation: Any, groups: int
) -> Tensor:
    """Input patches by explicit loops: (groups, positions, kh * kw * in / groups), input channel fastest."""
    stride, padding, dilation = ((v, v) if isinstance(v, int) else v for v in (stride, padding, dilation))
    x = torch.nn.functional.pad(x, (padding[1], padding[1], padding[0], padding[0]))
    batch, channels, height, width = x.shape
    high = (height - dilation[0] * (kernel[0] - 1) - 1) // stride[0] + 1
    wide = (width - dilation[1] * (kernel[1] - 1) - 1) // stride[1] + 1
    size = channels // groups
    out = []
    for g in range(groups):
        rows = []
        for b in range(batch):
            for i in range(high):
                for j in range(wide):
                    rows.append(
                        torch.cat(
                            [
                                x[
                                    b,
                                    g * size : (g + 1) * size,
                                    i * stride[0] + u * dilation[0],
                                    j * stride[1] + v * dilation[1],
                                ]
                                for u in range(kernel[0])
                                for v in range(kernel[1])
                            ]
                        )
                    )
        out.append(torch.stack(rows))
    return torch.stack(out)


def best_masks(W: Tensor, A: Tensor, G: Tensor, pattern: Any) -> dict[tuple[bool, ...], float]:
    """For every mask of a small weight that a pattern allows, the least ``tr(G E A Eᵀ)``, E = W - W', W' on the mask."""
    metric = torch.kron(G, A)
    w = W.flatten()
    values = {}
    for bits in itertools.product((False, True), repeat=w.numel()):
        mask = torch.tensor(bits)
        if not torch.equal(pattern.mask(mask.view(W.shape).double()), mask.view(W.shape)):
            continue
        gone = ~mask  # on the mask E is free: what is left of the metric is its Schur complement
        schur = torch.linalg.inv(torch.linalg.inv(metric)[gone][:, gone])
        values[bits] = (w[gone] @ schur @ w[gone]).item()
    return values


class Dense(LinearOperator):
    """Apply an explicit (n, n) matrix to tensors of n elements.

    Args:
        matrix: (n, n), symmetric.
    """

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix

    def __matmul__(self, v: Tensor) -> Tensor:
        return (self.matrix @ v.flatten()).view_as(v)
