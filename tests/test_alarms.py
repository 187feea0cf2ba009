"""storage.alarms: one of a kind is open at a time, says the newest, and is announced once."""

from __future__ import annotations

from datetime import datetime, timedelta

import pytest
from sqlalchemy import Engine

from storage import alarms, db, ledger

pytestmark = pytest.mark.databases("sqlite", "postgresql")


def test_an_alarm_of_a_kind_is_open_once(engine: Engine, now: datetime) -> None:
    with db.writing(engine) as connection:
        raised = [alarms.raise_alarm(connection, "adjudication", "drift", "inputs changed", {}, now) for _ in range(2)]
        assert raised == [True, False]
        assert alarms.clear(connection, "adjudication", "drift", now)
        assert alarms.list_open(connection) == []
        assert len(alarms.list_since(connection, "adjudication", now)) == 1


def test_an_open_alarm_says_the_newest_and_is_announced_once(engine: Engine, now: datetime) -> None:
    with db.writing(engine) as connection:
        alarms.raise_alarm(connection, "scribe", "base", "of another agent", {}, now)
        for minutes, version in enumerate(("v1.0", "v1.0", "v3.0"), start=1):
            at = now + timedelta(minutes=minutes)
            alarms.raise_alarm(connection, "adjudication", "base", f"{version} is not served", {"version": version}, at)
        other, alarm = alarms.list_open(connection)
        assert (alarm["message"], alarm["detail"]) == ("v3.0 is not served", {"version": "v3.0"})
        assert alarm["raised_at"] == now + timedelta(minutes=1), "it has been open since then"
        assert other["message"] == "of another agent"
        assert [row["kind"] for row in ledger.show(connection, "adjudication")] == ["alarm"]


def test_a_drift_alarm_keeps_the_windows_that_it_was_raised_for(engine: Engine, now: datetime) -> None:
    with db.writing(engine) as connection:
        for first in ("a", "b"):
            alarms.raise_alarm(
                connection, "adjudication", "drift", f"since {first}", {"source": "traffic", "first": first}, now, restate=False
            )
        assert [(one["message"], one["detail"]["first"]) for one in alarms.list_open(connection)] == [("since a", "a")]
