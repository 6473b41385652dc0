"""`measure`: what a network and its layers take on this machine, for budgets in milliseconds."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from snows import together
from snows.choosing.budgets import Budget
from snows.choosing.compiling import Runtime
from snows.choosing.deciding import clock_of, decide_cut
from snows.choosing.ladders import GROUPED, SCATTERED, has_kernel
from snows.choosing.latency import second
from snows.choosing.options import Zeros
from snows.choosing.shares import ImpossibleError, NothingError
from snows.choosing.tables import Timetable
from snows.choosing.timed import NoisyError
from snows.matching.losses import Matching, Objective
from snows.networks.checks import autocast_off
from snows.networks.implants import why_not
from snows.networks.layers import groups_of, prunable
from snows.networks.twins import Twins
from snows.results.progress import shown


@together.alone()
def measure(
    model: nn.Module,
    example: Any,
    *,
    runtime: Runtime = "eager",
    images: int | None = None,
    progress: bool = True,
) -> Timetable:
    """Measure what a network and its layers take here, at any widths, ranks and patterns.

    Whole networks of about half the milliseconds, chosen by magnitude, correct what layers alone predict; not
    where their times scatter too much, which the timetable then says.

    Args:
        model: any module in evaluation mode; left as it was.
        example: one batch, as `prune` takes them.
        runtime: of the whole networks: "eager", "compile" (`torch.compile` with constant weights), or
            "cuda-graph".
        images: at a time; None for as many as the example has.
        progress: show a progress bar.

    Returns:
        A timetable; `Timetable.save` writes it for `Budget(..., times=file)`, also on another machine.

    Raises:
        ValueError: the model cannot run the example, or not in that runtime.
    """
    with shown(progress) as tell, autocast_off(model):
        tell.doing("checking and tracing the network")
        twins = Twins(model, [example, example])
        goal = Budget(0.5, of="latency", order="magnitude", runtime=runtime, images=images)
        clock = clock_of(twins, goal)
        try:
            objective = Objective(twins, Matching(metric="none"), 0)
            table = decide_cut(twins, goal, None, None, objective, tell.doing).timetable
            assert table is not None
        except (ImpossibleError, NothingError):  # there is no smaller network to correct by
            table = Timetable.begin(clock)
        except NoisyError as error:
            table = replace(Timetable.begin(clock), noise=error.error)
        layers = prunable(twins.sparse)
        for name, calls in table.layers.items():
            tell.doing(f"timing {name}")
            layer = layers[name]
            kinds: list[Zeros] = [] if groups_of(layer) > 1 else [*GROUPED, *SCATTERED]
            for shape in calls:
                table.times.of(shape)
                if not why_not(twins.sparse, twins.trace, name):
                    table.times.of(second(shape))
                for pattern in kinds:
                    if not pattern.fits(layer.weight.shape) and has_kernel("latency", name, layer, pattern):
                        table.times.of(shape, pattern)
        return table
