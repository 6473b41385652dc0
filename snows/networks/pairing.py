"""Which operations of two networks mean the same: those of one name, called equally often in both."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from snows.networks.functions import known
from snows.networks.implants import first_factors
from snows.networks.trace import Trace


def kind_of(name: str) -> str:
    """Return an operation's name without its number."""
    path, _, function = name.rpartition(":")
    return f"{path}:{function.partition('#')[0]}"


def kinds(trace: Trace) -> Counter[str]:
    """Count the operations of each kind: of one function in one module call.

    A first factor of an implant has no counterpart, and no place in a horizon.
    """
    alone = first_factors(trace.net)
    return Counter(
        kind_of(event.name)
        for event in trace.events
        if known(event.function).counted and event.module not in alone
    )


def paired(one: Trace, other: Trace) -> Callable[[str], bool]:
    """Say of an operation's name whether it means the same in two networks.

    It does if both call such a function there equally often.
    """
    first, second = kinds(one), kinds(other)
    return lambda name: first[kind_of(name)] == second[kind_of(name)]


def unpaired(one: Trace, other: Trace) -> list[str]:
    """List the kinds of operation that two networks do not call equally often."""
    first, second = kinds(one), kinds(other)
    return [kind for kind in dict.fromkeys((*first, *second)) if first[kind] != second[kind]]
