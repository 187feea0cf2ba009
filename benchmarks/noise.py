"""What the loop claims where there is nothing to learn: `ratchet simulate --baselines` on 1,000 made-up claims whose answers are noise.

The answer is `Claim Status`, the input all other columns but the ids; history 400, stream 600, budget 50 %. An honest loop claims no gain:
the interval of `gain_over_frozen` reaches 0 or below. Each replay lies in its own folder and is skipped when it is done.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import os
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import replays
from benchmarks.figures import Figure, finish

HISTORY = 400
BUDGET = "0.5"
IDS = ("Claim ID", "Provider ID", "Patient ID")
DAY, ANSWER = "Date of Service", "Claim Status"
console = Console(stderr=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path("bench-out/noise"))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3, 4, 5])
    asked = parser.parse_args()
    cases = read_cases(Path(os.environ["RATCHET_TEST_DATA"]) / "claims_synthetic_1000" / "claim_data.csv.gz")
    gains = [replay(asked.out / f"seed{seed}", cases, seed)["gain_over_frozen"] for seed in asked.seeds]
    for seed, gain in zip(asked.seeds, gains, strict=True):
        console.print(f"seed {seed}: gain over frozen {gain['estimate']:+.4f} ({gain['low']:+.4f} to {gain['high']:+.4f})")
    honest = sum(gain["low"] <= 0 for gain in gains)
    finish("noise", [Figure(f"seeds of {len(gains)} that claim no gain", honest, at_least=0.8 * len(gains))])


def read_cases(path: Path) -> list[dict[str, Any]]:
    """The claims in the file's order, an hour apart: the answers know no time either."""
    began = datetime(2025, 1, 1, tzinfo=UTC)
    with gzip.open(path, "rt", encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    return [
        {
            "claim_id": row[IDS[0]],
            "occurred_at": (began + timedelta(hours=number)).isoformat(),
            "input": {name: value for name, value in row.items() if name not in (*IDS, ANSWER)},
            "answer": row[ANSWER],
        }
        for number, row in enumerate(rows)
    ]


def replay(folder: Path, cases: Sequence[dict[str, Any]], seed: int) -> dict[str, Any]:
    """The report of one replay, which is made unless it is there."""
    if not (folder / "report.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        for name, part in (("history", cases[:HISTORY]), ("stream", cases[HISTORY:])):
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(case) + "\n" for case in part))
        replays.simulate(folder, "--budget", BUDGET, "--seed", str(seed))
    return replays.read_report(folder)


if __name__ == "__main__":
    main()
