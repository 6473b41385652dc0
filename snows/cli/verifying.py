"""`snows verify`: whether a file holds what its certificate claims."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from snows.cli import terminal
from snows.cli.judging import judging_batches
from snows.cli.loading import say_note
from snows.cli.runs import Trust, refused
from snows.cli.terminal import console, numbers, say, warn

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import nn

    from snows.results.certificate import Certificate
    from snows.sources.source import Source


def verify(
    file: Annotated[Path, typer.Argument(help="safetensors that prune, deploy or save wrote")],
    model: Annotated[
        str | None, typer.Option(help="the dense network, instead of what source.json beside FILE names")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="where the test images come from, instead of what source.json names")
    ] = None,
    images: Annotated[
        int | None, typer.Option(min=0, help="test images; by default as many as are claimed; 0 for none")
    ] = None,
    trust: Trust = False,
    weights: Annotated[
        Path | None, typer.Option(help="of the dense network, instead of those that source.json names")
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
    """Measure again what a file claims; exit code 1 where a claim about the file does not hold."""
    import snows
    from snows.results.findings import Claims

    place = terminal.device_of(device)
    certificate = Claims.read(file).certificate
    paths = {"weights": weights, "classes": classes, "labels": labels}
    given = {
        **{name: None if path is None else str(path) for name, path in paths.items()},
        "model": model,
        "data": data,
        "crop": crop,
        "resize": resize,
        "mean": numbers(mean, "mean"),
        "std": numbers(std, "std"),
    }
    known = {name: x for name, x in given.items() if x is not None}
    source = replace(_source(file.parent, known, trust), **known)  # type: ignore[arg-type]
    try:
        nets, batches = _loaded(source, certificate, images, batch_size, trust or data is not None)
    except ValueError as error:
        if known:
            raise
        warn(f"what the file alone tells is checked: {error}")
        nets, batches = (None, None), None
    network, dense = (None if net is None else net.to(place) for net in nets)
    found = snows.verify(file, network, batches, reference=dense)
    console.print(found.table())
    say(found.summary())
    if not found.holds:
        raise typer.Exit(1)


def _source(folder: Path, given: dict[str, Any], trust: bool) -> Source:
    """Read where the network and the images come from, as far as the file's folder says and is trusted."""
    from snows.sources.source import SOURCE, Source

    source = Source.read(folder) if (folder / SOURCE).is_file() else Source("", "")
    for name in ("model", "data"):
        if sentence := "" if name in given else refused(folder, name, getattr(source, name), trust):
            warn(sentence)
            source = replace(source, model="") if name == "model" else replace(source, data="")
    return source


def _loaded(
    source: Source, certificate: Certificate, count: int | None, batch_size: int, fetch: bool
) -> tuple[tuple[nn.Module | None, nn.Module | None], Iterable[Any] | None]:
    """Load the architecture of the file, the dense network, and the images that claims are about."""
    from snows import sources
    from snows.results import files

    if not source.model:
        return (None, None), None
    weights = None if source.weights is None else Path(source.weights)
    network = sources.load_model(source.model, weights, random_weights=source.random_weights)
    dense = bare = network.model
    if weights is not None and files.has_edits(weights):  # it was smaller already when it was pruned
        bare = sources.load_model(source.model, random_weights=True).model
    if not source.data or count == 0 or not (certificate.judged or certificate.timed):
        return (bare, dense), None
    preparation = network.preparation.override(*source.settings())
    files_of = {"classes": source.classes, "labels": source.labels}
    test = sources.load_data(
        source.data,
        network,
        "test",
        preparation=preparation,
        fetch=fetch,
        **{name: None if path is None else Path(path) for name, path in files_of.items()},
    )
    say_note(test)
    judged = next(iter(certificate.judged), None)
    used: list[int] | None = None
    if judged is not None and judged.samples:
        images = sources.load_data(source.data, network, "calibration", preparation=preparation, fetch=fetch)
        if images.origin == test.origin and judged.samples <= len(images):
            used = images.drawn(judged.samples, judged.seed)
    asked = count or (judged.asked if judged is not None else certificate.timed[0].images)
    return (bare, dense), judging_batches(test, used, asked, batch_size)
