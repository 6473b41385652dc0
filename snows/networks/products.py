"""What the products of a forward pass cost, and which of them shrink with a group of units."""

from __future__ import annotations

import math
from collections import defaultdict
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from snows.networks.attention import plain_forward
from snows.networks.batches import Batch, output_of
from snows.networks.channels import Group
from snows.networks.functions import arguments, known
from snows.networks.watching import Call, Watch


class Counts(NamedTuple):
    """Hold how many multiplications with an addition one pass makes.

    Attributes:
        weights: of layers, and of other parameters that a linear function or a convolution is called with,
            by the parameter's name; of tensors that are none, by the call's name.
        products: of activations with each other, by the call's name and, where a function makes several
            products, their number.
    """

    weights: dict[str, int]
    products: dict[tuple[str, int], int]


def count(net: nn.Module, batch: Batch) -> Counts:
    """Count the multiplications of one pass, over all samples of the batch.

    Args:
        net: in evaluation mode.
        batch: on the network's device.

    Raises:
        ValueError: the network cannot run the batch.
    """
    watch = _Counting(net)
    with torch.no_grad(), plain_forward(), watch:
        output_of(net, batch)
    return Counts(dict(watch.weights), watch.products)


class _Counting(Watch):
    """Count multiplications."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__(net)
        self.names = {id(p): name for name, p in net.named_parameters()}
        self.weights: dict[str, int] = defaultdict(int)
        self.products: dict[tuple[str, int], int] = {}

    def other(self, func: Any, args: Any, kwargs: Any) -> Any:
        output = func(*args, **kwargs)
        if bound := arguments(func, args, kwargs):
            weight, name = bound["weight"], self.frame.operation(func)
            size = output.numel() * math.prod(weight.shape[1:])
            self.weights[self.names.get(id(weight), name)] += size
        elif side := known(func).multiplies:
            x, weight = (*args, *kwargs.values())[:2]
            size = (x if side == "input" else output).numel() * weight[0].numel()
            self.weights[self.names.get(id(weight), self.frame.operation(func))] += size
        elif product := known(func).product:
            name, sizes = self.frame.operation(func), list[int]()

            def times(equation: str, left: Tensor, right: Tensor) -> Tensor:
                ones = [torch.ones((), dtype=torch.float64).expand(x.shape) for x in (left, right)]
                sizes.append(_total(equation, *ones))
                return torch.einsum(equation, *(x.to("meta") for x in ones))

            product(times, *args, **kwargs)
            self.products |= {(name, i): size for i, size in enumerate(sizes)}
        return output


def _total(equation: str, left: Tensor, right: Tensor) -> int:
    """Sum over all products of two numbers that an equation asks for."""
    return round(float(torch.einsum(equation.split("->")[0] + "->", left, right)))


# ---------------------------------------------------------------- what a unit takes part in


def shares(net: nn.Module, batch: Batch, group: Group) -> dict[tuple[str, int], tuple[float, ...]]:
    """Find the products that the units of a group take part in.

    The outputs that are the group's first unit are NaN in one pass. Layers and products compute with zeros
    in their place; a product's output is NaN where nothing but NaN went into it. So an attention head is
    found in both of its products, and a channel that a product sums over ends there.

    Args:
        net: in evaluation mode.
        batch: on the network's device.
        group: of the network.

    Returns:
        By product, named as in `Counts`, the share of its multiplications that one unit takes part in; where
        units number both the rows and the columns of its output, one share for each, and they multiply.
        Products that the network does not reach, because it does not run with NaN, are left out.
    """
    watch = _Marking(net, group)
    with suppress(Exception), torch.no_grad(), plain_forward(), watch:
        batch.through(net)
    return watch.shares


class _Marking(Watch):
    """Mark one unit with NaN, and see which products read it."""

    def __init__(self, net: nn.Module, group: Group) -> None:
        super().__init__(net)
        self.group = group
        self.shares: dict[tuple[str, int], tuple[float, ...]] = {}

    def layer(self, name: str, call: Call, args: Any, kwargs: Any) -> Any:
        output = call.function(*tree_map(_clean, args), **tree_map(_clean, kwargs))
        if name in self.group.rows:
            rows = self.group.rows[name][0].to(output.device)
            output = output.index_fill(-1 if not call.kernel else -3, rows, torch.nan)
        return output

    def other(self, func: Any, args: Any, kwargs: Any) -> Any:
        product = known(func).product
        if product is None:
            return func(*args, **kwargs)
        name, found = self.frame.operation(func), list[tuple[float, ...]]()

        def times(equation: str, left: Tensor, right: Tensor) -> Tensor:
            a, b = ((~x.isnan()).double() for x in (left, right))
            found.append(_share(equation, a, b))
            result = torch.einsum(equation, a, b)
            return torch.where(result > 0, 0.0, torch.nan)

        result = product(times, *args, **kwargs)
        output = func(*tree_map(_clean, args), **tree_map(_clean, kwargs))
        self.shares |= {(name, i): share for i, share in enumerate(found) if share}
        return output if result is None else output.masked_fill(result.isnan(), torch.nan)


def _clean(x: Any) -> Any:
    return x.masked_fill(x.isnan(), 0) if isinstance(x, Tensor) and x.is_floating_point() else x


def _share(equation: str, left: Tensor, right: Tensor) -> tuple[float, ...]:
    """Return the share of a product's multiplications that meet a mark, or one of each side's.

    Args:
        equation: of the product.
        left: 1 where there is no mark, else 0.
        right: the same of the other operand.
    """
    ones = torch.ones_like(left), torch.ones_like(right)
    whole = _total(equation, *ones)
    a, b, both = (
        1 - _total(equation, *x) / whole for x in ((left, ones[1]), (ones[0], right), (left, right))
    )
    if both > max(a, b) + 1e-9:  # rows and columns of the output, and not the same entries of both
        return (a, b)
    return (both,) if both else ()
