import math

import pytest
import torch
from oracles import Dense, dense_gauss_newton, dense_hessian, matrix_of
from torch import nn
from torch.func import functional_call

from snows.solving.operators import GaussNewton, Hessian, Restricted, trace
from snows.solving.preconditioners import Factors, Kronecker, RowBlocks
from snows.sparsity import rows


class NetLoss:
    """Sum of squares of a small network's output minus a target, as a function of its first weight."""

    def __init__(self, net, x, y):
        self.net, self.x, self.y = net, x, y

    def residuals(self, weight):
        out = functional_call(self.net, {"0.weight": weight}, (self.x,))
        return [out - self.y, out.square()]

    def weigh(self, residuals):
        return [2 * residuals[0], 0.5 * residuals[1]]

    def __call__(self, weight):
        first, second = self.residuals(weight)
        return first.square().sum() + 0.25 * second.square().sum()


def case(activation):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5), activation, nn.Linear(5, 4), nn.LayerNorm(4)).double()
    return NetLoss(net, torch.randn(7, 6).double(), torch.randn(7, 4).double()), net[0].weight.detach()


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.GELU(), nn.Tanh()], ids=str)
def test_hessian_and_gauss_newton_against_dense_matrices(activation):
    loss, at = case(activation)
    for operator, oracle in (
        (Hessian(loss, at), dense_hessian(loss, at)),
        (GaussNewton(loss, at), dense_gauss_newton(loss, at)),
    ):
        found = matrix_of(operator, at)
        assert (found - oracle).norm() <= 1e-10 * oracle.norm()
        assert operator.value == pytest.approx(loss(at).item(), rel=1e-12)
        expected = torch.autograd.functional.jacobian(loss, at)
        assert (operator.grad - expected).norm() <= 1e-10 * expected.norm()


def test_hessian_of_a_linear_loss_is_zero():
    H = Hessian(lambda w: (3 * w).sum(), torch.ones(3))
    assert torch.equal(H @ torch.ones(3), torch.zeros(3))
    assert torch.equal(H.grad, torch.full((3,), 3.0))


def test_restricted_is_the_masked_block_plus_damping():
    matrix = torch.randn(12, 12, dtype=torch.float64)
    matrix = matrix @ matrix.T
    mask = torch.rand(3, 4) < 0.5
    keep = mask.flatten().double()
    expected = matrix * keep[:, None] * keep[None] + 0.3 * torch.diag(keep)
    assert torch.allclose(
        matrix_of(Restricted(Dense(matrix), mask, 0.3), mask.double()), expected, rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("groups", [1, 2])
def test_kronecker_inverts_the_damped_product_where_nothing_is_masked(groups):
    shape = (6, 4, 1, 2)
    A, G = torch.randn(groups, 8, 9).double(), torch.randn(groups, 6 // groups, 9).double()
    A, G = A @ A.transpose(1, 2), G @ G.transpose(1, 2)
    P = Kronecker(Factors(A, G), torch.ones(shape, dtype=torch.bool), damping=0.04)
    v = torch.randn(shape).double()
    for g in range(groups):
        a = A[g] + 0.2 * A[g].diagonal().mean() * torch.eye(8, dtype=torch.float64)
        h = G[g] + 0.2 * G[g].diagonal().mean() * torch.eye(len(G[g]), dtype=torch.float64)
        size = 6 // groups
        scale = A[g].diagonal().mean() * G[g].diagonal().mean()
        found = h @ rows(P @ v)[g * size : (g + 1) * size] @ a / scale
        expected = rows(v)[g * size : (g + 1) * size]
        assert (found - expected).norm() <= 1e-9 * expected.norm()


@pytest.mark.parametrize("groups", [1, 2])
def test_row_blocks_invert_each_rows_block_on_its_mask(groups):
    shape = (6, 4, 1, 2)
    A, G = torch.randn(groups, 8, 9).double(), torch.randn(groups, 6 // groups, 9).double()
    A, G = A @ A.transpose(1, 2), G @ G.transpose(1, 2)
    mask = torch.rand(shape) < 0.6
    mask[2] = False
    P = RowBlocks(Factors(A, G), mask, damping=0.04)
    v = torch.randn(shape).double()
    found = rows(P @ v)
    sensitivity = G.diagonal(dim1=1, dim2=2).flatten()
    scale = A.diagonal(dim1=1, dim2=2).mean() * sensitivity.mean()
    for i, keep in enumerate(rows(mask)):
        block = sensitivity[i] / scale * A[i // (6 // groups)][keep][:, keep] + 0.04 * torch.eye(
            int(keep.sum()), dtype=torch.float64
        )
        assert torch.allclose(found[i, keep], torch.linalg.solve(block, rows(v)[i, keep]), rtol=1e-9)
        assert not found[i, ~keep].any()


def test_row_blocks_of_moments_that_rounding_made_indefinite_are_damped_until_they_factor():
    """Two rows share an A whose smallest eigenvalue is -0.5 (what float32 leaves of extreme features); a third row keeps one column."""
    Q = torch.linalg.qr(torch.randn(6, 6).double()).Q
    A = (Q * torch.tensor([-0.5, 0.1, 1.0, 1.0, 2.0, 3.0])) @ Q.T
    G = torch.eye(3).double()
    mask = torch.ones(3, 6, dtype=torch.bool)
    mask[2, 1:] = False
    P = RowBlocks(Factors(A[None], G[None]), mask, damping=1e-3)
    scale = A.diagonal().mean()
    v = torch.randn(3, 6).double()
    found = P @ v
    shift = 1e-3
    while torch.linalg.eigvalsh(A / scale + shift * torch.eye(6).double()).min() <= 0:
        shift *= 10
    block = A / scale + shift * torch.eye(6).double()
    assert torch.allclose(found[:2], torch.linalg.solve(block, v[:2].T).T, rtol=1e-8)
    assert found[2, 0].item() == pytest.approx(
        (v[2, 0] / (A[0, 0] / scale + 1e-3)).item(), rel=1e-9
    )  # no more than it needs


def test_trace_is_unbiased_with_an_honest_error():
    matrix = torch.randn(30, 30, dtype=torch.float64)
    matrix = matrix + matrix.T
    mask = torch.rand(5, 6) < 0.7
    keep = mask.flatten()
    exact = matrix.diagonal()[keep].sum().item()
    block = matrix[keep][:, keep]
    variance = 2 * (block.square().sum() - block.diagonal().square().sum()).item()
    found = trace(
        Dense(matrix), mask, probes=4000, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    assert found.error == pytest.approx(math.sqrt(variance / 4000), rel=0.1)
    assert abs(found.mean - exact) < 4 * found.error
