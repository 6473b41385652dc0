"""Fitting a layer, whatever its network can be differentiated through."""

from __future__ import annotations

from collections.abc import Callable

import torch

from snows.matching.losses import LayerLosses
from snows.matching.statistics import LayerStatistics
from snows.networks.batches import first_line
from snows.solving.models import never
from snows.solving.newton import Fit, Newton, Step
from snows.sparsity import MaskedWeight

OVERWRITTEN = "modified by an inplace operation"  # PyTorch's words


def fit(
    solver: Newton,
    losses: LayerLosses,
    statistics: LayerStatistics,
    start: MaskedWeight,
    generator: torch.Generator,
    tell: Callable[[Step], None],
    late: Callable[[float], bool] = never,
) -> Fit:
    """Solve for a layer's weights; where a derivative is missing, match fewer operations.

    A network that changes in place what a derivative needs is run with copies of that. One with an operation
    that has no second derivative is matched up to that operation, which the report names.

    Args:
        solver: settings.
        losses: of the layer.
        statistics: of its inputs.
        start: mask and first weight.
        generator: source of random numbers, on the CPU.
        tell: called after every step.
        late: says whether so many seconds more are too many.

    Raises:
        RuntimeError: what PyTorch raises for any other reason.
    """
    factors = statistics.factors if solver.preconditioner != "none" else None
    while True:
        try:
            return solver.solve(
                losses, start, held=losses.held, factors=factors, generator=generator, tell=tell, late=late
            )
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, NotImplementedError) as error:
            if OVERWRITTEN in str(error) and not losses.horizon.tolerant:
                losses.begin_again(tolerant=True)
            elif name := losses.undifferentiable(start.weight):
                losses.objective.twins.notes.append(
                    f"{losses.site.name}: matched up to what comes before {name}, which has no second "
                    f"derivative ({first_line(error)})."
                )
                losses.begin_again()
            else:
                raise
