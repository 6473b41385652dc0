"""`prune`: walk a network layer by layer, choose each mask, and re-fit the weights that stay."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from snows import __version__, together
from snows.amounts import check_seconds, read_bytes, said
from snows.choosing.after import after_cut
from snows.choosing.allowance import Pace
from snows.choosing.asked import settings
from snows.choosing.budgets import Budget
from snows.choosing.deadline import Deadline, load
from snows.choosing.footprint import footprint
from snows.choosing.goals import Choosing, LayerChoice, Only, PatternChoice, check_goal, excluded, selected
from snows.choosing.plan import Plan, decide
from snows.choosing.stages import Stages
from snows.choosing.tables import Timetable
from snows.matching.losses import Matching, Objective
from snows.networks.checks import autocast_off, read_batches
from snows.networks.edits import Edit
from snows.networks.layers import prunable
from snows.networks.room import bound, peak
from snows.networks.twins import Twins
from snows.ops.precision import products_in
from snows.results.origin import Origin, architecture, contents, tensors_in
from snows.results.progress import shown
from snows.results.report import LayerReport, Report
from snows.results.run import Run
from snows.results.storage import digest
from snows.results.story import run_page
from snows.selectors import alps
from snows.shaping import Shaping
from snows.solving.cg import Stop
from snows.solving.newton import Newton
from snows.walking import Walk, time_notes


@dataclass(frozen=True)
class Pruned:
    """Hold what `prune` made; unpacks into network and report.

    Attributes:
        network: the pruned copy, of the same class and with the same `state_dict` keys (but for layers of
            low rank); beside each pruned layer's weight lies its mask, see `snows.mask_of`.
        report: what happened, layer by layer.
        masks: by layer, bool, True where a weight is kept.
        edits: that made the network smaller, in order; empty where weights were only masked.
    """

    network: nn.Module
    report: Report
    masks: dict[str, Tensor]
    edits: list[Edit] = field(default_factory=list)

    def __iter__(self) -> Iterator[Any]:
        return iter((self.network, self.report))


@together.exchange()
def prune(
    model: nn.Module,
    batches: Iterable[Any],
    pattern: PatternChoice | Budget,
    *,
    select: Choosing | Pruned = alps,
    solver: Newton | None = Newton(),
    matching: Matching = Matching(),
    cap: float = 0.95,
    only: LayerChoice | None = None,
    skip: LayerChoice | None = None,
    recalibrate: bool = True,
    seconds: float | None = None,
    memory: int | str | None = None,
    out: Path | str | None = None,
    resume: bool = False,
    seed: int = 0,
    progress: bool = True,
) -> Pruned:
    """Prune a trained network in one shot.

    Args:
        model: any module in evaluation mode, in float32 or float64; left as it was.
        batches: unlabelled calibration batches: tensors, `(images, labels)` pairs (labels ignored) or
            mappings of keyword inputs. Read once and kept. The last of the largest (or an eighth of the last,
            with fewer than four) is held back: each layer keeps the weight that is best there.
        pattern: for all layers, by layer name, or a function of name and module that may return None for
            dense. An `Unstructured` given alone is one exact budget over the prunable weights. None with
            masks from elsewhere. A `Budget` says what stays of a cost, by whatever loses least; a
            `Structured` is one that takes whole units out, so that the network gets smaller.
        select: a rule, masks by layer name (bool, weight.shape), or a network that is already pruned, also as
            what `prune` returned. By default ALPS: a mask by ADMM and least squares on it.
        solver: Newton's settings; None keeps what `select` gives.
        matching: which features of the dense network are matched, and how a mismatch is measured.
        cap: the largest share a layer may lose under an `Unstructured` budget.
        only: which layers to prune, by a function of name and module or by names with `*`; by default all
            that run but the first and the last.
        skip: which of those to leave alone, said in the same way. Of a `Structured` both say which layers'
            outputs may be taken out; weights are fitted in all layers.
        recalibrate: correct the statistics of BatchNorm at the end by how far pruning moved them.
        seconds: a limit for all of this call, from its start to its end. The arguments above are then what is
            done at most: where time is short, layers get fewer samples, fewer iterations or no Newton steps,
            at last masks by magnitude, and the report's notes say so. Results then depend on how fast the
            machine is, and are not the same bits twice. A run in `out` may go on with another limit or none;
            it takes finished layers as they are.
        memory: bytes, such as "8GB", that activations may take between layers; by default half of what is
            free. Those of batches that find no room lie in a file in `out`, or in the system's folder for
            temporary files; of a GPU first on the host. Results do not depend on it. Networks, pictures and
            the work on one batch come on top.
        out: a folder; every finished layer is saved there at once.
        resume: go on with the run in `out`.
        seed: of all that is random.
        progress: show a progress bar; a line a layer where there is no terminal.

    Returns:
        The pruned copy, the report and the masks; `network, report = prune(...)` takes the first two.

    Raises:
        ValueError: an argument does not fit; the sentence says which, and what to do.
    """
    began = time.perf_counter()
    check_seconds(seconds)
    batches = _agreed(model, batches, seconds)
    deadline = Deadline(seconds) if seconds is not None else None
    select = select.network if isinstance(select, Pruned) else select
    goal = pattern if isinstance(pattern, Budget) else None
    check_goal(pattern if goal is None else goal.then, select, cap, goal is None)
    _check_settings(solver, matching, out, resume, seed)
    allowed = read_bytes(memory)
    if goal is not None:
        _check_select(goal, select)
    if deadline is not None:
        load()  # now, so that it is not taken for a part of a layer's work
    with shown(progress) as tell, autocast_off(model), products_in("float32"):
        tell.doing("checking and tracing the network")
        twins = Twins(model, batches)
        pace = None if deadline is None else Pace(deadline, twins, solver, matching, recalibrate)
        only, skip = selected("only", only, twins.sparse), selected("skip", skip, twins.sparse)
        plan = Plan({}) if isinstance(pattern, Budget) else decide(twins, pattern, select, only, skip, cap)
        layers = list(plan.patterns) if goal is None else _allowed(twins.sparse, only, skip)
        folder, images = Path(out) if out is not None else None, twins.batches[0].samples()
        if goal is not None and goal.times is not None:
            images = Timetable.read(goal.times).images
        asked = settings(pattern, select, solver, matching, cap, recalibrate, seed, plan, layers, images)
        together.agree({name: json.dumps(x, sort_keys=True) for name, x in asked.items()} | {"out": str(out)})
        walked = plan.choices if goal is None else twins.order
        rooms = bound(twins, allowed, walked, folder)
        predicted = footprint(twins, rooms, walked, matching, solver, goal is not None)
        tell.note(f"predicted peak memory: {said(predicted)}")
        opened = (
            Run.open(folder, asked, model, twins.batches, plan.starts(), resume)
            if folder is not None
            else nullcontext()
        )
        with twins.store, opened as run:
            limits = None
            if deadline is not None and goal is not None:
                limits = Stages(deadline, twins, goal, solver, matching, recalibrate)
            shaping = Shaping(twins, Objective(twins, matching, seed), run, tell, recalibrate, limits)
            if goal is not None:
                shaping.reduce(goal, only, skip)
                patterns, fits = shaping.cut.patterns, solver is not None
                plan = after_cut(twins, goal, patterns, select, only, skip, cap, fits)
            objective = Objective(twins, matching, seed, None if goal is None else twins.sparse)
            pace = pace if limits is None else limits.walking()
            weighs = solver is not None and matching.metric == "output" and (pace is None or pace.weighs())
            if goal is not None and weighs:
                _ = objective.sensitivity  # of the network before the walk, also where a run goes on in it
            walk = Walk(twins, objective, solver, run, seed, tell, pace)
            judged = plan.choices and all(x.select is None for x in plan.choices.values())
            if goal is not None and judged and not (limits is not None and limits.late()):
                rows = shaping.staged(
                    "Newton", lambda: walk.through(plan, recalibrate, shaping.left), _fitted
                )
            else:
                rows = walk.through(plan, recalibrate, shaping.left)
            network = Origin.of(model, twins.batches).note(twins.closed())
            report = shaping.reported(_report(twins, plan, rows, asked, run))
            report.notes += [] if pace is None else time_notes(rows, pace)
            report.seconds = time.perf_counter() - began
            report.predicted_bytes, report.peak_bytes = predicted, peak(twins.device)
            if run is not None:
                run.finish(network, twins.masks, report, run_page(report))
    return Pruned(network, report, twins.masks, twins.edits)


def _agreed(model: Any, batches: Iterable[Any], seconds: float | None) -> Iterable[Any]:
    """Refuse processes with other models or data than the first, before anything is done together.

    Returns:
        The batches; of several processes read, for they are read once.
    """
    if together.size() == 1 or not isinstance(model, nn.Module):
        return batches
    device = next(model.parameters(), torch.empty(0)).device
    if not together.everywhere(device.type != "cuda" or device.index == torch.cuda.current_device()):
        raise ValueError(
            "prune: expected each process's model on its current GPU, got one on another; call "
            "torch.cuda.set_device before moving it there"
        )
    found = read_batches(model, batches)
    known = {
        "version of snows": __version__,
        "version of torch": torch.__version__,
        "model": digest({}, architecture(model)),
        **{f"{name} of the model": digest({name: x}) for name, x in tensors_in(model).items()},
        "number of calibration batches": str(len(found)),
        **{f"calibration batch {i}": digest(*contents([batch])) for i, batch in enumerate(found, 1)},
        "seconds": str(seconds),
    }
    together.agree(known)
    return found


def _allowed(net: nn.Module, only: Only | None, skip: Only | None) -> list[str]:
    """List the layers that `only` and `skip` leave to be made smaller."""
    return [name for name, layer in prunable(net).items() if not excluded(name, layer, only, skip)]


def _fitted(rows: list[LayerReport]) -> bool:
    """Say whether Newton's method took a step in any layer."""
    return any(row.steps for row in rows)


def _report(
    twins: Twins, plan: Plan, rows: list[LayerReport], asked: dict[str, Any], run: Run | None
) -> Report:
    """Put the layers' lines together, with what a reader should know of the whole."""
    fitted = {row.name: row for row in rows}
    notes = list(dict.fromkeys(twins.notes))
    notes += [
        f"{row.name}: numbers stopped being finite; it keeps the best weight found before."
        for row in rows
        if row.stop == Stop.NOT_FINITE.value
    ]
    if idle := [row.name for row in rows if row.before == 0 and row.pattern != "fitted"]:
        notes.append(
            f"{len(idle)} of the pruned layers, {idle[0]} for one, do not change what is matched after "
            "them, so that nothing was fitted there; are their branches switched off by a zero scale?"
        )
    if run is not None and run.threads != torch.get_num_threads():
        notes.append(
            f"The run began with {run.threads} threads and ended with {torch.get_num_threads()}; the last "
            "bits of its numbers may differ from those of a run that was not interrupted."
        )
    size = sum(p.numel() for p in twins.model.parameters())
    return Report([fitted.get(row.name, row) for row in plan.rows], size, asked, notes)


def _check_select(goal: Budget, select: Any) -> None:
    """Refuse a rule or masks that a budget has no use for."""
    if goal.masks and isinstance(select, Mapping | nn.Module):
        raise ValueError(
            "prune: a Budget chooses which layers get zeros, and select brings masks too; name a rule as "
            "select, or leave nm and unstructured out of using"
        )
    if not goal.masks and goal.then is None and select is not alps:
        raise ValueError(
            f"prune: select chooses masks, and a {type(goal).__name__} without then= asks for none; leave "
            "select out, or name a pattern with then="
        )


def _check_settings(solver: Any, matching: Any, out: Any, resume: Any, seed: Any) -> None:
    if solver is not None and not isinstance(solver, Newton):
        raise TypeError(f"prune: expected solver to be a snows.Newton or None, got {solver!r}")
    if not isinstance(matching, Matching):
        raise TypeError(f"prune: expected matching to be a snows.Matching, got {matching!r}")
    if resume and out is None:
        raise ValueError("prune: resume=True needs out=, the folder of the run to go on with")
    if not (isinstance(seed, int) and seed >= 0):
        raise ValueError(f"prune: expected seed to be a whole number of at least 0, got {seed!r}")
