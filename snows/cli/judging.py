"""`snows eval`: a network's figures on test images."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from snows.cli import terminal
from snows.cli.loading import load_network, say_note, say_prepared
from snows.cli.terminal import numbers, say, show_scores, warn

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from torch import nn

    from snows.evaluation import Scores
    from snows.results.claims import Judged
    from snows.sources import Data


def evaluate(
    model: terminal.Model,
    data: terminal.Data,
    weights: terminal.Weights = None,
    random_weights: terminal.RandomWeights = False,
    dense: Annotated[
        Path | None,
        typer.Option(help="weights of the dense network, to compare with; by default the library's own"),
    ] = None,
    images: Annotated[
        int | None,
        typer.Option(min=1, help="test images, evenly spread, or a stream's first; by default all"),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="images a batch")] = 250,
    device: terminal.Device = "auto",
    classes: terminal.Classes = None,
    labels: terminal.Labels = None,
    crop: terminal.Crop = None,
    resize: terminal.Resize = None,
    mean: terminal.Mean = None,
    std: terminal.Std = None,
) -> None:
    """Measure accuracy, and agreement and divergence against the dense network."""
    from snows import evaluation, sources

    place = terminal.device_of(device)
    network = load_network(model, weights, random_weights)
    preparation = network.preparation.override(crop, resize, numbers(mean, "mean"), numbers(std, "std"))
    test = sources.load_data(data, network, "test", preparation=preparation, classes=classes, labels=labels)
    say_prepared(test)
    net = network.model.to(place)
    batches = test.batches(batch_size) if images is None else test.spread(images, batch_size)
    reference = _reference(model, weights, dense)
    if reference is None:
        rows = [("network", evaluation.evaluate(net, batches))]
    else:
        first, second = evaluation.compare(reference.to(place), net, batches)
        rows = [("dense" if dense else "the library's weights", first), ("network", second)]
    say_note(test)
    if not rows[-1][1].images:
        raise ValueError(f"--data: none of the pictures in {data} can be read")
    show_scores(rows)
    if images is not None and test.stream is not None:
        say(f"on the first {rows[-1][1].images} test images")
    elif images is not None and images < len(test):
        say(f"on {rows[-1][1].images} of {len(test)} test images")


def _reference(model: str, weights: Path | None, dense: Path | None) -> nn.Module | None:
    """Load the dense network to compare with.

    Its weights are those in `dense`, or the library's own if others are judged.
    """
    from snows import sources

    if dense is None and (weights is None or sources.runs_code(model)):
        return None
    try:
        return sources.load_model(model, dense).model
    except ValueError as error:
        if dense is not None:
            raise
        warn(f"not compared with the dense network: {error}")
        return None


def judge_networks(
    dense: nn.Module,
    others: Iterable[tuple[str, nn.Module]],
    test: Data,
    used: list[int] | None,
    count: int,
    batch_size: int,
) -> tuple[dict[str, Scores], Judged]:
    """Compare networks with the dense one on test images, by class too where the data has labels.

    Args:
        dense: the dense network.
        others: by name, the pruned one last.
        test: the test images.
        used: numbers of the calibration images where they are of the same split, for the data has one alone;
            None where it has two.
        count: images at most.
        batch_size: images a batch.

    Returns:
        Scores by name, and what can be claimed of the last network.
    """
    from snows import evaluation
    from snows.verification import judgement

    rows: dict[str, Scores] = {}
    for name, net in others:
        seen = evaluation.Seen(judging_batches(test, used, count, batch_size))
        rows["dense"], rows[name] = evaluation.compare(dense, net, seen)
        say_note(test)
        if not rows["dense"].images:
            raise ValueError(f"none of the pictures in {test.origin} can be read")
    show_scores(list(rows.items()))
    if used is not None:
        but = ", but not of these images" if len(test) > len(used) > 0 else ""
        say(f"of the same data as the calibration images, which has no test split{but}")
    elif count < len(test):
        say(f"on {rows['dense'].images} of {len(test)} test images; snows eval judges on all")
    return rows, replace(judgement(test.origin, seen, rows["dense"], rows[name]), asked=count)


def judging_batches(test: Data, used: list[int] | None, count: int, batch_size: int) -> Iterator[Any]:
    """Take test images; of data that has one split alone not those that calibrated, if others are left."""
    return test.spread(count, batch_size, used if used and len(test) > len(used) else ())


def compared(
    dense: nn.Module, batches: list[Any], pattern: Any, cap: float, pruned: nn.Module
) -> Iterator[tuple[str, nn.Module]]:
    """Give what is compared: pruning by magnitude, that with corrected statistics, and the pruned network.

    A network that units were taken out of is compared with the dense one alone.
    """
    import snows
    from snows.matching.normalisation import recalibrate_statistics, statistics_of
    from snows.networks.batches import Batch
    from snows.sparsity import Pattern

    if isinstance(pattern, Pattern):
        net, _ = snows.prune(
            dense,
            batches,
            pattern,
            select=snows.magnitude,
            solver=None,
            cap=cap,
            recalibrate=False,
            progress=False,
        )
        yield "magnitude", net
        if statistics_of(net):
            recalibrate_statistics(net, dense, [Batch.of(x) for x in batches])
            yield "magnitude + statistics", net
    yield "pruned", pruned
