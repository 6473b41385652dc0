"""One layer where it stands, in the dense network and in its working copy, with the batches that reach it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from snows.networks.stream import Stream
from snows.networks.watching import Call


class Pair(NamedTuple):
    """Hold one batch's streams through both networks, on the device, advanced to the same layer."""

    dense: Stream
    sparse: Stream

    @property
    def calls(self) -> tuple[Call, Call]:
        """The layer's calls.

        Where routing sent other inputs to the layer, the pruned network's call stands for the dense one's.
        """
        dense, sparse = self.dense.call, self.sparse.call
        assert dense is not None
        assert sparse is not None
        return (dense if _alike(dense, sparse) else sparse), sparse

    def expect(self) -> None:
        """Fetch what both streams remember, because they are used next."""
        self.dense.expect()
        self.sparse.expect()


def in_turn(pairs: Sequence[Pair]) -> Iterator[Pair]:
    """Give pairs in order, each while the next is fetched; after the last the first."""
    for i, pair in enumerate(pairs, 1):
        pairs[i % len(pairs)].expect()
        yield pair


def numbered(pairs: Sequence[Pair], held: int, most: int | None) -> Iterator[tuple[int, Pair]]:
    """Give pairs with their numbers: first those that a layer takes if all reach it, then the others.

    Args:
        pairs: of all batches.
        held: number of the one to judge by.
        most: of the others, that a layer takes; None for all.
    """
    near = [i for i in range(len(pairs)) if i == held or most is None or i < most]
    yield from zip(near, in_turn([pairs[i] for i in near]), strict=True)
    yield from ((i, pair) for i, pair in enumerate(pairs) if i not in near)


def _alike(dense: Call, sparse: Call) -> bool:
    """Say whether both calls answer for the same positions.

    A factor of an implant may step over its input otherwise than the dense layer does: then only the number
    of samples can be compared.
    """
    steps = ("stride", "padding", "dilation")
    one, other = ((call.kernel, *(call.settings.get(x) for x in steps)) for call in (dense, sparse))
    if one != other:
        return dense.shape[0] == sparse.shape[0]
    return _positions(dense) == _positions(sparse)


def _positions(call: Call) -> torch.Size:
    """Return the shape of a call's input without its channels, of which a cut network has fewer."""
    return torch.Size((*call.shape[:1], *call.shape[2:])) if call.kernel else call.shape[:-1]


@dataclass(frozen=True)
class Site:
    """Hold one layer where it stands: its weight, and every batch that reaches it.

    Attributes:
        name: of the layer.
        layer: the working copy's.
        weight: before pruning.
        source: the dense network's layer in whose place it stands.
        target: that layer's weight.
        left: which of that layer's outputs are left; None for all.
        training: the batches to fit to, on the host.
        held: the samples to judge by; of the first batch where none are held back.
    """

    name: str
    layer: nn.Linear | nn.Conv2d
    weight: Tensor
    source: str
    target: Tensor
    left: Tensor | None
    training: Sequence[Pair]
    held: Pair | None

    @property
    def first(self) -> bool:
        """Whether it is the first of two layers in the place of one, whose output that one does not have."""
        return self.name == f"{self.source}.0"
