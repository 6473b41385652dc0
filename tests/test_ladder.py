"""Imports point down the ladder."""

import ast
from pathlib import Path

import snows

FLOORS = [
    {"kernels", "build"}, {"reference", "derivatives", "ops", "graphs"}, {"sparsity"}, {"operators", "solvers", "packing", "layers"},
    {"network", "moments", "routes", "horizon"}, {"selectors", "report", "run", "evaluation", "intake", "normalisation", "pruning"},
    {"measuring", "rewriting", "deployment", "files", "onnx"},
    {"zoo", "sources", "demo", "cli", "__main__"},
]
PACKAGE = Path(snows.__file__).parent


def floor(module):
    return next(i for i, names in enumerate(FLOORS) if module in names)


def imported(path):
    """Modules of the package that a file imports, by their first name."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "snows":
            parts = node.module.split(".")
            yield from [parts[1]] if len(parts) > 1 else [alias.name for alias in node.names]


def test_every_module_imports_from_its_own_floor_or_below():
    seen = 0
    for path in PACKAGE.rglob("*.py"):
        own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if own == "__init__":
            continue
        for name in imported(path):
            if name in set().union(*FLOORS):
                seen += 1
                assert floor(name) <= floor(own), f"{path.name} on floor {floor(own)} imports {name} from floor {floor(name)}"
    assert seen > 30


def test_the_public_names():
    assert sorted(snows.__all__) == [
        "NM", "Newton", "SparseConv2d", "SparseLinear", "Unstructured", "alps", "deploy", "evaluate", "least_squares", "load", "magnitude",
        "parse_pattern", "prune", "save", "sparsegpt", "wanda"]
