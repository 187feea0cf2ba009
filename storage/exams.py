"""Exams and watches: which two versions are compared, since when, and how it ended."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from datetime import datetime
from typing import Any, Literal, cast

from sqlalchemy import Connection, RowMapping, bindparam, func, select, update

from storage import bulk, events, ids, ledger, reviews
from storage.tables import Exam, Review

Kind = Literal["exam", "watch"]


def open_new(
    connection: Connection, agent: str, kind: Kind, candidate: str, champion: str, now: datetime, report: Mapping[str, Any] | None = None
) -> str:
    """Begin to compare two versions, with what is known of them so far; an exam that is open for the same pair is the same exam."""
    exam = ids.make_ulid(now, agent, kind, candidate, champion)
    row = {
        "id": exam,
        "agent": agent,
        "kind": kind,
        "candidate": candidate,
        "champion": champion,
        "state": "open",
        "opened_at": now,
        "report": dict(report or {}),
    }
    bulk.insert_new(connection, Exam, row)
    current = read_open(connection, agent, kind)
    if current is None or (current["candidate"], current["champion"]) != (candidate, champion):
        raise ValueError(f"agent {agent} has another open {kind}: close it before {candidate} against {champion}")
    return str(current["id"])


def read_open(connection: Connection, agent: str, kind: Kind) -> RowMapping | None:
    """The agent's open exam or watch."""
    query = select(Exam.__table__).where(Exam.agent == agent, Exam.kind == kind, Exam.state == "open")
    return connection.execute(query).mappings().first()


def list_open(connection: Connection, agent: str) -> list[RowMapping]:
    """The agent's open exam and watch."""
    query = select(Exam.__table__).where(Exam.agent == agent, Exam.state == "open").order_by(Exam.kind.desc())
    return list(connection.execute(query).mappings())


def is_asking(connection: Connection, agent: str) -> bool:
    """Whether an exam or a watch has claims to ask about, for the router's budget; else others have what is left of the day."""
    reports = connection.execute(select(Exam.report).where(Exam.agent == agent, Exam.state == "open")).scalars()
    return any(report.get("asking", {}).get("is_open", True) for report in reports)


def count_asked(connection: Connection, agent: str, since: datetime) -> Counter[Kind]:
    """How many reviews exam and watch opened since then; those that were withdrawn cost no expert anything."""
    rows = connection.execute(_ASKED, {"agent": agent, "since": since}).all()
    return Counter({cast("Kind", row[0]): row[1] for row in rows})


_ASKED = (
    select(Exam.kind, func.count())
    .join(Review, Review.exam == Exam.id)
    .where(Review.agent == bindparam("agent"), Review.opened_at >= bindparam("since"), Review.state != "expired")
    .group_by(Exam.kind)
)
"""Asked for every batch and every single event where there is a budget: put together once."""


def update_report(connection: Connection, exam: str, report: Mapping[str, Any]) -> None:
    """Keep the newest numbers of an open exam."""
    connection.execute(update(Exam).where(Exam.id == exam).values(report=dict(report)))


def close(connection: Connection, exam: str, outcome: str, report: Mapping[str, Any], now: datetime) -> bool:
    """End an exam once, with its outcome; the reviews that only it asked for are withdrawn. False when it had ended before."""
    change = update(Exam).where(Exam.id == exam, Exam.state == "open")
    values = {"state": "closed", "outcome": outcome, "closed_at": now, "report": dict(report)}
    row = connection.execute(change.values(values).returning(Exam.agent, Exam.kind, Exam.candidate, Exam.champion)).mappings().first()
    if row is None:
        return False
    body = {**row, "exam": exam, "outcome": outcome, "reasons": list(report.get("reasons", []))}
    ledger.append(connection, f"{row['kind']} closed", row["agent"], body, now)
    events.emit(connection, f"ratchet.{row['kind']}.closed.v1", f"{row['agent']}/{row['candidate']}", exam, body, now)
    reviews.withdraw_exam(connection, exam, now)
    return True


def of_version(connection: Connection, agent: str, version: str) -> list[RowMapping]:
    """Every exam and watch that a version sat, oldest first."""
    query = select(Exam.__table__).where(Exam.agent == agent, Exam.candidate == version).order_by(Exam.opened_at)
    return list(connection.execute(query).mappings())


def read(connection: Connection, exam: str) -> RowMapping | None:
    """One exam."""
    return connection.execute(select(Exam.__table__).where(Exam.id == exam)).mappings().first()


def list_all(connection: Connection, agent: str, kind: Kind) -> list[RowMapping]:
    """Every exam or watch of an agent, oldest first."""
    query = select(Exam.__table__).where(Exam.agent == agent, Exam.kind == kind).order_by(Exam.opened_at, Exam.id)
    return list(connection.execute(query).mappings())
