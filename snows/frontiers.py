"""`frontier`: what a network loses at many budgets, predicted from one set of statistics."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import nn

from snows import together
from snows.amounts import read_bytes
from snows.choosing.budgets import Budget
from snows.choosing.choices import Choice
from snows.choosing.costs import WORDS
from snows.choosing.deciding import Settled, settled
from snows.choosing.goals import LayerChoice, selected
from snows.choosing.shares import ImpossibleError
from snows.choosing.structure import Deciding
from snows.matching.losses import Matching, Objective
from snows.networks.checks import autocast_off
from snows.networks.room import bound
from snows.networks.twins import Twins
from snows.ops.precision import products_in
from snows.results.origin import fingerprint
from snows.results.progress import shown
from snows.results.storage import write
from snows.results.story import frontier_page
from snows.results.tables import render
from snows.sparsity import parse_pattern

KIND, VERSION = "snows frontier", 1
SHARES = tuple(round(0.9 - 0.05 * i, 2) for i in range(12))  # 90 % to 35 %


@dataclass(frozen=True)
class Point:
    """Hold one budget of a frontier.

    Attributes:
        share: of the cost that stays.
        cost: that stays, of what the frontier's goal is of; milliseconds are predicted, by times of whole
            networks near the middle of the frontier.
        loss: predicted; comparable between points, too small or too large as a whole.
        macs: multiplications of one sample.
        units: by group that loses some, the numbers of the units that stay.
        layers: by layer, its rank, or the pattern of its weight as text.
    """

    share: float
    cost: float
    loss: float
    macs: int
    units: dict[str, list[int]]
    layers: dict[str, int | str]


@dataclass(frozen=True)
class Frontier:
    """Hold what a network is predicted to lose at many budgets.

    Attributes:
        goal: of all points but for the share.
        model: SHA-256 of the dense network.
        whole: cost of the dense network.
        points: from the largest share down.
        notes: sentences that a reader should see.
    """

    goal: Budget
    model: str
    whole: float
    points: list[Point]
    notes: list[str] = field(default_factory=list)

    def budget(self, index: int) -> Budget:
        """Return the goal that takes up a point: `prune` decides nothing again.

        Raises:
            ValueError: there is no such point.
        """
        if not 0 <= index < len(self.points):
            raise ValueError(f"frontier: expected a point from 0 to {len(self.points) - 1}, got {index}")
        point = self.points[index]
        layers = {name: x if isinstance(x, int) else _zeros(x) for name, x in point.layers.items()}
        units = {name: torch.tensor(x) for name, x in point.units.items()}
        return replace(self.goal, share=units, layers=layers, ms=None, mb=None)

    def check(self, model: nn.Module) -> None:
        """Refuse another network than the one that the frontier is of.

        Raises:
            ValueError: the network is another, or has other weights.
        """
        if fingerprint(model) != self.model:
            raise ValueError(
                "frontier: expected the network and weights that its points were chosen for, got others; "
                "make one of this network"
            )

    def page(self) -> str:
        """Make a page: the predicted loss of each point as a chart, and the table."""
        of = WORDS[self.goal.of]
        points = {f"{x.share:.0%}, {x.cost:.4g} {of}": x.loss for x in self.points}
        lead = f"What stays of {self.whole:.4g} {of}, and the loss that is predicted for it."
        return frontier_page(lead, points, self.table(), self.notes)

    def table(self) -> Table:
        """Make the table of points."""
        table, of = Table(pad_edge=False), self.goal.of
        costs = [WORDS[of]] if of == "macs" else [WORDS[of], "MACs"]
        for heading in ("point", "stays", *costs, "predicted loss", "groups cut", "layers treated"):
            table.add_column(heading, justify="right", no_wrap=True)
        for i, x in enumerate(self.points):
            cost = f"{x.cost:.4g}" if of == "latency" else f"{x.cost:,.0f}"
            cells = [str(i), f"{x.share:.1%}", cost, f"{x.macs:,}"][: 2 + len(costs)]
            table.add_row(*cells, f"{x.loss:.3g}", str(len(x.units)), str(len(x.layers)))
        return table

    def __str__(self) -> str:
        return "\n".join([render(self.table(), width=160), *self.notes])

    def save(self, path: Path | str) -> None:
        """Write the frontier as JSON, whole or not at all.

        Raises:
            ValueError: it cannot be written.
        """
        goal = {key: getattr(self.goal, key) for key in KEPT}
        content = {
            "kind": KIND,
            "version": VERSION,
            "goal": {**goal, "using": list(self.goal.using)},
            "model": self.model,
            "whole": self.whole,
            "points": [asdict(x) for x in self.points],
            "notes": self.notes,
        }
        write(Path(path), (json.dumps(content, indent=1) + "\n").encode())

    @classmethod
    def read(cls, path: Path | str) -> Frontier:
        """Read what `save` wrote.

        Raises:
            ValueError: there is no such file, or it is another one.
        """
        try:
            content = json.loads(Path(path).read_text())
            if content["kind"] != KIND or content["version"] != VERSION:
                raise ValueError("it is of another kind or version")
            points = [_point(x) for x in content["points"]]
            goal = Budget(0.5, **{key: content["goal"][key] for key in KEPT})
            return cls(goal, str(content["model"]), float(content["whole"]), points, list(content["notes"]))
        except OSError as error:
            raise ValueError(f"frontier: {path} cannot be read ({error.strerror})") from error
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(
                f"frontier: expected a file that snows frontier wrote, got {path} ({error})"
            ) from error


KEPT = ("of", "using", "multiple", "floor", "refit", "runtime", "images")


def _point(entry: Any) -> Point:
    units = {str(name): [int(i) for i in x] for name, x in entry["units"].items()}
    layers = {str(name): x if isinstance(x, int) else str(_zeros(x)) for name, x in entry["layers"].items()}
    return Point(**{**entry, "units": units, "layers": layers})


def _zeros(text: str) -> Any:
    return parse_pattern(text)


@together.alone()
def frontier(
    model: nn.Module,
    batches: Iterable[Any],
    goal: Budget = Budget(0.5, of="latency"),
    shares: Sequence[float] = SHARES,
    *,
    matching: Matching = Matching(),
    only: LayerChoice | None = None,
    skip: LayerChoice | None = None,
    memory: int | str | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Frontier:
    """Predict what a network loses at many budgets, from one set of statistics.

    Nothing is fitted; one process does it, also in a process group. Milliseconds are of layers timed at a few
    widths, corrected by whole networks that are timed at the middle one of the shares, or at the next larger
    that is possible; a share that is not possible is left out with a note.

    Args:
        model: as for `prune`.
        batches: as for `prune`.
        goal: what is asked; its own share does not matter.
        shares: of the cost that stay, each above 0 and below 1.
        matching: as for `prune`.
        only: as for `prune`.
        skip: as for `prune`.
        memory: as for `prune`; what finds no room lies in the system's folder for temporary files.
        seed: of all that is random.
        progress: show a progress bar.

    Returns:
        The points; `prune(model, batches, frontier.budget(3))` takes one up.

    Raises:
        ValueError: an argument does not fit, or no share is possible.
    """
    shares = sorted(shares, reverse=True)
    if not shares or not all(isinstance(x, int | float) and 0 < x < 1 for x in shares):
        raise ValueError(f"frontier: expected shares above 0 and below 1, got {shares}")
    if not isinstance(goal, Budget):
        raise TypeError(f"frontier: expected goal to be a snows.Budget, got {goal!r}")
    if not isinstance(goal.order, str) or goal.then is not None:
        raise ValueError("frontier: expected a goal with an order by name and without then=, got another")
    allowed = read_bytes(memory)
    with shown(progress) as tell, autocast_off(model), products_in("float32"), ExitStack() as opened:
        tell.doing("checking and tracing the network")
        twins = Twins(model, batches)
        bound(twins, allowed, twins.order, None)
        opened.enter_context(twins.store)
        only, skip = selected("only", only, twins.sparse), selected("skip", skip, twins.sparse)
        middle = len(shares) // 2
        goal = replace(goal, share=shares[middle], ms=None, mb=None, layers=None)
        objective = Objective(twins, matching, seed)
        deciding = Deciding.of(twins, goal, only, skip, objective, tell.doing)
        tell.doing("choosing")
        if goal.of == "latency":  # of so many images, whatever batches a point is pruned with
            images = twins.batches[0].samples() if deciding.table is None else deciding.table.images
            goal = replace(goal, images=goal.images or images)
        costs, correction = found = _settled(deciding, shares[middle::-1])
        points, left_out, why = [], list[str](), ""
        for share in shares:
            try:
                choice = found.chosen(deciding.choose, share)
            except ValueError as error:
                left_out.append(f"{share:.1%}")
                why = why or str(error)
                continue
            cost = correction * costs.total(goal.of, choice.widths)
            points.append(_point_of(deciding, choice, share, cost))
        if not points:
            raise ValueError(why)
        notes = [f"Left out: {', '.join(left_out)}. {why}."] if why else []
        return Frontier(goal, fingerprint(model), costs.total(goal.of), points, notes)


def _settled(deciding: Deciding, shares: Sequence[float]) -> Settled:
    """Return costs to choose by, settled at the first of the shares that is possible.

    Raises:
        ValueError: none is, or what it costs cannot be measured.
    """
    for share in shares[:-1]:
        with suppress(ImpossibleError):
            return settled(replace(deciding, goal=replace(deciding.goal, share=share)))
    return settled(replace(deciding, goal=replace(deciding.goal, share=shares[-1])))


def _point_of(deciding: Deciding, choice: Choice, share: float, cost: float) -> Point:
    """Write down a choice as a point."""
    units = {x.name: x.units for x in deciding.choose.possible.free}
    fewer = {name: x.tolist() for name, x in choice.kept.items() if len(x) < units[name]}
    layers: dict[str, int | str] = {name: x.rank or str(x.pattern) for name, x in choice.options.items()}
    macs = round(deciding.costs.total("macs", choice.widths))
    return Point(share, cost, deciding.choose.loss(choice), macs, fewer, layers)
