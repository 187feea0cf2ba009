"""Rows that are stored many at once are stored once and whole."""

from __future__ import annotations

from datetime import datetime

import pytest
from sqlalchemy import Engine, select

from storage import bulk, db
from storage.tables import Policy

pytestmark = pytest.mark.databases("sqlite", "postgresql")


def test_rows_in_hundreds_are_stored_once_and_counted(engine: Engine, now: datetime) -> None:
    rows = [{"agent": f"agent-{number}", "version": 1, "digest": "d", "body": {"n": number}, "created_at": now} for number in range(250)]
    with db.writing(engine) as connection:
        stored = [bulk.insert_many(connection, Policy, some) for some in (rows[:7], rows[:230], rows[5:], [])]
        kept = connection.execute(select(Policy.agent, Policy.body, Policy.created_at)).all()
    assert stored == [7, 223, 20, 0]
    assert sorted(kept) == sorted((row["agent"], row["body"], now) for row in rows)
