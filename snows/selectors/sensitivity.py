"""How much each weight moves the network's output: the score by which a budget is spent over layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from snows.network import Call, Inputs, Watch, output_tensors, patches, plain_forward
from snows.selectors.statistics import columns
from snows.sparsity import rows, unrows


class _Gather(Watch):
    """Keeps each layer's call and output."""

    def __init__(self, net: nn.Module, names: Sequence[str]) -> None:
        super().__init__(net)
        self.wanted = set(names)
        self.calls: dict[str, tuple[Call, Tensor]] = {}

    def layer(self, name: str, call: Call, func: Any, args: Any, kwargs: Any) -> Any:
        out = func(*args, **kwargs)
        if name in self.wanted:
            self.calls[name] = (call, out)
        return out


def sensitivities(net: nn.Module, names: Sequence[str], inputs: Inputs, *, seed: int = 0) -> dict[str, Tensor]:
    """``w² · E[x²] · E[g²]``: the diagonal of the layer's Kronecker-factored Gauss-Newton matrix of the network's output.

    x is the weight's input, g the derivative of the network's output (Gaussian-weighted, so any output will do) with
    respect to the layer's output; comparable between layers (the saliency of LeCun et al. 1989, without labels).

    Args:
        net: the dense network, in evaluation mode.
        names: of the layers.
        inputs: one batch.
        seed: of the weights of the output.

    Returns:
        By layer, of weight.shape.
    """
    generator = torch.Generator().manual_seed(seed)
    watch = _Gather(net, names)
    with torch.enable_grad(), plain_forward(), watch:
        output = net(*inputs.args, **inputs.kwargs)
    scores = {}
    outputs = output_tensors(output)
    noise = [torch.randn(y.shape, generator=generator, dtype=y.dtype).to(y.device) for y in outputs]
    found = [watch.calls[name][1] for name in names]
    for name, g in zip(names, torch.autograd.grad(outputs, found, noise), strict=True):
        weight: Any = net.get_submodule(name).weight
        call = watch.calls[name][0]
        call.x = call.x.detach()
        total = torch.stack([x.square().sum(1) for x in patches(call)]).sum(0)  # (groups, in)
        channels = (g if weight.ndim == 2 else g.movedim(1, -1)).flatten(0, -2).square().sum(0)
        scores[name] = unrows(rows(weight.detach()).square() * columns(total, weight) * channels[:, None], weight.shape)
    return scores
