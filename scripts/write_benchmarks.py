"""Write `docs/benchmarks.md` from the closing line that each benchmark left in `benchmarks/results/`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS, PAGE = ROOT / "benchmarks" / "results", ROOT / "docs" / "benchmarks.md"

INTRODUCTION = """\
# Benchmarks

What was measured, by `make bench NAME=…`; how, and against which baseline, is told in [the method](../benchmarks/README.md). A ratio
compares with a baseline that ran in the same run on the same machine; the absolute figures are that machine's.

This page is generated from `benchmarks/results/`: run a benchmark again to change it.
"""


def write_page() -> str:
    """`docs/benchmarks.md`: a table for each benchmark that has a result, and the names of the others."""
    results = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    lines = [INTRODUCTION, *(line for result in results for line in _tabulate(result))]
    missing = sorted(find_names() - {result["benchmark"] for result in results})
    lines += [line for name in missing for line in (f"## {name}", "", "Not measured: no result is kept.", "")]
    return "\n".join(lines).rstrip() + "\n"


def find_names() -> set[str]:
    """The benchmarks that there are, by the name that each ends with."""
    ends = re.compile(r'finish\(\s*"(\w+)"|"benchmark": "(\w+)"')
    return {name for path in RESULTS.parent.glob("*.py") for pair in ends.findall(path.read_text()) for name in pair if name}


def _tabulate(result: dict[str, Any]) -> list[str]:
    heading = [f"## {result['benchmark']}", "", f"{result['machine']}.", ""]
    rows = ["| figure | value | baseline | ratio | goal | holds |", "|---|---|---|---|---|---|"]
    return [*heading, *rows, *(_to_row(figure) for figure in result["figures"]), ""]


def _to_row(figure: dict[str, Any]) -> str:
    ratio = None if figure["ratio"] is None else f"{figure['ratio']:.2f} ×"  # noqa: RUF001
    holds = {True: "yes", False: "**no**", None: None}[figure["holds"]]
    cells = (figure["name"], _show(figure["value"]) or "not measured", _show(figure["baseline"]), ratio, figure["goal"], holds)
    return f"| {' | '.join(cell or '–' for cell in cells)} |"  # noqa: RUF001


def _show(value: float | None) -> str | None:
    """Four digits, without an exponent."""
    if value is None:
        return None
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"  # noqa: PLR2004


if __name__ == "__main__":
    PAGE.write_text(write_page())
    print(f"Wrote {PAGE.relative_to(ROOT)}.")
