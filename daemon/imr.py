"""California's Independent Medical Reviews as history and stream: `python -m daemon.imr --years 2001-2005 FILE.jsonl`.

A physician who works for neither side upholds or overturns a health plan's denial. Overturned means that the claim should have been
approved. Source and terms: docs/data.md.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import re
from collections import defaultdict
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).parents[1] / "data" / "imr_ca_2001_2013.csv.gz"
ANSWERS = {"Overturned Decision of Health Plan": "APPROVED", "Upheld Decision of Health Plan": "DENIED"}
FIELDS = ("diagnosis_category", "diagnosis_subcategory", "treatment_category", "treatment_subcategory", "type", "age_range", "gender")
SLICES = ("diagnosis_category", "type", "age_range", "gender")


def read_decisions(first_year: int, last_year: int, source: Path = SOURCE) -> Iterator[dict[str, Any]]:
    """The decisions of these years, one by one in order: claim_id, group, occurred_at, input, attributes, answer.

    The record has a year and a running number but no date: the times spread each year's cases evenly over it.
    """
    by_year: dict[int, list[dict[str, str]]] = defaultdict(list)
    with gzip.open(source, "rt", encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            by_year[int(row["report_year"])].append(row)
    for year in range(first_year, last_year + 1):
        rows = sorted(by_year[year], key=lambda row: (_number(row["reference_id"]), row["reference_id"]))
        began = datetime(year, 1, 1, tzinfo=UTC)
        step = (datetime(year + 1, 1, 1, tzinfo=UTC) - began) / max(1, len(rows))
        for place, row in enumerate(rows):
            yield _to_case(row, began + place * step)


def _to_case(row: dict[str, str], at: datetime) -> dict[str, Any]:
    return {
        "claim_id": row["reference_id"],
        "group": row["reference_id"],
        "occurred_at": (at - timedelta(microseconds=at.microsecond)).isoformat(),
        "input": {name: row[name] for name in FIELDS},
        "attributes": {name: row[name] or "unknown" for name in SLICES},
        "answer": ANSWERS[row["determination"]],
    }


def _number(reference_id: str) -> int:
    found = re.search(r"-(\d+)$", reference_id)
    return int(found.group(1)) if found else 0


def write_jsonl(path: Path, first_year: int, last_year: int, last: int | None = None) -> int:
    """Write the decisions of these years, or only the `last` ones of them, as JSON lines; returns how many."""
    cases = list(read_decisions(first_year, last_year))
    cases = cases[-last:] if last else cases
    path.write_text("".join(json.dumps(case, ensure_ascii=False) + "\n" for case in cases), encoding="utf-8")
    return len(cases)


def main() -> None:
    """Write one file."""
    parser = argparse.ArgumentParser(description="Turn the public IMR decisions into JSON lines.")
    parser.add_argument("--years", required=True, metavar="FIRST-LAST")
    parser.add_argument("file", type=Path)
    asked = parser.parse_args()
    first, last = (int(year) for year in asked.years.split("-"))
    print(f"{write_jsonl(asked.file, first, last)} decisions written to {asked.file}")  # noqa: T201


if __name__ == "__main__":
    main()
