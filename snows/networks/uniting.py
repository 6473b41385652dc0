"""Units from what belongs together: rows and columns of layers, and entries of other tensors."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from snows.networks.channels import Group, Kind
from snows.networks.layers import Layer

Node = tuple[str, str, int, int]  # "row", "column" or "entry", of which layer or tensor, dimension, number
Place = tuple[str, str, int]


class Units:
    """Unite rows, columns and entries that cannot go one without the other.

    Attributes:
        reasons: by one node of it, why a unit cannot go.
    """

    def __init__(self) -> None:
        self.reasons: dict[Node, str] = {}
        self._above: dict[Node, Node] = {}

    def find(self, node: Node) -> Node:
        """Return the node that stands for all that one belongs together with."""
        root = node
        while (above := self._above.get(root, root)) != root:
            root = above
        while node != root:
            self._above[node], node = root, self._above[node]
        return root

    def join(self, nodes: Iterable[Node]) -> None:
        """Say that nodes belong together."""
        first: Node | None = None
        for node in nodes:
            root = self.find(node)
            self._above.setdefault(root, root)
            if first is None:
                first = root
            self._above[root] = first

    def groups(self, called: Mapping[str, Layer], layers: Mapping[str, Layer]) -> list[Group]:
        """Put units that are alike into groups.

        Args:
            called: layers that the network calls, in order.
            layers: all.
        """
        parts: dict[Node, dict[Place, list[int]]] = defaultdict(lambda: defaultdict(list))
        for name, layer in layers.items():
            for i in range(len(layer.weight)):
                self.join([("row", name, 0, i)])
        for node in self._above:
            parts[self.find(node)][node[:3]].append(node[3])
        reasons: dict[Node, str] = {}
        for node, why in self.reasons.items():
            reasons.setdefault(self.find(node), why)
        order = {name: i for i, name in enumerate((*called, *(x for x in layers if x not in called)))}
        alike: dict[tuple[object, ...], list[dict[Place, list[int]]]] = defaultdict(list)
        for root, places in parts.items():
            rows = sorted((order[name] for kind, name, _ in places if kind == "row"))
            if not rows:
                continue  # what only the network's input feeds
            why = reasons.get(root, "")
            if not why and not any(kind == "column" for kind, _, _ in places):
                name = next(name for kind, name, _ in places if kind == "row")
                why = "nothing reads its units" if name in called else "the example does not reach it"
            signature = tuple(sorted((place, len(numbers)) for place, numbers in places.items()))
            alike[tuple(rows), why, signature].append(places)
        found = [self._group(units, str(why), order, layers) for (_, why, _), units in alike.items()]
        found.sort(key=lambda x: (order[x.name], int(x.rows[x.name][0, 0])))
        return _named(found)

    def _group(self, units: Sequence[Mapping[Place, list[int]]], why: str, order: Mapping[str, int], layers: Mapping[str, Layer]) -> Group:
        places = sorted(units[0], key=lambda x: (order.get(x[1], len(order)), x))
        first = next(x for x in places if x[0] == "row")
        units = sorted(units, key=lambda x: min(x[first]))
        tensors = {place: torch.tensor([sorted(unit[place]) for unit in units]) for place in places}
        rows, columns = (
            {name: x for (kind, name, _), x in tensors.items() if kind == wanted} for wanted in ("row", "column")
        )
        entries = {(name, dim): x for (kind, name, dim), x in tensors.items() if kind == "entry"}
        return Group(first[1], _kind(rows, columns, layers), rows, columns, entries, reason=why)


def _kind(rows: Mapping[str, Tensor], columns: Mapping[str, Tensor], layers: Mapping[str, Layer]) -> Kind:
    if any(isinstance(layers[name], nn.Conv2d) for name in (*rows, *columns)):
        return "channels"
    several = all(any(x.shape[1] > 1 for x in side.values()) for side in (rows, columns))
    return "heads" if several else "neurons"


def _named(groups: Sequence[Group]) -> list[Group]:
    """Number the groups that begin in the same layer."""
    from dataclasses import replace

    counts: dict[str, int] = {}
    found = []
    for group in groups:
        count = counts[group.name] = counts.get(group.name, -1) + 1
        found.append(replace(group, name=f"{group.name}#{count}") if count else group)
    return found
