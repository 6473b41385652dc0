"""The closed form of an implant against brute force on data: no other factors do better."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from snows.matching.low_rank import InputMoments, low_rank, spectrum
from snows.matching.statistics import LayerStatistics
from snows.networks.implants import Implant
from snows.networks.watching import Call

SHAPES = [(5, 7), (7, 5), (6, 6), (4, 2, 3, 1), (9, 1, 2, 3)]


def data(shape, n=60):
    """Rows X, targets Y on other rows (in the row view), and what reads the outputs."""
    weight = torch.randn(shape).double()
    width = weight[0].numel()
    matrix = weight if weight.ndim == 2 else weight.permute(0, 2, 3, 1).reshape(len(weight), width)
    X = torch.randn(n, width).double() @ torch.randn(width, width).double() + torch.randn(width)
    other = X + 0.3 * torch.randn(n, width).double() + 0.5
    J = torch.randn(2 * len(weight), len(weight)).double() * torch.linspace(0.1, 2, len(weight))
    return weight, matrix, X, other @ matrix.T, J


def product(factors):
    first, second, _ = factors
    return second.flatten(1) @ (first if first.ndim == 2 else first.permute(0, 2, 3, 1).flatten(1))


def loss(M, c, X, Y, J):
    return ((Y - X @ M.T - c) @ J.T).square().sum(1).mean()


def best(X, Y, J, rank, intercept, starts=4):
    """The best of several runs of alternating least squares from random factors, on the data alone."""
    ones, found = torch.ones(len(X), int(intercept)).double(), []
    for seed in range(starts):
        V = torch.randn(X.shape[1], rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        value = torch.inf
        for _ in range(2000):
            solution = torch.linalg.lstsq(torch.cat([X @ V, ones], 1), Y).solution
            U, c = solution[:rank].T, solution[rank:].sum(0)
            V = torch.linalg.lstsq(X, (Y - c) @ (torch.linalg.pinv(J @ U) @ J).T).solution
            before, value = value, float(loss(U @ V.T, c, X, Y, J))
            if value > before * (1 - 1e-12):
                break
        found.append(value)
    return min(found)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rank", [1, 3])
def test_no_other_factors_do_better(shape, rank):
    weight, W, X, Y, J = data(shape)
    A, G, mean = X.T @ X / len(X), J.T @ J, X.mean(0)
    cases = {
        "own inputs": (A, X @ W.T, False),
        "intercept": (InputMoments(A, mean), X @ W.T, True),
        "other inputs": (InputMoments(A, cross=Y.T @ X / len(X)), Y, False),
        "other inputs, intercept": (InputMoments(A, mean, Y.T @ X / len(X), Y.mean(0)), Y, True),
    }
    for name, (inputs, target, intercept) in cases.items():
        found = low_rank(weight, inputs, G, rank)
        assert found.first.shape == (rank, *shape[1:])
        assert found.second.shape == (shape[0], rank, *(1 for _ in shape[2:]))
        assert (found.intercept is not None) == intercept
        measured = float(loss(product(found), found.intercept if intercept else 0, X, target, J))
        brute = best(X, target, J, rank, intercept)
        assert measured <= brute * (1 + 1e-9), name
        assert measured >= brute * (1 - 1e-4), name


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_spectrum_is_the_measured_loss(shape):
    weight, W, X, Y, J = data(shape)
    A, G, mean = X.T @ X / len(X), J.T @ J, X.mean(0)
    full = min(W.shape)
    cross = InputMoments(A, mean, Y.T @ X / len(X), Y.mean(0))
    # least squares without a limit on the rank, by a column of ones
    ones = torch.cat([X, torch.ones(len(X), 1).double()], 1)
    free = torch.linalg.lstsq(ones, Y).solution
    unavoidable = float(((Y - ones @ free) @ J.T).square().sum(1).mean())
    for inputs, target, rest in (
        (A, X @ W.T, 0.0),
        (InputMoments(A, mean), X @ W.T, 0.0),
        (cross, Y, unavoidable),
    ):
        found = spectrum(weight, inputs, G)
        assert found.shape == (full + 1,)
        assert found.dtype == torch.float64
        assert float(found[-1]) == 0
        for rank in range(1, full):
            factors = low_rank(weight, inputs, G, rank)
            c = 0 if factors.intercept is None else factors.intercept
            measured = float(loss(product(factors), c, X, target, J)) - rest
            assert measured == pytest.approx(float(found[rank]), rel=1e-8, abs=1e-9)
        c = 0 if not isinstance(inputs, InputMoments) else target.mean(0)
        nothing = float(loss(torch.zeros_like(W), c, X, target, J)) - rest
        assert nothing == pytest.approx(float(found[0]), rel=1e-8)


@pytest.mark.parametrize("shape", [(5, 7), (7, 5)])
def test_singular_moments(shape):
    """Directions that no input has, or that the output does not feel, cost nothing and break nothing."""
    weight, W, X, _, J = data(shape)
    X, J = X.clone(), J.clone()
    X[:, :2], J[:, 1:3] = 0, 0
    A, G = X.T @ X / len(X), J.T @ J
    for rank in (1, 2, 4):
        found = low_rank(weight, A, G, rank)
        assert product(found).isfinite().all()
        measured = float(loss(product(found), 0, X, X @ W.T, J))
        assert measured == pytest.approx(float(spectrum(weight, A, G)[rank]), rel=1e-8, abs=1e-9)
        keep = [0, *range(3, W.shape[0])]
        assert measured <= best(X[:, 2:], (X @ W.T)[:, keep], J[:, keep], rank, False) * (1 + 1e-9) + 1e-9
    assert float(spectrum(weight, A, G)[3]) < 1e-9 * float(spectrum(weight, A, G)[0])
    zero = low_rank(weight, torch.zeros_like(A), G, 2)
    assert product(zero).isfinite().all()


def test_statistics_of_a_convolution_on_two_streams():
    """The factors put into a network are the best ones on its own data, intercept and all."""
    torch.manual_seed(1)
    conv = nn.Conv2d(3, 6, 3, stride=2, padding=1).double()
    dense = [torch.randn(4, 3, 7, 6).double() + 1 for _ in range(2)]
    sparse = [x + 0.4 * torch.randn_like(x) - 0.3 for x in dense]
    settings = {"stride": (2, 2), "padding": (1, 1), "dilation": (1, 1), "groups": 1}
    calls = [[Call(F.conv2d, x, (3, 3), settings) for x in xs] for xs in (sparse, dense)]
    J = torch.randn(9, 6).double()
    statistics = LayerStatistics(*calls, lambda: (J.T @ J)[None])
    weight = conv.weight.detach().clone()
    X = torch.cat([F.unfold(x, 3, padding=1, stride=2).transpose(1, 2).flatten(0, 1) for x in sparse])
    Y = torch.cat([F.conv2d(x, weight, stride=2, padding=1).permute(0, 2, 3, 1).flatten(0, 2) for x in dense])
    torch.testing.assert_close(statistics.target(weight)[0], Y.mean(0))
    inputs = InputMoments.of(statistics, weight, damping=1e-12)
    net = nn.Sequential(conv)
    bias = conv.bias.detach().clone()
    Implant("0", 2, low_rank(weight, inputs, statistics.sensitivity[0], 2)).apply(net)
    with torch.no_grad():
        own = torch.cat([net(x).permute(0, 2, 3, 1).flatten(0, 2) for x in sparse]) - bias
    measured = float(((Y - own) @ J.T).square().sum(1).mean())
    brute = best(X, Y, J, 2, True)
    assert measured == pytest.approx(brute, rel=1e-6)
    # much damping draws the solution to the dense weight's own low rank
    strong = InputMoments.of(statistics, weight, damping=1e9)
    U, S, V = torch.linalg.svd(J @ weight.flatten(1), full_matrices=False)
    found = J @ product(low_rank(weight, strong, J.T @ J, 2))
    wanted = ((U[:, :2] * S[:2]) @ V[:2]).view(9, 3, 3, 3).permute(0, 2, 3, 1).flatten(1)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_the_factors_have_the_weights_dtype():
    weight, _, X, _, J = data((5, 7))
    inputs = InputMoments((X.T @ X / len(X)).float(), X.mean(0).float())
    assert [x.dtype for x in low_rank(weight.float(), inputs, (J.T @ J).float(), 2)] == [torch.float32] * 3


@pytest.mark.parametrize("rank", [0, 5, -1, 2.0, True])
def test_ranks_that_are_none(rank):
    with pytest.raises(ValueError, match=r"^low_rank: expected a rank of at least 1 and below 5, got"):
        low_rank(torch.randn(5, 7), torch.eye(7), torch.eye(5), rank)


def test_matrices_that_do_not_fit():
    W, A, G = torch.randn(5, 7), torch.eye(7), torch.eye(5)
    cases = [
        (W, G, G, r"a Gram matrix of \(7, 7\) finite numbers, got \(5, 5\)"),
        (W, A, A, r"a sensitivity of \(5, 5\) finite numbers, got \(7, 7\)"),
        (W, A * torch.nan, G, "a Gram matrix of .* got NaN"),
        (W, InputMoments(A, torch.zeros(5)), G, r"a mean of \(7,\)"),
        (W, InputMoments(A, cross=W.T), G, r"a cross moment of \(5, 7\)"),
        (W, InputMoments(A, torch.zeros(7), W, torch.zeros(7)), G, r"a target of \(5,\)"),
        (W, InputMoments(A, torch.zeros(7), W), G, "the target's mean"),
        (W, InputMoments(torch.ones(7, 7), cross=W), G, "positive definite"),
    ]
    for weight, inputs, sensitivity, words in cases:
        with pytest.raises(ValueError, match=f"^low_rank: expected .*{words}"):
            low_rank(weight, inputs, sensitivity, 2)
        with pytest.raises(ValueError, match=words):
            spectrum(weight, inputs, sensitivity)
