"""The database is opened and locked so that a commit is on the disk and nothing is half-written."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from sqlalchemy import Engine, text
from sqlalchemy.exc import OperationalError

from storage import alarms, db, leases, ledger, policies, tokens

pytestmark = pytest.mark.databases("sqlite", "postgresql")


@pytest.mark.databases("sqlite")
def test_a_commit_is_synced_to_the_disk_in_wal_mode(engine: Engine) -> None:
    with db.reading(engine) as connection:
        pragmas = {name: connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in ("journal_mode", "synchronous", "foreign_keys")}
    assert pragmas == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1}


@pytest.mark.databases("sqlite")
def test_who_writes_waits_for_another_process_and_says_when_that_takes_too_long(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    with contextlib.closing(sqlite3.connect(engine.url.database or "", isolation_level=None, check_same_thread=False)) as other:
        other.execute("BEGIN IMMEDIATE")
        release = threading.Timer(0.2, other.rollback)
        release.start()
        with db.writing(engine) as connection:
            alarms.raise_alarm(connection, "adjudication", "drift", "it was released", {}, datetime.now(UTC))
        release.join()
        other.execute("BEGIN IMMEDIATE")
        monkeypatch.setattr(db, "BUSY_SECONDS", 0.05)
        with pytest.raises(OperationalError, match="database is locked"), db.writing(engine):
            pass
        other.rollback()
    monkeypatch.undo()
    with db.writing(engine) as connection:
        assert connection.exec_driver_sql("PRAGMA busy_timeout").scalar() == db.BUSY_SECONDS * 1000


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(db.UrlRefusedError, match=r"nowhere/ratchet.db does not exist: create it, or correct database.url"):
        db.open_engine(f"sqlite:///{tmp_path}/nowhere/ratchet.db")


def test_writers_wait_for_each_other(engine: Engine, now: datetime) -> None:
    def add(number: int) -> None:
        with db.writing(engine) as connection:
            tokens.count_valid(connection)
            tokens.add(connection, f"expert-{number}", "reviewer", now)

    threads = [threading.Thread(target=add, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with db.reading(engine) as connection:
        assert tokens.count_valid(connection) == 8


def test_a_token_is_shown_once_and_stops_working_when_revoked(engine: Engine, now: datetime) -> None:
    with db.writing(engine) as connection:
        secret = tokens.add(connection, "ann", "reviewer", now)
        assert tokens.find(connection, secret) == tokens.Principal("ann", "reviewer")
        assert secret not in str(tokens.list_all(connection))
        tokens.revoke(connection, "ann", now)
        assert tokens.find(connection, secret) is None
        with pytest.raises(tokens.TokenError, match="never reused"):
            tokens.add(connection, "ann", "reviewer", now)
    with db.writing(engine) as connection, pytest.raises(tokens.TokenError, match="producer, reviewer, operator"):
        tokens.add(connection, "eve", "admin", now)


def test_a_lease_has_one_holder_and_its_fence_grows(engine: Engine, now: datetime) -> None:
    term = timedelta(seconds=30)
    with db.writing(engine) as connection:
        assert leases.acquire(connection, "device:cpu", "a", now, term) == 1
        assert leases.acquire(connection, "device:cpu", "b", now, term) is None
        assert leases.acquire(connection, "device:cpu", "a", now + term / 2, term) == 1
        assert leases.acquire(connection, "device:cpu", "b", now + 2 * term, term) == 2
        assert leases.holder_of(connection, "device:cpu", now + 2 * term) == "b"
        leases.release(connection, "device:cpu", "b")
        assert leases.acquire(connection, "device:cpu", "a", now + 2 * term, term) == 3


def test_a_changed_policy_is_a_new_version(engine: Engine, now: datetime) -> None:
    with db.writing(engine) as connection:
        numbers = [policies.record(connection, "adjudication", digest, {"threshold": 0.7}, now) for digest in ("a", "a", "b")]
        assert numbers == [1, 1, 2]
        assert policies.show(connection, "adjudication", 1) is not None


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


@pytest.mark.databases("postgresql")
def test_what_waited_for_a_lock_sees_what_was_written_whatever_the_server_is_set_to(engine: Engine) -> None:
    url = engine.url.update_query_dict({"options": "-c default_transaction_isolation=serializable"})
    other = db.open_engine(url.render_as_string(hide_password=False))
    try:
        with db.reading(other) as connection:
            assert connection.execute(text("SHOW transaction_isolation")).scalar() == "repeatable read"
        with db.writing(other) as connection:
            assert connection.execute(text("SHOW transaction_isolation")).scalar() == "read committed"
    finally:
        other.dispose()
