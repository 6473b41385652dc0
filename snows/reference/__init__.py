"""Each op in plain PyTorch: the specification that every kernel is tested against.

What has a public function is described there, in `ops`; here is what only kernels and derivatives call. A
function of one of the modules is found by its name here too.
"""

from typing import Any

from snows.reference import cg, masks, nonlinear, packed, sdpa


def __getattr__(name: str) -> Any:
    """Find a function or constant in one of the modules."""
    for module in (cg, masks, nonlinear, packed, sdpa):
        if name in vars(module):
            return vars(module)[name]
    raise AttributeError(f"module 'snows.reference' has no attribute {name!r}")
