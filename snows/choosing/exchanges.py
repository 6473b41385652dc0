"""Exchanges between widths: one becomes narrower so that another may become wider."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from snows.choosing.costs import Costs, Of
from snows.choosing.widths import Widths

STEPS = 4  # widths down to which one may go in an exchange
ROUNDS = 100
WORTH = 1e-4  # of the predicted loss, what an exchange must save


class _Exchange(NamedTuple):
    gain: float
    widths: dict[str, int]


def exchanged(
    options: Sequence[Widths], costs: Costs, widths: Mapping[str, int], limit: float, of: Of
) -> dict[str, int]:
    """Lower the predicted loss at no more than a limit of cost, by single widenings and by exchanges.

    Args:
        options: what may have other widths.
        costs: of the network at any widths.
        widths: at which the cost is within the limit.
        limit: of the cost.
        of: what is counted.
    """
    now = dict(widths)
    for _ in range(ROUNDS):
        best = max(_exchanges(options, costs, now, limit, of), key=lambda x: x.gain, default=None)
        loss = sum(float(x.loss[_place(x, now)]) for x in options)
        if best is None or best.gain <= WORTH * loss:
            return now
        now = best.widths
    return now


def _exchanges(
    options: Sequence[Widths], costs: Costs, now: Mapping[str, int], limit: float, of: Of
) -> Iterator[_Exchange]:
    """Give the best widening alone, and the best beside each narrowing, that the limit allows."""
    room = limit - costs.total(of, now)
    alone = {x.name: _needed(x, costs, now, of) for x in options}
    yield from _widenings(options, alone, now, room, 0.0)
    for option in options:
        at = _place(option, now)
        for to in range(at + 1, min(at + 1 + STEPS, len(option.allowed))):
            width = option.allowed[to]
            narrowed = {**now, option.name: int(width)}
            needed = {
                x.name: _needed(x, costs, narrowed, of)
                if x.name in costs.beside(option.name)
                else alone[x.name]
                for x in options
                if x is not option
            }
            saved = float(costs.saved(of, now, option.name, width))
            others = [x for x in options if x is not option]
            yield from _widenings(
                others, needed, narrowed, room + saved, float(option.loss[to] - option.loss[at])
            )


def _needed(option: Widths, costs: Costs, widths: Mapping[str, int], of: Of) -> Tensor:
    """Return what each wider width costs more than the present one: float64, from the widest on."""
    return -costs.saved(of, widths, option.name, option.allowed[: _place(option, widths)])


def _widenings(
    options: Sequence[Widths],
    needed: Mapping[str, Tensor],
    widths: Mapping[str, int],
    room: float,
    paid: float,
) -> Iterator[_Exchange]:
    """Give the best widening of each option that there is room for.

    Args:
        options: what may become wider.
        needed: by option, what each wider width costs.
        widths: as they are before.
        room: what the widening may cost.
        paid: in loss, for that room.
    """
    for option in options:
        fits = (needed[option.name] <= room).nonzero().flatten()
        if len(fits):  # the widest loses least
            gain = float(option.loss[_place(option, widths)] - option.loss[fits[0]]) - paid
            yield _Exchange(gain, {**widths, option.name: int(option.allowed[fits[0]])})


def _place(option: Widths, widths: Mapping[str, int]) -> int:
    """Return where an option's width stands among those that are allowed."""
    return int((option.allowed == widths[option.name]).nonzero()[0])
