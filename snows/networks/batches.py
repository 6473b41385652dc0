"""Batches of inputs, and the tensors that a network returns."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from snows import together


class Batch(NamedTuple):
    """Hold one batch, ready to call a network with.

    Its samples are the entries of each tensor's first dimension, or of a list of tensors.

    Attributes:
        args: by position.
        kwargs: by name.
        share: of the samples that all processes have of the batch, those in this one.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    share: float = 1.0

    @classmethod
    def of(cls, batch: Any) -> Batch:
        """Read a batch: a tensor, a list of pictures, `(images, labels)` or a mapping of keyword inputs.

        Labels are ignored.

        A list of pictures is a list of floating-point (C, H, W) tensors, of any sizes, as detection networks
        take it.

        Raises:
            TypeError: it is none of these.
        """
        if isinstance(batch, Batch):
            return batch
        if isinstance(batch, Tensor) or _is_pictures(batch):
            return cls((batch,), {})
        if isinstance(batch, Mapping):
            return cls((), {key: value for key, value in batch.items() if key not in LABELS})
        if (
            isinstance(batch, list | tuple)
            and batch
            and (isinstance(batch[0], Tensor | Mapping) or _is_pictures(batch[0]))
        ):
            return cls.of(batch[0])
        raise TypeError(
            "batches: expected tensors, lists of pictures, (images, labels) pairs or mappings of keyword "
            f"inputs, got {type(batch).__name__}"
        )

    def map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        """Apply a function to every tensor."""
        return Batch(*tree_map(lambda x: function(x) if isinstance(x, Tensor) else x, tuple(self)))

    def to(self, device: torch.device) -> Batch:
        """Move every tensor to a device."""
        return self.map(lambda x: x.to(device))

    def through(self, net: nn.Module) -> Any:
        """Call a network with this batch."""
        return net(*self.args, **self.kwargs)

    def tensors(self) -> list[Tensor]:
        """List the tensors, in order."""
        return [x for x in tree_leaves(tuple(self)) if isinstance(x, Tensor)]

    def samples(self) -> int:
        """Count the samples, by the first tensor or list of tensors."""
        return next((len(x) for x in tree_leaves(tuple(self), is_leaf=_is_batched) if _is_batched(x)), 1)

    def split(self, size: int) -> list[Batch]:
        """Divide a batch into parts of `size` samples; whole if its tensors disagree on their number."""
        count = self.samples()
        if size < 1 or not self._divides():
            return [self]
        return [self.between(i, i + size) for i in range(0, count, size)]

    def _divides(self) -> bool:
        """Say whether all tensors agree on the number of samples."""
        count = self.samples()
        leaves = tree_leaves(tuple(self), is_leaf=_is_batched)
        return all(len(x) == count for x in leaves if _is_batched(x))

    def part(self) -> Batch:
        """Return the samples that this process has.

        Where there are too few for all processes, some have a sample that is not theirs, whose share is 0, so
        that every process runs the network alike.

        Raises:
            ValueError: the batch cannot be divided into samples.
        """
        size, rank, count = together.size(), together.rank(), self.samples()
        if size == 1:
            return self
        if not self._divides():
            raise ValueError(
                "prune: expected batches of which every tensor has an entry a sample, to share them among "
                f"{size} processes, got others; run one process"
            )
        begin, end = (count * i // size for i in (rank, rank + 1))
        if begin == end:
            begin = min(begin, count - 1)
            return self.between(begin, begin + 1)._replace(share=0.0)
        return self.between(begin, end)._replace(share=(end - begin) / count)

    def between(self, begin: int, end: int) -> Batch:
        """Return the samples from `begin` to before `end`."""

        def some(x: Any) -> Any:
            return x[begin:end] if _is_batched(x) else x

        return Batch(*tree_map(some, tuple(self), is_leaf=_is_batched))


LABELS = ("label", "labels")


def labels_of(batch: Any) -> Tensor | None:
    """Read the class numbers of a batch, if it brings any: those of `(images, labels)`, or a mapping's.

    Raises:
        ValueError: what stands there are no numbers.
    """
    if isinstance(batch, Mapping):
        labels = next((batch[key] for key in LABELS if batch.get(key) is not None), None)
    elif isinstance(batch, list | tuple) and len(batch) > 1 and not _is_pictures(batch):
        labels = batch[1]
    else:
        labels = None
    try:
        return None if labels is None else torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"batches: expected labels to be class numbers, got {type(labels).__name__} ({first_line(error)})"
        ) from error


def _is_batched(x: Any) -> bool:
    """Say whether this holds a sample an entry: a tensor, or a list of pictures, which may differ in size."""
    if isinstance(x, Tensor):
        return x.ndim > 0
    return isinstance(x, list) and bool(x) and all(isinstance(t, Tensor) for t in x)


def _is_pictures(x: Any) -> bool:
    return (
        isinstance(x, list)
        and bool(x)
        and all(isinstance(t, Tensor) and t.ndim == 3 and t.is_floating_point() for t in x)
    )


# ---------------------------------------------------------------- outputs


def output_of(net: nn.Module, batch: Batch) -> Any:
    """Return what the network returns.

    Raises:
        ValueError: it cannot run this batch, whatever it raises itself.
    """
    try:
        return batch.through(net)
    except Exception as error:
        got = ", ".join(f"{x.dtype} of {tuple(x.shape)}" for x in batch.tensors())
        raise ValueError(
            f"the model cannot run a batch of {got} ({first_line(error)}); expected batches as the model "
            "takes them"
        ) from error


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message, or its type's name."""
    return (str(error) or type(error).__name__).strip().splitlines()[0]


def tensors_in(output: Any) -> list[Tensor]:
    """List the tensors in an output, in order.

    They are found in tuples, lists, mappings, dataclasses and any objects that hold them.
    """
    return list(_tensors(output, set()))


def _tensors(x: Any, seen: set[int]) -> Iterator[Tensor]:
    if isinstance(x, Tensor):
        yield x
        return
    if isinstance(x, str | bytes | int | float | type | nn.Module | None) or id(x) in seen:
        return
    seen.add(id(x))
    if isinstance(x, Mapping):
        parts = list(x.values())
    elif isinstance(x, list | tuple | set | frozenset):
        parts = list(x)
    elif dataclasses.is_dataclass(x):
        parts = [getattr(x, entry.name, None) for entry in dataclasses.fields(x)]
    else:
        slots = [
            name
            for kind in type(x).__mro__
            for name in getattr(kind, "__slots__", ())
            if isinstance(name, str)
        ]
        parts = [*getattr(x, "__dict__", {}).values(), *(getattr(x, name, None) for name in slots)]
    for part in parts:
        yield from _tensors(part, seen)


def output_tensors(output: Any) -> list[Tensor]:
    """List the floating-point tensors in a network's output, in order."""
    return [x for x in tensors_in(output) if x.is_floating_point()]


def outputs(net: nn.Module, batch: Batch) -> list[Tensor]:
    """Run a network for inference on a copy of a batch, and list the floating-point tensors it returns."""
    with torch.inference_mode():
        return output_tensors(output_of(net, batch.map(torch.clone)))


def difference(expected: list[Tensor], got: list[Tensor]) -> float:
    """Return the largest difference of an output, relative to its largest entry; NaN counts as infinite."""
    worst = 0.0
    for a, b in zip(expected, got, strict=True):
        a, b = a.double(), b.double()
        error = float((a - b).abs().max() / a.abs().max().clamp_min(1e-30)) if a.numel() else 0.0
        worst = max(worst, error if error == error else float("inf"))
    return worst
