"""Memory of a run by the number of its rows: a snapshot of generated claims, tokenised, and read in the order of an epoch.

Each size is read by a process of its own; what it takes beside the smallest one is what its rows cost.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from benchmarks.figures import Figure, finish
from storage import snapshots

SMALL = 10_000
console = Console(stderr=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--read", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.read:
        print(json.dumps(read(asked.read)))
        return
    peaks, rates = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for rows in (SMALL, asked.rows):
            place = Path(folder) / str(rows)
            snapshots.write(place, make_rows(rows), {})
            for state in ("tokenised", "read again"):
                done = subprocess.run(
                    [sys.executable, "-m", "benchmarks.rows", "--read", str(place)], check=True, capture_output=True, text=True
                )
                told = json.loads(done.stdout.splitlines()[-1])
                peaks[rows, state], rates[rows, state] = told["peak_bytes"] / 1e6, rows / told["seconds"]
                console.print(f"{rows} rows, {state}: {told}")
    finish(
        "rows",
        [
            Figure(
                f"peak memory, MB, {asked.rows:,} rows {state}, {SMALL:,} rows", peaks[asked.rows, state], peaks[SMALL, state], at_most=1.5
            )
            for state in ("tokenised", "read again")
        ]
        + [Figure("rows/s tokenised", rates[asked.rows, "tokenised"]), Figure("rows/s read again", rates[asked.rows, "read again"])],
    )


def make_rows(count: int) -> Iterator[snapshots.Row]:
    """Made-up claims."""
    for number in range(count):
        fields = {"treatment": f"treatment {number % 977}", "diagnosis": f"diagnosis {number % 613}", "age": str(number % 90)}
        answer = "APPROVED" if number % 3 else "DENIED"
        yield snapshots.Row(
            f"row-{number}", f"{number:064x}", "train", "import", f"label-{number}", json.dumps(fields), "{}", answer, None, "2026-01-01"
        )


def read(folder: Path) -> dict[str, float]:
    """Read all rows as a run does: tokenise them unless that was done, then pack them batch after batch."""
    import time  # noqa: PLC0415  what is imported here is part of what every size takes

    from trainers import data, loop, packing, tiny  # noqa: PLC0415
    from trainers.spec import Options, Prompt  # noqa: PLC0415

    prompt = Prompt(text="{% for name, value in input.items() %}{{ name }}: {{ value }}\n{% endfor %}decision:\n")
    tokenizer = tiny.train_tokenizer(prompt.render(json.loads(row.input)) for row in make_rows(SMALL))
    began = time.perf_counter()
    lessons = data.read_lessons(folder, tokenizer, prompt, ("APPROVED", "DENIED"), Options(), limit=512, warm=False, seed=1)
    examples = data.list_examples(lessons.train)
    schedule = loop.Schedule(len(examples), 256, 1, 0.05, 1)
    for step in range(schedule.steps):
        packing.pack([examples[row] for row in schedule.batch(step)], 8192, "cpu")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"peak_bytes": peak, "seconds": time.perf_counter() - began}


if __name__ == "__main__":
    main()
