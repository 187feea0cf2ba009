"""Labelled cases of a history or a stream, read from a file of JSON lines and checked for a replay."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import orjson

from daemon.agents import Agent


class CasesRefusedError(ValueError):
    """The cases can't be replayed as they are."""


@dataclass(frozen=True, slots=True)
class Case:
    """One labelled case of the history or the stream."""

    claim_id: str
    group: str
    occurred_at: datetime
    input: dict[str, Any]
    attributes: dict[str, Any]
    answer: str


def read(path: Path) -> list[Case]:
    """The cases of a JSON lines file in order of time. Raises `CasesRefusedError` with the line that is wrong."""
    cases = []
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                cases.append(_read_line(path, number, line))
    if not cases:
        raise CasesRefusedError(f"{path} holds no cases")
    return sorted(cases, key=lambda case: (case.occurred_at, case.claim_id))


def _read_line(path: Path, number: int, line: bytes) -> Case:
    try:
        row = orjson.loads(line)
        at = datetime.fromisoformat(row["occurred_at"])
        if at.tzinfo is None:
            raise ValueError("occurred_at has no time zone")  # noqa: TRY301  one sentence for all that may be wrong
        group = str(row.get("group") or row["claim_id"])
        return Case(str(row["claim_id"]), group, at, dict(row["input"]), dict(row.get("attributes") or {}), str(row["answer"]))
    except (KeyError, TypeError, ValueError) as error:
        wanted = '{"claim_id", "group", "occurred_at", "input": {…}, "attributes": {…}, "answer"}'
        what = f"{error.args[0]} is missing" if isinstance(error, KeyError) else str(error)
        raise CasesRefusedError(f"{path}, line {number}: {what}. A line is {wanted}") from error


def check(history: Sequence[Case], stream: Sequence[Case], agent: Agent) -> None:
    """Raise `CasesRefusedError` when the stream begins before the history ends, repeats a claim, or has an answer that is no label."""
    if stream[0].occurred_at < history[-1].occurred_at:
        raise CasesRefusedError(f"the stream begins {stream[0].occurred_at}, before the history ends {history[-1].occurred_at}")
    counts = Counter(case.claim_id for case in itertools.chain(history, stream))
    repeated = [claim for claim, count in counts.items() if count > 1]
    if repeated:
        raise CasesRefusedError(f"claim {repeated[0]!r} is there {counts[repeated[0]]} times: each claim may stand once")
    unknown = {case.answer for case in itertools.chain(history, stream)} - set(agent.labels)
    if unknown:
        raise CasesRefusedError(f"answer {min(unknown)!r} is not one of the agent's labels {', '.join(agent.labels)}")
