"""`snows groups`: what can be taken out of a network."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from snows.cli import terminal
from snows.cli.loading import example_of, load_network
from snows.cli.terminal import console, numbers, say

if TYPE_CHECKING:
    from rich.table import Table
    from torch import Tensor, nn

    from snows.networks.channels import Group


def groups(
    model: terminal.Model,
    data: Annotated[
        str | None, typer.Option(help="where one picture comes from, as for prune; by default it is noise")
    ] = None,
    weights: terminal.Weights = None,
    random_weights: terminal.RandomWeights = False,
    device: terminal.Device = "auto",
    crop: terminal.Crop = None,
    resize: terminal.Resize = None,
    mean: terminal.Mean = None,
    std: terminal.Std = None,
) -> None:
    """List the channels, heads and neurons that can be taken out of a network, and why others cannot."""
    import snows

    place = terminal.device_of(device)
    network = load_network(model, weights, random_weights)
    preparation = network.preparation.override(crop, resize, numbers(mean, "mean"), numbers(std, "std"))
    example = example_of(model, data, network, preparation, 1)
    net, example = network.model.to(place), example.to(place)
    found = snows.groups(net, example)
    console.print(_table(net, example, found))
    free = [x for x in found if not x.reason]
    say(f"{sum(x.units for x in free):,} units in {len(free)} of {len(found)} groups can be taken out")


def _table(net: nn.Module, example: Tensor, found: list[Group]) -> Table:
    """Make a line for each group, with the share of the network's multiplications that depends on it."""
    from rich.table import Table

    from snows.choosing.costs import Costs
    from snows.networks.batches import Batch
    from snows.networks.copies import working_copy
    from snows.results.tables import add_row

    opened, _ = working_copy(net)
    costs = Costs.of(opened, Batch.of(example), found)
    table = Table(pad_edge=False)
    table.add_column("group", overflow="fold")
    table.add_column("kind")
    for heading in ("units", "outputs each", "of the MACs"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("stays whole because", overflow="fold")
    whole = costs.total("macs")
    for x in found:
        share = "" if x.reason else f"{1 - costs.total('macs', {x.name: 0}) / whole:.1%}"
        add_row(table, x.name, x.kind, str(x.units), str(x.each), share, x.reason)
    return table
