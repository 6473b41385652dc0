"""Imports point down the ladder, none goes in a circle, and every file is read at a sitting."""

import ast
from pathlib import Path

import pytest

import snows

# A file or package stands on the first floor that names it; of a floor's files none imports from a floor above.
FLOORS = {
    "kernels": {"kernels", "build", "heap", "amounts", "together"},
    "ops": {"reference", "ops"},
    "sparsity": {"sparsity"},
    "packing": {"packing"},
    "layers": {"layers"},
    "solving": {"solving"},
    "networks": {"networks"},
    "results": {"results"},
    "matching": {"matching"},
    "selectors": {"selectors"},
    "choosing": {"choosing"},
    "verbs": {"pruning", "walking", "shaping", "frontiers", "timing", "deployment", "holding"},
    "shell": {"evaluation", "judge", "verification", "sources", "zoo", "demo", "cli", "__main__"},
}
LINES = {".py": 300, ".cpp": 400, ".h": 400, ".cu": 400, ".cuh": 400}
PACKAGE = Path(snows.__file__).parent
ROOT = PACKAGE.parent
ORDER = [names for names in FLOORS.values()]


def floor(part):
    """The floor of a file or package by its first name."""
    found = [i for i, names in enumerate(ORDER) if part in names]
    assert len(found) == 1, f"{part} stands on {len(found)} floors; name it on one in tests/test_ladder.py"
    return found[0]


def modules(package):
    """Every module of a package: its dotted name and file."""
    for path in sorted(package.rglob("*.py")):
        parts = list(path.relative_to(package).with_suffix("").parts)
        yield ".".join(["snows", *(parts[:-1] if parts[-1] == "__init__" else parts)]), path


def imported(path, known, types=True):
    """Modules of the package that a file imports, wherever in the file.

    `from snows.a import b` is the module snows.a.b where there is one. Without `types` what only a type checker sees is left out.
    """
    tree = ast.parse(path.read_text())
    hidden = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
        for child in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in hidden and not types:
            continue
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "snows":
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in known else node.module
        elif isinstance(node, ast.Import):
            yield from (
                alias.name
                for alias in node.names
                if alias.name.split(".")[0] == "snows" and alias.name in known
            )


def graph(package, types=True):
    known = dict(modules(package))
    return {name: set(imported(path, known, types)) - {name} for name, path in known.items()}


def climbs(package):
    """Imports from a floor above."""
    found = []
    for name, others in graph(package).items():
        for other in others:
            if (
                name != "snows"
                and other != "snows"
                and floor(name.split(".")[1]) < floor(other.split(".")[1])
            ):
                found.append((name, other))
    return found


def circle(arrows):
    """A circle of imports, if there is one."""
    done, open_ = set(), []

    def visit(name):
        if name in open_:
            return open_[open_.index(name) :]
        if name in done:
            return None
        open_.append(name)
        found = next((c for other in sorted(arrows.get(name, ())) if (c := visit(other))), None)
        open_.pop()
        done.add(name)
        return found

    return next((c for name in sorted(arrows) if (c := visit(name))), None)


def long_files(folders):
    return [
        (str(path), count)
        for folder in folders
        for path in sorted(folder.rglob("*"))
        if path.suffix in LINES and (count := len(path.read_text().splitlines())) > LINES[path.suffix]
    ]


def test_every_module_imports_from_its_own_floor_or_below():
    assert climbs(PACKAGE) == []
    assert sum(map(len, graph(PACKAGE).values())) > 150


def test_no_imports_go_in_a_circle():
    arrows = graph(PACKAGE, types=False)
    arrows.pop("snows")  # imports a public name when it is first used
    assert circle({name: others - {"snows"} for name, others in arrows.items()}) is None


def test_every_file_is_read_at_a_sitting():
    folders = [PACKAGE, *(ROOT / name for name in ("csrc", "kernels") if (ROOT / name).is_dir())]
    assert long_files(folders) == []


def test_every_package_is_found_that_is_there():
    text = (ROOT / "pyproject.toml").read_text()
    assert "[tool.setuptools.packages.find]" in text


@pytest.fixture
def package(tmp_path):
    def write(**files):
        root = tmp_path / "snows"
        for name, text in files.items():
            path = root / (name.replace("__", "/") + ".py")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return root

    return write


def test_the_ladder_refuses_what_it_is_for(package):
    with pytest.raises(AssertionError, match="attic stands on 0 floors"):
        climbs(package(attic="from snows.sparsity import rows\n", sparsity=""))
    root = package(sparsity="from snows.pruning import prune\n", pruning="", attic="")
    (root / "attic.py").unlink()
    assert climbs(root) == [("snows.sparsity", "snows.pruning")]
    package(matching__a="from snows.matching import b\n", matching__b="from snows.matching.a import x\n")
    assert set(circle(graph(root))) == {"snows.matching.a", "snows.matching.b"}
    package(matching__long="x = 1\n" * 301)
    assert [Path(name).name for name, _ in long_files([root])] == ["long.py"]


def test_the_public_names():
    assert sorted(snows.__all__) == [
        "Budget",
        "Deployed",
        "Group",
        "Matching",
        "NM",
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
    assert all(getattr(snows, name) is not None for name in snows.__all__)
