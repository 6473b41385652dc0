"""The walk: one layer after the other gets its mask, and what stays is fitted to the dense network."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from snows import together
from snows.choosing.allowance import Pace, Ration
from snows.choosing.plan import LayerPlan, Plan, checked
from snows.matching.fitting import fit
from snows.matching.losses import Objective
from snows.matching.normalisation import recalibrate_statistics
from snows.matching.statistics import LayerStatistics
from snows.networks.layers import prunable
from snows.networks.masks import kept_mask
from snows.networks.sites import Site
from snows.networks.twins import Twins
from snows.results.progress import Tell
from snows.results.report import LayerReport
from snows.results.run import Run
from snows.solving.cg import Stop
from snows.solving.newton import Fit, Newton
from snows.sparsity import MaskedWeight

NOT_FITTED = "no time was left to fit it"
NOT_SELECTED = "no time was left for the selector; its mask is by magnitude"


@dataclass(frozen=True)
class Walk:
    """Prune one layer after the other.

    Attributes:
        twins: the networks, and the batches in both.
        objective: gives each layer its losses.
        solver: re-fits what stays; None for nothing.
        run: keeps finished layers; None for nowhere.
        seed: of all that is random.
        tell: says what is done.
        pace: of a limited time, gives each layer its share; None for no limit.
    """

    twins: Twins
    objective: Objective
    solver: Newton | None
    run: Run | None
    seed: int
    tell: Tell
    pace: Pace | None = None

    def through(self, plan: Plan, recalibrate: bool, left: Mapping[str, Tensor]) -> list[LayerReport]:
        """Prune all layers of a plan, and return their lines of the report.

        Args:
            plan: what was decided.
            recalibrate: correct BatchNorm's statistics at the end.
            left: of BatchNorms that lost channels, by name, which are left.
        """
        self.tell.layers(len(plan.choices))
        if self.pace is None:
            self.twins.begin_again()
        else:
            self._begin(self.pace, plan)
        rows = [self.layer(i, name, choice) for i, (name, choice) in enumerate(plan.choices.items())]
        batches = self.twins.batches
        if self.pace is not None:
            batches = self.pace.recalibration()
            if self.pace.recalibrate and not batches:
                self.twins.notes.append("No time was left to correct BatchNorm's statistics.")
        if recalibrate and batches:
            self.tell.doing("correcting BatchNorm's statistics")
            recalibrate_statistics(self.twins.sparse, self.twins.dense, batches, left)
        return rows

    def _begin(self, pace: Pace, plan: Plan) -> None:
        """Predict what the layers that are not on disk will take, and measure what all of them need."""
        held = self.run.held() if self.run is not None else set()
        pace.begin([name for i, name in enumerate(plan.choices) if f"{i:04d}" not in held])
        if self.solver is not None and pace.fits_any() and pace.weighs():
            _ = self.objective.sensitivity  # so that it is not taken for a part of the first layer

    def layer(self, index: int, name: str, plan: LayerPlan) -> LayerReport:
        """Prune one layer, or take it from the run's folder; return its line of the report."""
        weight: Tensor = self.twins.sparse.get_submodule(name).weight  # type: ignore[assignment]
        key, like = f"{index:04d}", {"weight": weight, "mask": torch.empty_like(weight, dtype=torch.bool)}
        done = self.run.finished(key, name, like) if self.run is not None else None
        if done is None:
            found = self._new(name, plan, torch.Generator().manual_seed(self.seed * 100_003 + index))
            if isinstance(found, LayerReport):
                return found
            done = found
            if self.run is not None:
                self.run.keep(key, *done)
        tensors, row = done
        self.twins.write(name, MaskedWeight(**tensors), keep=plan.select is not None)
        self.tell.done(row)
        return row

    def _new(
        self, name: str, plan: LayerPlan, generator: torch.Generator
    ) -> tuple[dict[str, Tensor], LayerReport] | LayerReport:
        """Choose one layer's mask and fit what stays, as far as there is time."""
        began = time.perf_counter()
        ration = Ration() if self.pace is None else self.pace.ration(name)
        if not ration.select:
            found = Fit(_cheapest(self.twins, name, plan), [], math.nan, math.nan)
        else:
            site = self.twins.at(name, ration.batches)
            if not site.training:
                shape, size = tuple(site.weight.shape), site.weight.numel()
                return LayerReport(name, shape, "dense", size, "no calibration batch reaches it")
            ration.lap("advance")
            found = self._fit(site, plan, generator, ration)
        row = _row(name, plan, found, self.solver, time.perf_counter() - began)
        if self.pace is not None and not found.steps and self.solver is not None:
            unselected = not ration.select and plan.start is None and plan.select is not None
            row = replace(row, stop=NOT_SELECTED if unselected else NOT_FITTED)
        return {key: together.same(x) for key, x in found.masked._asdict().items()}, row

    def _fit(self, site: Site, plan: LayerPlan, generator: torch.Generator, ration: Ration) -> Fit:
        """Choose one layer's mask, then re-fit what stays."""
        self.tell.at(f"{site.name}: statistics and mask")
        losses = self.objective.at(site)
        statistics = LayerStatistics.of(site, losses.sensitivity)
        start = MaskedWeight(*map(together.same, _start(site, plan, statistics)))
        ration.lap("select")
        if self.solver is None or not ration.step:
            return Fit(start, [], math.nan, math.nan)
        tell = partial(self.tell.step, site.name)
        found = fit(self.solver, losses, statistics, start, generator, tell, ration.late)
        ration.lap("step")
        return found


def _start(site: Site, plan: LayerPlan, statistics: LayerStatistics) -> MaskedWeight:
    """Choose one layer's mask and first weight."""
    if plan.select is None:
        mask = kept_mask(site.layer)
        return MaskedWeight(site.weight, torch.ones_like(site.weight).bool() if mask is None else mask)
    found = plan.select(site.weight, statistics, plan.pattern)
    return checked(plan.select, site.name, found, site.weight, plan.pattern)


def _cheapest(twins: Twins, name: str, plan: LayerPlan) -> MaskedWeight:
    """Give a layer the mask and weight that it came with, or else a mask by magnitude, without statistics."""
    layer = prunable(twins.sparse)[name]
    weight = layer.weight.detach().clone()
    if plan.start is not None:
        return MaskedWeight(*(x.to(weight.device) for x in plan.start))
    if plan.select is None or plan.pattern is None:
        mask = kept_mask(layer)
        return MaskedWeight(weight, torch.ones_like(weight).bool() if mask is None else mask)
    mask = plan.pattern.mask(weight.abs())
    return MaskedWeight(weight * mask, mask)


def _row(name: str, plan: LayerPlan, found: Fit, solver: Newton | None, seconds: float) -> LayerReport:
    """Write a fitted layer's line of the report."""
    stop = found.steps[-1].stop if found.steps else None
    said = "" if stop is None else stop.value
    if stop is Stop.ITERATIONS and solver is not None:
        said = f"{solver.max_iterations} iterations, as set"
    return LayerReport(
        name=name,
        shape=tuple(found.masked.weight.shape),
        pattern=str(plan.pattern or ("mask" if plan.select is not None else "fitted")),
        kept=int(found.masked.mask.sum()),
        before=found.before,
        after=found.after,
        iterations=sum(s.iterations for s in found.steps),
        steps=sum(s.stop is not Stop.TIME or s.iterations > 0 for s in found.steps),
        stop=said,
        seconds=seconds,
    )


def time_notes(rows: list[LayerReport], pace: Pace) -> list[str]:
    """Say what a limited time was enough for; nothing where it was enough for all."""
    stops = Counter(row.stop for row in rows if not row.reason)
    unselected, unfitted, cut = (stops[x] for x in (NOT_SELECTED, NOT_FITTED, Stop.TIME.value))
    count = stops.total()
    said = [f"{count - unselected - unfitted} of {count} layers were fitted and {unselected + unfitted} not"]
    said += [f"{cut} of the fits ended early"] if cut else []
    said += [f"the masks of {unselected} are by magnitude"] if unselected else []
    samples = sorted(pace.samples)
    if samples and samples[0] < pace.all_samples:
        several = f"{samples[0]} to {samples[-1]}" if samples[0] < samples[-1] else f"{samples[0]}"
        said.append(f"a layer used {several} of {pace.all_samples} samples")
    return [f"The limit was {pace.deadline.seconds:g} seconds: {'; '.join(said)}."]
