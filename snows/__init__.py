"""One-shot pruning of vision networks by Hessian-free Newton steps (SNOWS)."""

from snows import build
from snows.deployment import deploy
from snows.files import load, save
from snows.layers import SparseConv2d, SparseLinear
from snows.pruning import prune
from snows.selectors import alps, least_squares, magnitude, sparsegpt, wanda
from snows.solvers import Newton
from snows.sparsity import NM, Unstructured, parse_pattern

__version__ = "0.1.0"

build.warn()

__all__ = [
    "NM", "Newton", "SparseConv2d", "SparseLinear", "Unstructured", "alps", "deploy", "least_squares", "load", "magnitude", "parse_pattern", "prune",
    "save", "sparsegpt", "wanda",
]
