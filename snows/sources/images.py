"""Images that are read when they are asked for: drawn for calibration, spread for a test, or all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from snows.networks.batches import Batch
from snows.sources.pictures import UnreadableError


@dataclass
class Data:
    """Images that are read when they are asked for.

    Attributes:
        origin: where they come from; two splits of one origin are the same images.
        read: returns the image with the given index, as a float32 (C, H, W) tensor.
        labels: class numbers, as the network counts them, int64; -1 for none.
        stream: batches in a fixed order, instead of `read` and `labels`; everything else is empty then.
        files: what the images are called, for messages; empty if they have no names.
        broken: pictures that could not be read: name and reason.
        note: a sentence for the user; empty if there is nothing to say.
        preparation: how pictures become tensors, in a line; empty if they come as tensors.
    """

    origin: str
    read: Callable[[int], Tensor] = field(repr=False, default=lambda index: torch.empty(0))
    labels: NDArray[np.int64] = field(repr=False, default_factory=lambda: np.empty(0, np.int64))
    stream: Iterable[Any] | None = field(repr=False, default=None)
    files: Sequence[str] = field(repr=False, default=())
    broken: list[tuple[str, str]] = field(repr=False, default_factory=list)
    note: str = ""
    preparation: str = ""

    def __len__(self) -> int:
        """Count the images; 0 for a stream, whose number only reading it tells."""
        return len(self.labels)

    def drawn(self, count: int, seed: int) -> list[int]:
        """Draw the numbers of `count` images, the same for a seed every time; none of a stream.

        Raises:
            ValueError: there are fewer.
        """
        if self.stream is None and count > len(self):
            raise ValueError(_too_few(count, self.origin, len(self)))
        return [int(i) for i in np.random.default_rng(seed).permutation(len(self))[:count]]

    def draw(self, count: int, size: int, seed: int) -> list[Any]:
        """Take images for calibration: `count` of them, drawn by `seed`, in batches of up to `size`.

        Of a stream the first are taken, in its own batches; where it shuffles by PyTorch's random numbers, as
        a DataLoader does, it does so by `seed`.

        Raises:
            ValueError: there are fewer.
        """
        if self.stream is None:
            return [x for x, _ in self.batches(size, self.drawn(count, seed))]
        taken, found = self._streamed(count, seed)
        if found < count:
            raise ValueError(_too_few(count, self.origin, found))
        return taken

    def available(self, count: int, seed: int) -> int:
        """Count the images that there are, up to `count`."""
        return min(count, len(self) if self.stream is None else self._streamed(count, seed)[1])

    def _streamed(self, count: int, seed: int) -> tuple[list[Any], int]:
        """Read a stream up to `count` images; return its batches, and how many images they hold."""
        taken: list[Any] = []
        found = 0
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for batch in self.stream or ():
                inputs = Batch.of(batch)
                if inputs.samples() > count - found:
                    inputs = inputs.split(count - found)[0]
                taken.append(inputs.kwargs or inputs.args[0])
                found += inputs.samples()
                if found >= count:
                    break
        return taken, found

    def first(self, count: int) -> Any:
        """Take the first `count` images that can be read, as one batch.

        Raises:
            ValueError: there are fewer, or they are no tensors.
        """
        taken: list[Tensor] = []
        found = 0
        for batch in self.batches(count):
            inputs = Batch.of(batch)
            if inputs.kwargs or not isinstance(inputs.args[0], Tensor):
                raise ValueError(
                    f"data: expected tensors of images from {self.origin} for an example, got keyword inputs "
                    "or lists"
                )
            taken.append(inputs.args[0][: count - found])
            found += len(taken[-1])
            if found == count:
                return torch.cat(taken)
        raise ValueError(f"asked for {count} images, but {self.origin} has {found}")

    def spread(self, count: int, size: int, leave_out: Sequence[int] = ()) -> Iterator[Any]:
        """Yield batches of about `count` images, evenly spread, none of `leave_out`.

        Folders come class by class; of a stream the first images are taken.
        """
        if self.stream is None:
            rest = np.setdiff1d(np.arange(len(self)), np.array(leave_out, np.int64))
            yield from self.batches(
                size, rest[np.linspace(0, len(rest) - 1, min(count, len(rest))).round().astype(int)]
            )
            return
        found = 0
        for batch in self.stream:
            yield batch
            found += Batch.of(batch).samples()
            if found >= count:
                return

    def batches(self, size: int, indices: Iterable[int] | None = None) -> Iterator[Any]:
        """Yield (images, labels) pairs of up to `size`, in the order of `indices`.

        Broken pictures are left out and noted. A stream comes in its own batches.
        """
        if self.stream is not None:
            yield from self.stream
            return
        images: list[Tensor] = []
        labels: list[int] = []
        for index in range(len(self)) if indices is None else indices:
            try:
                images.append(self.read(int(index)))
            except UnreadableError as error:
                entry = (self.files[index] if self.files else f"image {index}", str(error))
                self.broken += [entry] if entry not in self.broken else []
                continue
            labels.append(int(self.labels[int(index)]))
            if len(images) == size:
                yield _stacked(images), torch.tensor(labels)
                images, labels = [], []
        if images:
            yield _stacked(images), torch.tensor(labels)


def _too_few(count: int, origin: str, found: int) -> str:
    return f"asked for {count} images, but {origin} has {found}; ask for fewer with --samples"


def _stacked(images: list[Tensor]) -> Tensor:
    if len({x.shape for x in images}) > 1:
        sizes = sorted({"x".join(map(str, x.shape)) for x in images})
        raise ValueError(
            f"data: expected pictures of one size, got {', '.join(sizes[:5])}; say --crop and --resize"
        )
    return torch.stack(images)
