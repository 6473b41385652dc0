"""How much memory a walk is predicted to take at most."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from snows.choosing.packing import nbytes
from snows.choosing.work import window
from snows.matching.consumers import MEMORY
from snows.matching.losses import Matching
from snows.networks.layers import groups_of, prunable
from snows.networks.room import Rooms, taken
from snows.networks.twins import Twins
from snows.solving.newton import Newton
from snows.solving.preconditioners import RowBlocks

LIBRARIES = 8 * 10**7  # bytes that PyTorch and its libraries take in the first passes of a process
PASSES = 8  # that each value of a horizon is held for at a time, by a step of Newton's method
MOMENTS = 6  # matrices in float64 as wide as a layer: second moments, factors and their inverses
INVERSES = 7  # of them in float64, while it is chosen what a layer's inputs lose: moments, factors, inverses


def footprint(
    twins: Twins,
    rooms: Rooms,
    layers: Iterable[str],
    matching: Matching,
    solver: Newton | None,
    chooses: bool = False,
) -> int:
    """Predict the most bytes that this process will take; on a GPU those that it will take there.

    That is what it takes now, activations between the layers, and the work on one batch of one layer; or, if
    that is more, what choosing takes. What a matrix takes that depends on masks is counted at its most.

    Args:
        twins: the networks and batches; their store is bounded.
        rooms: what activations take.
        layers: of the walk.
        matching: tells how long a horizon is.
        solver: of Newton's method; None for no steps.
        chooses: whether it is chosen before the walk what goes, so that stages can be undone.
    """
    events, weights = twins.trace.events, twins.sparse
    at = {event.layer: i for i, event in reversed([*enumerate(events)]) if event.layer}
    share = max(x.samples() for x in twins.batches) / max(twins.batches[0].samples(), 1)
    passes, work = PASSES if solver is not None else 2, 0.0
    for name in layers:
        if name in at:
            layer: Any = weights.get_submodule(name)
            weight = layer.weight
            numbers = sum(math.prod(x.shape) for x in window(events, at[name], matching.horizon))
            matrices = 8 * MOMENTS * groups_of(layer) * math.prod(weight.shape[1:]) ** 2
            if solver is not None and solver.preconditioner == "rows":
                matrices += RowBlocks.most(weight)
            work = max(work, passes * share * numbers * weight.element_size() + matrices)
    limit = twins.store.levels[0].limit
    between = rooms.most if rooms.most <= limit else limit + rooms.least
    libraries = LIBRARIES if twins.device.type == "cpu" else 0
    walk = between + work
    if chooses:
        walk = max(walk + nbytes(weights), _choosing(twins))  # the network is kept as it was before a stage
    return int(taken(twins.device) + libraries + walk)


def _choosing(twins: Twins) -> int:
    """Predict what second moments of the layers take together, and inverses of the widest one's."""
    layers = prunable(twins.dense).values()
    sizes = [8 * groups_of(x) * x.weight[0].numel() ** 2 for x in layers]
    return min(sum(sizes), MEMORY) + INVERSES * max(sizes, default=0)
