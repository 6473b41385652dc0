"""Networks as a user would run them: as they are, under `torch.compile`, or captured in a CUDA graph."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from snows.networks.batches import Batch, first_line
from snows.ops import graphs

log = logging.getLogger(__name__)
MOST = 1000  # networks of one class that are compiled in one process
CALLS = 20  # of a layer in one CUDA graph

Runtime = Literal["eager", "compile", "cuda-graph"]
RUNTIMES: tuple[Runtime, ...] = ("eager", "compile", "cuda-graph")
HOW: dict[Runtime, str] = {
    "eager": "",
    "compile": "Its milliseconds are those under torch.compile with constant weights: set "
    "torch._inductor.config.freezing = True, then call torch.compile(network) under torch.no_grad().",
    "cuda-graph": "Its milliseconds are those of a CUDA graph: call the network once, capture "
    "output = network(x) by torch.cuda.graph under torch.no_grad(), then copy each batch into x and replay.",
}


class UnavailableError(ValueError):
    """Say that a network cannot be run in a runtime here, and why."""


def there(batch: Batch) -> list[Runtime]:
    """List the runtimes that a network may be tried in, on the device of its inputs."""
    return [x for x in RUNTIMES if x != "cuda-graph" or on_cuda(batch)]


def on_cuda(batch: Batch) -> bool:
    """Say whether a batch lies on a CUDA device."""
    return any(x.is_cuda for x in batch.tensors())


def ready(net: nn.Module, example: Any, runtime: Runtime) -> nn.Module:
    """Make a network ready to be called in a runtime.

    Args:
        net: in evaluation mode; left as it was.
        example: one batch of the shapes that it will be called with; it is run once or twice.
        runtime: "eager", "compile" (`torch.compile` with constant weights), or "cuda-graph".

    Returns:
        What to call, without gradients. In a CUDA graph its output is overwritten by the next call.

    Raises:
        UnavailableError: it cannot be run so here.
    """
    if runtime == "compile":
        compiled = frozen(net, example)
        if compiled is None:
            raise UnavailableError(
                "torch.compile cannot compile this network here, without a C++ compiler for example"
            )
        return compiled
    if runtime == "cuda-graph":
        batch = Batch.of(example)
        if not on_cuda(batch):
            raise UnavailableError("a CUDA graph needs a network on a CUDA device, and this one is on none")
        try:
            return Captured(net, batch)
        except RuntimeError as error:
            raise UnavailableError(f"no CUDA graph can capture this network ({first_line(error)})") from error
    return net


def frozen(net: nn.Module, example: Any) -> nn.Module | None:
    """Compile a network as far as PyTorch can for inference, its weights being constants.

    Args:
        net: in evaluation mode; left as it was.
        example: one batch of the shapes that it is compiled for; it is run once.

    Returns:
        The compiled network; None if it cannot be compiled here, where there is no C++ compiler for example.
    """
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # of the compiler about itself, which may be errors here
            import torch._dynamo.config as limits
            import torch._inductor.config as config

            # more than a few networks of one class would silently run eagerly otherwise
            with config.patch(freezing=True), limits.patch(recompile_limit=MOST):
                compiled: nn.Module = torch.compile(net)  # type: ignore[assignment]
                Batch.of(example).through(compiled)
                return compiled
    except Exception as error:  # of the compiler, whatever it raises
        log.debug("a network is not compiled: %s", error)
        return None


class Captured(nn.Module):
    """Replay a CUDA graph of a network for batches of one shape.

    Args:
        net: in evaluation mode.
        batch: of that shape.
    """

    def __init__(self, net: nn.Module, batch: Batch) -> None:
        super().__init__()
        self.net = net  # whose weights the graph reads
        with torch.inference_mode(False), torch.no_grad():
            static = batch.map(torch.clone)
            self._inputs = static.tensors()
            device = self._inputs[0].device
            with graphs.aside(device):
                static.through(net)  # libraries start and kernels compile outside of the graph
            torch.cuda.empty_cache()  # room for all that a network computes
            self._graph, self._output = graphs.captured(lambda: static.through(net), device)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the network's output, into the same memory each time."""
        for static, x in zip(self._inputs, Batch(args, kwargs).tensors(), strict=True):
            static.copy_(x)
        self._graph.replay()
        return self._output


def repeated(
    runs: Sequence[Callable[[], object]], batch: Batch
) -> tuple[Sequence[Callable[[], object]], int]:
    """Repeat calls in CUDA graphs, so that the device is timed and not how long it takes to launch its work.

    Args:
        runs: that are timed beside each other.
        batch: that they are called with.

    Returns:
        What to call instead, and for how many calls it stands: the same calls where there is no CUDA, or
        where one of them cannot be captured.
    """
    if not on_cuda(batch):
        return runs, 1
    device = batch.tensors()[0].device

    def several(run: Callable[[], object]) -> None:
        for _ in range(CALLS):
            run()

    try:
        with graphs.aside(device):
            for run in runs:
                run()
        return [graphs.captured(partial(several, run), device)[0].replay for run in runs], CALLS
    except RuntimeError as error:
        log.debug("layers are timed call by call: %s", error)
        return runs, 1
