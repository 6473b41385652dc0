"""What a network costs, as a function of how many units of each group it keeps."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from snows.choosing.options import Ladder, treatment
from snows.choosing.options import table as of_options
from snows.networks import products
from snows.networks.batches import Batch
from snows.networks.channels import Group
from snows.networks.layers import groups_of, prunable

Of = Literal["macs", "params", "bytes", "nonzeros", "latency"]
WORDS: dict[str, str] = {
    "macs": "MACs",
    "params": "parameters",
    "bytes": "bytes",
    "nonzeros": "weights that are not zero",
    "latency": "milliseconds",
}
Gone: TypeAlias = NDArray[np.float64]
Factor = Mapping[str, Tensor]  # by group or other choice: what is left of a size at each width, 0 to all


class Term(NamedTuple):
    """Describe one weight, buffer or product, and how it shrinks.

    At given widths each factor is ``1 - Σ (1 - table[width])`` over its groups, which are parts of one
    dimension; factors multiply. A width that is not given is the last of its table.

    Attributes:
        name: of the parameter, the buffer or the call.
        macs: multiplications with an addition, per sample; zeros of a pattern are not multiplied.
        params: numbers that were trained.
        bytes: in memory.
        nonzeros: those of the numbers that no pattern makes zero.
        latency: milliseconds, see `latency`.
        factors: of its dimensions; each table is float64 of (units + 1,).
    """

    name: str
    macs: float = 0.0
    params: float = 0.0
    bytes: float = 0.0
    nonzeros: float = 0.0
    latency: float = 0.0
    factors: tuple[Factor, ...] = ()


class Costs:
    """Say what a network costs at any widths.

    Args:
        terms: what the costs are the sum of.
        full: by group or other choice, its width in the network as it is.
    """

    def __init__(self, terms: Sequence[Term], full: Mapping[str, int]) -> None:
        self.terms, self.full = tuple(terms), dict(full)

    @classmethod
    def of(
        cls,
        net: nn.Module,
        batch: Batch,
        groups: Sequence[Group],
        ladders: Mapping[str, Ladder] | None = None,
    ) -> Costs:
        """Count a network's weights, buffers and multiplications, those of attention too.

        Args:
            net: in evaluation mode.
            batch: of any number of samples; one of them is run once, and once more for each group where the
                network multiplies activations with each other.
            groups: those that have a reason to stay do not count as widths.
            ladders: by name of a layer, how it may be treated; a width too, as `treatment` names it.

        Raises:
            ValueError: the network cannot run the batch.
        """
        groups, ladders = [x for x in groups if not x.reason], ladders or {}
        one = batch.split(1)[0].to(next(net.parameters()).device)
        counts, samples = products.count(net, one), one.samples()
        sides = parts(net, groups)
        tensors = dict(net.named_parameters()) | dict(net.named_buffers())
        trained = dict(net.named_parameters())
        weights = dict(counts.weights)
        terms: list[Term] = []
        for name, x in tensors.items():
            own = x.numel() if name in trained else 0
            sizes = weights.pop(name, 0) / samples, own, x.nbytes, own
            dims = {
                dim: {group.name: table(group.units, share) for group, share in shares}
                for dim, shares in sides.get(id(x), {}).items()
            }
            whole, layer = Term(name, *sizes, factors=tuple(dims.values())), name.removesuffix(".weight")
            terms += _treated(whole, layer, x, dims, ladders[layer]) if layer in ladders else [whole]
        terms += [Term(name, macs / samples) for name, macs in weights.items()]
        factors = defaultdict[tuple[str, int], list[Factor]](list)
        for group in groups if counts.products else ():
            for product, shares in products.shares(net, one, group).items():
                factors[product] += [
                    {group.name: table(group.units, share * group.units)} for share in shares
                ]
        terms += [
            Term(name, macs / samples, factors=tuple(factors[name, i]))
            for (name, i), macs in counts.products.items()
        ]
        return cls(terms, full_widths(groups, ladders))

    def total(self, of: Of, widths: Mapping[str, int] | None = None) -> float:
        """Return what the network costs at these widths; a group that is not named keeps all units."""
        return float(self._sum(self.terms, of, widths or {}))

    def by_name(self, of: Of, widths: Mapping[str, int]) -> dict[str, float]:
        """Return what each weight, buffer or product costs at these widths."""
        found = defaultdict[str, float](float)
        for term in self.terms:
            found[term.name] += float(self._sum([term], of, widths))
        return dict(found)

    def saved(self, of: Of, widths: Mapping[str, int], name: str, to: Tensor) -> Tensor:
        """Return what is saved if one width changes.

        Args:
            of: what is counted.
            widths: as they are now.
            name: of the width that changes.
            to: int64 (n,), what it changes to.

        Returns:
            float64 (n,).
        """
        terms = self._touched.get(name, [])
        narrow = self._sum(terms, of, {**widths, name: to.numpy()})
        return torch.as_tensor(self._sum(terms, of, widths) - narrow).expand(len(to)).double()

    def beside(self, name: str) -> set[str]:
        """Return the widths on which depends what a change of this one saves, and itself."""
        return {name}.union(*(factor for term in self._touched.get(name, ()) for factor in term.factors))

    @cached_property
    def _touched(self) -> dict[str, list[Term]]:
        found = defaultdict[str, list[Term]](list)
        for term in self.terms:
            for name in set[str]().union(*term.factors):
                found[name].append(term)
        return found

    def _sum(self, terms: Sequence[Term], of: Of, widths: Mapping[str, int | Gone]) -> Any:
        """Sum terms at widths, of which one may be an array.

        NumPy and plain numbers: the tables are short, and this is asked for some hundred thousand times.
        """
        total: Any = 0.0
        for term in terms:
            value: Any = getattr(term, of)
            for factor in self._gone[id(term)] if value else ():
                left: Any = 1.0
                for name, (numbers, array) in factor.items():
                    width = widths.get(name, -1)
                    left = left - (numbers[width] if isinstance(width, int) else array[width])
                value = value * left
            total = total + value
        return total

    @cached_property
    def _gone(self) -> dict[int, list[dict[str, tuple[list[float], Gone]]]]:
        """Return by term and factor what is gone of a size at each width."""
        return {
            id(term): [
                {name: (x.tolist(), x.numpy()) for name, x in ((n, 1 - y.double()) for n, y in f.items())}
                for f in term.factors
            ]
            for term in self.terms
        }


def parts(net: nn.Module, groups: Sequence[Group]) -> dict[int, dict[int, list[tuple[Group, float]]]]:
    """Find which share of each dimension of a parameter or buffer is a group's: by id, then by dimension."""
    named = dict(net.named_parameters(remove_duplicate=False)) | dict(
        net.named_buffers(remove_duplicate=False)
    )
    layers = prunable(net)
    found = defaultdict[int, dict[int, list[tuple[Group, float]]]](lambda: defaultdict(list))
    for group in groups:
        sizes: dict[tuple[int, int], float] = {}
        for (name, dim), entries in group.entries.items():
            sizes[id(named[name]), dim] = entries.numel() / named[name].shape[dim]
        for name, entries in group.rows.items():
            for parameter in ("weight", "bias"):
                if (x := named.get(f"{name}.{parameter}")) is not None:
                    sizes[id(x), 0] = entries.numel() / len(x)
        for name, entries in group.columns.items():
            inputs = named[f"{name}.weight"].shape[1] * groups_of(layers[name])
            if name not in group.rows or groups_of(layers[name]) == 1:
                sizes[id(named[f"{name}.weight"]), 1] = entries.numel() / inputs
        for (tensor, dim), share in sizes.items():
            found[tensor][dim].append((group, share))
    return found


def full_widths(groups: Sequence[Group], ladders: Mapping[str, Ladder]) -> dict[str, int]:
    """Return the widths of a network as it is."""
    return {x.name: x.units for x in groups} | {treatment(x): len(y) - 1 for x, y in ladders.items()}


def _treated(
    whole: Term, layer: str, weight: Tensor, dims: Mapping[int, Factor], ladder: Ladder
) -> Iterator[Term]:
    """Describe a weight that may be treated: as one layer with or without zeros, else as two thin ones."""
    width, size = treatment(layer), weight.element_size()
    kept, one = of_options(ladder, lambda x: x.density), of_options(ladder, lambda x: float(not x.rank))
    packed = of_options(ladder, lambda x: x.bytes_share(size))
    for part, left in (
        (whole._replace(params=0, bytes=0), kept),
        (Term(whole.name, params=whole.params), one),
        (Term(whole.name, bytes=whole.bytes), packed),
    ):
        yield part._replace(factors=(*whole.factors, {width: left}))
    rank = {width: of_options(ladder, lambda x: x.rank)}
    for dim, entries in ((1, len(weight)), (0, weight[0].numel())):
        macs, params, nbytes, nonzeros = (
            x / entries for x in (whole.macs, whole.params, whole.bytes, whole.nonzeros)
        )
        sides = [dims[dim]] if dim in dims else []
        yield Term(whole.name, macs, params, nbytes, nonzeros, factors=(*sides, rank))


def table(units: int, share: float) -> Tensor:
    """Return what is left of a dimension of which `share` is the group's, at 0 to all units."""
    return 1 - share * (1 - torch.arange(units + 1, dtype=torch.float64) / units)
