"""Preconditioners from the Kronecker factors of a layer's curvature, on the weights that a mask keeps."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from snows import together
from snows.solving.operators import LinearOperator
from snows.sparsity import rows, unrows


@dataclass(frozen=True)
class Factors:
    """Kronecker factors of one layer's curvature, by group of a convolution, in the row view.

    Attributes:
        inputs: (groups, in, in), second moment of the layer's input rows.
        outputs: (groups, out / groups, out / groups), second moment of what a unit change of an output does
            later.
    """

    inputs: Tensor
    outputs: Tensor


class Kronecker(LinearOperator):
    """Apply ``P (G + εI)⁻¹ ⊗ (A + εI)⁻¹ P`` (after K-FAC, Martens & Grosse 2015).

    A is the second moment of the layer's inputs, G that of its output's sensitivity; each is damped by
    ``sqrt(damping)`` of its own mean diagonal, so the choice is free of scale.

    Args:
        factors: A and G.
        mask: bool, the layer's weight shape.
        damping: relative to the curvature's mean, above 0.
    """

    def __init__(self, factors: Factors, mask: Tensor, damping: float) -> None:
        self.mask = mask
        share = math.sqrt(damping)
        self._inputs = _inverse(factors.inputs, share)
        self._outputs = _inverse(factors.outputs, share)

    def __matmul__(self, v: Tensor) -> Tensor:
        matrix = rows(v * self.mask)
        grouped = matrix.view(len(self._inputs), -1, matrix.shape[1])
        product = self._outputs @ grouped @ self._inputs
        return unrows(product.reshape(matrix.shape), v.shape) * self.mask


class RowBlocks(LinearOperator):
    """Invert the curvature of each output row on its own mask.

    Row i's block is ``G_ii A_SS + εI``, S the weights it keeps: what is left of the Kronecker product ``G ⊗
    A`` after restricting it to the mask and dropping what couples rows. Restricting first and inverting then
    is what counts: the inverse of the whole product, restricted, is far from it as soon as many weights are
    masked.

    Of several processes each has the blocks of its own rows.

    Args:
        factors: A and G.
        mask: bool, the layer's weight shape.
        damping: ε relative to the mean of the product's diagonal, above 0.
    """

    LIMIT = 2**26  # numbers in all blocks: 256 MB in float32
    COPIES = 5  # of what is inverted at a time, in float64, that are there at a time

    def __init__(self, factors: Factors, mask: Tensor, damping: float) -> None:
        self.mask = mask
        kept = rows(mask)
        size = len(kept) // len(factors.inputs)
        width = max(1, int(kept.sum(1).max()))
        self._rows = together.Rows(len(kept), 4 * len(kept) * width**3)  # small matrices, in float64
        own = self._rows.own
        kept, counts = kept[own], kept[own].sum(1)
        # the kept columns of each row first, in order; what fills up shorter rows is masked out
        self._columns = kept.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :width]
        self._real = torch.arange(width, device=mask.device) < counts[:, None]
        sensitivity = factors.outputs.diagonal(dim1=-2, dim2=-1).flatten().double()
        diagonal = factors.inputs.diagonal(dim1=-2, dim2=-1).double()
        scale = (sensitivity.mean() * diagonal.mean()).clamp_min(torch.finfo(torch.float32).tiny)
        sensitivity = sensitivity[own] / scale
        self._inverse = torch.empty(len(kept), width, width, dtype=factors.inputs.dtype, device=mask.device)
        step = self._at_a_time(width, mask.device)
        for start in range(0, len(kept), step):
            part = slice(start, min(start + step, len(kept)))
            group = torch.arange(own.start + part.start, own.start + part.stop, device=mask.device) // size
            index = self._columns[part]
            block = factors.inputs[group[:, None, None], index[:, :, None], index[:, None, :]].double()
            real = self._real[part]
            block *= real[:, :, None] & real[:, None, :]
            block *= sensitivity[part, None, None]
            shift = torch.ones_like(block[..., 0]).masked_fill_(real, damping)
            clean = block.diagonal(dim1=-2, dim2=-1).clone()
            block.diagonal(dim1=-2, dim2=-1).add_(shift)
            factor, failed = torch.linalg.cholesky_ex(block)
            while failed.any():  # features so extreme that float32 moments are not positive definite any more
                shift[failed > 0] *= 10
                block.diagonal(dim1=-2, dim2=-1).copy_(clean + shift)
                factor, failed = torch.linalg.cholesky_ex(block)
            self._inverse[part] = inverse_of(factor, at_once=factor.is_cuda).to(self._inverse.dtype)

    @classmethod
    def fits(cls, mask: Tensor) -> bool:
        """Say whether the blocks stay below `LIMIT` numbers."""
        kept = rows(mask)
        return len(kept) * int(kept.sum(1).max()) ** 2 <= cls.LIMIT

    @classmethod
    def most(cls, weight: Tensor) -> int:
        """Return the bytes that the blocks of a layer take at most, and inverting them, whatever its mask is.

        Args:
            weight: of the layer.
        """
        count, columns = len(weight), weight[0].numel()
        width = min(columns, math.isqrt(cls.LIMIT // count))  # of the widest blocks that still fit
        piece = min(count, cls._at_a_time(max(width, 1), weight.device))
        return width**2 * (count * weight.element_size() + 8 * cls.COPIES * piece)

    @classmethod
    def _at_a_time(cls, width: int, device: torch.device) -> int:
        """Return how many blocks are inverted at a time; a CPU takes one after the other anyway."""
        return max(1, (2**20 if device.type == "cpu" else 2**24) // width**2)

    def __matmul__(self, v: Tensor) -> Tensor:
        matrix, own = rows(v), self._rows.own
        packed = matrix[own].gather(1, self._columns) * self._real
        product = torch.bmm(self._inverse, packed.unsqueeze(-1)).squeeze(-1) * self._real
        found = torch.zeros_like(matrix[own]).scatter_(1, self._columns, product)
        return unrows(self._rows.joined(found), v.shape)


def inverse_of(factors: Tensor, at_once: bool) -> Tensor:
    """Invert ``L Lᵀ`` for each of many Cholesky factors L.

    Args:
        factors: L, (count, n, n), lower triangles.
        at_once: by one triangular solve and one product for all of them. That is slower on a CPU (2.5 times
            from a width of 288 on), but on a CUDA device PyTorch's `cholesky_inverse` takes one matrix after
            the other, and each leaves most of the device idle.
    """
    if not at_once:
        return torch.cholesky_inverse(factors)
    eye = torch.eye(factors.shape[-1], dtype=factors.dtype, device=factors.device)
    roots: Tensor = torch.linalg.solve_triangular(factors, eye.expand_as(factors), upper=False)
    return roots.mT @ roots


def _inverse(matrices: Tensor, share: float) -> Tensor:
    """Invert a batch of positive semi-definite matrices damped by `share` of their own mean diagonal."""
    diagonal = matrices.diagonal(dim1=-2, dim2=-1)
    mean = diagonal.mean(-1).double().clamp_min(torch.finfo(torch.float32).tiny)
    damped = matrices.to(torch.float64, copy=True)
    damped.diagonal(dim1=-2, dim2=-1).add_((share * mean)[:, None])
    factor = torch.linalg.cholesky(damped)
    del damped  # three of these matrices of a wide layer may be more than there is room for
    return torch.cholesky_inverse(factor).mul_(mean[:, None, None]).to(matrices.dtype)
