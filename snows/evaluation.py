"""How good a network is on images, and how far from another."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from snows.networks.batches import Batch, labels_of, output_of, output_tensors


class Scores(NamedTuple):
    """Hold what was measured; NaN where there were no labels, or no reference.

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
    """Compute the (B, classes) logits on the network's device: the first floating-point tensor of its output.

    Raises:
        ValueError: the network cannot run the batch, or returns no such tensor.
    """
    device = next((x.device for x in (*net.parameters(), *net.buffers())), torch.device("cpu"))
    found = output_tensors(output_of(net, Batch.of(batch).to(device)))
    if not found or found[0].ndim != 2:
        got = f"a tensor of {tuple(found[0].shape)}" if found else "no floating-point tensor"
        raise ValueError(f"evaluate: expected the model to return logits of (images, classes), got {got}")
    return found[0].float()


class Tally:
    """Scores that grow batch by batch."""

    def __init__(self) -> None:
        self.images = self.labelled = self.hits = self.hits5 = self.compared = self.same = 0
        self.divergence = 0.0

    def add(self, logits: Tensor, labels: Tensor | None = None, reference: Tensor | None = None) -> None:
        """Count one batch.

        Args:
            logits: (B, classes).
            labels: (B,) class numbers, on any device; negative stands for no label.
            reference: the other network's logits, (B, classes), on any device.

        Raises:
            ValueError: there are not as many labels, or not as many reference logits, or a class number is
                that of no output.
        """
        self.images += len(logits)
        if labels is not None:
            labels = labels.to(logits.device)
            if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
                raise ValueError(
                    f"evaluate: expected class numbers as whole numbers, got labels of {labels.dtype}"
                )
            if labels.shape != logits.shape[:1]:
                raise ValueError(
                    f"evaluate: expected a class number for each of {len(logits)} images, got labels of "
                    f"{tuple(labels.shape)}"
                )
            known = labels >= 0
            if known.any() and int(labels.max()) >= logits.shape[1]:
                raise ValueError(
                    f"evaluate: expected class numbers below {logits.shape[1]}, the model's outputs, got "
                    f"{int(labels.max())}"
                )
            ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
            self.labelled += int(known.sum())
            self.hits += int(ranked[known, 0].sum())
            self.hits5 += int(ranked[known].any(1).sum())
        if reference is not None:
            if reference.shape != logits.shape:
                raise ValueError(
                    f"evaluate: expected reference logits of {tuple(logits.shape)}, got "
                    f"{tuple(reference.shape)}"
                )
            reference = reference.to(logits)
            self.compared += len(logits)
            self.same += int((reference.argmax(1) == logits.argmax(1)).sum())
            p, q = reference.double().log_softmax(1), logits.double().log_softmax(1)
            self.divergence += (p.exp() * (p - q)).sum().item()

    def scores(self) -> Scores:
        """Divide by how many were counted."""

        def share(count: float, whole: int) -> float:
            return count / whole if whole else float("nan")

        return Scores(
            self.images,
            100 * share(self.hits, self.labelled),
            100 * share(self.hits5, self.labelled),
            100 * share(self.same, self.compared),
            share(self.divergence, self.compared),
        )


class Seen:
    """Batches whose images and labels are told apart from others by a digest, once all were read.

    Args:
        batches: as `evaluate` takes them.
    """

    def __init__(self, batches: Iterable[Any]) -> None:
        self._rest = iter(batches)
        self._first: list[Any] = []
        self._found: dict[str, Any] = {}

    def first(self) -> Any:
        """Return the first batch.

        Raises:
            ValueError: there is none.
        """
        for batch in self._rest if not self._first else ():
            self._first.append(batch)
            break
        if not self._first:
            raise ValueError("verify: expected batches of images, got none")
        return self._first[0]

    def __iter__(self) -> Iterator[Any]:
        self.first()
        for batch in chain(self._first, self._rest):
            leaves = tree_leaves(tuple(Batch.of(batch)))
            for i, x in enumerate([*leaves, labels_of(batch)]):
                self._add("labels" if i == len(leaves) else str(i), x)
            yield batch

    def _add(self, place: str, x: Any) -> None:
        if isinstance(x, Tensor):
            kind = f"{place} {x.dtype} {tuple(x.shape[1:])}"
            found = self._found.setdefault(kind, hashlib.sha256())
            found.update(x.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)

    def digest(self) -> str:
        """Return the SHA-256 of all images and labels that were read, in however large batches."""
        parts = [f"{kind} {x.hexdigest()}" for kind, x in sorted(self._found.items())]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def evaluate(
    net: nn.Module, batches: Iterable[Any], reference: nn.Module | Iterable[Tensor] | None = None
) -> Scores:
    """Measure a classifier, on the device that it is on.

    Args:
        net: in evaluation mode.
        batches: as `prune` takes them, on any device; class numbers as `(images, labels)`, or under `labels`
            or `label` of a mapping, int64 of (B,), -1 or None for no label.
        reference: the other network, or its logits, a batch each.

    Raises:
        ValueError: the network cannot run a batch, returns no (B, classes) logits, or labels or reference
            logits do not belong to the images.
    """
    if isinstance(reference, nn.Module):
        return compare(reference, net, batches)[1]
    tally, others = Tally(), iter(reference) if reference is not None else None
    for batch in batches:
        other = next(others, None) if others is not None else None
        if others is not None and other is None:
            raise ValueError("evaluate: expected reference logits for every batch, got fewer")
        tally.add(logits_of(net, batch), labels_of(batch), other)
    return tally.scores()


def compare(dense: nn.Module, net: nn.Module, batches: Iterable[Any]) -> tuple[Scores, Scores]:
    """Measure two classifiers on the same images: the dense one, and another next to it."""
    first, second = Tally(), Tally()
    for batch in batches:
        logits, labels = logits_of(dense, batch), labels_of(batch)
        first.add(logits, labels)
        second.add(logits_of(net, batch), labels, logits)
    return first.scores(), second.scores()
