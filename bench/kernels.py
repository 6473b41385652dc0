"""Each op of the solver beside eager PyTorch and torch.compile, on real shapes, and its share of a large copy's bandwidth.

    python -m pytest bench/kernels.py                                                   # on a GPU if there is one, else on the CPU
    python -m pytest bench/kernels.py --benchmark-json=bench/results/cpu/kernels.json -k "not compile"

A case is right (against float64, or bit for bit where it selects) before it is timed. `bytes` are those that cannot be avoided: each
input read once, each output written once. Batch rotate, so that no run finds its own in the cache; on a GPU a run ends when the device
has finished.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from snows import NM, Unstructured, ops
from snows.packing import pack

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning"
)  # of PyTorch's own compiler, when it is first imported
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LARGE = DEVICE == "cuda"  # 64 MB and more, so that the chip is filled
SETS = 4


class Case(NamedTuple):
    """An op at one shape.

    Attributes:
        make: inputs, anew.
        op: ours, of those inputs.
        eager: the same in plain PyTorch.
        bytes: moved at the least.
    """

    name: str
    make: Callable[[], tuple[Tensor, ...]]
    op: Callable[..., object]
    eager: Callable[..., object]
    bytes: int


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=dtype)


def select(scores: Tensor, n: int, m: int) -> Tensor:
    kept = scores.view(len(scores), -1, m).topk(n, dim=-1).indices
    return (
        torch.zeros_like(scores, dtype=torch.bool)
        .view(len(scores), -1, m)
        .scatter_(2, kept, True)
        .view_as(scores)
    )


def cg_update(x: Tensor, r: Tensor, p: Tensor, Ap: Tensor, state: Tensor) -> None:
    ops.cg_update(x, r, p, Ap, state, 1e-9)


def cg_eager(x: Tensor, r: Tensor, p: Tensor, Ap: Tensor, state: Tensor) -> None:
    alpha = (state[2] / (p * Ap).sum()).to(x.dtype)
    x.addcmul_(p, alpha)
    r.addcmul_(Ap, alpha, value=-1)
    (r * r).sum()


def system(n: int) -> tuple[Tensor, ...]:
    """x, r, a direction, its product with 2 I, and a state that runs on: status, iterations, r·z, r·r, b·b."""
    x, r, p = randn(n), randn(n), randn(n)
    return x, r, p, 2 * p, torch.tensor([0.0, 0.0, n, n, 1.0], dtype=torch.float64, device=DEVICE)


def packed(rows: int, columns: int, pattern: NM | Unstructured) -> tuple[Tensor, Tensor]:
    """Values and codes."""
    weight = randn(rows, columns)
    mask = pattern.mask(weight.abs())
    return pack(weight * mask, mask, pattern)[:2]


def unpack_groups(values: Tensor, codes: Tensor) -> Tensor:
    """2:4 rows of whole groups."""
    nibbles = torch.stack((codes & 15, codes >> 4), -1)
    positions = torch.stack((nibbles & 3, nibbles >> 2), -1).view(-1, 2).long()
    return (
        values.new_zeros(len(positions), 4).scatter_(1, positions, values.view(-1, 2)).view(len(values), -1)
    )


def unpack_bits(values: Tensor, codes: Tensor, shape: tuple[int, int]) -> Tensor:
    kept = (codes[:, None] >> torch.arange(8, device=codes.device)) & 1
    return values.new_zeros(shape).masked_scatter_(kept.view(shape).bool(), values)


def gelu_and_slope(x: Tensor) -> tuple[Tensor, Tensor]:
    return F.gelu(x), torch.ops.aten.gelu_backward(torch.ones_like(x), x)


def cases() -> list[Case]:
    tokens, width = (197 * 256, 3072) if LARGE else (197 * 8, 3072)
    rows, columns = (16384, 4096) if LARGE else (3072, 768)
    n = rows * columns
    d = tokens * width
    found = [
        Case(
            f"nm_mask 2:4 {rows}x{columns}",
            lambda: (randn(rows, columns),),
            lambda s: ops.nm_mask(s, 2, 4),
            lambda s: select(s, 2, 4),
            5 * n,
        ),
        Case(
            f"nm_mask 1:4 {rows}x{columns}",
            lambda: (randn(rows, columns),),
            lambda s: ops.nm_mask(s, 1, 4),
            lambda s: select(s, 1, 4),
            5 * n,
        ),
        Case(
            f"nm_select 2:4 {rows}x{columns}",
            lambda: (randn(rows, columns),),
            lambda s: ops.nm_select(s, 2, 4),
            lambda s: select(s, 2, 4),
            4 * n + n // 4,
        ),
        Case(
            f"masked {rows}x{columns}",
            lambda: (randn(rows, columns), ops.pack_bits(randn(rows, columns) > 0)),
            ops.masked,
            lambda w, b: w * ((b.unsqueeze(1) >> torch.arange(8, device=w.device)) & 1).view_as(w),
            8 * n + n // 8,
        ),
        Case(
            f"unpack 2:4 {rows}x{columns}",
            lambda: packed(rows, columns, NM(2, 4)),
            lambda v, c: ops.unpack(v, c, (rows, columns), 2, 4),
            unpack_groups,
            6 * n + n // 8,
        ),
        Case(
            f"unpack 0.9 {rows}x{columns}",
            lambda: packed(rows, columns, Unstructured(0.9)),
            lambda v, c: ops.unpack(v, c, (rows, columns), 0, 0),
            lambda v, c: unpack_bits(v, c, (rows, columns)),
            4 * n + 4 * n // 10 + n // 8,
        ),
        Case(f"cg_update {n}", lambda: system(n), cg_update, cg_eager, 24 * n),
        Case(
            f"gelu and slope {tokens}x{width}",
            lambda: (randn(tokens, width),),
            lambda x: torch.ops.snows.gelu(x, "none"),
            gelu_and_slope,
            12 * d,
        ),
        Case(
            f"layer_norm {tokens}x{width}",
            lambda: (randn(tokens, width), randn(width), randn(width)),
            lambda x, w, b: ops.layer_norm(x, (width,), w, b),
            lambda x, w, b: F.layer_norm(x, (width,), w, b),
            8 * d,
        ),
    ]
    return found


@pytest.fixture(scope="session")
def copy_bandwidth() -> float:
    """GB/s of a large copy, bytes read and written, on this device in this run."""
    x = torch.randn(2**28 if LARGE else 2**25, device=DEVICE)
    y = torch.empty_like(x)
    seconds = []
    for _ in range(12):
        began = time.perf_counter()
        y.copy_(x)
        wait()
        seconds.append(time.perf_counter() - began)
    return 2 * x.nbytes / statistics.median(seconds[2:]) / 1e9


def wait() -> None:
    if LARGE:
        torch.cuda.synchronize()


def difference(case: Case, inputs: tuple[Tensor, ...]) -> float:
    """How far the op is from its eager form in float64: relative, or 1 where a selection differs anywhere."""
    ours, theirs = tuple(x.clone() for x in inputs), doubled(inputs)
    found, wanted = case.op(*ours), case.eager(*theirs)
    if found is None:  # changed in place
        found, wanted = torch.cat(ours[:2]), torch.cat(theirs[:2])
    elif isinstance(found, tuple) and found[0].is_floating_point():
        found, wanted = torch.cat(found), torch.cat(wanted)
    elif isinstance(found, tuple):  # bits and codes; the codes are held to the reference by the tests
        found, wanted = found[0], ops.pack_bits(wanted).view_as(found[0])
    if not found.is_floating_point():
        return float((found != wanted).any())
    return ((found.double() - wanted).norm() / wanted.norm()).item()


def doubled(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x.double() if x.dtype == torch.float32 else x.clone() for x in inputs)


@pytest.mark.parametrize("implementation", ["snows", "eager", "compile"])
@pytest.mark.parametrize("case", cases(), ids=lambda c: c.name)
def test_op(case: Case, implementation: str, benchmark, copy_bandwidth: float) -> None:
    torch.manual_seed(0)
    function = {"snows": case.op, "eager": case.eager, "compile": None}[implementation] or torch.compile(
        case.eager
    )
    inputs = case.make()
    assert difference(case, inputs) < 1e-5
    turns = [inputs, *(case.make() for _ in range(SETS - 1))]
    count = iter(range(10**9))

    def one() -> None:
        function(*turns[next(count) % SETS])
        wait()

    one()
    benchmark.pedantic(one, rounds=40 if LARGE else 15, warmup_rounds=SETS)
    rate = case.bytes / benchmark.stats.stats.median / 1e9
    benchmark.extra_info |= {
        "case": case.name,
        "implementation": implementation,
        "device": DEVICE,
        "threads": torch.get_num_threads(),
        "runs": ops.implementation(case.name.split()[0], DEVICE.upper()),
        "bytes": case.bytes,
        "GB/s": rate,
        "share of copy": rate / copy_bandwidth,
    }
