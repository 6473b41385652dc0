"""What a cut network has left of the dense network's features, operation by operation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map

from snows.networks.attention import plain_forward
from snows.networks.batches import Batch
from snows.networks.functions import known
from snows.networks.watching import Call, Watch


@dataclass(frozen=True)
class Reduction:
    """Say which entries of the dense network's features a cut network still has.

    Attributes:
        outputs: by layer of the dense network that was cut, which of its outputs are left.
        kept: by name of an operation, the dimension that is shorter and what is left of it.
        lost: operations whose features cannot be compared: what is gone is not whole slices of them.
        sources: by layer of the cut network, the dense network's layer whose place it has; where it has
            another name.
    """

    outputs: Mapping[str, Tensor] = field(default_factory=dict)
    kept: Mapping[str, tuple[int, Tensor]] = field(default_factory=dict)
    lost: frozenset[str] = frozenset()
    sources: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(
        cls, dense: nn.Module, left: Mapping[str, Tensor], batch: Batch, sources: Mapping[str, str]
    ) -> Reduction:
        """Find out by one pass of the dense network in which all that is gone is NaN.

        Args:
            dense: the network.
            left: by layer that was cut, which of its outputs are left: int64.
            batch: on the network's device.
            sources: as the attribute.
        """
        watch = _Marking(dense, left)
        with torch.no_grad(), plain_forward(), sdpa_kernel(SDPBackend.MATH), watch:
            batch.through(dense)
        return cls(dict(left), watch.kept, frozenset(watch.lost), dict(sources))

    def left(self, name: str, y: Tensor) -> Tensor | None:
        """Return what is left of an operation's output in the dense network.

        It is None where that cannot be said.
        """
        if name in self.lost:
            return None
        if name not in self.kept:
            return y
        dim, kept = self.kept[name]
        return y.index_select(dim, kept.to(y.device))

    def source(self, layer: str) -> str:
        """Return the dense network's layer in whose place a layer stands."""
        return self.sources.get(layer, layer)


class _Marking(Watch):
    """Set outputs of layers that are gone to NaN, and see which slices of which operations are NaN then.

    A layer that is no grouped convolution reads what is gone as zero, as the cut network reads nothing.
    """

    def __init__(self, net: nn.Module, left: Mapping[str, Tensor]) -> None:
        super().__init__(net)
        self.left = left
        self.kept: dict[str, tuple[int, Tensor]] = {}
        self.lost: set[str] = set()

    def layer(self, name: str, call: Call, args: Any, kwargs: Any) -> Any:
        if call.settings.get("groups", 1) == 1:
            clean = call.x.nan_to_num(nan=0.0)
            args, kwargs = tree_map(lambda x: clean if x is call.x else x, (args, kwargs))
        return self.named(call.function, args, kwargs, self.left.get(name))

    def other(self, func: Any, args: Any, kwargs: Any) -> Any:
        return self.named(func, args, kwargs, None)

    def named(self, func: Any, args: Any, kwargs: Any, left: Tensor | None) -> Any:
        """Call a function, and note which slices of its output are NaN."""
        entry = known(func)
        name = self.frame.operation(func) if entry.counted else ""
        out = func(*args, **kwargs)
        if left is not None:
            assert entry.channel is not None
            dim, left = entry.channel % out.ndim, left.to(out.device)
            out = torch.full_like(out, torch.nan).index_copy(dim, left, out.index_select(dim, left))
        first = out[0] if isinstance(out, tuple) else out
        if name and isinstance(first, Tensor) and first.is_floating_point():
            self.note(name, first.isnan())
        return out

    def note(self, name: str, taken: Tensor) -> None:
        """Note what is left of an operation's output."""
        if not taken.any():
            return
        for dim in range(1, taken.ndim):  # the first is of samples, of which another batch has more
            line = taken.movedim(dim, 0).flatten(1).any(1)
            if not line.all() and bool((taken == line.view(-1, *[1] * (taken.ndim - dim - 1))).all()):
                self.kept[name] = dim - taken.ndim, (~line).nonzero().flatten().cpu()
                return
        self.lost.add(name)
