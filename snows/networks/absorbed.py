"""What stands where a module was that another layer computes now."""

from __future__ import annotations

from collections import OrderedDict
from typing import Literal

from torch import nn


class Absorbed(nn.Identity):
    """Stand where a module was that a layer before it computes now.

    Args:
        into: the layer's name; empty if it is not known.
        role: of the module that was here.
    """

    def __init__(self, into: str = "", role: Literal["norm", "activation", ""] = "") -> None:
        super().__init__()
        self.into, self.role = into, role

    def extra_repr(self) -> str:
        """Say which layer computes it."""
        return f"into={self.into}" if self.into else ""


class Remainder(nn.Sequential):
    """Apply what a normalisation of a subclass does after its product, which a layer before it computes now.

    Args:
        norm: the normalisation; its children stay, in order.
        into: the layer's name; empty if it is not known.
    """

    def __init__(self, norm: nn.Module, into: str = "") -> None:
        super().__init__(OrderedDict(norm.named_children()))
        self.into = into
