"""Timetables: what a network and its layers take on one machine, kept in a file and used on any other."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from torch import nn

from snows.choosing.compiling import Runtime
from snows.choosing.latency import shapes
from snows.choosing.measuring import Stopwatch
from snows.choosing.options import Zeros
from snows.choosing.runtimes import Clock
from snows.choosing.times import Fit, Shape, Times
from snows.networks.batches import Batch
from snows.packing import packable
from snows.results.machine import Machine
from snows.results.storage import write

KIND = "snows timetable"
VERSION = 2


@dataclass
class Timetable:
    """Hold what a network and its layers take.

    Attributes:
        machine: that was measured, with its threads.
        dtype: of the weights, as text.
        runtime: that the whole network was measured in.
        images: at a time.
        whole: milliseconds of the network as it came.
        layers: by layer, the shapes of its calls.
        times: of layers.
        packed: of what packed weights save in layers alone, the part that they save in the network.
        correction: a measured share of the network's milliseconds, relative to the one predicted for it.
        noise: how far the median of a whole network may be off, relative to it, where that was too far for a
            correction; else 0.
    """

    machine: str
    dtype: str
    runtime: Runtime
    images: int
    whole: float
    layers: dict[str, list[Shape]]
    times: Times
    packed: float = 1.0
    correction: float = 1.0
    noise: float = 0.0

    @property
    def warning(self) -> str:
        """What a reader should know of a noisy machine; empty otherwise."""
        if not self.noise:
            return ""
        return (
            f"When the timetable was made, the median time of whole networks was known to {self.noise:.0%} "
            "alone, so that its predictions are uncorrected; measure again on a quieter machine, or for more "
            "images at a time."
        )

    @classmethod
    def begin(cls, clock: Clock) -> Timetable:
        """Time a network as it came; its layers are timed when they are asked for."""
        net, example = clock.twins.sparse, clock.example
        layers = {name: [shape for shape, _ in calls] for name, calls in shapes(net, example).items()}
        like = next(net.parameters())
        times = Times(like, clock.stopwatch)
        here, images = str(Machine.here(like.device.type)), example.samples()
        return cls(here, str(like.dtype), clock.runtime, images, clock.dense(), layers, times)

    def save(self, path: Path | str) -> None:
        """Write the timetable as JSON, whole or not at all.

        Raises:
            ValueError: it cannot be written.
        """
        numbers = {key: getattr(self, key) for key in NUMBERS}
        layers = {name: [x._asdict() for x in calls] for name, calls in self.layers.items()}
        times = [
            {"shape": shape._asdict(), "pattern": str(pattern or ""), "fit": list(fit)}
            for (shape, pattern), fit in self.times.found.items()
        ]
        content = {"kind": KIND, "version": VERSION, **numbers, "layers": layers, "times": times}
        write(Path(path), (json.dumps(content, indent=1) + "\n").encode())

    @classmethod
    def read(cls, path: Path | str) -> Timetable:
        """Read what `save` wrote.

        Raises:
            ValueError: there is no such file, or it is another one.
        """
        try:
            content = json.loads(Path(path).read_text())
        except OSError as error:
            raise ValueError(f"times: {path} cannot be read ({error.strerror})") from error
        except (ValueError, RecursionError) as error:
            raise ValueError(f"times: {path} is no timetable ({error})") from error
        if not isinstance(content, dict) or content.get("kind") != KIND or content.get("version") != VERSION:
            raise ValueError(
                f"times: expected a timetable as snows measure writes it, got {path}; measure again"
            )
        try:
            found = {
                (_shape(x["shape"]), packable(x["pattern"]) if x["pattern"] else None): _fit(x["fit"])
                for x in content["times"]
            }
            layers = {name: [_shape(x) for x in calls] for name, calls in content["layers"].items()}
            numbers = {key: kind(content[key]) for key, kind in NUMBERS.items()}
            sound = all(0 < numbers[x] < math.inf for x in ("images", "whole", "correction"))
            if (
                not sound
                or not all(0 <= numbers[x] < math.inf for x in ("packed", "noise"))
                or numbers["runtime"] not in get_args(Runtime)
            ):
                raise ValueError("a number is out of range")
            return cls(layers=layers, times=Times(None, Stopwatch(), found), **numbers)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise ValueError(f"times: {path} is damaged ({error}); measure again") from error

    def has(self, name: str, layer: nn.Module, pattern: Zeros) -> bool:
        """Say whether a layer was timed with a pattern."""
        return all((shape, pattern) in self.times.found for shape in self.layers.get(name, ()))

    def check(self, net: nn.Module, example: Batch, runtime: Runtime, images: int | None) -> None:
        """Refuse another network, precision, runtime or number of images.

        Args:
            net: as it is to be pruned, with open attention.
            example: of as many samples as the timetable is of.
            runtime: that is asked for.
            images: that are asked for; None for any.

        Raises:
            ValueError: the timetable is of something else.
        """
        if runtime != self.runtime or images not in (None, self.images):
            raise ValueError(
                f"times: expected a timetable of runtime {runtime}"
                f"{f' and {images} images' if images else ''}, got one of {self.runtime} and {self.images}; "
                "measure again, or ask for what it is of"
            )
        dtype = str(next(net.parameters()).dtype)
        if dtype != self.dtype:
            raise ValueError(
                f"times: expected a timetable of weights in {dtype}, got one of {self.dtype}; measure again"
            )
        own = {name: [shape for shape, _ in calls] for name, calls in shapes(net, example).items()}
        other = [name for name in {**own, **self.layers} if own.get(name) != self.layers.get(name)]
        if other:
            raise ValueError(
                f"times: expected a timetable of this model and size of images, got one in which {other[0]} "
                "is another layer; measure this model"
            )


NUMBERS: Mapping[str, type[Any]] = {
    "machine": str,
    "dtype": str,
    "runtime": str,
    "images": int,
    "whole": float,
    "packed": float,
    "correction": float,
    "noise": float,
}


def _shape(entry: Mapping[str, Any]) -> Shape:
    return Shape(**{key: _hashable(x) for key, x in entry.items()})


def _hashable(x: Any) -> Any:
    return tuple(map(_hashable, x)) if isinstance(x, list) else x


def _fit(entry: list[float]) -> Fit:
    fit = Fit(*map(float, entry))
    if not all(0 <= x < math.inf for x in fit):
        raise ValueError("a time is below 0")
    return fit
