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
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), Table.metadata) == []


def test_upgrading_twice_keeps_the_installation(engine: Engine) -> None:
    with db.reading(engine) as connection:
        before = connection.execute(select(Installation.secret)).scalars().all()
    schema.upgrade(engine)
    with db.reading(engine) as connection:
        assert connection.execute(select(Installation.secret)).scalars().all() == before
    assert len(before) == 1


def test_a_database_without_schema_is_refused_with_the_remedy(tmp_path: Path) -> None:
    empty = db.open_engine(f"sqlite:///{tmp_path}/empty.db")
    with pytest.raises(schema.SchemaOutdatedError, match="ratchet db upgrade"):
        schema.check(empty)
    empty.dispose()


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
