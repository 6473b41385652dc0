"""The judge of the demonstration: accuracy, divergence and times of the zoo's networks."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from snows import zoo
from snows.choosing.compiling import frozen
from snows.choosing.measuring import Stopwatch
from snows.deployment import Deployed
from snows.evaluation import Scores, evaluate, logits_of
from snows.networks.batches import Batch
from snows.networks.folding import fold_normalisations
from snows.networks.layers import copied
from snows.networks.trace import Trace

TOGETHER = 80  # images at a time: they stay in the cache, and are 16 times a whole number


@dataclass
class Judge:
    """Measure networks of the zoo on test images, and count where the time goes.

    Args:
        count: of test images.
        device: that networks run on.
        stopwatch: how long networks are timed.
        compiled: compile networks too.
    """

    count: int
    device: torch.device
    stopwatch: Stopwatch
    compiled: bool
    clock: dict[str, float] = field(
        default_factory=lambda: {"pruning": 0.0, "deployment": 0.0, "evaluation": 0.0}
    )

    def __post_init__(self) -> None:
        images, labels = zoo.images("test")
        assert labels is not None
        images, self.labels = images[: self.count], labels[: self.count]
        self.test = list(zip(images.split(TOGETHER), self.labels.split(TOGETHER), strict=True))
        self.references: dict[str, list[Tensor]] = {}
        self.frozen: dict[str, nn.Module | None] = {}

    @property
    def example(self) -> Tensor:
        """The first test images, on the device."""
        images: Tensor = self.test[0][0].to(self.device)
        return images

    def compiles(self, name: str, net: nn.Module) -> bool:
        """Say whether a dense network is measured compiled; it is compiled once."""
        if name not in self.frozen:
            with self.timed("deployment"):
                self.frozen[name] = frozen(net, self.example) if self.compiled else None
        return self.frozen[name] is not None

    @contextmanager
    def timed(self, share: str) -> Iterator[None]:
        """Count the time of what is done inside."""
        began = time.perf_counter()
        yield
        self.clock[share] += time.perf_counter() - began

    def fast(self, net: nn.Module) -> nn.Module:
        """Copy a network to compute the same a little sooner: channels last, normalisation folded."""
        net = copied(net).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        example = Batch.of(self.example)
        fold_normalisations(net, example, Trace.of(net, example))
        return net

    def dense(self, name: str, net: nn.Module) -> float:
        """Measure the dense network, once; return its accuracy in percent."""
        if name not in self.references:
            with self.timed("evaluation"):
                quick = self.fast(net)
                self.references[name] = [logits_of(quick, x) for x, _ in self.test]
        found = torch.cat(self.references[name]).argmax(1).cpu()
        return 100 * (found == self.labels).double().mean().item()

    def scores(self, name: str, net: nn.Module) -> Scores:
        """Measure a network next to the dense one."""
        with self.timed("evaluation"):
            return evaluate(net, self.test, self.references[name])

    def times(self, name: str, dense: nn.Module, deployed: Deployed, smaller: bool) -> dict[str, Any]:
        """Time a network beside the dense one in turns, a smaller one compiled too."""
        with self.timed("deployment"):
            compiles = self.compiles(name, dense) and smaller
            compiled = frozen(deployed.network, self.example) if compiles else None
            networks = {
                "dense ms": dense,
                "snows ms": deployed.network,
                "dense, compiled": self.frozen[name],
                "snows, compiled": compiled,
            }
            runs = {key: partial(_run, net, self.example) for key, net in networks.items() if net is not None}
            found = dict(zip(runs, self.stopwatch.network(list(runs.values())).medians, strict=True))
        row: dict[str, Any] = {key: found.get(key, "") for key in networks}
        return row | {"ratio": found["dense ms"] / found["snows ms"]}


def _run(net: nn.Module, example: Tensor) -> object:
    with torch.no_grad():
        return net(example)
