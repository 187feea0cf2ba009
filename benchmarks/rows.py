"""Memory of a run by the number of its rows: a snapshot of generated claims, tokenised, read in the order of an epoch, and drawn from.

A warm start draws from the imported rows (`warm`), and before that from those that were learned before (`warm, half of the old`).
Each size and each of the four is a process of its own; what it takes beside the smallest one is what its rows cost. *Memory* is what the
process holds for itself (RssAnon, looked at 20 times a second). With the pages of mapped files, which the kernel takes back when it wants
to, it is the resident size.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from benchmarks.figures import Figure, finish
from storage import snapshots

SMALL = 10_000
STATES = ("tokenised", "read", "warm", "warm, half of the old")
LOOK_SECONDS = 0.05
console = Console(stderr=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--child", nargs=2, metavar=("STATE", "FOLDER"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        print(json.dumps(measure(asked.child[0], Path(asked.child[1]))))
        return
    found: dict[tuple[int, str], dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for rows in (SMALL, asked.rows):
            place = Path(folder) / str(rows)
            snapshots.write(place, make_rows(rows), {})
            for state in STATES:
                command = [sys.executable, "-m", "benchmarks.rows", "--child", state, str(place)]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                found[rows, state] = json.loads(done.stdout.splitlines()[-1])
                console.print(f"{rows} rows, {state}: {found[rows, state]}")
    few, many = ({state: found[rows, state] for state in STATES} for rows in (SMALL, asked.rows))
    finish(
        "rows",
        [
            *(
                Figure(f"memory, MB, {asked.rows:,} rows {state}, {SMALL:,} rows", many[state]["own"], few[state]["own"], at_most=1.5)
                for state in STATES
            ),
            *(Figure(f"resident size, MB, the same {state}", many[state]["resident"], few[state]["resident"]) for state in STATES),
            *(Figure(f"rows/s {state}", asked.rows / many[state]["seconds"]) for state in STATES),
        ],
    )


def make_rows(count: int) -> Iterator[snapshots.Row]:
    """Made-up claims."""
    for number in range(count):
        fields = {"treatment": f"treatment {number % 977}", "diagnosis": f"diagnosis {number % 613}", "age": str(number % 90)}
        answer = "APPROVED" if number % 3 else "DENIED"
        yield snapshots.Row(
            f"row-{number}", f"{number:064x}", "train", "import", f"label-{number}", json.dumps(fields), "{}", answer, None, "2026-01-01"
        )


def measure(state: str, folder: Path) -> dict[str, float]:
    """Tokenise all rows, or read them, tokenised before, as a run does: batch after batch, packed. Peaks in MB."""
    from trainers import data, packing, schedule, tiny  # noqa: PLC0415  what is imported here is part of what every size takes
    from trainers.spec import Options, Prompt  # noqa: PLC0415

    prompt = Prompt(text="{% for name, value in input.items() %}{{ name }}: {{ value }}\n{% endfor %}decision:\n")
    tokenizer = tiny.train_tokenizer(prompt.render(json.loads(row.input)) for row in make_rows(SMALL))
    is_warm, learned = state.startswith("warm"), folder if state.endswith("old") else None
    options = Options(replay_share=0.5) if learned else Options()
    with watching() as own:
        began = time.perf_counter()
        lessons = data.read_lessons(
            folder, tokenizer, prompt, ("APPROVED", "DENIED"), options, limit=512, warm=is_warm, seed=1, learned=learned
        )
        examples = data.list_examples(lessons.train)
        order = schedule.Schedule(len(examples), 256, 1, 0.05, 1)
        for step in range(order.steps if state == "read" else 0):
            packing.pack([examples[row] for row in order.batch(step)], 8192, "cpu", share_prefixes=False)
        seconds = time.perf_counter() - began
    return {"own": max(own), "resident": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, "seconds": seconds}


@contextlib.contextmanager
def watching() -> Iterator[list[float]]:
    """What this process holds for itself, in MB, time after time."""
    seen, is_over = [look()], threading.Event()

    def watch() -> None:
        while not is_over.wait(LOOK_SECONDS):
            seen.append(look())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield seen
    finally:
        is_over.set()
        watcher.join()
        seen.append(look())


def look() -> float:
    """What this process holds for itself now, in MB (proc_pid_status(5))."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:")) / 1024


if __name__ == "__main__":
    main()
