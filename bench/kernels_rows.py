"""The layer-wise warm start's many systems, a row each: batched conjugate gradients beside a batched Cholesky solve.

    python -m pytest bench/kernels_rows.py --benchmark-json=bench/results/cpu/kernels_rows.json

3,072 rows of 768 (768 on a CPU) with a 2:4 mask each share the Gram matrix of 3,000 real images' activations in a random layer;
damping is 1 % of its mean diagonal, the tolerance 1e-4. Cholesky gathers each row's 384 x 384 system, as many at a time as fit 256 MB.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from snows import NM, zoo
from snows.solving.cg import batched_cg

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROWS, WIDTH = 3072 if DEVICE == "cuda" else 768, 768


def system() -> tuple[Tensor, Tensor, Tensor]:
    """Gram (1, width, width), right-hand sides and masks (1, rows, width)."""
    torch.manual_seed(0)
    images, _ = zoo.images("calibration")
    x = F.gelu(images.flatten(1) @ torch.randn(784, WIDTH) / 28).to(DEVICE)
    gram = x.T @ x / len(x)
    weight = torch.randn(ROWS, WIDTH, device=DEVICE)
    return gram[None], (weight @ gram)[None], NM(2, 4).mask(weight.abs())[None]


def cholesky(gram: Tensor, right: Tensor, mask: Tensor) -> Tensor:
    damped = gram[0] + 0.01 * gram[0].diagonal().mean() * torch.eye(WIDTH, device=DEVICE)
    kept = mask[0].nonzero()[:, 1].view(ROWS, -1)
    found = torch.zeros_like(right[0])
    for rows in torch.arange(ROWS, device=DEVICE).split(2**28 // (4 * kept.shape[1] ** 2)):
        index = kept[rows]
        blocks = damped[index[:, :, None], index[:, None, :]]
        solved = torch.cholesky_solve(
            right[0][rows].gather(1, index)[..., None], torch.linalg.cholesky(blocks)
        )[..., 0]
        found[rows] = found[rows].scatter(1, index, solved)
    return found[None]


@pytest.mark.parametrize("implementation", ["snows", "Cholesky"])
def test_rows(implementation: str, benchmark) -> None:
    gram, right, mask = system()
    solve = {
        "snows": lambda: batched_cg(gram, right, mask, damping=0.01, rtol=1e-4),
        "Cholesky": lambda: cholesky(gram, right, mask),
    }[implementation]
    wanted = cholesky(gram.double(), right.double(), mask)
    found = solve()
    residual = (
        (
            found.double()
            @ (gram[0].double() + 0.01 * gram[0].diagonal().mean().double() * torch.eye(WIDTH, device=DEVICE))
        )
        - right
    ) * mask
    assert (residual.norm(dim=-1) / (right * mask).norm(dim=-1)).max().item() < 2e-4
    assert ((found.double() - wanted).norm() / wanted.norm()).item() < 1e-2

    def run() -> None:
        solve()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(run, rounds=20 if DEVICE == "cuda" else 3, warmup_rounds=1)
    benchmark.extra_info |= {"case": f"{ROWS} rows of {WIDTH}, 2:4", "implementation": implementation}
