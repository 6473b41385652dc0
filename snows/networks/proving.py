"""The proof of a cut: the smaller network must compute what the whole one does where nothing reads the units.

"Masked" means that the columns that read a unit are zero; a unit's own outputs may be anything then. Both
networks run on one sample with random parameters, so that no layer scale of 1e-6 hides a wrong cut, and every
layer's output is compared, as well as what the network returns.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from snows.networks.attention import plain_forward
from snows.networks.batches import Batch, difference, first_line, output_tensors
from snows.networks.channels import Follow, Group, tainted_groups
from snows.networks.copies import sharing
from snows.networks.functions import known
from snows.networks.layers import groups_of, prunable
from snows.networks.taking import Take, take
from snows.networks.watching import Call, Watch

TOLERANCE = 1e-5  # of an output's largest entry
TRIES = 40  # sets of attributes that are tried for one group

Features = dict[
    str, list[tuple[int, Tensor]]
]  # by layer, the dimension of its channels and each call's output


def groups(net: nn.Module, batch: Batch) -> list[Group]:
    """Find all units of a network, and prove of every group that units can be taken out of it.

    Args:
        net: in evaluation mode, with open attention.
        batch: of which one sample is used, on the network's device.

    Returns:
        The groups; of those that cannot lose units `reason` says why.
    """
    proof = Proof(net, batch)
    return [group if group.reason else proof.alone(group) for group in tainted_groups(net, batch)]


def proved(
    net: nn.Module, batch: Batch, found: Sequence[Group], kept: Mapping[str, Tensor]
) -> tuple[Take, dict[str, Group]]:
    """Prove a cut of several groups at once; those that cannot go together stay whole.

    Args:
        net: in evaluation mode, with open attention.
        batch: of which one sample is used, on the network's device.
        found: groups of it, as `groups` returns them.
        kept: by name of a group, the numbers of the units that stay; groups without an entry stay whole.

    Returns:
        The cut, and by name the groups that stay whole, with the reason.

    Raises:
        ValueError: nothing of it can be cut.
    """
    proof, declined = Proof(net, batch), dict[str, Group]()
    chosen = [group for group in found if group.name in kept]
    if proof.fault(chosen, kept):
        together: list[Group] = []
        for group in chosen:
            if why := proof.fault([*together, group], kept):
                declined[group.name] = replace(group, reason=why)
            else:
                together.append(group)
        chosen = together
    if not chosen:
        said = "; ".join(f"{x.name}: {x.reason}" for x in declined.values())
        raise ValueError(f"prune: no unit can be taken out ({said or 'none is to go'})")
    return take(net, chosen, kept), declined


class Proof:
    """Compare cut networks with masked ones.

    Args:
        net: in evaluation mode, with open attention.
        batch: of which one sample is used.
    """

    def __init__(self, net: nn.Module, batch: Batch) -> None:
        self.batch = batch.split(1)[0]
        self.net = _randomised(net)
        try:
            finite = all(bool(x.isfinite().all()) for x in _run(self.net, self.batch)[1])
        except Exception:
            finite = False
        if not finite:  # it asks for more of its parameters than that they are numbers
            self.net = net

    def alone(self, group: Group) -> Group:
        """Prove a group by an irregular half of its units: return it with what follows, or a reason."""
        if group.units < 2:
            return replace(group, reason="it is one unit")
        half, why = _half(group.units), ""
        for follows in itertools.islice(self._attributes(group), TRIES):
            tried = replace(group, follows=follows)
            fault = self.fault([tried], {group.name: half})
            if not fault:
                return tried
            why = why or fault
        return replace(group, reason=why)

    def fault(self, chosen: Sequence[Group], kept: Mapping[str, Tensor]) -> str:
        """Say how a cut network differs from the masked one; empty if it does not."""
        try:
            cut = take(self.net, chosen, kept)
            slim = sharing(self.net)
            cut.apply(slim)
            got, returned = _run(slim, self.batch)
        except Exception as error:
            return f"the cut network does not run ({first_line(error)})"
        wanted, whole = _run(_masked(self.net, chosen, kept), self.batch)
        entries = cut.kept
        for name, outputs in wanted.items():
            left = entries.get((f"{name}.weight", 0))
            if len(got.get(name, ())) != len(outputs):
                return f"the cut network calls {name} another number of times"
            for (dim, a), (_, b) in zip(outputs, got[name], strict=True):
                if fault := _apart(a if left is None else a.index_select(dim, left.to(a.device)), b):
                    return f"the cut network's {name} {fault}"
        if len(whole) != len(returned):
            return "the cut network returns another number of tensors"
        faults = (_apart(a, b) for a, b in zip(whole, returned, strict=True))
        return next((f"the cut network's output {fault}" for fault in faults if fault), "")

    def _attributes(self, group: Group) -> Iterator[tuple[Follow, ...]]:
        """List sets of attributes that may hold the group's width, the likeliest first."""
        sizes = (
            {group.units}
            | {x.numel() for x in group.rows.values()}
            | {x.numel() for x in group.columns.values()}
        )
        owners = [*group.rows, *group.columns, *(name.rpartition(".")[0] for name, _ in group.entries)]
        sizes |= {len(self.net.get_submodule(name).weight) for name in group.rows}  # type: ignore[arg-type]
        parents = [name.rpartition(".")[0] for name in owners]
        above = [name.rpartition(".")[0] for name in parents]
        near, *others = (
            list(_holders(self.net, dict.fromkeys(names), sizes, group.units))
            for names in (parents, owners, above)
        )
        every = [*dict.fromkeys(itertools.chain(near, *others))]
        pairs = itertools.combinations(every, 2)
        yield from dict.fromkeys([(), tuple(near), *((x,) for x in every), *pairs, tuple(every)])


def _half(units: int) -> Tensor:
    """Draw half of the units, so that the other way round they are others."""
    generator, mirrored = torch.Generator().manual_seed(units), True
    while mirrored:
        half = torch.randperm(units, generator=generator)[: (units + 1) // 2].sort().values
        mirrored = torch.equal(half, (units - 1 - half).flip(0))
    return half


def _holders(net: nn.Module, names: Mapping[str, None], sizes: set[int], units: int) -> Iterator[Follow]:
    """List attributes of modules that hold one of these sizes, PyTorch's own layers aside."""
    for name in names:
        module = net.get_submodule(name)
        if type(module).__module__.startswith("torch.nn."):
            continue
        for key, value in module.__dict__.items():
            last = value[-1] if isinstance(value, tuple) and value else value
            if type(last) is int and last in sizes and last % units == 0:
                yield Follow(name, key, last // units)


def _apart(a: Tensor, b: Tensor) -> str:
    """Say how two outputs differ; empty if they do not."""
    if a.shape != b.shape:
        return f"is {tuple(b.shape)} where the masked network's is {tuple(a.shape)}"
    error = difference([a], [b])
    return (
        f"differs from the masked network's by {error:.2g} of its largest entry" if error > TOLERANCE else ""
    )


# ---------------------------------------------------------------- the networks that are compared


class _Outputs(Watch):
    """Keep what every layer returns."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__(net)
        self.found: Features = {}

    def layer(self, name: str, call: Call, args: Any, kwargs: Any) -> Any:
        output = self.other(call.function, args, kwargs)
        channel = known(call.function).channel
        assert channel is not None
        self.found.setdefault(name, []).append((channel % output.ndim, output.clone()))
        return output


def _run(net: nn.Module, batch: Batch) -> tuple[Features, list[Tensor]]:
    watch = _Outputs(net)
    with torch.no_grad(), plain_forward(), watch:
        returned = output_tensors(batch.map(torch.clone).through(net))
    return watch.found, returned


def _masked(net: nn.Module, chosen: Sequence[Group], kept: Mapping[str, Tensor]) -> nn.Module:
    """Return the network in which nothing reads the units that go."""
    masked = sharing(net)
    for group in chosen:
        goes = group.without(kept[group.name])
        for name, columns in group.columns.items():
            layer: Any = masked.get_submodule(name)
            if groups_of(layer) == 1:
                gone = columns[goes].flatten().to(layer.weight.device)
                layer.weight = nn.Parameter(layer.weight.detach().index_fill(1, gone, 0), False)
    return masked


def _randomised(net: nn.Module) -> nn.Module:
    """Copy a network, with random parameters and statistics."""
    other = sharing(net)
    generator = torch.Generator().manual_seed(0)
    layers = {id(x.weight) for x in prunable(other).values()}

    def drawn(x: Tensor, spread: bool) -> Tensor:
        values = torch.empty(x.shape).uniform_(0.5, 1.5, generator=generator)
        if spread:  # a layer's weight: its outputs are as large as its inputs
            values = torch.randn(x.shape, generator=generator) / x[0].numel() ** 0.5
        return values.to(x.device, x.dtype)

    new: dict[int, nn.Parameter] = {}
    for module in other.modules():
        for key, p in module._parameters.items():
            if p is not None and p.is_floating_point():
                wide = id(p) in layers or p.ndim > 2
                module._parameters[key] = new.setdefault(id(p), nn.Parameter(drawn(p, wide), False))
        for key in ("running_mean", "running_var"):
            if isinstance(x := module._buffers.get(key), Tensor):
                module._buffers[key] = drawn(x, False)
    return other
