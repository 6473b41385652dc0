"""CUDA graphs: calls captured once and replayed, so that hundreds of launches become one.

A graph of curvature products lives and dies with one operator, and its memory with it. The first product
runs eagerly, which also warms up what must not happen while capturing (libraries that start, kernels that
compile); the second is captured, which costs about as many launches again and an emptied cache; from the
third on a product is one launch. A solver asks for up to ``1 + max_iterations`` of each operator. Where the
device is the slower side nothing is gained, and little lost.

One graph for all operators of a horizon would be captured once a layer. It would have to hold the forward
pass too, which is the network's own Python and ends by an exception, for each size of batch, and would keep
its memory while the line search needs room.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
log = logging.getLogger(__name__)
_side = functools.cache(torch.cuda.Stream)


class Graph(Protocol):
    """Stand for what was captured."""

    def replay(self) -> None:
        """Compute the static output from the static input again."""


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


def captured(function: Callable[[], T], device: torch.device) -> tuple[Graph, T]:
    """Capture a graph of a call on a device; return it, and what the call returned: the memory it writes."""
    graph = torch.cuda.CUDAGraph()
    with aside(device), torch.cuda.graph(graph, stream=torch.cuda.current_stream(device)):
        return graph, function()


def capture(function: Callable[[Tensor], Tensor], v: Tensor) -> tuple[Graph, Tensor]:
    """Capture a graph that applies `function` to what `v` holds; return it and the tensor it writes."""
    return captured(lambda: function(v), v.device)


class Replayed:
    """Applies one function to tensors of one shape: once eagerly, then by a graph.

    A function that cannot be captured, since it waits for the device, say, or memory is short, stays eager;
    the log (debug) says why.

    Args:
        capture: makes the graph; None for never.
    """

    def __init__(
        self, capture: Callable[[Callable[[Tensor], Tensor], Tensor], tuple[Graph, Tensor]] | None
    ) -> None:
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
