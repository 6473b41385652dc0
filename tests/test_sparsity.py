import pytest
import torch
from models import Chain, settle, small
from oracles import best_nm

import snows
from snows import NM, Unstructured, ops, parse_pattern, reference
from snows.choosing.zeros import allocate
from snows.packing import packable
from snows.sparsity import Taps, rows, unrows


@pytest.mark.parametrize(
    ("n", "m", "columns"), [(1, 4, 16), (2, 4, 20), (3, 8, 24), (2, 4, 7), (3, 32, 70), (1, 2, 1)]
)
def test_nm_mask_is_the_best_of_all_choices(n, m, columns):
    scores = torch.randn(9, columns, dtype=torch.float64)
    mask = ops.nm_mask(scores, n, m)
    assert torch.equal(mask, torch.stack([best_nm(row, n, m) for row in scores]))


def test_nm_mask_breaks_ties_by_the_lower_index():
    scores = torch.tensor([[1.0, 1, 1, 1, 0, 2, 2, 2], [0, 0, -1, 0, 5, 5, 6, 5]])
    expected = torch.tensor([[1, 1, 0, 0, 0, 1, 1, 0], [1, 1, 0, 0, 1, 0, 1, 0]], dtype=torch.bool)
    assert torch.equal(ops.nm_mask(scores, 2, 4), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nm_mask_agrees_with_the_reference_on_rounded_scores(dtype):
    scores = torch.randint(-3, 3, (301, 45)).to(dtype)
    for n, m in ((2, 4), (1, 8), (7, 32), (3, 5)):
        assert torch.equal(ops.nm_mask(scores, n, m), reference.nm_mask(scores, n, m))


def test_nm_mask_of_views_and_nothing():
    scores = torch.randn(8, 12)
    assert torch.equal(ops.nm_mask(scores.T, 2, 4), reference.nm_mask(scores.T.contiguous(), 2, 4))
    assert ops.nm_mask(torch.empty(0, 8), 2, 4).shape == (0, 8)


def test_nm_mask_opcheck():
    torch.library.opcheck(torch.ops.snows.nm_mask.default, (torch.randn(4, 8), 2, 4))


@pytest.mark.parametrize(
    "bad", [torch.ones(3), torch.ones(2, 4, dtype=torch.int64), torch.tensor([[torch.nan, 1, 2, 3]])]
)
def test_nm_mask_refuses(bad):
    with pytest.raises(ValueError, match="nm_mask: expected"):
        ops.nm_mask(bad, 2, 4)


def test_groups_of_a_convolution_run_along_input_channels_at_one_tap():
    weight = torch.zeros(1, 8, 3, 3)
    weight[0, [1, 6], 2, 0] = torch.tensor([3.0, 5.0])
    mask = NM(1, 4).mask(weight.abs())
    assert mask[0, :, 2, 0].tolist() == [False, True, False, False, False, False, True, False]
    assert mask.view(1, 2, 4, 9).sum(2).eq(1).all()


def test_rows_and_back():
    weight = torch.randn(5, 6, 2, 3)
    matrix = rows(weight)
    assert matrix[4, (1 * 3 + 2) * 6 + 5] == weight[4, 5, 1, 2]
    assert torch.equal(unrows(matrix, weight.shape), weight)


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.9])
def test_unstructured_keeps_exactly_its_share(sparsity):
    scores = torch.randint(0, 4, (7, 11)).float()
    mask = Unstructured(sparsity).mask(scores)
    assert mask.sum() == 77 - round(sparsity * 77)
    assert scores[mask].min() >= scores[~mask].max()


def test_patterns_parse_and_print():
    for text, pattern in (("2:4", NM(2, 4)), ("1:8", NM(1, 8)), ("0.7", Unstructured(0.7))):
        assert parse_pattern(text) == pattern
        assert parse_pattern(str(pattern)) == pattern
    assert parse_pattern("70%") == Unstructured(0.7)


@pytest.mark.parametrize("text", ["", "4:2", "4:4", "0:4", "2:4:8", "half", "1.5", "0", "1", "-0.5", "nan"])
def test_patterns_that_are_refused(text):
    with pytest.raises(ValueError, match="expected"):
        parse_pattern(text)


def test_allocate_spends_the_budget_exactly_and_lowest_first():
    scores = {"a": torch.arange(10.0), "b": torch.arange(10.0) + 100}
    assert allocate(scores, 0.25, cap=1.0) == {"a": 5, "b": 0}
    assert allocate(scores, 0.7, cap=0.8) == {"a": 8, "b": 6}
    many = {str(i): torch.randn(50 + i) for i in range(7)}
    counts = allocate(many, 0.63, cap=0.7)
    assert sum(counts.values()) == round(0.63 * sum(s.numel() for s in many.values()))
    assert all(counts[k] <= 0.7 * s.numel() for k, s in many.items())


def test_allocate_without_a_cap_is_one_global_threshold():
    scores = {str(i): torch.rand(100) * (i + 1) for i in range(4)}
    everything = torch.cat(list(scores.values()))
    threshold = everything.sort().values[200]
    assert allocate(scores, 0.5, cap=1.0) == {k: int((s < threshold).sum()) for k, s in scores.items()}


def test_allocate_refuses_an_impossible_budget():
    with pytest.raises(ValueError, match="lower the sparsity or raise the cap"):
        allocate({"a": torch.rand(100)}, 0.96, cap=0.95)


# ---------------------------------------------------------------- centre taps


@pytest.mark.parametrize(
    ("shape", "share"), [((8, 3, 3, 3), 0.5), ((5, 2, 5, 3), 0.3), ((4, 1, 1, 3), 0.9), ((7, 2, 3, 3), 0.01)]
)
def test_channels_with_the_least_around_the_centre_keep_it_alone(shape, share):
    scores = torch.rand(shape)
    mask = Taps(share).mask(scores)
    out, _, height, width = shape
    around = [
        sum(
            float(scores[o, :, i, j].sum())
            for i in range(height)
            for j in range(width)
            if (i, j) != (height // 2, width // 2)
        )
        for o in range(out)
    ]
    least = sorted(range(out), key=around.__getitem__)[: round(share * out)]
    for o in range(out):
        wanted = torch.full(shape[1:], o not in least)
        wanted[:, height // 2, width // 2] = True
        assert torch.equal(mask[o], wanted)
    assert not Taps(share).fits(torch.Size(shape))
    assert torch.equal(Taps(share).mask(mask.float()), mask)  # a mask allows itself


def test_taps_of_equal_scores_and_their_text():
    mask = Taps(0.5).mask(torch.ones(4, 2, 3, 3))
    assert mask.flatten(1).sum(1).tolist() == [18, 18, 2, 2]  # the first stay
    assert mask.float().mean().item() == pytest.approx(Taps(0.5).density)
    assert parse_pattern("taps:0.25") == Taps(0.25)
    assert parse_pattern(str(Taps(0.3))) == Taps(0.3)
    for share in (0, 1, -1, "0.5"):
        with pytest.raises(ValueError, match="Taps: expected a share between 0 and 1"):
            Taps(share)
    for shape, reason in (
        ((4, 4), "no convolution"),
        ((4, 4, 1, 1), "no convolution"),
        ((4, 4, 2, 3), "no centre"),
    ):
        assert reason in Taps(0.5).fits(torch.Size(shape))
        with pytest.raises(ValueError, match=reason):
            Taps(0.5).mask(torch.ones(shape))
    with pytest.raises(ValueError, match="NaN"):
        Taps(0.5).mask(torch.full((4, 4, 3, 3), torch.nan))
    with pytest.raises(ValueError, match=r"packable: expected N:M or a sparsity, got taps:0\.5"):
        packable("taps:0.5")


def test_a_network_is_pruned_to_taps_and_packed_as_what_they_obey():
    net, x = settle(Chain()), torch.randn(8, 4, 7, 5)
    pruned = snows.prune(net, [x], Taps(0.5), progress=False)
    weight = pruned.network.first.weight
    alone = [o for o in range(8) if not weight[o].flatten(1)[:, [0, 1, 2, 3, 5, 6, 7, 8]].any()]
    assert len(alone) == 4
    assert weight[alone][:, :, 1, 1].all()
    assert torch.equal(pruned.network.second.weight, net.second.weight)  # 1 x 1: nothing around its centre
    deployed = small(pruned.network, x)
    torch.testing.assert_close(deployed.network(x), pruned.network(x), rtol=1e-4, atol=1e-5)
