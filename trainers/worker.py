"""A resident trainer: run folders on standard input, one per line; one line of JSON back each, in the same order.

The base stays loaded for the next run with the same one, so a retrain pays neither for imports nor for loading.
It ends at the end of its input; SIGTERM and SIGINT stop it after a checkpoint.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import IO

from trainers import bases, train
from trainers.spec import EXIT_DONE
from trainers.stopping import Stop

log = logging.getLogger(__name__)


class IdleStop(Stop):
    """A stop that ends the process at once while no run is going on: reading a line can't be woken otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.is_idle = True

    def __call__(self, *signal: object) -> None:
        """Handle a signal."""
        super().__call__(*signal)
        if self.is_idle:
            raise SystemExit(EXIT_DONE)


def main() -> int:
    """Work until the input ends or a signal comes."""
    argparse.ArgumentParser(prog="python -m trainers.worker", description=__doc__).parse_args()
    stop = IdleStop()
    stop.listen()
    answers = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):  # A library that prints must not write between the answers.
        work(sys.stdin, answers, stop)
    return EXIT_DONE


def work(lines: Iterable[str], answers: IO[str], stop: IdleStop) -> None:
    """Perform the run of each line and answer it, until the input ends or a run was stopped."""
    held = bases.Bases()
    for line in lines:
        if not line.strip():
            continue
        started = time.monotonic()
        stop.is_idle = False
        try:
            status, sentence = train.run(Path(line.strip()), None, held, stop)
        except Exception as error:  # A run that breaks is that run's failure; the next one starts from a fresh base.
            log.exception("run_broke")
            held = bases.Bases()
            status, sentence = train.EXIT_FAILED, f"failed: {type(error).__name__}: {error}"
        answer = {"run_dir": line.strip(), "exit": status, "reason": sentence, "seconds": round(time.monotonic() - started, 3)}
        answers.write(json.dumps(answer, ensure_ascii=False) + "\n")
        answers.flush()
        stop.is_idle = True
        if stop.is_requested:
            break


if __name__ == "__main__":
    sys.exit(main())
