"""A time means the same on every machine and in both databases."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone

import pytest
from sqlalchemy import Engine

from storage import db, tokens

pytestmark = pytest.mark.databases("sqlite", "postgresql")


def test_a_time_without_zone_is_refused_and_others_come_back_in_utc(engine: Engine) -> None:
    with db.writing(engine) as connection, pytest.raises(Exception, match="no time zone"):
        tokens.add(connection, "ann", "reviewer", datetime(2026, 1, 1))  # noqa: DTZ001
    east = datetime(2026, 1, 1, 2, tzinfo=timezone(timedelta(hours=2)))
    with db.writing(engine) as connection:
        tokens.add(connection, "ben", "reviewer", east)
        [row] = tokens.list_all(connection)
    assert row["created_at"] == east
    assert row["created_at"].tzinfo == UTC
