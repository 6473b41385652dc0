"""One-shot pruning of vision networks by Hessian-free Newton steps (SNOWS)."""

from snows.layers import SparseConv2d, SparseLinear
from snows.pruning import prune
from snows.selectors import alps, least_squares, magnitude, sparsegpt, wanda
from snows.solvers import Newton
from snows.sparsity import NM, Unstructured, parse_pattern

__version__ = "0.1.0"

__all__ = [
    "NM", "Newton", "SparseConv2d", "SparseLinear", "Unstructured", "alps", "least_squares", "magnitude", "parse_pattern", "prune",
    "sparsegpt", "wanda",
]
