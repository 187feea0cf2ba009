"""The database: how it is opened, how a transaction begins, and how the schema is brought up to date."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import alembic.command
import alembic.config
import alembic.runtime.migration
import alembic.script
import orjson
from sqlalchemy import Connection, Engine, create_engine, event, insert, make_url, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import OperationalError

from storage.tables import Installation, Table

BUSY_SECONDS = 30


class SchemaOutdatedError(RuntimeError):
    """The database was made by another version of Ratchet."""


def open_engine(url: str) -> Engine:
    """Open the database at `url`; SQLite runs in WAL mode and syncs every commit to the disk.

    Raises `ValueError` when the folder of an SQLite file is missing.
    """
    parsed = make_url(url)
    is_sqlite = parsed.get_backend_name() == "sqlite"
    if is_sqlite and parsed.database and not Path(parsed.database).parent.is_dir():
        raise ValueError(f"the folder of {parsed.database} does not exist: create it, or run `ratchet init`")
    engine = create_engine(
        parsed,
        json_serializer=lambda value: orjson.dumps(value).decode(),
        json_deserializer=orjson.loads,
        pool_pre_ping=not is_sqlite,
        **({"connect_args": {"timeout": BUSY_SECONDS}} if is_sqlite else {}),
    )
    if is_sqlite:
        event.listen(engine, "connect", _prepare_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
    return engine


def _prepare_sqlite(connection: Any, _record: object) -> None:
    connection.isolation_level = None  # transactions begin where we say so, see _begin_sqlite
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", f"busy_timeout={BUSY_SECONDS * 1000}", "cache_size=-32768"):
        connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection: Connection) -> None:
    # A transaction that reads first and writes later would fail when another one wrote in between: take the lock at once.
    is_writing = connection.get_execution_options().get("writes", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if is_writing else "BEGIN")


@contextmanager
def writing(engine: Engine) -> Iterator[Connection]:
    """One transaction that may write: all of it is committed, or none."""
    with engine.connect().execution_options(writes=True) as connection, connection.begin():
        yield connection


@contextmanager
def reading(engine: Engine) -> Iterator[Connection]:
    """One consistent view of the database; nothing is written."""
    with engine.connect() as connection, connection.begin():
        yield connection


def insert_or_skip(connection: Connection, table: type[Table]) -> Any:
    """An INSERT that leaves a row alone which is there already; what came of it is in the result's `rowcount`."""
    dialect = postgresql if connection.dialect.name == "postgresql" else sqlite
    return dialect.insert(table).on_conflict_do_nothing()


def upgrade(engine: Engine) -> None:
    """Bring the schema to this version of Ratchet; doing so twice changes nothing."""
    with engine.connect().execution_options(writes=True) as connection:
        config = _alembic_config()
        config.attributes["connection"] = connection
        alembic.command.upgrade(config, "head")
    with writing(engine) as connection:
        if connection.execute(select(Installation.id)).first() is None:
            connection.execute(insert(Installation).values(id=1, secret=secrets.token_hex(32), created_at=datetime.now(UTC)))


def check(engine: Engine) -> None:
    """Raise `SchemaOutdatedError` with the remedy unless the schema is the one this version of Ratchet was written for."""
    head = alembic.script.ScriptDirectory.from_config(_alembic_config()).get_current_head()
    try:
        with engine.connect() as connection:
            current = alembic.runtime.migration.MigrationContext.configure(connection).get_current_revision()
    except OperationalError as error:
        raise SchemaOutdatedError(f"the database can't be opened: {error.orig}") from error
    if current != head:
        raise SchemaOutdatedError(f"the database has schema {current or 'none'}, this version needs {head}: run `ratchet db upgrade`")


def _alembic_config() -> alembic.config.Config:
    config = alembic.config.Config()
    config.set_main_option("script_location", str(Path(__file__).with_name("migrations")))
    config.set_main_option("path_separator", "os")
    return config
