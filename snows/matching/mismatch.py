"""How far a network's output is from the dense one's, on samples that nothing is fitted to."""

from __future__ import annotations

import torch

from snows import together
from snows.matching.metrics import variance
from snows.networks.attention import plain_forward
from snows.networks.batches import output_tensors
from snows.networks.copies import hold_back
from snows.networks.twins import Twins


def mismatch(twins: Twins) -> float:
    """Return the squared mismatch of the outputs on the held-back samples, as a share of their variance.

    Where no samples are held back, the first batch stands for them. The first process measures it for all.
    """
    return together.first(lambda: _measured(twins))


def _measured(twins: Twins) -> float:
    batch = (hold_back(twins.batches)[1] or twins.batches[0]).to(twins.device)
    with torch.no_grad(), plain_forward():
        wanted = output_tensors(batch.map(torch.clone).through(twins.dense))
        found = output_tensors(batch.map(torch.clone).through(twins.sparse))
    errors = [
        (a - b).square().mean().item() / variance(a) for a, b in zip(wanted, found, strict=True) if a.numel()
    ]
    return sum(errors) / max(len(errors), 1)
