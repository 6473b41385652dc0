"""What a certificate claims of a weight, of accuracy on images, and of milliseconds."""

from __future__ import annotations

import math
from dataclasses import dataclass

from snows.results.machine import Machine


@dataclass(frozen=True)
class WeightClaim:
    """Claim what is in one weight.

    Attributes:
        name: as the dense network's state_dict has it, of a packed weight too.
        shape: of the weight, unpacked.
        zeros: how many of its entries are zero.
        pattern: N:M that it follows; empty for none.
        kept: digest of the indices that were kept of a larger weight; empty where all were.
    """

    name: str
    shape: tuple[int, ...]
    zeros: int = 0
    pattern: str = ""
    kept: str = ""


@dataclass(frozen=True)
class Judged:
    """Claim how good the network is on images; NaN where there were no labels.

    Attributes:
        data: where the images come from.
        images: how many.
        digest: of the images and their labels.
        asked: how many were asked for.
        samples: calibration images of the same data, drawn by `seed`, that were left out.
        seed: of the calibration images.
        top1, top5: accuracy in percent.
        dense_top1: the dense network's.
        agreement: percent of images with the same first choice as the dense network's.
        divergence: mean KL of the class probabilities from the dense network's, in nats.
    """

    data: str
    images: int
    digest: str
    asked: int = 0
    samples: int = 0
    seed: int = 0
    top1: float = math.nan
    top5: float = math.nan
    dense_top1: float = math.nan
    agreement: float = math.nan
    divergence: float = math.nan


@dataclass(frozen=True)
class Timed:
    """Claim how long the network takes.

    Attributes:
        milliseconds: median of one batch.
        images: in the batch.
        machine: name of the processor, or of the GPU.
        threads: of the processor; 0 of a GPU.
        device: "cpu" or "cuda".
        runtime: "eager", "compile" or "cuda-graph".
    """

    milliseconds: float
    images: int
    machine: str
    threads: int
    device: str
    runtime: str

    @classmethod
    def on(cls, machine: Machine, milliseconds: float, images: int, runtime: str) -> Timed:
        """Make the claim of a machine."""
        return cls(milliseconds, images, machine.processor, machine.threads, machine.device, runtime)

    @property
    def where(self) -> Machine:
        """The machine."""
        return Machine(self.machine, self.device, self.threads)
