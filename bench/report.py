"""Turn tracked measurements into the tables of the README and of docs/.

    python bench/report.py                 # rewrites the tables between <!-- name --> and <!-- /name --> in place
    python bench/report.py FILE.json       # prints the table of one file

`name` is a file of `bench/results/` without `.json`. Each figure is the median over its rows (seeds or repeats).
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
DIGITS = {
    "divergence": 5,
    "accuracy": 2,
    "top-1": 1,
    "top-5": 1,
    "agreement": 2,
    "seconds": 1,
    "MACs": 1,
    "parameters": 1,
}
LABELS = ("network", "pattern", "method", "layer")


# Implementations that are ours; all others are rivals.
OURS = (
    "snows",
    "snows without its graph",
    "snows, torch.compile frozen",
    *(f"{pattern}{layout}" for layout in ("", " innermost") for pattern in ("2:4", "1:4", "0.9")),
)


def milliseconds(x: float) -> str:
    return f"{x:.3g}" if x < 1000 else f"{x:.0f}"


def race(rows: list[dict]) -> str:
    """Markdown: one line a case, the milliseconds of each implementation, and how much faster ours are than the fastest rival."""
    rows = [row for row in rows if "median ms" in row]  # what could not run says why in its file
    names = list(dict.fromkeys(row["implementation"] for row in rows))
    ours = [name for name in names if name in OURS]
    shares = [x for x in ("share of copy", "share of matmul") if x in rows[0]]
    cases: dict[str, dict[str, dict]] = {}
    for row in rows:
        cases.setdefault(row["case"], {})[row["implementation"]] = row
    heads = [
        "case",
        *(f"{name}, ms" for name in names),
        *(f"{name}, times as fast" for name in ours),
        *shares,
    ]
    lines = ["| " + " | ".join(heads) + " |", "| --- |" + " ---: |" * (len(heads) - 1)]
    for case, found in cases.items():
        rivals = [row["median ms"] for name, row in found.items() if name not in ours]
        cells = [milliseconds(found[name]["median ms"]) if name in found else "" for name in names]
        cells += [
            f"{min(rivals) / found[name]['median ms']:.2f}" if rivals and name in found else ""
            for name in ours
        ]
        cells += [f"{found[ours[0]][x]:.2f}" for x in shares]
        lines.append("| " + " | ".join([case, *cells]) + " |")
    return "\n".join(lines)


def table(result: dict) -> str:
    """Markdown: one line for each combination of labels, medians of the numbers."""
    rows = result["rows"]
    if "implementation" in rows[0]:
        return race(rows)
    labels = [x for x in LABELS if x in rows[0]]
    numbers = [x for x in rows[0] if x not in labels and x != "seed" and isinstance(rows[0][x], int | float)]
    groups: dict[tuple[str, ...], list[dict]] = {}
    for row in rows:
        groups.setdefault(tuple(str(row[x]) for x in labels), []).append(row)
    dense = result.get("dense")
    lost = ["lost"] if isinstance(dense, float) and "accuracy" in numbers and "network" not in labels else []
    lines = [
        "| " + " | ".join([*labels, *lost, *numbers]) + " |",
        "| " + " | ".join(["---"] * len(labels) + ["---:"] * len(lost + numbers)) + " |",
    ]
    for key, group in groups.items():
        medians = {x: statistics.median(row[x] for row in group) for x in numbers}
        cells = [f"{dense - medians['accuracy']:.2f}"] if lost else []
        cells += [
            f"{medians[x]:.{DIGITS.get(x, 0 if isinstance(group[0][x], int) else 3)}f}" for x in numbers
        ]
        lines.append("| " + " | ".join([*key, *cells]) + " |")
    return "\n".join(lines)


def main() -> None:
    if len(sys.argv) > 1:
        print(table(json.loads(Path(sys.argv[1]).read_text())))
        return
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        text = page.read_text()

        def fill(match: re.Match[str], page: Path = page) -> str:
            name = match[1]
            if not (RESULTS / f"{name}.json").is_file():
                print(f"{page.relative_to(ROOT)}: no {name}.json; its table stays as it is")
                return match[0]
            return f"<!-- {name} -->\n{table(json.loads((RESULTS / f'{name}.json').read_text()))}\n<!-- /{name} -->"

        filled = re.sub(r"<!-- ([\w/.-]+) -->\n.*?<!-- /\1 -->", fill, text, flags=re.DOTALL)
        if filled != text:
            page.write_text(filled)
            print(f"{page.relative_to(ROOT)}: tables rewritten")


if __name__ == "__main__":
    main()
