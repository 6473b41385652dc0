"""`nn.MultiheadAttention` opened into plain Linear layers, which can be pruned, and closed again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from snows.networks.layers import has_hooks, held_elsewhere, substitute
from snows.networks.masks import give_mask, kept_mask

PROJECTIONS = (
    "in_proj",
    "q_proj",
    "k_proj",
    "v_proj",
)  # the children whose weights are parameters of the closed module


@contextmanager
def plain_forward() -> Iterator[None]:
    """Run `nn.MultiheadAttention` without its fast path, which skips hooks."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


class OpenAttention(nn.Module):
    """Compute what an `nn.MultiheadAttention` computes, by plain Linear layers over its parameters.

    The same call and the same results as the closed module in evaluation (Vaswani et al. 2017).
    """

    def __init__(self, closed: nn.MultiheadAttention) -> None:
        super().__init__()
        self.closed = [closed]  # in a list: not a submodule
        self.heads, self.batch_first = closed.num_heads, closed.batch_first
        self.in_proj_bias, self._qkv_same_embed_dim = (
            None,
            False,
        )  # nn.TransformerEncoderLayer reads these for its fast path
        if closed._qkv_same_embed_dim:
            self.in_proj = _linear(closed.in_proj_weight, closed.in_proj_bias)
        else:
            biases = [None] * 3 if closed.in_proj_bias is None else closed.in_proj_bias.chunk(3)
            self.q_proj = _linear(closed.q_proj_weight, biases[0])
            self.k_proj = _linear(closed.k_proj_weight, biases[1])
            self.v_proj = _linear(closed.v_proj_weight, biases[2])
        self.out_proj = _linear(closed.out_proj.weight, closed.out_proj.bias)
        give_mask(self.out_proj, kept_mask(closed.out_proj))
        for name in PROJECTIONS:
            if hasattr(self, name):
                give_mask(getattr(self, name), kept_mask(closed, f"{name}_"))
        self.train(closed.training)

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        if not hasattr(self, "in_proj"):
            return self.q_proj(query), self.k_proj(key), self.v_proj(value)
        if query is key and key is value:
            return tuple(self.in_proj(query).chunk(3, dim=-1))
        # one call of the one layer: the three inputs side by side along the batch
        sizes = [x.shape[1] for x in (query, key, value)]
        parts = self.in_proj(torch.cat([query, key, value], dim=1)).split(sizes, dim=1)
        return tuple(x.chunk(3, dim=-1)[i] for i, x in enumerate(parts))

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend as `nn.MultiheadAttention.forward` does, whose arguments and results these are."""
        same = query is key and key is value
        batched = query.ndim == 3
        if not batched:
            query, key, value = (x.unsqueeze(0) for x in (query, key, value))
        elif not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        if same:
            key = value = query
        q, k, v = (
            x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in self._project(query, key, value)
        )
        mask = self._mask(attn_mask, key_padding_mask, q, k)
        weights = None
        if need_weights:
            scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
            weights = (scores if mask is None else scores + mask).softmax(-1)
            attended = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if batched else weights.squeeze(0)
        else:
            attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        out = self.out_proj(attended.transpose(1, 2).flatten(2))
        if not batched:
            out = out.squeeze(0)
        elif not self.batch_first:
            out = out.transpose(0, 1)
        return out, weights

    @staticmethod
    def _mask(attn_mask: Tensor | None, padding: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
        """Make one additive mask that broadcasts to (batch, heads, queries, keys)."""

        def additive(mask: Tensor) -> Tensor:
            return (
                q.new_zeros(mask.shape).masked_fill(mask, -torch.inf)
                if mask.dtype == torch.bool
                else mask.to(q)
            )

        total = None
        if attn_mask is not None:
            total = additive(attn_mask)
            if total.ndim == 3:
                total = total.view(q.shape[0], q.shape[1], *total.shape[1:])
        if padding is not None:
            keys = additive(padding).view(q.shape[0], 1, 1, k.shape[2])
            total = keys if total is None else total + keys
        return total


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight)
    if bias is not None:
        linear.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias)
    return linear


def can_open(module: nn.Module) -> bool:
    """Say whether a module is an `nn.MultiheadAttention` that `OpenAttention` can stand for."""
    plain = type(module) is nn.MultiheadAttention and not has_hooks(module)
    return plain and module.bias_k is None and not module.add_zero_attn


def open_attention(model: nn.Module) -> None:
    """Put an `OpenAttention` in the place of each `nn.MultiheadAttention` that can be opened."""
    held = held_elsewhere(model)
    for module in list(model.modules()):
        if can_open(module) and id(module) not in held:
            substitute(model, module, OpenAttention(module))  # type: ignore[arg-type]


def close_attention(model: nn.Module) -> None:
    """Undo `open_attention`, in place; what was written into the parameters, and the masks, stay.

    An attention whose projections were replaced by other layers stays open, and one that lost heads.
    """
    for module in list(model.modules()):
        if not isinstance(module, OpenAttention):
            continue
        if (
            module.closed
            and all(isinstance(x, nn.Linear) for x in module.children())
            and module.out_proj.weight.shape == module.closed[0].out_proj.weight.shape
        ):
            closed = module.closed[0]
            give_mask(closed.out_proj, kept_mask(module.out_proj))
            for part in PROJECTIONS:
                if hasattr(module, part):
                    give_mask(closed, kept_mask(getattr(module, part)), f"{part}_")
            substitute(model, module, closed)
        else:
            module.closed.clear()
