"""Networks under `torch.compile`, as a user would run them for inference."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn

from snows.networks.batches import Batch

Runtime = Literal["eager", "compile"]
RUNTIMES: tuple[Runtime, ...] = ("eager", "compile")
MOST = 1000  # networks of one class that are compiled in one process


def frozen(net: nn.Module, example: Any) -> nn.Module | None:
    """Compile a network as far as PyTorch can for inference, its weights being constants.

    Args:
        net: in evaluation mode; left as it was.
        example: one batch of the shapes that it is compiled for; it is run once.

    Returns:
        The compiled network; None if it cannot be compiled here, where there is no C++ compiler for example.
    """
    import torch._dynamo.config as limits
    import torch._inductor.config as config

    try:
        # more than a few networks of one class would silently run eagerly otherwise
        with config.patch(freezing=True), limits.patch(recompile_limit=MOST), torch.no_grad():
            compiled: nn.Module = torch.compile(net)  # type: ignore[assignment]
            Batch.of(example).through(compiled)
            return compiled
    except Exception:  # of the compiler, whatever it raises
        return None
