"""The orders in which the units of a group may go."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial, reduce
from itertools import cycle, islice
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from snows import together
from snows.choosing.compensated import compensated
from snows.choosing.curves import Curve
from snows.matching.consumers import Measured, readers
from snows.matching.pulled import by_sample, gate_derivatives, weight_gradients
from snows.networks.batches import Batch
from snows.networks.channels import Group
from snows.networks.layers import groups_of

Order: TypeAlias = Literal["compensated", "hap", "fisher", "magnitude"] | Callable[[Group], Tensor]

ERROR = 0.1  # median relative standard error of the scores, at which no more noise is drawn
FEWEST, MOST = 4, 64  # passes with noise


def curves(
    order: Order, measured: Measured, groups: Sequence[Group], seed: int = 0, share: float = 1.0
) -> dict[str, Curve]:
    """Order the units of every group that has units to take out.

    Args:
        order: by name, or a function of a group that returns a score for each unit, of which the higher stay.
        measured: of the dense network.
        groups: of the network.
        seed: of the noise that some orders draw.
        share: of the passes with noise that there is time for.

    Returns:
        By group.

    Raises:
        ValueError: there is no such order, scores are not of a group's units, or the network cannot be
            differentiated as the order asks.
    """
    groups = [x for x in groups if not x.reason]
    if not isinstance(order, str):
        return {x.name: Curve.of_scores(x, order(x)) for x in groups}
    if order not in ORDERS:
        raise ValueError(
            f"order: expected one of {', '.join(ORDERS)} or a function of a group, got {order!r}"
        )
    noise = {"seed": seed, "most": max(FEWEST, math.ceil(MOST * share))} if order in NOISY else {}
    found = partial(ORDERS[order], measured, groups, **noise)
    if not groups:
        return {}
    return together.first(found) if noise else found()  # whose noise is of whole batches


def magnitude(measured: Measured, groups: Sequence[Group]) -> dict[str, Curve]:
    """Order units by the root mean square of their weights, in the layers that make and that read them.

    Args:
        measured: of the dense network.
        groups: with units that can be taken out.
    """
    found = {}
    for group in groups:
        energy, size = torch.zeros(group.units, dtype=torch.float64), 0
        for name, entries in group.rows.items():
            weight = measured.layers[name].weight.detach().double().cpu()
            energy += weight.flatten(1).square().sum(1)[entries].sum(1)
            size += entries.shape[1] * weight[0].numel()
        for name in readers(group, measured.layers):
            layer, entries = measured.layers[name], group.columns[name]
            weight = layer.weight.detach().double().cpu()
            parts = weight.view(groups_of(layer), -1, weight.shape[1], weight[0, 0].numel())
            energy += parts.square().sum((1, 3)).flatten()[entries].sum(1)
            size += entries.shape[1] * parts[0, :, 0].numel()
        found[group.name] = Curve.of_scores(group, (energy / size).sqrt())
    return found


def hap(
    measured: Measured, groups: Sequence[Group], error: float = ERROR, most: int = MOST, seed: int = 0
) -> dict[str, Curve]:
    """Order units by the trace of their block of the Gauss-Newton matrix, relative to their weights.

    The score is ``trace / (2 p) ‖w‖²`` over the p weights w that make a unit (HAP: Yu et al., WACV 2022). The
    trace is estimated by Hutchinson's method, from noise in place of labels.

    Args:
        measured: of the dense network.
        groups: with units that can be taken out.
        error: median relative standard error of the traces, at which no more noise is drawn.
        most: the most passes.
        seed: of the noise.

    Raises:
        ValueError: the network cannot be differentiated.
    """
    names = {name for group in groups for name in group.rows}

    def traces() -> Iterator[dict[str, Tensor]]:
        for batch, generator in _passes(measured, most, seed):
            squares = {
                name: g.double().flatten(1).square().sum(1).cpu()
                for name, g in weight_gradients(measured.net, batch, names, generator).items()
            }
            yield {x.name: _gathered(x.units, x.rows, squares) for x in groups}

    means, errors = _estimated(traces(), error)
    found = {}
    for group in groups:
        weights = {name: measured.layers[name].weight.detach().double().cpu() for name in group.rows}
        squares = {name: w.flatten(1).square().sum(1) for name, w in weights.items()}
        size = sum(x.shape[1] * weights[name][0].numel() for name, x in group.rows.items())
        scores = means[group.name] / (2 * size) * _gathered(group.units, group.rows, squares)
        found[group.name] = Curve.of_scores(group, scores, errors[group.name])
    return found


def fisher(
    measured: Measured, groups: Sequence[Group], error: float = ERROR, most: int = MOST, seed: int = 0
) -> dict[str, Curve]:
    """Order units by the mean square, over samples and noise, of the derivative by a gate on the unit.

    The gate stands where its consumers read it (Molchanov et al., CVPR 2019; Theis et al. 2018).

    Args:
        measured: of the dense network.
        groups: with units that can be taken out.
        error: median relative standard error of the scores, at which no more noise is drawn.
        most: the most passes.
        seed: of the noise.

    Raises:
        ValueError: the network cannot be differentiated.
    """
    reading = {group.name: readers(group, measured.layers) for group in groups}
    names = set[str]().union(*reading.values())

    def squares() -> Iterator[dict[str, Tensor]]:
        for batch, generator in _passes(measured, most, seed):
            gates = {
                name: x.double().cpu()
                for name, x in gate_derivatives(measured.net, batch, names, generator).items()
            }
            found = {}
            for group in groups:
                parts = [
                    gates[x][:, group.columns[x]].sum(-1) for x in reading[group.name] if x in gates
                ]  # each (samples, units)
                derivative = reduce(by_sample, parts) if parts else torch.zeros(1, group.units)
                found[group.name] = derivative.double().square().sum(0)
            yield found

    means, errors = _estimated(squares(), error)
    return {x.name: Curve.of_scores(x, means[x.name], errors[x.name]) for x in groups}


NOISY = ("hap", "fisher")
ORDERS: dict[str, Callable[..., dict[str, Curve]]] = {
    "compensated": compensated,
    "hap": hap,
    "fisher": fisher,
    "magnitude": magnitude,
}


def _passes(measured: Measured, most: int, seed: int) -> Iterator[tuple[Batch, torch.Generator]]:
    """Give batches in turn, on the network's device, with the source of their noise."""
    generator = torch.Generator().manual_seed(seed)
    for batch in islice(cycle(measured.batches), most):
        yield batch.to(measured.device), generator


def _gathered(units: int, rows: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> Tensor:
    """Sum values of layers' outputs over the outputs of each unit: float64 (units,)."""
    total = torch.zeros(units, dtype=torch.float64)
    for name, entries in rows.items():
        if name in values:
            total += values[name][entries].sum(1)
    return total


def _estimated(
    draws: Iterator[dict[str, Tensor]], error: float
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Average draws until they are exact enough.

    Args:
        draws: by group, of one value a unit.
        error: median relative standard error of all units, at which no more are drawn.

    Returns:
        By group, the means, and their relative standard errors; 0 where the mean is 0.
    """
    drawn: list[dict[str, Tensor]] = []
    means, errors = {}, {}
    for draw in draws:
        drawn.append(draw)
        for name in draw:
            values = torch.stack([x[name] for x in drawn])
            means[name] = values.mean(0)
            spread = values.std(0) if len(drawn) > 1 else torch.full_like(means[name], torch.inf)
            errors[name] = (spread / len(drawn) ** 0.5 / means[name]).nan_to_num(0.0, torch.inf)
        if len(drawn) >= FEWEST and draw and float(torch.cat(list(errors.values())).median()) < error:
            break
    return means, errors
