"""Choosing, layer by layer, between dense and packed weights: by measured time, or by size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from snows.choosing.compiling import repeated
from snows.choosing.measuring import REPEATS, SCATTER, Race, Stopwatch
from snows.layers import SparseConv2d, SparseLinear
from snows.layers.conv2d import laid_out
from snows.networks.batches import Batch
from snows.networks.edits import Pack
from snows.networks.folding import stock
from snows.networks.layers import Layer, groups_of
from snows.networks.masks import mask_of
from snows.networks.trace import Use
from snows.ops import cusparselt
from snows.results.deployment import DeployedLayer
from snows.sparsity import NM, Unstructured

Packed: TypeAlias = SparseLinear | SparseConv2d
WHOLE = Unstructured(1e-9)  # the pattern that a weight without zeros is packed by


@dataclass(frozen=True)
class Terms:
    """Say when a packed layer is taken.

    Attributes:
        objective: "speed": it is `margin` times as fast as the dense layer; "size": it is smaller.
        margin: of speed.
        innermost: whether convolutions hand images on innermost in memory. A dense one then takes its input
            and gives its output so too, and a convolution without zeros is packed if that takes less time
            than moving what it reads and makes.
    """

    objective: Literal["speed", "size"] = "speed"
    margin: float = 1.0
    innermost: bool = False


@dataclass
class Packing:
    """Choose for each layer, timing layers that are equal once.

    Attributes:
        stopwatch: that layers are timed with.
        times: what was measured, by all in which layers differ.
    """

    stopwatch: Stopwatch
    times: dict[Any, Race] = field(default_factory=dict)

    def choose(
        self, name: str, layer: Layer, use: Use, activation: tuple[str, nn.Module] | None, terms: Terms
    ) -> tuple[tuple[Pack, Packed] | None, DeployedLayer]:
        """Choose between a layer as it is and its packed form.

        Args:
            name: of the layer.
            layer: with zeros in its weight, or a convolution of images innermost.
            use: how the network applies it.
            activation: name and module of the activation that alone reads its output; None for none.
            terms: of the choice.

        Returns:
            The edit that packs it and the packed layer, None to leave it dense; and its line of the report.
        """
        row = DeployedLayer(name, tuple(layer.weight.shape), dense_bytes=nbytes(layer), reason=use.oddity)
        if not row.reason and groups_of(layer) > 1:
            row = replace(row, reason=f"{groups_of(layer)} groups")
        if row.reason:
            return None, row
        dense = stock(layer, use)
        try:
            ways = packed_ways(dense, mask_of(layer, name), activation, terms)
        except ValueError as error:
            return None, replace(row, reason=str(error))
        run = dense if activation is None else nn.Sequential(dense, activation[1])
        dense_ms, *taken = self._race(run, ways, use, terms).medians
        sparse_ms, packed = min(zip(taken, ways, strict=True), key=lambda x: x[0])
        row = replace(row, sparse_bytes=nbytes(packed), kernel=_kernel(packed), pattern=_pattern(packed))
        row = replace(row, dense_ms=dense_ms, sparse_ms=sparse_ms)
        row = replace(row, reason=_why_dense(row, packed, layer.weight.dtype, terms))
        absorbs = activation[0] if activation is not None else ""
        return (None if row.reason else (Pack.of(name, packed, absorbs), packed)), row

    def _race(self, dense: nn.Module, ways: list[Packed], use: Use, terms: Terms) -> Race:
        first = ways[0]
        key = (
            type(first),
            first.shape,
            tuple(use.calls),
            _pattern(first),
            first.activation,
            str(use.settings),
            first.values.dtype,
            tuple(map(_kernel, ways)),
        )
        if key not in self.times:
            x = [_random(shape, stride, first.values) for shape, stride in use.calls]
            plain: Callable[[Tensor], Tensor] = dense
            if isinstance(first, SparseConv2d) and first.innermost:
                x, plain = [laid_out(a) for a in x], lambda a: laid_out(dense(a))
            with torch.inference_mode():
                runs, calls = repeated([partial(_each, way, x) for way in (plain, *ways)], Batch((x,), {}))
                race = self.stopwatch.layer(
                    runs, lambda race: terms.objective == "speed" and _unsure(race, terms.margin)
                )
            self.times[key] = race.each(calls)
        return self.times[key]

    def scatter(self, margin: float) -> list[str]:
        """Say of which choices the times mean little."""
        unsure = sum(_unsure(race, margin) for race in self.times.values())
        return (
            [
                f"The times of {unsure} of {len(self.times)} kinds of layer {SCATTERS}, so that choosing "
                "between dense and packed means little there; measure again on a quieter machine."
            ]
            if unsure
            else []
        )


SCATTERS = f"scatter by more than {100 * SCATTER:.0f} % although they were taken {REPEATS} times"


def _each(layer: Callable[[Tensor], Tensor], inputs: list[Tensor]) -> None:
    for x in inputs:
        layer(x)


def _unsure(race: Race, margin: float) -> bool:
    """Say whether the times do not tell a packed layer from the dense one, the first of the race."""
    return any(race.scatters(0, i, margin) for i in range(1, len(race.rounds[0])))


def packed_ways(
    dense: Layer, mask: Tensor, activation: tuple[str, nn.Module] | None, terms: Terms
) -> list[Packed]:
    """Pack a layer; return it once for each way that there is to run it."""
    follow: Literal["relu", "gelu"] | None = None
    if activation is not None:
        follow = "relu" if isinstance(activation[1], nn.ReLU) else "gelu"
    if isinstance(dense, nn.Linear):
        ours = SparseLinear.from_dense(dense, mask=mask, activation=follow)
        if not cusparselt.takes(ours.values, ours.shape, *ours.packed.group):
            return [ours]
        return [ours, SparseLinear(ours.packed, ours.bias, follow, cusparselt=True)]
    packed = SparseConv2d.from_dense(dense, WHOLE if mask.all() else None, mask, follow)
    packed.innermost = terms.innermost
    return [packed]


def _kernel(packed: Packed) -> str:
    innermost = isinstance(packed, SparseConv2d) and packed.innermost
    return f"{packed.kernel}, images innermost" if innermost else packed.kernel


def _pattern(packed: Packed) -> str:
    pattern = packed.pattern
    return str(pattern) if isinstance(pattern, NM) else f"{100 * pattern.sparsity:.1f} %"


def _why_dense(row: DeployedLayer, packed: Packed, dtype: torch.dtype, terms: Terms) -> str:
    """Say why a layer stays dense; empty if it is packed."""
    if terms.objective == "size":
        return "" if row.sparse_bytes < row.dense_bytes else "smaller as it is"
    if packed.kernel == "reference":
        return f"no packed kernel here for {str(dtype).removeprefix('torch.')}"
    if terms.margin * row.sparse_ms < row.dense_ms:
        return ""
    if row.sparse_ms >= row.dense_ms:
        return "faster as it is"
    return f"less than {terms.margin} times as fast: the network was faster without it"


def _random(shape: torch.Size, stride: tuple[int, ...], like: Tensor) -> Tensor:
    x = (
        torch.empty(shape, dtype=like.dtype, device=like.device)
        if 0 in stride
        else torch.empty_strided(shape, stride, dtype=like.dtype, device=like.device)
    )
    return x.normal_()


def nbytes(module: nn.Module) -> int:
    """Count the bytes of a module's state; a tensor of several names counts once."""
    found = {id(x): x for x in module.state_dict(keep_vars=True).values() if isinstance(x, Tensor)}
    return sum(x.nbytes for x in found.values())
