"""How good a network is on images, and how far from another."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from snows.network import as_inputs, output_of, output_tensors


class Scores(NamedTuple):
    """What was measured; NaN where there were no labels, or no reference.

    Attributes:
        images: how many.
        top1, top5: accuracy in percent.
        agreement: percent of images on which both networks' first choice is the same.
        divergence: mean KL(reference ‖ network) of the class probabilities, in nats.
    """

    images: int
    top1: float
    top5: float
    agreement: float
    divergence: float


@torch.no_grad()
def logits_of(net: nn.Module, batch: Any) -> Tensor:
    """The (B, classes) logits: the first floating-point tensor of the network's output."""
    return output_tensors(output_of(net, as_inputs(batch)))[0]


def evaluate(net: nn.Module, batches: Iterable[Any], reference: Iterable[Tensor] | None = None) -> Scores:
    """Measure a classifier.

    Args:
        net: in evaluation mode.
        batches: images, or (images, labels) with int64 class numbers; -1 or None stands for no label.
        reference: the other network's logits, a batch each.
    """
    images = labelled = hits = hits5 = 0
    same, divergence = 0, 0.0
    others = iter(reference) if reference is not None else None
    for batch in batches:
        logits = logits_of(net, batch).float()
        images += len(logits)
        labels = batch[1] if isinstance(batch, list | tuple) and len(batch) > 1 else None
        if labels is not None:
            known = labels >= 0
            ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
            labelled += int(known.sum())
            hits += int(ranked[known, 0].sum())
            hits5 += int(ranked[known].any(1).sum())
        if others is not None:
            other = next(others).float()
            same += int((other.argmax(1) == logits.argmax(1)).sum())
            p, q = other.double().log_softmax(1), logits.double().log_softmax(1)
            divergence += (p.exp() * (p - q)).sum().item()
    nan = float("nan")
    return Scores(
        images,
        100 * hits / labelled if labelled else nan,
        100 * hits5 / labelled if labelled else nan,
        100 * same / images if others is not None and images else nan,
        divergence / images if others is not None and images else nan,
    )
