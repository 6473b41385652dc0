"""Dataclasses as JSON that any reader takes, and back: a record edited by hand is refused with a sentence."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import fields
from typing import Any, TypeVar, get_type_hints

Row = TypeVar("Row")
Whole = TypeVar("Whole")


def to_json(content: Any) -> str:
    """Write JSON that any reader takes: numbers that are not finite become null."""

    def finite(x: Any) -> Any:
        if isinstance(x, Mapping):
            return {key: finite(value) for key, value in x.items()}
        if isinstance(x, list | tuple):
            return [finite(value) for value in x]
        return None if isinstance(x, float) and not math.isfinite(x) else x

    return json.dumps(finite(content), indent=1, allow_nan=False)


def read(kind: type[Whole], rows: Mapping[str, type[Any]], text: str) -> Whole:
    """Read a report from the JSON of its fields.

    Args:
        kind: of the report.
        rows: the kinds of its lists, by field; `layers` must be there, other lists are of texts.
        text: the JSON.

    Raises:
        ValueError: it is no JSON, or an entry is missing, unknown or of another type; the sentence names it.
    """
    try:
        content = json.loads(text)
    except RecursionError:
        raise ValueError(
            "expected an object with a list of layers, got one that is nested too deeply"
        ) from None
    if not isinstance(content, dict) or not isinstance(content.get("layers"), list):
        raise ValueError("expected an object with a list of layers")
    lists = {
        name: [_fields(row, x, f"{name.removesuffix('s')} {i}: ") for i, x in enumerate(content[name])]
        for name, row in rows.items()
        if isinstance(content.get(name), list)
    }
    return _fields(kind, {**content, **lists}, "", rows)


def _fields(kind: type[Row], content: Any, where: str, rows: Collection[str] = ()) -> Row:
    """Read one dataclass from JSON; null stands for a number that was not finite."""
    if not isinstance(content, dict):
        raise ValueError(f"{where}expected an object, got {content!r:.60}")
    hints, values = get_type_hints(kind), {}
    if unknown := [key for key in content if key not in hints]:
        raise ValueError(f"{where}there is no entry {unknown[0]!r:.60}")
    for entry in fields(kind):  # type: ignore[arg-type]  # of a dataclass
        name, hint = entry.name, getattr(hints[entry.name], "__origin__", hints[entry.name])
        if name not in content:
            continue
        value = content[name]
        value = (
            tuple(value)
            if hint is tuple and isinstance(value, list) and all(type(x) is int and x > 0 for x in value)
            else value
        )
        value = math.nan if hint is float and value is None else value
        if (
            hint is list
            and name not in rows
            and isinstance(value, list)
            and not all(isinstance(x, str) for x in value)
        ):
            raise ValueError(f"{where}expected {name} to be a list of texts, got {value!r:.60}")
        if not (
            type(value) is int
            if hint in (int, float) and not isinstance(value, float)
            else isinstance(value, hint)
        ):
            raise ValueError(f"{where}expected {name} to be of type {hint.__name__}, got {value!r:.60}")
        if isinstance(value, int) and abs(value) >= 2**63:
            raise ValueError(
                f"{where}expected {name} to be below 2**63, got a number of {len(str(value))} digits"
            )
        if isinstance(value, int | float) and value < 0:
            raise ValueError(f"{where}expected {name} to be at least 0, got {value!r:.60}")
        values[name] = value
    try:
        return kind(**values)
    except TypeError as error:  # an entry without a default is missing
        raise ValueError(f"{where}{error}") from error
