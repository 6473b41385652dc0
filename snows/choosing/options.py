"""The ways in which a layer may be treated, beside losing units: low rank, or zeros that are not multiplied.

Of each layer there is a ladder of options, which is a width like the number of a group's units: the layer as
it is comes first, and what is predicted to lose more comes later.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from snows.choosing.widths import Widths
from snows.reference.packed import code_bits
from snows.sparsity import NM, Unstructured

Zeros: TypeAlias = NM | Unstructured


class Option(NamedTuple):
    """Describe one way to treat a layer.

    Attributes:
        loss: that is predicted.
        rank: of two thin layers in its place; 0 for the one layer.
        pattern: of its weight; None for all weights.
    """

    loss: float = 0.0
    rank: int = 0
    pattern: Zeros | None = None

    @property
    def density(self) -> float:
        """The share of the one layer's weights that stay; 0 for two thin layers."""
        if self.rank:
            return 0.0
        return 1.0 if self.pattern is None else self.pattern.density

    def bytes_share(self, itemsize: int) -> float:
        """Return the packed weight's share of the dense one's bytes; 0 for two thin layers."""
        if self.pattern is None:
            return self.density
        codes = 1.0
        if isinstance(self.pattern, NM):
            codes = code_bits(self.pattern.n, self.pattern.m) / self.pattern.m
        return self.density + codes / (8 * itemsize)


DENSE = Option()
Ladder: TypeAlias = Sequence[Option]  # of a layer; the first is `DENSE`


def treatment(layer: str) -> str:
    """Name the width that is the place of a layer's option, counted from the last one."""
    return f"treatment of {layer}"


def widths(layer: str, ladder: Ladder, without: Collection[Option] = ()) -> Widths:
    """Return the options of a layer as widths: the number of options that lose more.

    Args:
        layer: its name.
        ladder: its options.
        without: those that may not be chosen.
    """
    places = [i for i, x in enumerate(ladder) if x not in without]
    losses = torch.tensor([ladder[i].loss for i in places], dtype=torch.float64)
    return Widths(treatment(layer), len(ladder) - 1 - torch.tensor(places), losses)


def table(ladder: Ladder, value: Callable[[Option], float]) -> Tensor:
    """Return a value of each option, as a width numbers them: float64 (options,)."""
    return torch.tensor([value(x) for x in reversed(ladder)], dtype=torch.float64)


def chosen(ladders: Mapping[str, Ladder], at: Mapping[str, int]) -> dict[str, Option]:
    """Return, by layer that is not left as it is, the option at its width."""
    last = {name: len(ladder) - 1 for name, ladder in ladders.items()}
    places = {name: full - at.get(treatment(name), full) for name, full in last.items()}
    return {name: ladders[name][place] for name, place in places.items() if place}
