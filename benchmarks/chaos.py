"""Chaos: the daemon and its trainers are killed at random moments of a running loop; what is lost, done twice or broken is counted.

How the loop is set up and harmed, and what is counted, stands in `tests/chaos_fixtures.py`: the test does the same with five kills.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from benchmarks.figures import Figure, finish
from tests import chaos_fixtures


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=200, help="half of them of the daemon, half of a trainer")
    parser.add_argument("--seed", type=int, default=1)
    asked = parser.parse_args()
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory() as folder:
        loop = chaos_fixtures.Loop(Path(folder) / "claims", asked.seed)
        columns = (TextColumn("killed {task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        try:
            with Progress(*columns, console=console) as progress:
                bar = progress.add_task("nobody", total=asked.kills)
                loop.run(asked.kills, lambda victim: progress.update(bar, description=f"a {victim}".ljust(9), advance=1))
        finally:
            loop.close()
        tally = chaos_fixtures.count(loop)
        for fault in chaos_fixtures.find_faults(loop):
            console.print(fault, markup=False)
    figures = describe(loop, tally)
    finish("chaos", figures)
    sys.exit(any(figure.holds is False for figure in figures))


def describe(loop: chaos_fixtures.Loop, tally: chaos_fixtures.Tally) -> list[Figure]:
    return [
        Figure("kills of the daemon", loop.kills["daemon"]),
        Figure("kills of a trainer", loop.kills["trainer"]),
        Figure("events acknowledged", tally.acknowledged),
        Figure("acknowledged events lost", tally.lost, at_most=0),
        Figure("things done twice", tally.twice, at_most=0),
        Figure("champions too many, or not those of history and pointer file", tally.champions_astray, at_most=0),
        Figure("breaks in the ledger", tally.ledger_breaks, at_most=0),
        Figure("damaged adapters, dataset versions, database pages", tally.damaged, at_most=0),
        Figure("runs", sum(tally.runs.values())),
        Figure("share of the runs that are done", tally.finished, at_least=0.95),
        Figure("runs parked", tally.runs.get("parked", 0)),
        Figure("runs parked without a reason", tally.parked_without_reason, at_most=0),
        Figure("runs neither done nor parked", tally.unfinished, at_most=0),
        Figure("faults of the daemon itself, by its log", tally.faults, at_most=0),
    ]


if __name__ == "__main__":
    main()
