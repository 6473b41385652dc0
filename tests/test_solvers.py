import math

import pytest
import torch
from oracles import Dense, masked_least_squares

from snows import Newton
from snows.solving.cg import Stop, batched_cg, cg
from snows.solving.operators import Restricted
from snows.solving.preconditioners import Factors, Kronecker
from snows.solving.search import armijo
from snows.sparsity import MaskedWeight


def spd(n, condition=100.0):
    Q, _ = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))
    return Q @ torch.diag(torch.logspace(0, math.log10(condition), n, dtype=torch.float64)) @ Q.T


def test_cg_solves_exactly_in_n_iterations():
    matrix, b = spd(12, 10), torch.randn(3, 4, dtype=torch.float64)
    found = cg(Dense(matrix), b, rtol=1e-9, max_iterations=20)
    expected = torch.linalg.solve(matrix, b.flatten()).view(3, 4)
    assert found.stop is Stop.CONVERGED
    assert found.iterations <= 12
    assert (found.x - expected).norm() <= 1e-8 * expected.norm()
    assert (b.flatten() - matrix @ found.x.flatten()).norm() <= 1e-8 * b.norm()


def test_cg_on_a_mask_solves_the_block():
    matrix, b, mask = spd(20), torch.randn(4, 5, dtype=torch.float64), torch.rand(4, 5) < 0.5
    found = cg(Restricted(Dense(matrix), mask, 0.1), b * mask, rtol=1e-10, max_iterations=40)
    keep = mask.flatten()
    block = matrix[keep][:, keep] + 0.1 * torch.eye(int(keep.sum()))
    assert torch.allclose(found.x[mask], torch.linalg.solve(block, b[mask]), rtol=1e-7, atol=1e-9)
    assert not found.x[~mask].any()


def test_a_perfect_preconditioner_needs_one_iteration():
    matrix, b = spd(10, 1e6), torch.randn(10, dtype=torch.float64)
    found = cg(Dense(matrix), b, preconditioner=Dense(torch.linalg.inv(matrix)), rtol=1e-6)
    assert found.iterations == 1
    assert cg(Dense(matrix), b, rtol=1e-6).iterations > 5


def test_the_kronecker_preconditioner_solves_a_kronecker_system_at_once():
    A, G = spd(6), spd(4)
    mask = torch.ones(4, 6, dtype=torch.bool)
    b = torch.randn(4, 6, dtype=torch.float64)
    operator = Dense(torch.kron(G, A))
    P = Kronecker(Factors(A[None], G[None]), mask, damping=1e-12)
    assert cg(operator, b, preconditioner=P, rtol=1e-4).iterations == 1


def test_cg_stops():
    b = torch.randn(5, dtype=torch.float64)
    assert cg(Dense(spd(5)), torch.zeros(5)).stop is Stop.ZERO
    assert cg(Dense(torch.full((5, 5), torch.nan, dtype=torch.float64)), b).stop is Stop.NOT_FINITE
    limited = cg(Dense(spd(50, 1e8)), torch.randn(50, dtype=torch.float64), rtol=1e-12, max_iterations=3)
    assert (limited.stop, limited.iterations) == (Stop.ITERATIONS, 3)


def test_negative_curvature_leaves_with_a_descent_direction():
    b = torch.randn(6, dtype=torch.float64)
    first = cg(Dense(-torch.eye(6, dtype=torch.float64)), b)
    assert first.stop is Stop.NEGATIVE_CURVATURE
    assert torch.equal(first.x, b)
    matrix = torch.diag(torch.tensor([1.0, 2.0, 3.0, -0.5]).double())
    b = torch.tensor([1.0, 1.0, 1.0, 0.1]).double()
    later = cg(Dense(matrix), b, rtol=1e-12)
    assert later.stop is Stop.NEGATIVE_CURVATURE
    assert later.iterations > 1
    assert (later.x * b).sum() > 0


@pytest.mark.parametrize("groups", [1, 3])
def test_batched_cg_solves_every_rows_own_system(groups):  # in double precision to 1e-10, unasked
    X = torch.randn(groups, 200, 10, dtype=torch.float64) * torch.logspace(0, 1, 10)
    gram = X.transpose(1, 2) @ X / 200
    right = torch.randn(groups, 7, 10, dtype=torch.float64)
    mask = torch.rand(groups, 7, 10) < 0.5
    mask[0, 0] = False
    found = batched_cg(gram, right, mask, damping=0.01)
    for g in range(groups):
        damped = gram[g] + 0.01 * gram[g].diagonal().mean() * torch.eye(10)
        for i in range(7):
            keep = mask[g, i]
            assert not found[g, i][~keep].any()
            assert torch.allclose(
                found[g, i][keep],
                torch.linalg.solve(damped[keep][:, keep], right[g, i][keep]),
                rtol=1e-8,
                atol=1e-10,
            )


def test_batched_cg_in_double_precision_does_not_show_how_sums_are_rounded():
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(2000, 288, generator=generator, dtype=torch.float64)
    X = X @ torch.randn(288, 288, generator=generator, dtype=torch.float64)  # many iterations
    gram, other = (X.mT @ X / 2000)[None], (X.flip(0).mT @ X.flip(0) / 2000)[None]
    assert 0 < (gram - other).abs().max() < 1e-12 * gram.abs().max()
    right = torch.randn(1, 64, 288, generator=generator, dtype=torch.float64)
    mask = torch.rand(1, 64, 288, generator=generator) < 0.5
    found = batched_cg(gram, right, mask)
    assert torch.allclose(found, batched_cg(other, right, mask), rtol=0, atol=1e-8 * found.abs().max())
    early = batched_cg(gram, right, mask, rtol=1e-4)
    assert (early - found).abs().max() > 1e-6 * found.abs().max()  # what an early stop leaves


def test_armijo_backtracks_to_a_real_decrease():
    def f(w):
        return (w - 1).square().sum()

    weight, direction = torch.zeros(3), torch.full((3,), 8.0)
    slope = float((-2 * torch.ones(3) * direction).sum())
    found = armijo(f, weight, direction, value=3.0, slope=slope)
    assert (found.size, found.tries) == (0.125, 4)
    assert found.value == pytest.approx(0.0)
    failed = armijo(lambda w: torch.tensor(torch.nan), weight, direction, value=3.0, slope=slope)
    assert (failed.size, failed.value) == (0.0, 3.0)
    assert armijo(f, weight, direction, value=3.0, slope=0.0).tries == 0


class LeastSquares:
    """``‖X Wᵀ - Y‖² / n`` as a loss of W."""

    def __init__(self, X, Y):
        self.X, self.Y = X, Y

    def residuals(self, weight):
        return [self.X @ weight.T - self.Y]

    def weigh(self, residuals):
        return [2 / len(self.X) * residuals[0]]

    def __call__(self, weight):
        return self.residuals(weight)[0].square().sum() / len(self.X)


@pytest.mark.parametrize("curvature", ["gauss-newton", "hessian"])
@pytest.mark.parametrize("preconditioner", ["rows", "kronecker", "none"])
@pytest.mark.parametrize("gradient", ["all", "batch"])
def test_one_newton_step_reaches_the_closed_form_on_a_linear_problem(curvature, preconditioner, gradient):
    X = torch.randn(80, 9, dtype=torch.float64) * torch.logspace(0, 1, 9)
    W = torch.randn(5, 9, dtype=torch.float64)
    mask = torch.rand(5, 9) < 0.6
    loss = LeastSquares(X, X @ W.T)
    factors = Factors((X.T @ X / 80)[None], torch.eye(5, dtype=torch.float64)[None])
    newton = Newton(
        gradient=gradient,
        curvature=curvature,
        preconditioner=preconditioner,
        rtol=1e-12,
        max_iterations=100,
        damping=1e-12,
    )
    found, steps, *_ = newton.solve([loss], MaskedWeight(W * mask, mask), held=loss, factors=factors)
    expected = masked_least_squares(X, X @ W.T, mask)
    assert torch.allclose(found.weight, expected, rtol=1e-6, atol=1e-8)
    assert steps[0].size == 1.0
    assert steps[0].after == pytest.approx(loss(expected).item(), rel=1e-8)


def test_the_best_held_back_weight_is_kept():
    X = torch.randn(30, 4, dtype=torch.float64)
    good = torch.randn(2, 4, dtype=torch.float64)
    mask = torch.ones(2, 4, dtype=torch.bool)
    held = LeastSquares(X, X @ good.T)
    misleading = LeastSquares(X, X @ (-good).T)
    found, steps, before, after = Newton(preconditioner="none", gradient="batch").solve(
        [misleading], MaskedWeight(good, mask), held=held
    )
    assert torch.equal(found.weight, good)
    assert steps[0].size > 0
    assert steps[0].after < steps[0].before  # of the misleading batch
    assert before == after == 0
    found, steps, *_ = Newton(preconditioner="none").solve([misleading], MaskedWeight(good, mask), held=held)
    assert torch.equal(found.weight, good)
    assert steps[0].size == 0


def test_the_gradient_of_all_batches_is_solved_with_the_curvature_of_one():
    X = [torch.randn(40, 3, dtype=torch.float64) for _ in range(3)]
    W = torch.randn(2, 3, dtype=torch.float64)
    losses = [LeastSquares(x, x @ W.T + torch.randn(40, 2, dtype=torch.float64)) for x in X]
    start = torch.zeros(2, 3, dtype=torch.float64)
    mask = torch.ones(2, 3, dtype=torch.bool)
    newton = Newton(preconditioner="none", rtol=1e-12, damping=1e-12)
    found, *_ = newton.solve(losses, MaskedWeight(start, mask))
    gradient = sum(2 * (x @ start.T - loss.Y).T @ x / 40 for x, loss in zip(X, losses, strict=True)) / 3
    expected = -gradient @ torch.linalg.inv(2 * X[0].T @ X[0] / 40)
    assert torch.allclose(found.weight, expected, atol=1e-8)


def test_a_loss_that_is_not_finite_stops_at_once():
    class Bad(LeastSquares):
        def residuals(self, weight):
            return [super().residuals(weight)[0] * torch.nan]

    start = MaskedWeight(torch.ones(2, 3), torch.ones(2, 3, dtype=torch.bool))
    found, steps, *_ = Newton().solve([Bad(torch.ones(4, 3), torch.ones(4, 2))], start)
    assert steps[0].stop is Stop.NOT_FINITE
    assert torch.equal(found.weight, start.weight)


@pytest.mark.parametrize("wrong", [{"rtol": 0}, {"damping": -1}, {"passes": 0}, {"curvature": "fisher"}])
def test_newton_refuses_settings(wrong):
    with pytest.raises(ValueError, match="Newton: expected"):
        Newton(**wrong)
