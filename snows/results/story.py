"""The pages of a run and of the demo: what was asked, what came, in ten seconds; the rest below."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone

from rich.table import Table

from snows.results.deployment import Deployment
from snows.results.page import Comparison, Figure, Folded, LayerBars, page
from snows.results.report import Report

METHODS = ("dense", "magnitude", "magnitude + statistics", "snows")


def run_page(
    report: Report,
    deployment: Deployment | None = None,
    accuracies: Mapping[str, float] | None = None,
    foot: Mapping[str, str] | None = None,
) -> str:
    """Make the page of a run.

    Args:
        report: of pruning.
        deployment: of deployment, if there was one.
        accuracies: in percent, of "dense", "pruned" and what else was compared, in order; NaN without labels.
        foot: what was run, by name: model, data, command.
    """
    settings = ", ".join(f"{key}={value}" for key, value in report.settings.items() if key != "layers")
    tables = [Folded("Pruning, layer by layer", report.tables())]
    notes, machine, found = list(report.notes), {}, dict(accuracies or {})
    title = str(report.settings.get("pattern", "pruned"))
    compared = Comparison("Accuracy", list(found), [(title[:40], list(found.values()))], "%")
    if deployment is not None:
        tables.append(Folded("Deployment, layer by layer", deployment.tables()))
        notes += [deployment.summary(), *deployment.notes]
        machine = {"machine": str(deployment.machine)}
    return page(
        "Pruned network",
        lead=report.summary(),
        figures=_figures(deployment, found.get("dense", math.nan), found.get("pruned", math.nan)),
        comparisons=[compared] if len(found) > 2 else [],
        layers=_layers(report, deployment),
        notes=notes,
        folded=tables,
        foot={**(foot or {}), **machine, "date": _date(), "settings": settings},
    )


def demo_page(
    rows: Sequence[Mapping[str, object]],
    reports: Sequence[tuple[str, Report]],
    deployments: Sequence[Deployment],
    tables: Mapping[str, Table],
    command: str,
) -> str:
    """Make the demo's page: the large numbers of the case that gained most, charts of all, the rest folded.

    Args:
        rows: of each case its figures, among them the accuracies of `METHODS`.
        reports: of each case its title and the report of pruning.
        deployments: of each case.
        tables: to open, by title.
        command: that was typed.
    """
    titles = [title for title, _ in reports]
    accuracies = [[_number(row[name]) for name in METHODS] for row in rows]
    times = [(x.dense_ms, x.sparse_ms) for x in deployments]
    sizes = [(x.dense_bytes / 1e6, x.sparse_bytes / 1e6) for x in deployments]
    best = max(range(len(rows)), key=lambda i: times[i][0] / max(times[i][1], 1e-9))
    details = [
        Folded(title, [*_layers(report, found), *report.tables(), found.table()])
        for (title, report), found in zip(reports, deployments, strict=True)
    ]
    return page(
        "snows demo",
        lead=f"The large numbers are of {titles[best]}, pruned in one shot without labels.",
        figures=_figures(deployments[best], accuracies[best][0], accuracies[best][-1]),
        comparisons=[
            Comparison("Accuracy", METHODS, list(zip(titles, accuracies, strict=True)), "%"),
            Comparison("Time", ("dense", "packed"), list(zip(titles, times, strict=True)), "ms", 1),
            Comparison("Size", ("dense", "packed"), list(zip(titles, sizes, strict=True)), "MB"),
        ],
        folded=[*(Folded(title, [table]) for title, table in tables.items()), *details],
        foot={
            "model": "zoo:resnet20 and zoo:vit",
            "data": "zoo:fashion-mnist",
            "machine": str(deployments[best].machine),
            "date": _date(),
            "command": command,
        },
    )


def frontier_page(lead: str, points: Mapping[str, float], table: Table, notes: Sequence[str]) -> str:
    """Make the page of a frontier.

    Args:
        lead: what it is of.
        points: by label, the predicted loss.
        table: of all that is known of them.
        notes: sentences that a reader should see.
    """
    rows = [(label, (loss,)) for label, loss in points.items()]
    return page(
        "Frontier",
        lead=lead,
        figures=[],
        comparisons=[],
        layers=[LayerBars("Predicted loss", ("predicted loss",), rows, scale="log")],
        notes=list(notes),
        folded=[Folded("All points", [table])],
        foot={"date": _date()},
    )


def _figures(deployment: Deployment | None, dense: float, now: float) -> list[Figure]:
    """Give the large numbers: accuracy where there are labels, size and time where it was deployed."""
    points = f"{now - dense:+.2f} points" if math.isfinite(dense) else ""
    found = [Figure("Accuracy, top 1", dense, now, "%", 2, points)]
    if deployment is not None:
        large, small = deployment.dense_bytes / 1e6, deployment.sparse_bytes / 1e6
        faster = f"{deployment.dense_ms / max(deployment.sparse_ms, 1e-9):.2f} times as fast"
        images = f"Time of {deployment.samples} image{'s' if deployment.samples > 1 else ''}"
        found += [
            Figure(
                "Size", large, small, "MB", 2, f"{100 * small / max(large, 1e-9):.0f} % of the dense size"
            ),
            Figure(images, deployment.dense_ms, deployment.sparse_ms, "ms", 1, faster),
        ]
    return found


def _layers(report: Report, deployment: Deployment | None) -> list[LayerBars]:
    """Chart milliseconds, share kept and loss by layer."""
    times = [
        (x.name, (x.dense_ms, math.nan if x.reason else x.sparse_ms))
        for x in (deployment.layers if deployment is not None else ())
    ]
    kept = [(x.name, (100 * x.kept / x.size,)) for x in report.layers if x.size]
    losses = [(x.name, (x.before, x.after)) for x in report.layers if not x.reason]
    return [
        LayerBars("Time", ("dense", "packed"), times, "ms"),
        LayerBars("Weights kept", ("kept",), kept, "%", 1),
        LayerBars("Reconstruction loss", ("before", "after"), losses, scale="log"),
    ]


def _number(value: object) -> float:
    return value if isinstance(value, float) else math.nan


def _date() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
