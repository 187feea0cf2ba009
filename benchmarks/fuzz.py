"""Fuzz: malformed requests of all kinds against the real daemon; what was not answered, answered with 5xx, or lost is counted.

How they are made, and what is counted, stands in `tests/fuzz_fixtures.py`: the test does the same with fewer.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from benchmarks.figures import Figure, finish
from tests import fuzz_fixtures
from tests.daemon_fixtures import Daemon, make_home


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    asked = parser.parse_args()
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder) / "claims"
        secrets = make_home(home)
        daemon = Daemon(home).start()
        try:
            target = fuzz_fixtures.Target(daemon, secrets, asked.seed)
            with Progress(console=console) as progress:
                bar = progress.add_task("requests", total=asked.requests)
                target.attack(asked.requests, lambda made: progress.update(bar, completed=made))
            tally = fuzz_fixtures.count(target)
            status = daemon.stop()
        finally:
            daemon.kill()
    for complaint in target.complaints:
        console.print(complaint, markup=False)
    figures = [
        Figure("requests", tally.requests, at_least=min(asked.requests, 1000)),
        *(Figure(f"of them answered with {code}", number) for code, number in sorted(target.statuses.items())),
        Figure("answers with 5xx, none at all, or one that the OpenAPI does not know", tally.complaints, at_most=0),
        Figure("events acknowledged", tally.acknowledged),
        Figure("acknowledged events lost", tally.lost, at_most=0),
        Figure("breaks in the ledger", tally.ledger_breaks, at_most=0),
        Figure("faults of the daemon itself, by its log", tally.faults, at_most=0),
        Figure("exit status of the daemon, told to stop afterwards", status, at_most=0),
    ]
    finish("fuzz", figures)
    sys.exit(any(figure.holds is False for figure in figures))


if __name__ == "__main__":
    main()
