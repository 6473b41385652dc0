"""A cut that was decided: the edits that make a network smaller, with what is said of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor, nn

from snows.choosing.tables import Timetable
from snows.networks.edits import Edit, described
from snows.networks.implants import Implant
from snows.networks.layers import prunable
from snows.networks.taking import Take
from snows.results.formats import read_edit
from snows.results.structure import GroupReport


@dataclass(frozen=True)
class Cut:
    """Hold what is taken out of a network, as it is kept on disk before anything is fitted.

    Attributes:
        edits: that take it out, in order.
        groups: a line of the report for each group.
        macs: multiplications of one sample, before and after.
        notes: sentences that a reader should see.
        milliseconds: that the network took before and after; empty where no share of them was asked for.
        patterns: by layer that is to get zeros, their pattern.
        counted: of a goal of bytes or weights that are not zero, how many before and after; else empty.
        unit: of that, as text.
        timetable: of what was timed to decide; not kept with the rest.
    """

    edits: list[Edit] = field(default_factory=list)
    groups: list[GroupReport] = field(default_factory=list)
    macs: tuple[int, int] = (0, 0)
    notes: list[str] = field(default_factory=list)
    milliseconds: tuple[float, ...] = ()
    patterns: dict[str, str] = field(default_factory=dict)
    counted: tuple[int, ...] = ()
    unit: str = ""
    timetable: Timetable | None = None

    def described(self) -> dict[str, Any]:
        """Describe it as JSON."""
        rows = [{key: None if x != x else x for key, x in asdict(row).items()} for row in self.groups]
        edits = [described(edit) for edit in self.edits]
        numbers = {"macs": list(self.macs), "milliseconds": list(self.milliseconds)}
        numbers["counted"] = list(self.counted)
        said = {"notes": self.notes, "patterns": self.patterns, "unit": self.unit}
        return {"edits": edits, "groups": rows, **numbers, **said}

    @classmethod
    def read(cls, content: Mapping[str, Any]) -> Cut:
        """Read what `described` wrote."""
        nan: Any = float("nan")
        rows = [
            GroupReport(**{key: nan if x is None else x for key, x in row.items()})
            for row in content["groups"]
        ]
        before, after = content["macs"]
        edits = [read_edit(x) for x in content["edits"]]
        times, patterns = tuple(content["milliseconds"]), dict(content["patterns"])
        counted, unit = tuple(content.get("counted", ())), str(content.get("unit", ""))
        return cls(edits, rows, (before, after), list(content["notes"]), times, patterns, counted, unit)

    def left_of_norms(self) -> dict[str, Tensor]:
        """Return of BatchNorms that lost channels, by name, which are left: int64."""
        return self._left("running_mean")

    def left_of_layers(self, dense: nn.Module) -> dict[str, Tensor]:
        """Return of layers of the dense network that lost outputs, by name, which are left: int64."""
        layers = prunable(dense)
        return {name: kept for name, kept in self._left("weight").items() if name in layers}

    def _left(self, key: str) -> dict[str, Tensor]:
        """Return by module what is left of the first dimension of its tensor of this name."""
        kept = [entry for edit in self.edits if isinstance(edit, Take) for entry in edit.kept.items()]
        named = [(*tensor.rpartition("."), dim, left) for (tensor, dim), left in kept]
        return {module: left for module, _, own, dim, left in named if own == key and dim == 0}

    def sources(self) -> dict[str, str]:
        """Return, of layers with another name than in the dense network, whose place they have."""
        thin = [edit.layer for edit in self.edits if isinstance(edit, Implant)]
        return {f"{layer}.{part}": layer for layer in thin for part in (0, 1)}
