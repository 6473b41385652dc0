import pytest
import torch
import torch.nn.functional as F
from oracles import best_masks, masked_least_squares, unfold_rows

from snows import NM, Unstructured, alps, least_squares, magnitude, sparsegpt, wanda
from snows.networks.watching import Call
from snows.selectors import LayerStatistics
from snows.selectors.alps import modes
from snows.sparsity import rows


def conv_call(x, groups=1):
    return Call(F.conv2d, x, (3, 3), {"stride": 1, "padding": 1, "dilation": 1, "groups": groups})


def identity(groups, out):
    return lambda: torch.eye(out, dtype=torch.float64).expand(groups, out, out)


def linear_case():
    mix = torch.randn(8, 8, dtype=torch.float64)
    dense, sparse = (torch.randn(60, 8, dtype=torch.float64) @ mix for _ in range(2))
    calls = [[Call(F.linear, x[:25]), Call(F.linear, x[25:])] for x in (sparse, dense)]
    return torch.randn(6, 8, dtype=torch.float64), LayerStatistics(*calls, identity(1, 6)), sparse, dense


def conv_case(groups):
    x = torch.randn(5, 8, 5, 6, dtype=torch.float64)
    weight = torch.randn(4, 8 // groups, 3, 3, dtype=torch.float64)
    statistics = LayerStatistics(
        [conv_call(x[:2], groups), conv_call(x[2:], groups)],
        [conv_call(x[:2], groups), conv_call(x[2:], groups)],
        identity(groups, 4 // groups),
    )
    return weight, statistics, unfold_rows(x, (3, 3), 1, 1, 1, groups)


@pytest.mark.parametrize("groups", [1, 2])
def test_statistics_are_moments_over_all_batches(groups):
    _, statistics, X = conv_case(groups)
    assert statistics.count == X.shape[1]
    assert torch.allclose(statistics.mean, X.mean(1))
    assert torch.allclose(statistics.gram, torch.einsum("gni,gnj->gij", X, X) / X.shape[1])
    assert torch.allclose(statistics.energy, X.square().mean(1))
    weight, statistics, sparse, dense = linear_case()
    assert torch.allclose(statistics.cross(weight)[0], weight @ dense.T @ sparse / 60)


@pytest.mark.parametrize("groups", [1, 2])
def test_cross_pairs_the_dense_layer_with_the_pruned_rows(groups):
    x, d = torch.randn(2, 5, 8, 5, 6, dtype=torch.float64)
    weight = torch.randn(4, 8 // groups, 3, 3, dtype=torch.float64)
    statistics = LayerStatistics(
        [conv_call(x[:2], groups), conv_call(x[2:], groups)],
        [conv_call(d[:2], groups), conv_call(d[2:], groups)],
        identity(groups, 4 // groups),
    )
    X, D = (unfold_rows(v, (3, 3), 1, 1, 1, groups) for v in (x, d))
    W = rows(weight).view(groups, 4 // groups, -1)
    assert torch.allclose(statistics.cross(weight), W @ D.transpose(1, 2) @ X / X.shape[1])


def test_wanda_by_hand():
    weight = torch.tensor([[1.0, -2.0, 3.0, 4.0]])
    x = torch.tensor([[8.0, 0.1, 1.0, 0.2], [0.0, 0.0, 1.0, 0.0]])
    statistics = LayerStatistics([Call(F.linear, x)], [Call(F.linear, x)], identity(1, 1))
    # |w| ‖x‖: 8, 0.2, 4.2, 0.8
    assert wanda(weight, statistics, NM(2, 4)).mask.tolist() == [[True, False, True, False]]
    assert wanda(weight, statistics, NM(2, 4)).weight.tolist() == [[1.0, 0.0, 3.0, 0.0]]
    assert magnitude(weight, statistics, NM(2, 4)).mask.tolist() == [[False, False, True, True]]


def sparsegpt_oracle(W, H, choose):
    """One row at a time, one column at a time, with the inverse of what is left of H, as the OBS formula has it."""
    W = W.clone()
    mask = torch.ones_like(W, dtype=torch.bool)
    for j in range(W.shape[1]):
        inverse = torch.linalg.inv(H[j:, j:])
        if (chosen := choose(W, j, H)) is not None:
            mask[:, j : j + chosen.shape[1]] = chosen
        for i in range(W.shape[0]):
            if not mask[i, j]:
                W[i, j:] = W[i, j:] - W[i, j] / inverse[0, 0] * inverse[:, 0]
                W[i, j] = 0
    return W, mask


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("pattern", [NM(2, 4), Unstructured(0.4)], ids=str)
def test_sparsegpt_against_the_column_by_column_formula(groups, pattern):
    weight, statistics, X = conv_case(groups)
    found = sparsegpt(weight, statistics, pattern, damping=0.01, block=36)
    out = 4 // groups
    if isinstance(pattern, NM):
        for g in range(groups):
            H = X[g].T @ X[g] / X.shape[1]
            H = H + 0.01 * H.diagonal().mean() * torch.eye(len(H), dtype=torch.float64)

            def choose(W, j, H):
                if j % 4:
                    return None
                U = torch.linalg.cholesky(torch.linalg.inv(H), upper=True).diagonal()
                return torch.zeros(out, 4, dtype=torch.bool).scatter(
                    1, (W[:, j : j + 4] / U[j : j + 4]).abs().topk(2).indices, True
                )

            W, mask = sparsegpt_oracle(rows(weight)[g * out : (g + 1) * out], H, choose)
            assert torch.equal(rows(found.mask)[g * out : (g + 1) * out], mask)
            assert torch.allclose(rows(found.weight)[g * out : (g + 1) * out], W, atol=1e-8)
    assert (~found.mask).sum() == round((1 - pattern.density) * weight.numel())
    assert not found.weight[~found.mask].any()


def test_sparsegpt_lowers_the_layers_error():
    weight, statistics, X, _ = linear_case()
    target = X @ weight.T
    for pattern in (NM(2, 4), NM(1, 4), Unstructured(0.7)):
        error = {
            f.__name__: (X @ f(weight, statistics, pattern).weight.T - target).square().sum().item()
            for f in (magnitude, sparsegpt)
        }
        assert error["sparsegpt"] < 0.9 * error["magnitude"]


@pytest.mark.parametrize("coupled", [False, True], ids=["rows alone", "rows coupled"])
@pytest.mark.parametrize("pattern", [NM(1, 2), NM(2, 4), Unstructured(0.5)], ids=str)
def test_alps_comes_near_the_best_of_all_masks(pattern, coupled):
    """Over every mask the pattern allows, by brute force, each with its own exact weights in the metric ``G ⊗ A``."""
    found, least, chosen_by_size = [], [], []
    for seed in range(20):
        torch.manual_seed(seed)
        X = torch.randn(50, 4, dtype=torch.float64) @ (torch.eye(4) + 0.4 * torch.randn(4, 4)).double()
        weight = torch.randn(2, 4, dtype=torch.float64)
        G = torch.randn(12, 2, dtype=torch.float64)
        G = G.T @ G if coupled else torch.eye(2, dtype=torch.float64)
        calls = [Call(F.linear, X)]
        statistics = LayerStatistics(calls, calls, lambda G=G: G[None])
        values = best_masks(weight, X.T @ X / 50, G, pattern)  # mask -> lowest error on it
        mask = alps(weight, statistics, pattern, damping=1e-6, smoothing=1e-6).mask
        assert torch.equal(pattern.mask(mask.double()), mask)
        found.append(values[tuple(mask.flatten().tolist())])
        chosen_by_size.append(values[tuple(magnitude(weight, statistics, pattern).mask.flatten().tolist())])
        least.append(min(values.values()))
    assert sum(found) <= 1.05 * sum(least)
    assert sum(found) < 0.75 * sum(chosen_by_size)


def test_alps_ends_in_least_squares_on_its_mask():
    weight, statistics, sparse, dense = linear_case()
    found = alps(weight, statistics, NM(2, 4), damping=1e-9)
    expected = masked_least_squares(sparse, dense @ weight.T, found.mask)
    assert torch.allclose(found.weight, expected, rtol=1e-2, atol=2e-3)


@pytest.mark.parametrize("pattern", [NM(2, 4), Unstructured(0.6)], ids=str)
def test_least_squares_against_lstsq_with_two_streams(pattern):
    weight, statistics, sparse, dense = linear_case()
    found = least_squares(weight, statistics, pattern, select=magnitude, damping=1e-9)
    expected = masked_least_squares(sparse, dense @ weight.T, found.mask)
    assert torch.equal(found.mask, magnitude(weight, statistics, pattern).mask)
    assert torch.allclose(found.weight, expected, rtol=1e-2, atol=2e-3)


def test_least_squares_of_a_grouped_convolution():
    weight, statistics, X = conv_case(2)
    found = least_squares(weight, statistics, Unstructured(0.5), damping=1e-9)
    for g in range(2):
        part = slice(2 * g, 2 * g + 2)
        expected = masked_least_squares(X[g], X[g] @ rows(weight)[part].T, rows(found.mask)[part])
        assert torch.allclose(rows(found.weight)[part], expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("width", "rank", "groups", "kept"),
    [(512, 64, 1, 160), (400, 3, 2, 160), (640, 0, 1, 160), (512, 200, 1, 512), (96, 64, 2, 96)],
)
def test_few_directions_of_a_wide_sensitivity_are_found_exactly(width, rank, groups, kept):
    generator = torch.Generator().manual_seed(rank)
    basis = torch.randn(groups, width, rank, generator=generator, dtype=torch.float64)
    matrices = basis @ basis.mT + 0.3 * torch.eye(width, dtype=torch.float64)
    floor, values, vectors = modes(matrices)
    assert vectors.shape == (groups, width, kept)
    eye = torch.eye(width, dtype=torch.float64)
    assert torch.allclose(vectors.mT @ vectors, eye[:kept, :kept], atol=1e-12)
    assert torch.allclose(floor * eye + vectors @ ((values - floor) * vectors.mT), matrices, atol=1e-9)
