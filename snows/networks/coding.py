"""Which entries reach what: numbered in binary, and by ranges where that leaves a choice."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

Reach = Callable[[Tensor], Tensor]  # int64 entries -> bool of all nodes: which of them the entries reach


class Link(NamedTuple):
    """Say that some entries reach some nodes, between them; `nodes` are numbers, int64."""

    entries: range
    nodes: Tensor


def links(size: int, everything: Tensor, reach: Reach) -> list[Link]:
    """Find out which entries reach what, in few passes.

    Entries are numbered in binary: one pass taints those whose bit is set, another those where it is clear. A
    node that sees one of the two at every bit is reached by one entry alone, whose number it spells. Nodes
    that several entries reach, as all outputs of an attention head reach all of its inputs, are resolved by
    ranges: a range is linked as one if it reaches nothing but what its first entry's unit does, and its last
    entry reaches some of that. What reaches nothing amid such a range is linked too; never the reverse.

    Args:
        size: how many entries there are.
        everything: bool, the nodes that all of them reach.
        reach: what some of them reach; more entries never reach less.

    Returns:
        Links. Entries whose links share a node belong together; an entry that reaches nothing has none.
    """
    entries = torch.arange(size)
    if not everything.any():
        return []
    if all(torch.equal(reach(entries[i : i + 1]), everything) for i in sorted({0, size - 1})):
        return [Link(range(size), everything.nonzero()[:, 0])]
    alone, number = everything.clone(), torch.zeros(len(everything), dtype=torch.int64)
    for bit in range((size - 1).bit_length()):
        is_set = (entries >> bit & 1).bool()
        one, other = reach(entries[is_set]), reach(entries[~is_set])
        alone &= one ^ other
        number += one.long() << bit
        if not alone.any():
            break
    alone &= number < size
    nodes = alone.nonzero()[:, 0]
    nodes = nodes[number[nodes].argsort(stable=True)]
    values, counts = number[nodes].unique_consecutive(return_counts=True)
    found = [
        Link(range(i, i + 1), part)
        for i, part in zip(values.tolist(), nodes.split(counts.tolist()), strict=True)
    ]
    shared = everything & ~alone
    return found + list(_ranges(size, shared, reach)) if shared.any() else found


def _ranges(size: int, shared: Tensor, reach: Reach) -> Iterator[Link]:
    """Link ranges of entries to nodes that several of them reach."""
    units: list[Tensor] = []  # no two with a node in common
    before = torch.zeros_like(shared)
    at = begin = 0
    guess = 1
    while at < size:
        base = reach(torch.arange(at, at + 1)) & shared
        touched = [unit for unit in units if (unit & base).any()]
        units = [unit for unit in units if not (unit & base).any()]
        for unit in touched:
            base = base | unit
        units.append(base)
        length = size - at if torch.equal(base, shared) else min(guess, size - at)
        while length > 1 and not _alike(at, length, base, shared, reach):
            length //= 2
        if base.any():
            yield Link(range(at, at + length), base.nonzero()[:, 0])
        if not (base & before).any() and (base | before).any():
            begin = at  # another unit than before
        at += length
        guess = at - begin  # as long as this unit is so far
        before = base


def _alike(at: int, length: int, base: Tensor, shared: Tensor, reach: Reach) -> bool:
    """Say whether a range reaches nothing but a unit, and its last entry that unit."""
    entries = torch.arange(at, at + length)
    if base.any() and not (reach(entries[-1:]) & base).any():
        return False
    return torch.equal(base, shared) or not (reach(entries) & shared & ~base).any()
