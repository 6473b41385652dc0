"""What becomes of the layers of a network that was made smaller."""

from __future__ import annotations

import math
from collections.abc import Mapping

from snows.choosing.budgets import Budget
from snows.choosing.goals import Choosing, Only
from snows.choosing.plan import LayerPlan, Plan, decide
from snows.networks.checks import shared_weights
from snows.networks.layers import prunable
from snows.networks.twins import Twins
from snows.results.report import LayerReport
from snows.sparsity import parse_pattern


def after_cut(
    twins: Twins,
    goal: Budget,
    patterns: Mapping[str, str],
    select: Choosing,
    only: Only | None,
    skip: Only | None,
    cap: float,
    fits: bool,
) -> Plan:
    """Decide what becomes of the layers of a cut network: the patterns that were chosen, or a new fit.

    Args:
        twins: the networks, cut.
        goal: what is asked.
        patterns: by layer, as they were chosen.
        select: a rule, masks by layer name, or a pruned network.
        only: which layers to prune.
        skip: which of those to leave alone.
        cap: the largest share that a layer may lose under an `Unstructured` budget.
        fits: whether layers without a pattern are fitted anew.
    """
    if goal.then is not None:
        return decide(twins, goal.then, select, only, skip, cap)
    plan = _refitted(twins) if fits else Plan({})
    if not patterns:
        return plan
    named = {name: parse_pattern(x) for name, x in patterns.items()}
    return plan.over(decide(twins, named, select, only, skip, cap))


def _refitted(twins: Twins) -> Plan:
    """Plan to fit all layers of a cut network anew, each on the mask that it has."""
    shared, plan = shared_weights(twins.sparse), Plan({})
    layers, before = prunable(twins.sparse), shared_weights(twins.dense)
    for name in [*twins.order, *(x for x in shared if x not in twins.order)]:
        shape = tuple(layers[name].weight.shape)
        if twins.calls[name] == 1 and name not in shared:
            plan.choices[name] = LayerPlan(None, None)
            plan.rows.append(LayerReport(name, shape, "fitted", math.prod(shape)))
        else:
            other = shared.get(name, before.get(name))  # a cut may part two layers' weights
            why = f"it shares its weight with {other}" if other else "it is called repeatedly"
            plan.rows.append(LayerReport(name, shape, "dense", math.prod(shape), why))
    return plan
