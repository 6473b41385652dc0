"""CUDA graphs: calls captured once and replayed, so that hundreds of launches become one.

A graph of curvature products lives and dies with one operator. The first product runs eagerly, which also
warms up what must not happen while capturing (libraries that start, kernels that compile); the second is
captured, which costs about as many launches again; from the third on a product is one launch. So an operator
of which few products are expected (`FEWEST`) is not captured. Where the device is the slower side nothing is
gained, and little lost. `SNOWS_GRAPHS=0` captures no operator, `SNOWS_GRAPHS=1` every one.

The memory that graphs compute in is theirs alone. Within `one_pool` they hand it on, each to the next: what a
graph leaves there may be overwritten by another, and a result is copied out as soon as it was computed.

One graph for all operators of a horizon would be captured once a layer. It would have to hold the forward
pass too, which is the network's own Python and ends by an exception, for each size of batch, and would keep
its memory while the line search needs room.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
log = logging.getLogger(__name__)
FEWEST = 10  # calls of what is captured, where their number is known: a guess, to be measured
_side = functools.cache(torch.cuda.Stream)
_latest: ContextVar[dict[torch.device, Any] | None] = ContextVar("_latest", default=None)


class Graph(Protocol):
    """Stand for what was captured."""

    def replay(self) -> None:
        """Compute the static output from the static input again."""


Capture = Callable[[Callable[[Tensor], Tensor], Tensor], tuple[Graph, Tensor]]


@contextmanager
def aside(device: torch.device) -> Iterator[None]:
    """Run on a stream that can be captured, in order with the current one.

    Where there are no streams, just run.

    Autograd runs a node's backward on the stream of its forward, and the default stream cannot be captured:
    so whatever a captured product goes back through is made in here.
    """
    if device.type != "cuda":
        yield
        return
    here, side = torch.cuda.current_stream(device), _side(device)
    side.wait_stream(here)
    with torch.cuda.stream(side):
        yield
    here.wait_stream(side)


def captured(function: Callable[[], T], device: torch.device, pool: Any = None) -> tuple[Any, T]:
    """Capture a graph of a call on a device; return it, and what the call returned: the memory it writes.

    `torch.cuda.graph` would first wait for the device and give all unused memory back to the driver, from
    which it would have to be asked for again. Without that a capture may find too little memory, and fails.

    Args:
        function: what is called.
        device: a CUDA device.
        pool: the memory of a graph that is still there, to compute in as well.
    """
    graph = torch.cuda.CUDAGraph()
    with aside(device):
        graph.capture_begin(*(() if pool is None else (pool,)))
        try:
            result = function()
        finally:
            graph.capture_end()
    return graph, result


@contextmanager
def one_pool() -> Iterator[None]:
    """Let graphs that `capture` makes in here compute in the same memory, which is free at the end.

    It is the latest graph's: memory lives as long as one graph does that was captured in it.
    """
    token = _latest.set({})
    try:
        yield
    finally:
        _latest.reset(token)


def capture(function: Callable[[Tensor], Tensor], v: Tensor) -> tuple[Graph, Tensor]:
    """Capture a graph that applies `function` to what `v` holds; return it and the tensor it writes."""
    latest = _latest.get()
    last = None if latest is None else latest.pop(v.device, None)  # gone if this fails, in whatever state
    graph, output = captured(lambda: function(v), v.device, None if last is None else last.pool())
    if latest is not None:
        latest[v.device] = graph
    return graph, output


def capturing(device: torch.device, calls: int | None = None) -> Capture | None:
    """Return what captures a function on a device; None where it should run eagerly.

    Args:
        device: that it runs on.
        calls: the most that are to be expected; None if that is not known.
    """
    asked = os.environ.get("SNOWS_GRAPHS")
    enough = asked == "1" or calls is None or calls >= FEWEST
    return capture if device.type == "cuda" and asked != "0" and enough else None


class Replayed:
    """Applies one function to tensors of one shape: once eagerly, then by a graph.

    A function that cannot be captured, since it waits for the device, say, or memory is short, stays eager;
    the log (debug) says why.

    Args:
        capture: makes the graph; None for never.
    """

    def __init__(self, capture: Capture | None) -> None:
        self._capture, self._warm = capture, False
        self._graph: Graph | None = None

    def __call__(self, function: Callable[[Tensor], Tensor], v: Tensor) -> Tensor:
        """Apply the function; from the third call on by the graph."""
        if self._warm and self._capture is not None:
            capture, self._capture = self._capture, None
            self._input = torch.empty_like(v)
            try:
                self._graph, self._output = capture(function, self._input)
            except RuntimeError as error:
                log.debug("a product stays eager: %s", error)
        self._warm = True
        if self._graph is None:
            with aside(v.device):
                return function(v)
        self._input.copy_(v)
        self._graph.replay()
        return self._output.clone()
