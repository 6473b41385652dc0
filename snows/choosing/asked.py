"""What was asked of `prune`, written down: a run that was interrupted goes on with the same alone."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields
from functools import partial
from types import CellType, CodeType, FunctionType
from typing import Any

from torch import Tensor, nn

from snows.choosing.budgets import Budget
from snows.choosing.plan import Plan
from snows.matching.losses import Matching


def settings(
    pattern: Any,
    select: Any,
    solver: Any,
    matching: Matching,
    cap: float,
    recalibrate: bool,
    seed: int,
    plan: Plan,
    layers: Iterable[str],
    images: int,
) -> dict[str, Any]:
    """Write down what was asked; a run that was interrupted goes on with the same alone.

    Arguments are those of `prune` but for what was made of them: the plan, the layers that may be treated,
    and how many images the first batch has.
    """
    several = isinstance(pattern, Mapping) or callable(pattern)
    deployed: dict[str, Any] = {}  # that `snows deploy` takes over
    if isinstance(pattern, Budget) and pattern.of == "latency":
        deployed = {"runtime": pattern.runtime, "images": pattern.images or images}
    if isinstance(pattern, Budget) and pattern.of == "bytes" and pattern.masks:
        deployed = {"objective": "size"}
    return {
        "pattern": plan.patterns
        if several
        else _goal(pattern)
        if isinstance(pattern, Budget)
        else str(pattern),
        "select": _name(select),
        "solver": str(solver),
        **asdict(matching),
        "cap": cap,
        "recalibrate": recalibrate,
        "seed": seed,
        "layers": list(layers),
        **deployed,
    }


def _goal(goal: Budget) -> str:
    """Write down a budget; the same in every process, and whole however long it is."""
    values = ", ".join(f"{x.name}={_value(getattr(goal, x.name))}" for x in fields(goal))
    return f"{type(goal).__name__}({values})"


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key!r}: {_value(x)}' for key, x in value.items())}}}"
    if isinstance(value, Tensor):
        return repr(value.tolist())
    return _name(value) if callable(value) else repr(value)


def _name(select: Any) -> str:
    if isinstance(select, partial):
        settings = ", ".join(f"{k}={_name(v) if callable(v) else v!r}" for k, v in select.keywords.items())
        return f"{_name(select.func)}({settings})"
    if isinstance(select, Mapping | nn.Module):
        return "masks"
    name: str = getattr(select, "__name__", type(select).__name__)
    if not isinstance(select, FunctionType) or (select.__module__ or "").partition(".")[0] == "snows":
        return name
    used = [*(select.__defaults__ or ()), *map(_content, select.__closure__ or ())]
    given = [x for x in used if isinstance(x, int | float | str)]
    return f"<{name.strip('<>')} {zlib.crc32(repr((_code(select.__code__), given)).encode()):x}>"


def _code(code: CodeType) -> tuple[Any, ...]:
    """Write down what a function computes, the same in every process of one Python."""
    return code.co_code, code.co_names, [_constant(x) for x in code.co_consts]


def _constant(x: Any) -> Any:
    if isinstance(x, CodeType):
        return _code(x)
    return sorted(map(repr, x)) if isinstance(x, frozenset) else repr(x)  # a set's order is the process's own


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # nothing is in it yet
        return None
