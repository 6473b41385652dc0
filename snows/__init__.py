"""One-shot pruning of vision networks by Hessian-free Newton steps (SNOWS).

A name is imported when it is first used, so that `import snows` alone costs no time. `import snows.ops`
registers the operations that an exported program of a packed network calls.
"""

import importlib
from typing import TYPE_CHECKING, Any

from snows import build

if TYPE_CHECKING:
    from snows.choosing.budgets import Budget, Structured
    from snows.deployment import Deployed, deploy
    from snows.evaluation import evaluate
    from snows.frontiers import frontier
    from snows.holding import hold
    from snows.layers import SparseConv2d, SparseLinear
    from snows.matching.losses import Matching
    from snows.networks.masks import mask_of
    from snows.pruning import Pruned, prune
    from snows.results.files import load, save
    from snows.selectors.alps import alps
    from snows.selectors.least_squares import least_squares
    from snows.selectors.scores import magnitude, wanda
    from snows.selectors.sparsegpt import sparsegpt
    from snows.solving.newton import Newton
    from snows.sparsity import NM, Unstructured, parse_pattern
    from snows.timing import measure
    from snows.verification import verify

__version__ = "0.1.0"

build.warn()

_MODULES = {
    "deployment": ["Deployed", "deploy"],
    "evaluation": ["evaluate"],
    "frontiers": ["frontier"],
    "holding": ["hold"],
    "layers": ["SparseConv2d", "SparseLinear"],
    "matching.losses": ["Matching"],
    "choosing.budgets": ["Budget", "Structured"],
    "networks.channels": ["Group"],
    "networks.masks": ["mask_of"],
    "pruning": ["Pruned", "prune"],
    "timing": ["measure"],
    "results.files": ["load", "save"],
    "shaping": ["groups"],
    "selectors": ["alps", "least_squares", "magnitude", "sparsegpt", "wanda"],
    "solving.newton": ["Newton"],
    "sparsity": ["NM", "Unstructured", "parse_pattern"],
    "verification": ["verify"],
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "NM",
    "Budget",
    "Deployed",
    "Group",
    "Matching",
    "Newton",
    "Pruned",
    "SparseConv2d",
    "SparseLinear",
    "Structured",
    "Unstructured",
    "alps",
    "deploy",
    "evaluate",
    "frontier",
    "groups",
    "hold",
    "least_squares",
    "load",
    "magnitude",
    "mask_of",
    "measure",
    "parse_pattern",
    "prune",
    "save",
    "sparsegpt",
    "verify",
    "wanda",
]


def __getattr__(name: str) -> Any:
    """Import a public name, or a module, when it is first used."""
    if name in _HOMES:
        found = getattr(importlib.import_module(f"snows.{_HOMES[name]}"), name)
    else:
        try:
            found = importlib.import_module(f"snows.{name}")
        except ModuleNotFoundError as error:
            if error.name != f"snows.{name}":
                raise
            raise AttributeError(f"module 'snows' has no attribute {name!r}") from None
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
