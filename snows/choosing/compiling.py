"""Networks under `torch.compile`, as a user would run them for inference."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def frozen(net: nn.Module, example: Tensor) -> nn.Module | None:
    """Compile a network as far as PyTorch can for inference, its weights being constants.

    Args:
        net: in evaluation mode; left as it was.
        example: of the shape that it is compiled for; it is run once.

    Returns:
        The compiled network; None if it cannot be compiled here, where there is no C++ compiler for example.
    """
    import torch._inductor.config as config

    try:
        with config.patch(freezing=True), torch.no_grad():
            compiled: nn.Module = torch.compile(net)  # type: ignore[assignment]
            compiled(example)
            return compiled
    except Exception:  # of the compiler, whatever it raises
        return None
