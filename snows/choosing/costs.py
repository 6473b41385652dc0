"""What a network costs, as a function of how many units of each group it keeps."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from snows.networks import products
from snows.networks.batches import Batch
from snows.networks.channels import Group
from snows.networks.layers import groups_of, prunable

Of = Literal["macs", "params", "bytes", "latency"]
Factor = Mapping[str, Tensor]  # by group or other choice: what is left of a size at each width, 0 to all


class Term(NamedTuple):
    """Describe one weight, buffer or product, and how it shrinks.

    At given widths each factor is ``1 - Σ (1 - table[width])`` over its groups, which are parts of one
    dimension; factors multiply. A width that is not given is the last of its table.

    Attributes:
        name: of the parameter, the buffer or the call.
        macs: multiplications with an addition, per sample.
        params: numbers that were trained.
        bytes: in memory.
        latency: milliseconds, see `latency`.
        factors: of its dimensions; each table is float64 of (units + 1,).
    """

    name: str
    macs: float = 0.0
    params: float = 0.0
    bytes: float = 0.0
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
        cls, net: nn.Module, batch: Batch, groups: Sequence[Group], ranks: Mapping[str, int] | None = None
    ) -> Costs:
        """Count a network's weights, buffers and multiplications, those of attention too.

        Args:
            net: in evaluation mode.
            batch: of any number of samples; one of them is run once, and once more for each group where the
                network multiplies activations with each other.
            groups: those that have a reason to stay do not count as widths.
            ranks: by name of a layer that may become two thin ones, its full rank. The rank between them is a
                width too, named as `rank_width` says; at the full rank the layer is one.

        Raises:
            ValueError: the network cannot run the batch.
        """
        groups, ranks = [x for x in groups if not x.reason], ranks or {}
        one = batch.split(1)[0].to(next(net.parameters()).device)
        counts, samples = products.count(net, one), one.samples()
        sides = parts(net, groups)
        tensors = dict(net.named_parameters()) | dict(net.named_buffers())
        trained = dict(net.named_parameters())
        weights = dict(counts.weights)
        terms: list[Term] = []
        for name, x in tensors.items():
            sizes = weights.pop(name, 0) / samples, x.numel() if name in trained else 0, x.nbytes
            dims = {
                dim: {group.name: table(group.units, share) for group, share in shares}
                for dim, shares in sides.get(id(x), {}).items()
            }
            whole, layer = Term(name, *sizes, factors=tuple(dims.values())), name.removesuffix(".weight")
            terms += _thin(whole, layer, x, dims, ranks[layer]) if layer in ranks else [whole]
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
        full = {group.name: group.units for group in groups} | {rank_width(x): r for x, r in ranks.items()}
        return cls(terms, full)

    def total(self, of: Of, widths: Mapping[str, int] | None = None) -> float:
        """Return what the network costs at these widths; a group that is not named keeps all units."""
        return float(self._sum(self.terms, of, widths or {}))

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
        return self._sum(terms, of, widths) - self._sum(terms, of, {**widths, name: to})

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

    def _sum(self, terms: Sequence[Term], of: Of, widths: Mapping[str, int | Tensor]) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for term in terms:
            value: Tensor | float = getattr(term, of)
            for factor in term.factors if value else ():
                gone = [1 - x[widths.get(name, -1)] for name, x in factor.items()]
                value = value * (1 - sum(gone))
            total = total + value
        return total


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


def rank_width(layer: str) -> str:
    """Name the width that is the rank of a layer."""
    return f"rank of {layer}"


def _thin(whole: Term, layer: str, weight: Tensor, dims: Mapping[int, Factor], full: int) -> Iterator[Term]:
    """Describe a weight that may become two thin ones: as it is at the full rank, else the two."""
    rank = torch.arange(full + 1, dtype=torch.float64) / full
    rank[full] = 0
    dense = (torch.arange(full + 1) == full).double()
    yield whole._replace(factors=(*whole.factors, {rank_width(layer): dense}))
    for dim, size in ((1, len(weight)), (0, weight[0].numel())):
        macs, params, nbytes = (x * full / size for x in (whole.macs, whole.params, whole.bytes))
        sides = [dims[dim]] if dim in dims else []
        yield Term(whole.name, macs, params, nbytes, factors=(*sides, {rank_width(layer): rank}))


def table(units: int, share: float) -> Tensor:
    """Return what is left of a dimension of which `share` is the group's, at 0 to all units."""
    return 1 - share * (1 - torch.arange(units + 1, dtype=torch.float64) / units)
