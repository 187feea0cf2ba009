"""The database is opened and locked so that a commit is on the disk and nothing is half-written."""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from pathlib import Path

import pytest
from sqlalchemy import Connection, Engine, text
from sqlalchemy.exc import DBAPIError, OperationalError

from storage import alarms, db, policies, tokens

pytestmark = pytest.mark.databases("sqlite", "postgresql")
Way = Callable[[Engine], AbstractContextManager[Connection]]


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


def test_what_a_savepoint_wrote_is_undone_when_it_raises_and_the_transaction_goes_on(engine: Engine) -> None:
    now = datetime.now(UTC)
    with db.writing(engine) as connection:
        alarms.raise_alarm(connection, "adjudication", "before", "kept", {}, now)
        with pytest.raises(ZeroDivisionError):
            fail_after(connection, lambda: alarms.raise_alarm(connection, "adjudication", "within", "undone", {}, now))
        with db.savepoint(connection):
            alarms.raise_alarm(connection, "adjudication", "after", "kept", {}, now)
    with db.reading(engine) as connection:
        assert {alarm["kind"] for alarm in alarms.list_open(connection)} == {"before", "after"}


def test_a_savepoint_that_cant_be_gone_back_to_is_the_databases_failure(engine: Engine) -> None:
    with pytest.raises(DBAPIError, match=r"(?i)savepoint"), db.writing(engine) as connection:
        fail_after(connection, lambda: connection.exec_driver_sql("ROLLBACK"))


def test_a_savepoint_says_first_what_the_database_said_first(engine: Engine) -> None:
    def fail() -> None:
        connection.exec_driver_sql("ROLLBACK")
        connection.exec_driver_sql("SELECT nothing")

    with pytest.raises(DBAPIError, match="nothing"), db.writing(engine) as connection:
        fail_after(connection, fail)


@pytest.mark.databases("sqlite")
def test_a_transaction_that_was_undone_is_not_taken_for_committed(engine: Engine) -> None:
    with pytest.raises(OperationalError, match="was undone"), db.writing(engine) as connection:
        connection.exec_driver_sql("ROLLBACK")


def fail_after(connection: Connection, work: Callable[[], object]) -> None:
    with db.savepoint(connection):
        work()
        with db.savepoint(connection):
            raise ZeroDivisionError


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(db.UrlRefusedError, match=r"nowhere/ratchet.db does not exist: create it, or correct database.url"):
        db.open_engine(f"sqlite:///{tmp_path}/nowhere/ratchet.db")


@pytest.mark.databases("sqlite")
@pytest.mark.parametrize("way", [db.reading, db.writing])
def test_a_file_that_was_deleted_is_told_at_the_next_transaction_and_not_made_anew(engine: Engine, way: Way) -> None:
    file = Path(engine.url.database or "")
    with db.reading(engine), db.reading(engine):
        pass
    file.unlink()
    for _ in range(3):
        with pytest.raises(OperationalError, match=rf"there is no {file}: restore it from a backup") as told, way(engine):
            pass
        assert not db.is_passing(told.value)
    assert not file.exists()


@pytest.mark.databases("sqlite")
@pytest.mark.parametrize("way", [db.reading, db.writing])
def test_a_file_that_was_replaced_is_not_used_in_place_of_the_first(engine: Engine, migrated: Path, way: Way) -> None:
    file = Path(engine.url.database or "")
    with db.reading(engine):
        pass
    copy = shutil.copy(migrated, file.with_name("copy"))
    copy.replace(file)
    with pytest.raises(OperationalError, match=rf"{file} was replaced by another file: stop every process that uses it"), way(engine):
        pass
    assert file.read_bytes() == migrated.read_bytes()
    engine.dispose()
    with way(engine):
        pass


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


def test_a_changed_policy_is_a_new_version(engine: Engine, now: datetime) -> None:
    with db.writing(engine) as connection:
        numbers = [policies.record(connection, "adjudication", digest, {"threshold": 0.7}, now) for digest in ("a", "a", "b")]
        assert numbers == [1, 1, 2]
        assert policies.show(connection, "adjudication", 1) is not None


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
