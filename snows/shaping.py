"""A network made smaller before the walk: units are taken out, and what stays is fitted by least squares."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn

from snows import together
from snows.choosing.allowance import Pace, Ration
from snows.choosing.budgets import Budget
from snows.choosing.cuts import Cut
from snows.choosing.deciding import decide_cut
from snows.choosing.goals import Only
from snows.choosing.stages import Stages
from snows.matching.compensation import Intercept, compensate, compensate_thin, unchanged
from snows.matching.losses import LayerLosses, Objective
from snows.matching.mismatch import mismatch
from snows.matching.normalisation import recalibrate_statistics
from snows.matching.statistics import LayerStatistics
from snows.networks import proving
from snows.networks.channels import Group
from snows.networks.checks import check_model, read_batch, shared_weights
from snows.networks.copies import working_copy
from snows.networks.implants import LowRank, dense_name
from snows.networks.sites import Site
from snows.networks.twins import Twins
from snows.results.progress import Tell
from snows.results.report import LayerReport, Report
from snows.results.run import TIMES, Run
from snows.results.structure import StageReport

Result = TypeVar("Result")


def groups(model: nn.Module, example: Any) -> list[Group]:
    """Find the channels, heads and neurons of a network, and which of them can be taken out.

    Args:
        model: any module in evaluation mode; left as it was.
        example: one batch, as `prune` takes them; one sample of it is used.

    Returns:
        The groups, in the order of their layers; one whose `reason` is not empty cannot lose units.

    Raises:
        ValueError: the model cannot run the example, or is none that can be pruned.
    """
    check_model("groups", model)
    batch = read_batch("groups", model, example)
    net, _ = working_copy(model)
    return proving.groups(net, batch.to(next(net.parameters()).device))


@dataclass
class Shaping:
    """Make the working copy smaller, stage by stage.

    A stage that does not lower the loss on the samples held back is undone.

    Attributes:
        twins: the networks, and the batches in both.
        objective: measures what an output's mismatch weighs, for low rank.
        run: keeps what was decided, and finished layers; None for nowhere.
        tell: says what is done.
        recalibrate: correct BatchNorm's statistics after each walk.
        limits: share a limited time; None for no limit.
        cut: what was decided.
        stages: what each stage left of the loss.
    """

    twins: Twins
    objective: Objective
    run: Run | None
    tell: Tell
    recalibrate: bool
    limits: Stages | None = None
    cut: Cut = field(default_factory=Cut)
    stages: list[StageReport] = field(default_factory=list)

    @property
    def left(self) -> dict[str, torch.Tensor]:
        """Of BatchNorms that lost channels, by name, which are left."""
        return self.cut.left_of_norms()

    def reduce(self, goal: Budget, only: Only | None, skip: Only | None) -> None:
        """Take out what the goal asks for, and fit what stays: the intercepts alone, then the weights too."""
        twins, stored = self.twins, self.run.decided() if self.run is not None else None
        if stored is None:
            limited = None if self.limits is None else self.limits.decide
            self.cut = decide_cut(twins, goal, only, skip, self.objective, self.tell.doing, limited)
            if together.size() > 1:  # what the first process has chosen, to the last unit
                own, table = json.dumps(self.cut.described()), self.cut.timetable
                self.cut = replace(Cut.read(json.loads(together.first(lambda: own))), timetable=table)
            if self.run is not None:
                self.run.decide(self.cut.described())
                if self.cut.timetable is not None:
                    together.by_first(self.cut.timetable.save)(self.run.folder / TIMES)
        else:
            self.cut = Cut.read(stored)
        twins.notes += self.cut.notes
        if not self.cut.edits:
            return
        left, sources = self.cut.left_of_layers(twins.dense), self.cut.sources()
        self.staged("cut", lambda: twins.apply(self.cut.edits, left, sources))
        if self.limits is not None and self.limits.late():
            twins.notes.append(
                f"The limit is less than choosing what goes takes with the fewest samples, which ended after "
                f"{self.limits.deadline.gone():.3g} seconds."
            )
        for name, weights in (("means", False), ("least squares", True))[: 2 if goal.refit else 1]:
            stage = name.replace(" ", "-")
            if self.limits is None or self.limits.sweep(self._unfitted(stage), weights):
                self.staged(name, partial(self._sweep, stage, weights))
            else:
                twins.notes.append(f"No time was left for {name}.")

    def reported(self, report: Report) -> Report:
        """Add groups and stages to a report; of a network that was not cut there are none."""
        if not self.cut.groups:
            return report
        sizes = tuple(
            sum(p.numel() for p in net.parameters()) for net in (self.twins.dense, self.twins.sparse)
        )
        report = replace(
            report,
            groups=self.cut.groups,
            stages=self.stages,
            macs=self.cut.macs,
            parameters=sizes,
            counted=self.cut.counted,
            unit=self.cut.unit,
        )
        if not self.cut.milliseconds:
            return report
        dense, small = self.cut.milliseconds
        return replace(report, dense_ms=dense, small_ms=small)

    def staged(
        self, name: str, work: Callable[[], Result], fitted: Callable[[Result], bool] = lambda _: True
    ) -> Result:
        """Do a stage's work, and undo it if the loss is higher than before.

        Args:
            name: of the stage.
            work: what is done.
            fitted: whether weights were fitted, by what the work returned; else only statistics were.
        """
        self.tell.doing(name)
        began, net = time.perf_counter(), self.twins.sparse
        before = {key: x.clone() for key, x in net.state_dict().items()} if self.stages else {}
        result = work()
        loss = mismatch(self.twins)
        least = min((x.loss for x in self.stages if x.taken), default=math.nan)
        taken = loss < least or not math.isfinite(least)
        if not taken:
            net.load_state_dict(before)
        if not fitted(result):
            name = "statistics"
        elif not taken:
            self.twins.notes.append(
                f"{name} did not lower the loss on the samples held back and was undone"
                f"{', also where a layer says that it lowered its own' if name == 'Newton' else ''}."
            )
        self.stages.append(StageReport(name, loss, taken, time.perf_counter() - began))
        return result

    def _sweep(self, stage: str, weights: bool) -> None:
        """Fit all layers in order, each to what is left of the dense layer's output."""
        twins, shared = self.twins, shared_weights(self.twins.sparse)
        pace = None if self.limits is None else self.limits.sweeps  # it has begun
        if pace is None:
            twins.begin_again()
        for index, name in enumerate(twins.order):
            if twins.calls[name] == 1 and name not in shared:
                self._layer(f"{stage}-{index:04d}", name, weights, pace)
        batches = twins.batches if pace is None else pace.recalibration()
        if self.recalibrate and batches:
            recalibrate_statistics(twins.sparse, twins.dense, batches, self.left)

    def _unfitted(self, stage: str) -> list[str]:
        """List the layers that are not on disk."""
        held = self.run.held() if self.run is not None else set()
        return [name for i, name in enumerate(self.twins.order) if f"{stage}-{i:04d}" not in held]

    def _layer(self, key: str, name: str, weights: bool, pace: Pace | None) -> None:
        """Fit one layer, or take it from the run's folder."""
        twins, dense = self.twins, dense_name(self.twins.sparse, name)
        implant = twins.sparse.get_submodule(dense) if name in twins.reduction.sources else None  # a new one
        both = implant if isinstance(implant, LowRank) and name == f"{dense}.0" else None  # fitted together
        intercept = Intercept.of(twins, name if both is None else f"{dense}.1")
        if not (weights or intercept.exists) or (both is not None and not weights):
            return
        own = {"weight": intercept.layer.weight.detach(), **intercept.tensors()}
        if both is not None:
            own = {key: x.detach() for key, x in both.named_parameters() if "weight" in key}
        done = self.run.finished(key, name, own) if self.run is not None else None
        if done is not None:
            for entry, value in done[0].items():
                own[entry].copy_(value)
            return
        began = time.perf_counter()
        self.tell.at(f"{name}: {'least squares' if weights else 'means'}")
        ration = Ration() if pace is None else pace.ration(name)
        if not ration.select:
            return
        site = twins.at(name, ration.batches)
        ration.lap("advance")
        if site.training and not unchanged(site):
            losses = self.objective.at(site)
            seen = LayerStatistics.of(site, losses.sensitivity, whole=True)
            if both is not None:
                compensate_thin(seen, both, _metric(site, losses), intercept.exists)
            else:
                compensate(site, seen, intercept, weights and implant is None)
            ration.lap("select")
        for x in own.values():
            x.copy_(together.same(x))
        if self.run is not None:
            size, seconds = site.weight.numel(), time.perf_counter() - began
            row = LayerReport(name, tuple(site.weight.shape), "fitted", size, seconds=seconds)
            self.run.keep(key, own, row)


def _metric(site: Site, losses: LayerLosses) -> torch.Tensor:
    """Return the output sensitivity of what is left of a dense layer's output, (out, out)."""
    found = losses.metric().matrix(len(site.target), like=site.target)[0]
    return found if site.left is None else found[site.left][:, site.left]
