"""Curvature as an operator: a loss's second-order model at one point, and what can be built from it.

Vectors have the weight's shape throughout; a mask is a projection, never an index list.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from snows import ops, together
from snows.ops import graphs
from snows.ops.precision import Precision, products_in


class Loss(Protocol):
    """Compute a function of one weight: ``½ Σ <r, M r>`` over its residuals r.

    Each residual has a symmetric positive semi-definite map M of its own.
    """

    def __call__(self, weight: Tensor) -> Tensor:
        """Compute the loss of a weight, by the samples of this process."""
        ...

    def residuals(self, weight: Tensor) -> Sequence[Tensor]:
        """Return the residuals, differentiable by the weight."""
        ...

    def weigh(self, residuals: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return ``M r`` for each, or for what is shaped like them: the derivative by the residuals."""
        ...


class LinearOperator(abc.ABC):
    """Apply a symmetric linear map to tensors of one shape."""

    @abc.abstractmethod
    def __matmul__(self, v: Tensor) -> Tensor:
        """Apply the map to `v`; the product has its shape and dtype."""


@dataclass(frozen=True)
class Estimate:
    """Hold a Monte-Carlo mean and its standard error."""

    mean: float
    error: float


def trace(
    operator: LinearOperator,
    mask: Tensor,
    *,
    probes: int = 8,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
) -> Estimate:
    """Estimate the trace of `operator` restricted to `mask` with Rademacher probes (Hutchinson 1990).

    Args:
        operator: a symmetric map on tensors of mask.shape.
        mask: bool; the entries whose diagonal is summed.
        probes: number of products.
        generator: source of the probes, on the CPU.
        dtype: of the probes.
    """
    samples = []
    for _ in range(probes):
        signs = torch.randint(0, 2, mask.shape, generator=generator).to(mask.device, dtype).mul_(2).sub_(1)
        probe = signs * mask
        samples.append((probe * (operator @ probe)).sum().item())
    values = torch.tensor(samples, dtype=torch.float64)
    error = (values.std() / math.sqrt(probes)).item() if probes > 1 else math.nan
    return Estimate(values.mean().item(), error)


class Curvature(LinearOperator):
    """Hold a loss's second-order model at a point, summed over all processes.

    On a CUDA device its products may be captured and replayed, see `graphs`, and be less precise than value
    and gradient.

    Args:
        at: the point.
        calls: the most products that will be asked for; None if that is not known.
        precision: of the products on a CUDA device.

    Attributes:
        value: the loss there.
        grad: its gradient.
        products: runs them.
    """

    value: float
    grad: Tensor

    def __init__(self, at: Tensor, calls: int | None, precision: Precision) -> None:
        self.products = graphs.Replayed(graphs.capturing(at.device, calls))
        self.precision = precision

    def __matmul__(self, v: Tensor) -> Tensor:
        with products_in(self.precision):
            return together.total(self.products(self.product, v))

    @abc.abstractmethod
    def product(self, v: Tensor) -> Tensor:
        """Compute this process's part of a product eagerly."""


def twice_differentiable() -> AbstractContextManager[None]:
    """Run attention in the one kernel that has a second derivative."""
    return sdpa_kernel(SDPBackend.MATH)


class Hessian(Curvature):
    """Apply the exact Hessian of a loss at a point; one graph serves value, gradient and products.

    ``(H @ v)`` is the gradient of ``<grad(W), v>`` (Pearlmutter 1994); no matrix is formed. The graph lives
    as long as this object.

    Args:
        loss: differentiable twice.
        at: the weight.
        calls, precision: see `Curvature`.

    Example:
        >>> H = Hessian(lambda w: w.pow(4).sum(), at=torch.tensor([1.0, 2.0]))
        >>> H @ torch.tensor([1.0, 1.0])
        tensor([12., 48.])
    """

    def __init__(
        self,
        loss: Callable[[Tensor], Tensor],
        at: Tensor,
        calls: int | None = None,
        precision: Precision = "float32",
    ) -> None:
        super().__init__(at, calls, precision)
        with torch.enable_grad(), twice_differentiable(), graphs.aside(at.device):
            self._at = at.detach().clone().requires_grad_()
            value = loss(self._at)
            (self._grad,) = torch.autograd.grad(value, self._at, create_graph=True)
        self.value = together.total(value.detach()).item()
        self.grad = together.total(self._grad.detach())

    def product(self, v: Tensor) -> Tensor:
        """Compute a product from the retained graph."""
        if not self._grad.requires_grad:  # a loss linear in the weight
            return torch.zeros_like(v)
        (product,) = torch.autograd.grad(self._grad, self._at, v, retain_graph=True, materialize_grads=True)
        return product


class GaussNewton(Curvature):
    """Apply the Gauss-Newton matrix ``Σ Jᵀ M J`` of a loss.

    J is the Jacobian of each of its residuals and M what that is measured by.

    Positive semi-definite; equal to the Hessian where the residuals are piecewise linear in the weight, as
    one layer of a ReLU network with evaluated BatchNorm is (Schraudolph 2002). ``J v`` is the derivative of
    ``Jᵀu`` with respect to u, so the forward pass runs once for all products.

    Args:
        loss: its `residuals` are differentiated.
        at: the weight.
        calls, precision: see `Curvature`.
    """

    def __init__(
        self, loss: Loss, at: Tensor, calls: int | None = None, precision: Precision = "float32"
    ) -> None:
        super().__init__(at, calls, precision)
        self._loss = loss
        with torch.enable_grad(), twice_differentiable(), graphs.aside(at.device):
            self._at = at.detach().clone().requires_grad_()
            self._residuals = list(loss.residuals(self._at))
            found = [r.detach() for r in self._residuals]
            self._cotangents = [u.detach().requires_grad_() for u in loss.weigh(found)]
            (self._pullback,) = torch.autograd.grad(
                self._residuals, self._at, self._cotangents, create_graph=True
            )
        self.value = together.total(half_inner(found, self._cotangents).detach()).item()
        self.grad = together.total(self._pullback.detach())

    def product(self, v: Tensor) -> Tensor:
        """Compute a product from the retained graph."""
        tangents = torch.autograd.grad(self._pullback, self._cotangents, v, retain_graph=True)
        (product,) = torch.autograd.grad(
            self._residuals, self._at, self._loss.weigh(tangents), retain_graph=True
        )
        return product


def half_inner(residuals: Sequence[Tensor], weighed: Sequence[Tensor]) -> Tensor:
    """Compute ``½ Σ <r, M r>``, the loss."""
    return 0.5 * torch.stack([(r * m).sum() for r, m in zip(residuals, weighed, strict=True)]).sum()


class Restricted(LinearOperator):
    """Apply ``P A P + damping I``, P the projection onto a mask: what Newton's method solves with.

    Args:
        operator: A.
        mask: bool.
        damping: absolute, at least 0.
    """

    def __init__(self, operator: LinearOperator, mask: Tensor, damping: float = 0.0) -> None:
        self.operator, self.damping = operator, damping
        self.bits = ops.pack_bits(mask)

    def __matmul__(self, v: Tensor) -> Tensor:
        v = ops.masked(v, self.bits)
        return ops.masked(self.operator @ v, self.bits).add_(v, alpha=self.damping)
