"""`snows eval`: a network's figures on test images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from snows.cli import terminal
from snows.cli.pruning import load_network, say_note, say_prepared
from snows.cli.terminal import numbers, show_scores, warn

if TYPE_CHECKING:
    from torch import nn


def evaluate(
    model: terminal.Model,
    data: terminal.Data,
    weights: terminal.Weights = None,
    random_weights: terminal.RandomWeights = False,
    dense: Annotated[
        Path | None,
        typer.Option(help="weights of the dense network, to compare with; by default the library's own"),
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
    images = sources.load_data(data, network, "test", preparation=preparation, classes=classes, labels=labels)
    say_prepared(images)
    net, batches = network.model.to(place), images.batches(batch_size)
    reference = _reference(model, weights, dense)
    if reference is None:
        rows = [("network", evaluation.evaluate(net, batches))]
    else:
        first, second = evaluation.compare(reference.to(place), net, batches)
        rows = [("dense" if dense else "the library's weights", first), ("network", second)]
    say_note(images)
    if not rows[-1][1].images:
        raise ValueError(f"--data: none of the pictures in {data} can be read")
    show_scores(rows)


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
