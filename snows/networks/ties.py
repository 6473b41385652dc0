"""Which nodes of a network belong together, and what keeps them in place."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeAlias

import torch
from torch import Tensor

from snows.networks.coding import Link

Axis = tuple[str, int]  # a tensor and a dimension of it; of a layer's weight 0 is its outputs, 1 its inputs
Unit: TypeAlias = dict[Axis, list[int]]  # by axis, the entries that belong to it
OUTPUT = 0  # the node of the network's output


def named(layer: str, key: str) -> str:
    """Name a layer's tensor; in a network that is one layer the layer has no name."""
    return f"{layer}.{key}" if layer else key


def outputs_of(layer: str) -> Axis:
    """Name the axis of a layer's outputs."""
    return named(layer, "weight"), 0


def inputs_of(layer: str) -> Axis:
    """Name the axis of a layer's input channels or features, of all groups of a convolution."""
    return named(layer, "weight"), 1


class Nodes:
    """Number the entries of axes; the network's output is number 0.

    Attributes:
        numbers: by axis, the numbers of its entries.
        total: how many nodes there are.
    """

    def __init__(self) -> None:
        self.numbers: dict[Axis, range] = {}
        self.total = 1

    def add(self, axis: Axis, size: int) -> range:
        """Give an axis's entries numbers, and return them."""
        self.numbers[axis] = range(self.total, self.total + size)
        self.total += size
        return self.numbers[axis]


class Ties:
    """Hold which nodes belong together: sets that grow together as links are found.

    Attributes:
        nodes: all of them.
    """

    def __init__(self, nodes: Nodes) -> None:
        self.nodes = nodes
        self._parents: dict[int, int] = {}
        self._refusals: dict[int, str] = {}  # by node

    def join(self, nodes: Iterable[int]) -> None:
        """Tie nodes to each other."""
        roots = {self._root(x) for x in nodes}
        if len(roots) > 1:
            first = min(roots)
            self._parents.update(dict.fromkeys(roots - {first}, first))

    def refuse(self, nodes: Iterable[int], reason: str) -> None:
        """Say why units with these nodes have to stay; the first reason counts."""
        for node in nodes:
            self._refusals.setdefault(node, reason)

    def link(self, axis: Axis, links: Iterable[Link]) -> None:
        """Tie entries of an axis to what they reach; what reaches the output has to stay."""
        numbers = self.nodes.numbers[axis]
        for entries, reached in links:
            own = numbers[entries.start : entries.stop]
            others = [x for x in reached.tolist() if x != OUTPUT]
            if others:
                self.join((*own, *others))
            if len(others) < len(reached):
                self.refuse(own, "its units reach the network's output")

    def parts(self, axis: Axis, count: int) -> list[range]:
        """Divide an axis's nodes into equal parts."""
        numbers = self.nodes.numbers[axis]
        size = len(numbers) // count
        return [numbers[i * size : (i + 1) * size] for i in range(count)]

    def removable(self, outputs: Iterable[Axis]) -> Tensor:
        """Say which nodes may be of a unit that can go, so far: it has outputs, but no layer's all.

        Args:
            outputs: the axes of the layers' outputs.

        Returns:
            bool, by node.
        """
        found, kept = set(), {self._root(x) for x in self._refusals}
        for axis in outputs:
            roots = {self._root(x) for x in self.nodes.numbers[axis]}
            found |= roots
            kept |= roots if len(roots) == 1 else set()
        free = found - kept
        return torch.tensor([self._root(x) in free for x in range(self.nodes.total)])

    def units(self) -> Iterator[tuple[Unit, str]]:
        """Give every set of nodes, in order of its first, with the reason why it has to stay or nothing."""
        units: dict[int, Unit] = {}
        for axis, numbers in self.nodes.numbers.items():
            for entry, node in enumerate(numbers):
                units.setdefault(self._root(node), {}).setdefault(axis, []).append(entry)
        reasons: dict[int, str] = {}
        for node, reason in self._refusals.items():
            reasons.setdefault(self._root(node), reason)
        return ((unit, reasons.get(root, "")) for root, unit in units.items())

    def _root(self, node: int) -> int:
        path = []
        while (parent := self._parents.get(node, node)) != node:
            path.append(node)
            node = parent
        self._parents.update(dict.fromkeys(path, node))
        return node
