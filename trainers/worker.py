"""A resident trainer: a line of JSON on standard input for each attempt, `{"run_dir", "attempt"}`, and one back, in the same order.

The base stays loaded for the next run with the same one, so a retrain pays neither for imports nor for loading.
It ends at the end of its input, or when it has waited too long; SIGTERM and SIGINT stop it after a checkpoint.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

from trainers import bases, train
from trainers.attempts import Attempt, open_attempt
from trainers.spec import EXIT_DONE, LOCK, LOG
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
    """Work until the input ends, a signal comes, or nothing has come for too long."""
    parser = argparse.ArgumentParser(prog="python -m trainers.worker", description=__doc__)
    parser.add_argument("--runs", help="where its run folders lie: what tells it from the trainers of another installation")
    parser.add_argument("--lock", type=int, help="the first attempt's lock, held already, as a file descriptor")
    parser.add_argument("--idle-seconds", type=float, default=0, help="end after waiting so long; 0 waits for ever")
    arguments = parser.parse_args()
    stop = IdleStop()
    stop.listen()
    signal.signal(signal.SIGALRM, stop)
    answers = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):  # A library that prints must not write between the answers.
        work(sys.stdin, answers, stop, arguments.idle_seconds, arguments.lock)
    return EXIT_DONE


def work(lines: Iterable[str], answers: IO[str], stop: IdleStop, idle_seconds: float = 0, held_lock: int | None = None) -> None:
    """Perform the attempt of each line and answer it, until the input ends or a run was stopped."""
    held = bases.Bases()
    signal.setitimer(signal.ITIMER_REAL, idle_seconds)
    for line in filter(str.strip, lines):
        stop.is_idle = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        started, asked = time.monotonic(), json.loads(line)
        try:
            first_lock, held_lock = held_lock, None
            with hold(open_attempt(Path(asked["run_dir"]), asked.get("attempt")), first_lock) as attempt:
                status, sentence = train.run(attempt.run_dir, attempt.number, held, stop)
        except Exception as error:  # A run that breaks is that run's failure; the next one starts from a fresh base.
            log.exception("run_broke")
            held = bases.Bases()
            status, sentence = train.EXIT_FAILED, f"failed: {type(error).__name__}: {error}"
        answer = {"run_dir": asked["run_dir"], "exit": status, "reason": sentence, "seconds": round(time.monotonic() - started, 3)}
        answers.write(json.dumps(answer, ensure_ascii=False) + "\n")
        answers.flush()
        stop.is_idle = True
        if stop.is_requested:
            break
        signal.setitimer(signal.ITIMER_REAL, idle_seconds)


@contextlib.contextmanager
def hold(attempt: Attempt, held_lock: int | None = None) -> Iterator[Attempt]:
    """Lock the attempt for as long as it is worked on, so that a later daemon finds who does, and speak into its log."""
    locked = (attempt.folder / LOCK).open("a") if held_lock is None else os.fdopen(held_lock, "a")
    with locked as lock, (attempt.folder / LOG).open("ab") as output:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        before = os.dup(sys.stderr.fileno())
        os.dup2(output.fileno(), sys.stderr.fileno())
        try:
            yield attempt
        finally:
            sys.stderr.flush()
            os.dup2(before, sys.stderr.fileno())
            os.close(before)


if __name__ == "__main__":
    sys.exit(main())
