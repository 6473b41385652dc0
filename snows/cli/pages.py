"""A run's page, from all that its folder holds."""

from __future__ import annotations

import json
import math
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from snows.results.claims import Judged
    from snows.results.deployment import Deployment
    from snows.results.report import Report

SCORES, DEPLOYED = "scores.json", "deployment.json"


def read_report(run: Path) -> Report:
    """Read a run's report.

    Raises:
        ValueError: the run is not finished, or the file is no report.
    """
    from snows.results.report import Report

    path = run / "report.json"
    if not path.is_file():
        raise ValueError(f"report: {run} holds no report.json; was the run finished?")
    try:
        return Report.from_json(path.read_text())
    except (ValueError, OSError) as error:
        raise ValueError(f"report: {path} is not a report ({error})") from error


def keep_scores(run: Path, accuracies: Mapping[str, float]) -> None:
    """Keep the accuracies of a run's networks, by name, for its page."""
    from snows.results.records import to_json
    from snows.results.storage import write

    write(run / SCORES, (to_json(accuracies) + "\n").encode())


def claim(run: Path, judged: Judged) -> None:
    """Add to the certificate of a run's weights how good they are."""
    from snows.results.certificate import amend

    amend(run / "model.safetensors", judged=[judged])


def claim_time(run: Path, report: Report, goal: Any, batch: Any, device: str) -> None:
    """Add to the certificate of a run's weights how long they take, if that was measured.

    Milliseconds of a timetable are predicted, and those of a choice with zeros are of packed layers, which
    the file of the weights has none of: neither is claimed.

    Args:
        run: the folder.
        report: of the run that has just ended.
        goal: what was asked, a budget or not.
        batch: the first that calibrated.
        device: that was measured.
    """
    from snows.choosing.budgets import SMALLER, Budget
    from snows.networks.batches import Batch
    from snows.results.certificate import amend
    from snows.results.claims import Timed
    from snows.results.machine import Machine

    packed = any(x.kind not in SMALLER for x in report.groups)
    if isinstance(goal, Budget) and goal.times is None and report.small_ms > 0 and not packed:
        count = goal.images or Batch.of(batch).samples()
        timed = Timed.on(Machine.here(device), report.small_ms, count, goal.runtime)
        amend(run / "model.safetensors", timed=[timed])


def keep_deployment(run: Path, deployment: Deployment) -> None:
    """Keep a run's deployment for its page."""
    from snows.results.storage import write

    write(run / DEPLOYED, deployment.to_json().encode())


def write_page(run: Path) -> None:
    """Write a run's page: its report, and accuracy, deployment and source where the folder holds them.

    Raises:
        ValueError: a file in the folder is damaged, or the page cannot be written.
    """
    from snows.results.deployment import Deployment
    from snows.results.storage import write
    from snows.results.story import run_page
    from snows.sources.source import SOURCE, Source

    deployment, accuracies, foot = None, None, {}
    if (run / DEPLOYED).is_file():
        try:
            deployment = Deployment.from_json((run / DEPLOYED).read_text())
        except (ValueError, OSError) as error:
            raise ValueError(f"{run / DEPLOYED} is not a deployment's report ({error})") from error
    if (run / SCORES).is_file():
        accuracies = _scores(run / SCORES)
    if (run / SOURCE).is_file():
        source = Source.read(run)
        foot = {"model": source.model, "data": source.data}
    foot["command"] = shlex.join(["snows", *sys.argv[1:]])
    write(run / "report.html", run_page(read_report(run), deployment, accuracies, foot).encode())


def _scores(path: Path) -> dict[str, float]:
    try:
        content = json.loads(path.read_text())
        found = {name: math.nan if value is None else value for name, value in dict(content).items()}
        if not {"dense", "pruned"} <= set(found) or not all(
            isinstance(x, int | float) for x in found.values()
        ):
            raise ValueError(f"expected accuracies by name, got {content!r:.60}")
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error})") from error
    return found
