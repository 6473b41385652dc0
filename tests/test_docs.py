"""The documents name what is there: names of the package, files of the repository, and links."""

import ast
import importlib
import re
from functools import cache
from pathlib import Path

import pytest

import snows

PACKAGE = Path(snows.__file__).parent
ROOT = PACKAGE.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PROSE = 160  # characters of a line that is no table and no code
FILES = "py|md|json|toml|txt|cpp|h|cu|cuh|html|safetensors|onnx|npz"

# What is written like a name of the package, `name.name`, and is none: PTX, the operations of a trace, examples.
FOREIGN = re.compile(
    r"mma\.sp|wgmma\.mma_async\.sp|cp\.async|layer\d.*|model\.\w+|package\.module.*|import snows"
)


# ---------------------------------------------------------------- what is there


def found(name):
    """Whether a dotted name of the package is a module, or something in one, or an attribute of a class."""
    module, rest = snows, name.split(".")[1:]
    while rest:
        try:
            module = importlib.import_module(f"{module.__name__}.{rest[0]}")
        except ModuleNotFoundError:
            break
        rest = rest[1:]
    thing = module
    for i, part in enumerate(rest):
        if isinstance(thing, type):
            return i == len(rest) - 1 and part in attributes().get(thing.__name__, ())
        if not hasattr(thing, part):
            return False
        thing = getattr(thing, part)
    return True


@cache
def attributes():
    """By class of the package: methods, fields, and what its methods assign to self."""
    classes = {}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                own = classes.setdefault(node.name, set())
                for child in ast.walk(node):
                    if isinstance(child, ast.FunctionDef):
                        own.add(child.name)
                    elif isinstance(child, ast.AnnAssign | ast.Assign):
                        for target in child.targets if isinstance(child, ast.Assign) else [child.target]:
                            for x in target.elts if isinstance(target, ast.Tuple) else [target]:
                                own.add(getattr(x, "attr", getattr(x, "id", "")))
    return classes


def tracked(path):
    """Whether a path that a document names is one of the repository, from its root or from the package."""
    return any(any(base.glob(path)) for base in (ROOT, PACKAGE))


# ---------------------------------------------------------------- what the documents say


def wrong_names(text):
    """Names in a document that say they are of the package or the repository and are not."""
    wrong = [
        x
        for x in re.findall(r"(?<![\w/.:])snows(?:\.[A-Za-z_]\w*)+", text)
        if not FOREIGN.match(x) and not found(x)
    ]
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    for code in re.findall(r"`([^`\n]+)`", prose):
        name = re.sub(r"\(.*", "", code.removeprefix("@"))
        if FOREIGN.fullmatch(name) or name.startswith("snows."):
            continue
        if re.fullmatch(rf"[\w*/.-]+\.(?:{FILES})", name) and "/" in name:
            wrong += (
                []
                if tracked(name) or "NAME" in name or "FAMILY" in name or name.startswith("runs/")
                else [code]
            )
        elif re.fullmatch(r"[A-Za-z_]\w*(?:\.\w+)+", name) and not re.fullmatch(rf".*\.(?:{FILES})", name):
            wrong += [] if named(name) else [code]
        elif re.fullmatch(r"[A-Z]\w*[a-z]\w*", name):  # a class
            wrong += (
                []
                if name in attributes() or elsewhere(f"torch.nn.{name}") or found(f"snows.{name}")
                else [code]
            )
    return wrong


def named(name):
    """Whether a dotted name without the package's is one of it, an attribute of one of its classes, or PyTorch's."""
    first, *rest = name.split(".")
    if first in attributes():
        return len(rest) == 1 and rest[0] in attributes()[first]
    full = {"nn": "torch.nn", "F": "torch.nn.functional"}.get(first, first)
    return found(f"snows.{name}") or elsewhere(".".join([full, *rest]))


def elsewhere(name):
    """Whether PyTorch has something of this name."""
    import torch

    thing = torch
    for part in name.split(".")[1:]:
        thing = getattr(thing, part, None)
    return name.startswith("torch.") and thing is not None


def slug(heading):
    """GitHub's anchor of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def broken_links(page, text):
    """Relative links of a document to files or headings that are not there."""
    wrong = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = link.partition("#")
        if re.match(r"\w+:", link):
            continue
        target = (page.parent / path) if path else page
        if not target.exists():
            wrong.append(link)
        elif anchor and anchor not in map(slug, re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE)):
            wrong.append(link)
    return wrong


def long_lines(text):
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    return [x for x in prose.splitlines() if len(x) > PROSE and not x.lstrip().startswith("|")]


# ---------------------------------------------------------------- tests


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_name_is_there(page):
    assert wrong_names(page.read_text()) == []


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=lambda page: page.name)
def test_every_link_leads_somewhere(page):
    assert broken_links(page, page.read_text()) == []


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=lambda page: page.name)
def test_no_line_of_prose_is_too_long(page):
    assert long_lines(page.read_text()) == []


def test_every_document_is_linked_from_the_readme():
    links = re.findall(r"\]\((docs/[\w.]+)\)", (ROOT / "README.md").read_text())
    assert set(links) == {f"docs/{page.name}" for page in PAGES if page.parent.name == "docs"}


def test_names_that_are_gone_are_found():
    """Old names of this package, by each way of writing them; and new ones beside them."""
    text = (
        "`horizon.Horizon` `matching.horizon.Horizon` `Metric.felt` `Metric.from_gradients` `snows.moments` `solving.cg.cg` "
        "`Twins.paired` `snows/routes.py` `snows/ops/routes.py` `results/files.py` `Inputs` `Batch` `torch.compile` "
        "`F.linear` `nn.Modules` `Newton(passes=2)` `Schedule.whole` `Schedule.half` `model.safetensors`\n"
        "```python\nsnows.prune(model)\nsnows.shrink(model)\n```\n"
    )
    assert wrong_names(text) == [
        "snows.moments",
        "snows.shrink",
        "horizon.Horizon",
        "Metric.felt",
        "snows/routes.py",
        "Inputs",
        "nn.Modules",
        "Schedule.half",
    ]


def test_links_and_lines_that_are_wrong_are_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# Two words: one\n")
    text = "[a](page.md#two-words-one) [b](page.md#three) [c](gone.md) [d](https://x.org/gone.md) [e](#two-words-one)"
    assert broken_links(page, text) == ["page.md#three", "gone.md"]
    assert long_lines("x" * 161 + "\n|" + "x" * 200 + "\n```\n" + "x" * 200 + "\n```\n") == ["x" * 161]
