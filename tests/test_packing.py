import math

import pytest
import torch

from snows import NM, Unstructured, ops
from snows.packing import Packed, check, find_pattern, pack, unpack
from snows.sparsity import rows

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
PATTERNS = [
    NM(2, 4),
    NM(1, 4),
    NM(2, 8),
    NM(4, 8),
    NM(1, 2),
    NM(3, 4),
    NM(3, 5),
    NM(1, 3),
    NM(7, 32),
    NM(31, 32),
    NM(1, 32),
]


def bits_of(x):
    """Bit patterns as integers: NaN-proof, and -0.0 is not 0.0."""
    return x.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def some_mask(shape, pattern):
    """A mask with up to n kept of every group of the row view, chosen at random, some groups empty."""
    matrix = rows(torch.empty(shape))
    mask = torch.zeros(matrix.shape, dtype=torch.bool)
    for row in range(matrix.shape[0]):
        for start in range(0, matrix.shape[1], pattern.m):
            width = min(pattern.m, matrix.shape[1] - start)
            count = int(torch.randint(0, min(pattern.n, width) + 1, ()))
            mask[row, start + torch.randperm(width)[:count]] = True
    return (
        mask
        if len(shape) == 2
        else mask.view(shape[0], *shape[2:], shape[1]).permute(0, 3, 1, 2).contiguous()
    )


def slow_codes(mask, n, m):
    """The stream of the format, written out bit by bit from the text of `snows.packing`."""
    stream = []
    for row in rows(mask).tolist():
        for start in range(0, len(row), m):
            group = [i < len(row[start:]) and row[start + i] for i in range(m)]
            stored = [i for i in range(m) if group[i]]
            stored = sorted(stored + [i for i in range(m) if not group[i]][: n - len(stored)])
            width = math.ceil(math.log2(m))
            if n * width <= m:
                stream += [position >> bit & 1 for position in stored for bit in range(width)]
            else:
                stream += [int(i in stored) for i in range(m)]
    stream += [0] * (-len(stream) % 8)
    return [sum(bit << i for i, bit in enumerate(stream[j : j + 8])) for j in range(0, len(stream), 8)]


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("shape", [(5, 32), (3, 37), (4, 6, 3, 2), (2, 1), (0, 8)], ids=str)
def test_groups_round_trip_bit_for_bit(pattern, shape):
    for dtype in DTYPES:
        mask = some_mask(shape, pattern)
        weight = (
            torch.randn(shape)
            .masked_fill(torch.rand(shape) < 0.2, -0.0)
            .masked_fill(torch.rand(shape) < 0.2, 0.0)
            .to(dtype)
        )
        weight = torch.where(mask, weight, 0)
        packed = pack(weight, mask, pattern)
        check(packed)
        assert torch.equal(bits_of(unpack(packed)), bits_of(weight))
        assert packed.codes.tolist() == slow_codes(mask, pattern.n, pattern.m)


@pytest.mark.parametrize("shape", [(5, 32), (3, 37), (4, 6, 3, 2), (1, 1), (0, 8)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_unstructured_round_trips_bit_for_bit(shape, dtype):
    for share in (0.0, 0.1, 1.0):
        mask = torch.rand(shape) < share
        weight = torch.where(mask, torch.randn(shape).masked_fill(torch.rand(shape) < 0.3, -0.0), 0).to(dtype)
        packed = pack(weight, mask, Unstructured(0.9))
        check(packed)
        assert packed.values.shape == (int(mask.sum()),)
        assert torch.equal(bits_of(unpack(packed)), bits_of(weight))
        flat = rows(mask).flatten().tolist()
        assert packed.codes.tolist() == [
            sum(bit << i for i, bit in enumerate(flat[j : j + 8])) for j in range(0, len(flat), 8)
        ]


def test_all_six_codes_of_2_of_4_are_the_hardware_s():
    nibbles = {(0, 1): 0x4, (0, 2): 0x8, (0, 3): 0xC, (1, 2): 0x9, (1, 3): 0xD, (2, 3): 0xE}  # PTX: mma.sp
    for pair, nibble in nibbles.items():
        mask = torch.zeros(1, 4, dtype=torch.bool)
        mask[0, pair] = True
        packed = pack(torch.where(mask, torch.tensor([[-0.0, 0.0, 3.0, 4.0]]), 0), mask, NM(2, 4))
        assert packed.codes.tolist() == [nibble]
    empty = pack(torch.zeros(1, 8), torch.zeros(1, 8, dtype=torch.bool), NM(2, 4))
    assert empty.codes.tolist() == [0x44]  # legal codes in empty groups too


def test_masked_entries_come_back_as_positive_zeros_and_codes_ignore_values():
    weight, mask = torch.full((2, 8), -0.0), NM(2, 4).mask(torch.rand(2, 8))
    back = unpack(pack(weight, mask, NM(2, 4)))
    assert torch.equal(back.signbit(), mask)


def test_2_of_4_costs_what_it_says():
    weight = torch.randn(96, 256)
    weight *= NM(2, 4).mask(weight.abs())
    for dtype, limit in ((torch.float16, 0.5625), (torch.bfloat16, 0.5625), (torch.float32, 0.54)):
        assert pack(weight.to(dtype), None, NM(2, 4)).nbytes <= limit * weight.to(dtype).nbytes
    sparse = torch.where(Unstructured(0.9).mask(weight.abs()), weight, 0)
    assert pack(sparse, None, Unstructured(0.9)).nbytes <= (0.1 + 1 / 32) * weight.nbytes + 8


def test_the_pattern_found_is_the_sparsest_that_fits():
    scores = torch.rand(16, 64, 3, 3)
    for pattern in (NM(1, 16), NM(1, 8), NM(1, 4), NM(2, 8), NM(2, 4), NM(4, 8), NM(3, 4)):
        assert find_pattern(pattern.mask(scores).float()) == pattern
    assert find_pattern(Unstructured(0.75).mask(scores).float()) == Unstructured(0.75)
    assert find_pattern(torch.zeros(4, 8), NM(2, 4).mask(torch.rand(4, 8))) == NM(2, 4)  # kept zeros count
    assert isinstance(find_pattern(torch.zeros(4, 8)), Unstructured)
    few = torch.zeros(64, 64)
    few[0, :2] = 1.0
    assert isinstance(find_pattern(few), Unstructured)  # it obeys 2:4, whose places would be all but empty
    # Groups of a convolution lie along the input channels: 3 channels have no groups of 4, whatever the row view says.
    assert isinstance(
        find_pattern(torch.eye(3)[:, :, None, None].expand(3, 3, 2, 2).contiguous()), Unstructured
    )


def test_too_many_kept_are_refused_by_row_and_group():
    weight = torch.zeros(3, 12)
    weight[1, [4, 5, 7]] = 1.0
    with pytest.raises(
        ValueError, match=r"at most 2 kept of every 4, got 3 in row 1, group 1 \(columns 4 to 7"
    ):
        pack(weight, None, NM(2, 4))


@pytest.mark.parametrize(
    ("weight", "mask", "pattern", "message"),
    [
        (torch.ones(2, 4), None, None, "expected a weight with zeros"),
        (torch.tensor([[torch.nan, 0.0]]), None, NM(1, 2), "without NaN"),
        (torch.ones(2, 4), torch.zeros(2, 4, dtype=torch.bool), NM(2, 4), "got 8 other weights"),
        (torch.ones(2, 4), torch.ones(2, 4), NM(2, 4), "expected a bool mask"),
        (torch.ones(2, 4), torch.ones(2, 5, dtype=torch.bool), NM(2, 4), "expected a bool mask"),
        (torch.ones(2, 4, dtype=torch.int32), None, NM(2, 4), "float32, float16"),
        (torch.ones(2, 4, 4), None, NM(2, 4), "2 .Linear. or 4"),
        (torch.zeros(2, 64), None, NM(1, 64), "groups of at most 32"),
        (torch.zeros(2, 4), None, "2:4", r"expected a pattern such as snows.NM\(2, 4\).*, got '2:4'"),
        (torch.zeros(2, 4), None, torch.zeros(2, 4, dtype=torch.bool), r"expected a pattern .*, got tensor"),
    ],
)
def test_what_cannot_be_packed(weight, mask, pattern, message):
    with pytest.raises(ValueError, match=message):
        find_pattern(weight, mask) if pattern is None else pack(weight, mask, pattern)


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(3, 5), NM(4, 8), NM(1, 3), Unstructured(0.5)], ids=str)
def test_codes_that_pack_did_not_write_are_refused(pattern):
    weight = torch.randn(6, 40)
    packed = pack(
        torch.where(some_mask((6, 40), pattern if isinstance(pattern, NM) else NM(2, 4)), weight, 0),
        None,
        pattern,
    )
    for codes in (
        torch.full_like(packed.codes, 255),
        torch.zeros_like(packed.codes),
        packed.codes[1:],
        packed.codes.int(),
    ):
        if not (
            pattern == NM(1, 3) and codes.numel() == packed.codes.numel() and int(codes.max()) == 0
        ):  # all first: legal
            with pytest.raises(ValueError, match="packed weight: expected"):
                check(packed._replace(codes=codes))
    with pytest.raises(ValueError, match="packed weight: expected"):
        check(packed._replace(values=packed.values.flatten()[1:]))


def test_unpack_is_an_op_that_compiles():
    packed = pack(torch.eye(8), None, NM(2, 4))
    torch.library.opcheck(torch.ops.snows.unpack.default, (packed.values, packed.codes, packed.shape, 2, 4))
    assert torch.equal(ops.unpack(packed.values, packed.codes, packed.shape, 2, 4), torch.eye(8))
    assert isinstance(packed, Packed)
