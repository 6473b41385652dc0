"""The documents name what is there: names of the package, files of the repository, and links."""

import ast
import importlib
import pkgutil
import re
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from models import QUICK
from test_ladder import FLOORS
from torch import nn

import snows
from snows.deployment import deploy

PACKAGE = Path(snows.__file__).parent
ROOT = PACKAGE.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PROSE = 160  # characters of a line that is no table and no code
FILES = "py|md|json|toml|txt|cpp|h|cu|cuh|html|safetensors|onnx|npz"

ALIASES = {"nn": "torch.nn", "F": "torch.nn.functional", "data": "torch.utils.data"}

# What is written like a name of the package or a file and is none: PTX, and what stands for something else.
FOREIGN = re.compile(
    r"mma\.sp|wgmma\.mma_async\.sp|cp\.async|package\.module.*|runs/.*|.*(?:NAME|FAMILY)\..*"
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


@cache
def constants():
    """Names that modules of the package assign."""
    trees = [ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py")]
    assigned = [node for tree in trees for node in tree.body if isinstance(node, ast.Assign)]
    return {x.id for node in assigned for x in node.targets if isinstance(x, ast.Name)}


def tracked(path):
    """Whether a path that a document names is one of the repository, from its root or from the package."""
    return any(any(base.glob(path)) for base in (ROOT, PACKAGE))


# ---------------------------------------------------------------- what the documents say


def blocks(text):
    """The Python blocks of a document."""
    return re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def wrong_names(text):
    """Names in a document that say they are of the package or the repository and are not."""
    full = re.findall(r"(?<![\w/.:])snows(?:\.[A-Za-z_]\w*)+", text)
    wrong = [x for x in full if not re.fullmatch(rf".*\.(?:{FILES})", x) and not found(x)]
    variables = set(re.findall(r"^\s*(\w+) = ", "".join(blocks(text)), re.MULTILINE))
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    for code in re.findall(r"`([^`\n]+)`", prose):
        name = re.sub(r"\(.*", "", code)
        if FOREIGN.fullmatch(name) or name.startswith("snows.") or name.split(".")[0] in variables:
            continue
        if re.fullmatch(rf"[\w*/.-]+\.(?:{FILES})", name):
            wrong += [] if "/" not in name or tracked(name) else [code]
        elif re.fullmatch(r"[A-Za-z_]\w*(?:\.\w+)+", name):
            wrong += [] if named(name) else [code]
        elif re.fullmatch(r"[A-Z]\w*[a-z]\w*", name):
            wrong += [] if known(name) or tracked(name) else [code]
    return wrong


def named(name):
    """Whether a dotted name is one of the package's, an attribute of one of its classes, or of another library."""
    first, *rest = name.split(".")
    if first in attributes():
        return len(rest) == 1 and rest[0] in attributes()[first]
    return found(f"snows.{name}") or elsewhere(".".join([ALIASES.get(first, first), *rest]))


def known(name):
    """Whether a name with a capital is a class or a constant of the package, or a class of PyTorch."""
    return (
        name in attributes() or name in constants() or any(elsewhere(f"{x}.{name}") for x in ALIASES.values())
    )


def elsewhere(name):
    """Whether an installed library has something of this name."""
    try:
        return pkgutil.resolve_name(name) is not None
    except (ImportError, AttributeError, ValueError):
        return False


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
        elif anchor:
            headings = re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE)
            wrong += [] if anchor in map(slug, headings) else [link]
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


@pytest.fixture
def one_thread():
    """Small networks on one thread: several that wait for each other on a busy machine take minutes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_the_guide_runs_as_it_stands(tmp_path, monkeypatch, one_thread):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in blocks((ROOT / "docs/guide.md").read_text()):
        exec(block, names)
    assert {x.name for x in tmp_path.iterdir()} == {
        "model.safetensors",
        "model.onnx",
        "model.pt2",
        "runs",
        "smaller.safetensors",
    }
    assert int(names["pruned"].masks["0.1.0"].sum()) == 32 * 16 * 9 // 2


def test_the_readme_runs_as_it_stands(tmp_path, monkeypatch, one_thread):
    monkeypatch.chdir(tmp_path)
    convolutions = [
        nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()) for _ in range(3)
    ]
    model = nn.Sequential(nn.Conv2d(3, 16, 3), *convolutions, nn.Flatten(), nn.Linear(16 * 36, 4)).eval()
    batches = [torch.randn(16, 3, 8, 8) for _ in range(4)]
    names = {"torch": torch, "model": model, "batches": batches, "example": batches[0]}
    monkeypatch.setattr(torch, "compile", lambda network: network)  # which takes a minute, and is PyTorch's
    by_size = partial(deploy, objective="size", stopwatch=QUICK)  # whatever the times are, a layer is packed
    monkeypatch.setattr(snows, "deploy", by_size)
    for block in blocks((ROOT / "README.md").read_text()):
        exec(block, names)
    assert [x.name for x in tmp_path.iterdir()] == ["model.safetensors"]
    assert isinstance(names["fast"].network, nn.Module)
    assert names["pruned"].report.zeros == 3 * 16 * 16 * 9 // 2


def test_the_floors_are_those_of_the_ladder():
    """The table has a row a floor, from the bottom, and names every package and file on it."""
    text = (ROOT / "docs/architecture.md").read_text()
    table = text[text.index("| floor |") : text.index("## Laws")].splitlines()[2:]
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in table if row]
    assert [row[0] for row in cells] == list(FLOORS)
    for row in cells:
        named = {re.sub(r"/$|\.py$", "", x) for x in re.findall(r"`([\w/.]+)`", row[1])}
        assert named - {"csrc"} == FLOORS[row[0]] - {"__main__"}


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
