"""One try at a run: its folder, its right to publish, its progress and its result.

`RUN_DIR/attempts/N/` holds `attempt.json` (the daemon's fence), `progress.jsonl`, `checkpoints/`, `adapters/`, and last `result.json`.
A newer attempt takes the right to publish away: a trainer that was stopped past its lease and wakes up finds it and leaves.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from storage.artifacts import write_atomically
from trainers.spec import PROGRESS, RESULT

BEAT_SECONDS = 2.0
"""A line that is so old is written again, as long as the work goes on."""
LOOK_SECONDS, BUSY_SHARE = 5.0, 0.01
"""How often is looked whether a long call still works: a process that only waits takes less of a processor."""
LONGEST_CALL_SECONDS = 3600.0
"""So long it is taken for work at most, for a card that hangs keeps the processor busy too."""
Status = Literal["done", "refused", "failed"]


class SupersededError(RuntimeError):
    """A newer attempt at the same run has begun: this one may publish nothing."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """The folder of one attempt, its number and the fence that the daemon gave it (None by hand)."""

    run_dir: Path
    number: int
    fence: Any
    is_silent: bool = False
    """Whether another process of the same attempt is the one that publishes."""

    @property
    def folder(self) -> Path:
        """`RUN_DIR/attempts/N`."""
        return self.run_dir / "attempts" / str(self.number)

    def is_done(self) -> bool:
        """Whether the attempt published a result that stands; a refused or failed one may be tried again."""
        path = self.folder / RESULT
        return path.exists() and json.loads(path.read_text())["status"] == "done"

    def check_current(self) -> None:
        """Raise `SupersededError` when a newer attempt's folder is there."""
        newest = max(attempt_numbers(self.run_dir), default=0)
        if newest > self.number:
            raise SupersededError(f"attempt {self.number} of {self.run_dir.name} was superseded by attempt {newest}: nothing is published")

    def publish(self, status: Status, run_id: str, **fields: Any) -> None:
        """Write `result.json`, whole or not at all, unless a newer attempt has begun (`SupersededError`)."""
        self.check_current()
        if self.is_silent:
            return
        result = {"schema": 1, "run_id": run_id, "attempt": self.number, "fence": self.fence, "status": status, **fields}
        write_atomically(self.folder / RESULT, json.dumps(result, indent=2, ensure_ascii=False).encode())


def open_attempt(run_dir: Path, number: int | None = None, *, is_silent: bool = False) -> Attempt:
    """The attempt with this number, or else the latest; by hand, where there is none, attempt 1 is made."""
    chosen = number or max(attempt_numbers(run_dir), default=1)
    folder = run_dir / "attempts" / str(chosen)
    folder.mkdir(parents=True, exist_ok=True)
    about = folder / "attempt.json"
    fence = json.loads(about.read_text()).get("fence") if about.exists() else None
    return Attempt(run_dir, chosen, fence, is_silent)


def attempt_numbers(run_dir: Path) -> list[int]:
    """The numbers of all attempts that have a folder."""
    return sorted(int(path.name) for path in (run_dir / "attempts").glob("*") if path.name.isdigit())


class Progress:
    """Appends to `progress.jsonl`, at most two lines a second, and to TensorBoard's event file."""

    def __init__(self, attempt: Attempt, every_seconds: float = 0.5) -> None:
        self._file = (Path(os.devnull) if attempt.is_silent else attempt.folder / PROGRESS).open("a", encoding="utf-8")
        self._events = None if attempt.is_silent else EventFileWriter(str(attempt.folder / "tensorboard"))
        self._every_seconds = every_seconds
        self._heartbeat = 0
        self._line: Mapping[str, float | str | None] = {}
        self._told_at = self._written_at = float("-inf")
        self._writing = threading.Lock()

    def write(self, phase: str, *, now: bool = False, **fields: float | str | None) -> None:
        """Note where the run is; with `now` the line is written even when the last one is fresh."""
        if not now and time.monotonic() - self._told_at < self._every_seconds:
            return
        self._told_at = time.monotonic()
        self._line = {"phase": phase, **fields}
        self._write_line()

    def beat(self) -> None:
        """A sign of life between two lines, to be given after each piece of work: when the last line is old it is written again."""
        if self._line and time.monotonic() - self._written_at >= BEAT_SECONDS:
            self._write_line()

    @contextlib.contextmanager
    def alive(self) -> Iterator[None]:
        """Signs of life through one long call, such as loading a base, as long as this process computes, reads or writes."""
        ended = threading.Event()

        def tell() -> None:
            patience, before = time.monotonic() + LONGEST_CALL_SECONDS, measure_work()
            while not ended.wait(LOOK_SECONDS) and time.monotonic() < patience:
                if is_work(before, after := measure_work(), LOOK_SECONDS):
                    self.beat()
                before = after

        teller = threading.Thread(target=tell, daemon=True)
        teller.start()
        try:
            yield
        finally:
            ended.set()
            teller.join()

    def _write_line(self) -> None:
        with self._writing:
            self._written_at = time.monotonic()
            self._heartbeat += 1
            line = {"at": datetime.now(UTC).isoformat(), **self._line, "heartbeat": self._heartbeat}
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()

    def plot(self, step: int, values: Mapping[str, float]) -> None:
        """Add one point to each of TensorBoard's curves."""
        summary = Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()])
        if self._events is not None:
            self._events.add_event(Event(wall_time=time.time(), step=step, summary=summary))

    def close(self) -> None:
        """Flush and close both files."""
        self._file.close()
        if self._events is not None:
            self._events.close()


def measure_work() -> tuple[float, int]:
    """The CPU seconds of this process so far, and how often it waited for the disk."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime, used.ru_majflt + used.ru_inblock + used.ru_oublock


def is_work(before: tuple[float, int], after: tuple[float, int], seconds: float) -> bool:
    """Whether a process did more in so many seconds than to look at itself."""
    return after[0] - before[0] > BUSY_SHARE * seconds or after[1] > before[1]
