"""Builds the API page from the docstrings, into docs/api; a warning, of a module that does not import, fails.

Kernels in Triton are left out, since Triton is not everywhere.
"""

import importlib
import shutil
import sys
import warnings
from pathlib import Path
from typing import get_type_hints

import pdoc

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "docs/api"


def pages() -> list[str]:
    """Name every module but those that pdoc finds in a package: all, or those in its `__all__`."""
    names = ["snows"]
    for path in sorted((ROOT / "snows").iterdir()):
        name = f"snows.{path.stem}"
        if path.is_symlink() or path.name.startswith("_"):
            continue
        if path.suffix == ".py":
            names.append(name)
        elif (path / "__init__.py").exists():
            names.append(name)
            listed = getattr(importlib.import_module(name), "__all__", None)
            if listed is not None:
                inner = [x.stem for x in sorted(path.glob("[a-z]*.py"))]
                names += [f"{name}.{x}" for x in inner if x not in listed]
    return names


def resolve(names: list[str]) -> None:
    """Write types where named tuples have texts, of which pdoc does not know the module."""
    for name in pdoc.extract.walk_specs(names):
        importlib.import_module(name)
        for kind in vars(sys.modules[name]).values():
            if isinstance(kind, type) and issubclass(kind, tuple) and kind.__module__ == name:
                kind.__new__.__annotations__ = get_type_hints(kind)


def main() -> None:
    """Build all pages anew."""
    warnings.simplefilter("error")
    shutil.rmtree(OUT, ignore_errors=True)
    names = pages()
    resolve(names)
    pdoc.render.configure(docformat="google")
    pdoc.pdoc(*names, output_directory=OUT)
    print(f"{OUT.relative_to(ROOT)}: {len(list(OUT.rglob('*.html')))} pages")


if __name__ == "__main__":
    main()
