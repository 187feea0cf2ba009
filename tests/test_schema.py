"""The migrations make exactly the schema, twice as well as once, and a database without it is refused."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import BigInteger, Engine, inspect, select

from storage import alarms, db, schema
from storage.tables import Installation, Table

pytestmark = pytest.mark.databases("sqlite", "postgresql")


@pytest.mark.databases("sqlite")
def test_what_indexes_hold_is_looked_at_and_connections_opened_later_know(engine: Engine) -> None:
    with db.writing(engine) as connection:
        for number in range(50):
            alarms.raise_alarm(connection, f"agent {number}", "drift", "", {}, datetime.now(UTC))
    schema.analyze(engine)
    with db.reading(engine) as connection:
        found = connection.exec_driver_sql("SELECT count(*) FROM sqlite_stat1 WHERE tbl = 'alarms'").scalar()
    assert found


def test_the_migrations_make_exactly_the_tables_of_the_schema(engine: Engine) -> None:
    hidden = "reviews_live" if engine.dialect.name == "sqlite" else ""  # SQLAlchemy can't read an index's order from SQLite
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"include_object": lambda _, name, *__: name != hidden})
        assert compare_metadata(context, Table.metadata) == []
        if hidden:
            found = connection.exec_driver_sql("SELECT sql FROM sqlite_master WHERE name = ?", (hidden,)).scalar_one()
            assert "(agent, priority DESC, opened_at) WHERE state IN ('open', 'leased')" in found


def test_upgrading_twice_keeps_the_installation(engine: Engine) -> None:
    with db.reading(engine) as connection:
        before = connection.execute(select(Installation.secret)).scalars().all()
    schema.upgrade(engine)
    with db.reading(engine) as connection:
        assert connection.execute(select(Installation.secret)).scalars().all() == before
    assert len(before) == 1


@pytest.mark.databases("sqlite")
@pytest.mark.parametrize("is_there", [False, True], ids=["no file", "a file without tables"])
def test_a_lost_database_is_told_with_both_ways_out_and_not_made_anew(tmp_path: Path, is_there: bool) -> None:
    file = tmp_path / "lost.db"
    if is_there:
        file.touch()
    lost = db.open_engine(f"sqlite:///{file}")
    with pytest.raises(schema.DatabaseMissingError, match=rf"no database at {file}: restore it from a backup.*ratchet db upgrade"):
        schema.check(lost)
    assert file.exists() == is_there
    assert schema.upgrade(lost), "an empty place gets a new installation"
    schema.check(lost)
    assert not schema.upgrade(lost)
    lost.dispose()


@pytest.mark.databases("sqlite")
def test_a_new_database_is_read_by_its_owner_only(tmp_path: Path) -> None:
    new = db.open_engine(f"sqlite:///{tmp_path}/new.db")
    schema.upgrade(new)
    with db.reading(new) as connection:
        assert connection.execute(select(Installation.id)).all()
        modes = {file.name: file.stat().st_mode & 0o777 for file in tmp_path.glob("new.db*")}
    assert modes == dict.fromkeys(["new.db", "new.db-wal", "new.db-shm"], 0o600)
    new.dispose()


def test_a_newer_schema_is_refused_by_name_and_nobody_is_told_to_upgrade_it(engine: Engine) -> None:
    with db.writing(engine) as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = 'zzz'")
    for work in schema.check, schema.upgrade:
        with pytest.raises(schema.SchemaOutdatedError, match=r"newer Ratchet \(schema zzz\): install that version, or restore the backup"):
            work(engine)


def test_the_migrations_make_the_same_checks_as_the_schema(new_engine: Callable[[], Engine]) -> None:
    migrated, fresh = new_engine(), new_engine()
    Table.metadata.drop_all(fresh)
    Table.metadata.create_all(fresh)
    for name in Table.metadata.tables:
        ours, theirs = (
            {check["name"]: check["sqltext"] for check in inspect(one).get_check_constraints(name)} for one in (migrated, fresh)
        )
        assert ours == theirs, name
    schema.upgrade(fresh)


@pytest.mark.databases("postgresql")
def test_there_is_room_for_more_steps_of_reviews_than_32_bits_count(engine: Engine) -> None:
    columns = {column["name"]: column["type"] for column in inspect(engine).get_columns("review_steps")}
    assert isinstance(columns["id"], BigInteger)
