"""Labelled cases to replay, and a trainer that costs no process."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from pathlib import Path

import orjson

from daemon import cases
from trainers import bases, train
from trainers.stopping import Stop

START = datetime(2020, 1, 1, tzinfo=UTC)


class InProcess:
    """A launcher that trains in this process: the start of a Python with torch takes longer than these runs."""

    def __init__(self) -> None:
        self._held = bases.Bases()
        self._status: dict[Path, int] = {}

    def submit(self, run_dir: Path, attempt: int) -> None:
        # Like the real one it works in another folder than the command.
        resolved = run_dir.resolve()
        with contextlib.chdir("/"):
            self._status[run_dir / str(attempt)] = train.run(resolved, attempt, self._held, Stop())[0]

    def status(self, run_dir: Path, attempt: int) -> int | None:
        return self._status.get(run_dir / str(attempt))

    def cancel(self, run_dir: Path, attempt: int, *, at_once: bool = False) -> None:
        pass

    def close(self) -> None:
        pass

    def logs(self, run_dir: Path, attempt: int) -> str:
        return ""

    def end_idle(self, device: str) -> None:
        return

    def clean_up(self, run_dir: Path) -> bool:
        return True

    def list_kept(self) -> set[str]:
        return set()


def make_cases(count: int, start: int) -> list[cases.Case]:
    generator = random.Random(start)
    return [
        cases.Case(
            f"c{number}",
            f"g{number}",
            START + timedelta(hours=number),
            {"diagnosis": generator.choice(["back pain", "asthma", "cancer"]), "treatment": generator.choice(["drug", "surgery"])},
            {"plan": generator.choice(["hmo", "ppo"])},
            generator.choice(["APPROVED", "DENIED"]),
        )
        for number in range(start, start + count)
    ]


def write_cases(path: Path, cases: Sequence[cases.Case]) -> Path:
    """The cases as a file of JSON lines."""
    path.write_bytes(b"".join(orjson.dumps(asdict(case)) + b"\n" for case in cases))
    return path
