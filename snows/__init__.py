"""One-shot pruning of vision networks by Hessian-free Newton steps (SNOWS).

A name is imported when it is first used, so that `import snows` alone costs no time. `import snows.ops` registers the operations that an
exported program of a packed network calls.
"""

import importlib
from typing import TYPE_CHECKING, Any

from snows import build

if TYPE_CHECKING:
    from snows.deployment import deploy
    from snows.evaluation import evaluate
    from snows.files import load, save
    from snows.layers import SparseConv2d, SparseLinear
    from snows.pruning import prune
    from snows.selectors.alps import alps
    from snows.selectors.least_squares import least_squares
    from snows.selectors.scores import magnitude, wanda
    from snows.selectors.sparsegpt import sparsegpt
    from snows.solvers import Newton
    from snows.sparsity import NM, Unstructured, parse_pattern

__version__ = "0.1.0"

build.warn()

_MODULES = {
    "deployment": ["deploy"], "evaluation": ["evaluate"], "files": ["load", "save"], "layers": ["SparseConv2d", "SparseLinear"], "pruning": ["prune"],
    "selectors": ["alps", "least_squares", "magnitude", "sparsegpt", "wanda"], "solvers": ["Newton"],
    "sparsity": ["NM", "Unstructured", "parse_pattern"],
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "NM", "Newton", "SparseConv2d", "SparseLinear", "Unstructured", "alps", "deploy", "evaluate", "least_squares", "load", "magnitude",
    "parse_pattern", "prune", "save", "sparsegpt", "wanda",
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
