"""The metadata of packed files, checked whoever wrote it; older formats are read as edits too."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from snows.networks.edits import CONVOLUTION, Drop, Edit, Fold, Open, Pack
from snows.networks.implants import Implant
from snows.networks.taking import Selection, Take
from snows.packing import packable

# 1 had no remainders; 1 and 2 held lists of modules, and not edits; 3 had packed layers alone; 4 no settings
# of linear layers
VERSION = 5


def edits_in(path: Path, text: str) -> list[Edit]:
    """Read the edits in a file's metadata.

    Raises:
        ValueError: it is damaged, incomplete, or of a newer format.
    """
    try:
        content = json.loads(text)
        version = content["version"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"load: the metadata of {path} is damaged ({type(error).__name__}: {error})"
        ) from error
    if type(version) is int and version > VERSION:  # whatever is in it
        raise ValueError(
            f"load: {path} has format {version}, this snows reads up to {VERSION}; install a newer one"
        )
    try:
        if type(version) is not int or version < 1:
            raise ValueError(f"version is {version!r:.60}")
        return _read(content) if version >= 3 else _read_old(content, version)
    except ValueError as error:
        raise ValueError(f"load: the metadata of {path} is damaged ({error})") from error


def _read(content: dict[str, Any]) -> list[Edit]:
    entries = content.get("edits")
    if not isinstance(entries, list):
        raise ValueError(f"edits is {entries!r:.60}")
    edits = [read_edit(entry) for entry in entries]
    if not any(isinstance(edit, Pack | Take | Implant) for edit in edits):
        raise ValueError("no layer is packed, smaller or replaced")
    return edits


def read_edit(entry: Any) -> Edit:
    """Read an edit as `described` writes it.

    Raises:
        ValueError: it is none.
    """
    kind = entry.get("kind") if isinstance(entry, dict) else None
    if not isinstance(kind, str) or kind not in _KINDS:
        raise ValueError(f"an edit is {entry!r:.60}")
    build, allowed = _KINDS[kind]
    if set(entry) != {"kind", *allowed}:
        raise ValueError(f"an edit has the entries {', '.join(map(str, entry)):.60}")
    return build(entry)


def _names(kind: type[Any], *fields: str) -> Callable[[dict[str, Any]], Edit]:
    """Build an edit of names alone."""

    def build(entry: dict[str, Any]) -> Edit:
        for field in fields:
            if not isinstance(entry[field], str):
                raise ValueError(f"{field} is {entry[field]!r:.60}")
        edit: Edit = kind(*(entry[field] for field in fields))
        return edit

    return build


def _implant(entry: dict[str, Any]) -> Implant:
    name, rank = entry["layer"], entry["rank"]
    if not isinstance(name, str):
        raise ValueError(f"layer is {name!r:.60}")
    if type(rank) is not int or not 1 <= rank < 2**31:
        raise ValueError(f"rank of {name} is {rank!r:.60}")
    return Implant(name, rank)


def _pack(entry: dict[str, Any]) -> Pack:
    name, absorbs = entry["layer"], entry["absorbs"]
    if not isinstance(name, str) or not isinstance(absorbs, str):
        raise ValueError(f"layer is {name!r:.60}, absorbs {absorbs!r:.60}")
    settings = entry["settings"]
    linear = isinstance(entry["shape"], list) and len(entry["shape"]) == 2
    if not isinstance(settings, dict) or not (
        settings == {} or (set(settings) == {"cusparselt"} and settings["cusparselt"] is True)
        if linear
        else set(settings) == {*CONVOLUTION, "innermost"}
    ):
        raise ValueError(f"settings of {name} is {settings!r:.60}")
    return _packed(name, entry | settings, absorbs)


def _packed(name: str, entry: Any, absorbs: str = "") -> Pack:
    """Build a `Pack` from the flat entries that older formats have."""
    if field := _unsound(entry):
        raise ValueError(
            f"{field} of {name} is {entry.get(field) if isinstance(entry, dict) else entry!r:.60}"
        )
    settings = {key: entry[key] for key in CONVOLUTION} if len(entry["shape"]) == 4 else {}
    if settings:
        settings["innermost"] = entry.get("innermost", False)
    elif "cusparselt" in entry:
        settings["cusparselt"] = True
    return Pack(name, entry["pattern"], tuple(entry["shape"]), entry["activation"], absorbs, settings)


def _take(entry: dict[str, Any]) -> Take:
    selections, sizes = entry["selections"], entry["sizes"]
    if not isinstance(selections, list) or not isinstance(sizes, list):
        raise ValueError(f"a cut is {entry!r:.60}")
    for x in sizes:
        sound = isinstance(x, list) and len(x) == 4 and all(isinstance(t, str) for t in x[:2])
        if not sound or not all(type(n) is int and n >= 0 for n in x[2:]):
            raise ValueError(f"a size is {x!r:.60}")
    return Take(tuple(map(_selection, selections)), tuple((a, b, c, d) for a, b, c, d in sizes))


def _selection(entry: Any) -> Selection:
    if not isinstance(entry, dict) or set(entry) != {"size", "left", "tensors"}:
        raise ValueError(f"a selection is {entry!r:.60}")
    size, left, tensors = entry["size"], entry["left"], entry["tensors"]
    if not isinstance(left, list) or not left or not all(type(n) is int for n in (size, *left)):
        raise ValueError(f"a selection keeps {left!r:.60} of {size!r:.20}")
    if left != sorted(set(left)) or left[0] < 0 or left[-1] >= size:
        raise ValueError(f"a selection keeps {left!r:.60} of {size}")
    if not isinstance(tensors, list) or not all(
        isinstance(x, list) and len(x) == 2 and isinstance(x[0], str) and x[1] in range(8) for x in tensors
    ):
        raise ValueError(f"a selection is of {tensors!r:.60}")
    return Selection(size, tuple(left), tuple((name, int(dim)) for name, dim in tensors))


_KINDS: dict[str, tuple[Callable[[dict[str, Any]], Edit], tuple[str, ...]]] = {
    "open": (_names(Open, "module"), ("module",)),
    "fold": (_names(Fold, "convolution", "norm"), ("convolution", "norm")),
    "drop": (_names(Drop, "module"), ("module",)),
    "take": (_take, ("selections", "sizes")),
    "implant": (_implant, ("layer", "rank")),
    "pack": (_pack, ("layer", "pattern", "shape", "activation", "absorbs", "settings")),
}


def _read_old(content: dict[str, Any], version: int) -> list[Edit]:
    """Read format 1 or 2.

    Packed layers stand there by name, and lists of modules that became identities, remainders or open
    attention.
    """
    content = {"remainders": [], **content} if version == 1 else content
    for key in ("identities", "remainders", "opened"):
        if not isinstance(content.get(key), list) or not all(isinstance(name, str) for name in content[key]):
            raise ValueError(f"{key} is {content.get(key)!r:.60}")
    if not isinstance(content.get("layers"), dict):
        raise ValueError(f"layers is {content.get('layers')!r:.60}")
    edits: list[Edit] = [Open(name) for name in content["opened"]]
    edits += [Fold("", name) for name in content["remainders"]]
    edits += [Drop(name) for name in content["identities"]]
    return [*edits, *(_packed(name, entry) for name, entry in content["layers"].items())]


def _unsound(entry: Any) -> str:
    """Say which entry of a packed layer is none that `save` writes; empty if all are."""

    def whole(x: Any, least: int, count: int) -> bool:
        return (
            isinstance(x, list) and len(x) == count and all(type(n) is int and least <= n < 2**31 for n in x)
        )

    if not isinstance(entry, dict):
        return "entry"
    shape = entry.get("shape", [])
    if not whole(shape, 1, 2) and not whole(shape, 1, 4):
        return "shape"
    try:
        packable(entry["pattern"])
    except (KeyError, ValueError, TypeError, AttributeError):
        return "pattern"
    if "activation" not in entry or entry["activation"] not in (None, "relu", "gelu"):
        return "activation"
    if len(shape) == 2:
        return ""
    for key, least in (("stride", 1), ("padding", 0), ("dilation", 1)):
        if not whole(entry.get(key), least, 2) and not (
            key == "padding" and entry.get(key) in ("same", "valid")
        ):
            return key
    if entry.get("padding_mode") not in ("zeros", "reflect", "replicate", "circular"):
        return "padding_mode"
    return "" if type(entry.get("innermost", False)) is bool else "innermost"
