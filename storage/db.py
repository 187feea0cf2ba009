"""The database: how it is opened, how a transaction begins, and how the schema is brought up to date."""

from __future__ import annotations

import functools
import hmac
import itertools
import re
import secrets
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import alembic.command
import alembic.config
import alembic.runtime.migration
import alembic.script
import orjson
from sqlalchemy import JSON, URL, ColumnElement, Connection, Dialect, Engine, create_engine, event, func, insert, make_url, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import ArgumentError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from storage.tables import Installation, Table

BUSY_SECONDS = 30
MAX_PORT = 65535
ROWS_AT_ONCE = 100
_PASSWORD = re.compile(r"""(://[^:/@\s]*:)\S+(?=@)|([?&][^=&\s]*passw[^=&\s]*=)[^&\s"']*""", re.IGNORECASE)
UNAVAILABLE = (OperationalError, InterfaceError, PoolTimeoutError)
"""What is raised when the database can't be reached, is locked for too long, or its disk is full: trying again later may help."""


class SchemaOutdatedError(RuntimeError):
    """The database was made by another version of Ratchet."""


class UrlRefusedError(ValueError):
    """No database can be at this address."""


def parse_url(url: str) -> URL:
    """The address of a database. Raises `UrlRefusedError`."""
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError) as error:
        raise UrlRefusedError("should be a URL whose port is a number: postgresql://USER:PASSWORD@HOST:5432/NAME") from error
    if parsed.port is not None and not 0 < parsed.port <= MAX_PORT:
        raise UrlRefusedError(f"port {parsed.port} should be between 1 and {MAX_PORT}")
    return parsed


def mask_passwords(text: str) -> str:
    """The text with the passwords of the URLs in it starred: before the host, where they may hold `/` and `@`, and in the query.

    No parser does it: what is refused for being no URL is shown too.
    """
    return _PASSWORD.sub(r"\1\2***", text)


def open_engine(url: str) -> Engine:
    """Open the database at `url`; SQLite runs in WAL mode and syncs every commit to the disk.

    Raises `UrlRefusedError`, also when the folder of an SQLite file is missing.
    """
    parsed = parse_url(url)
    is_sqlite = parsed.get_backend_name() == "sqlite"
    if is_sqlite and parsed.database and not Path(parsed.database).parent.is_dir():
        raise UrlRefusedError(f"the folder of {parsed.database} does not exist: create it, or correct database.url")
    engine = create_engine(
        parsed,
        json_serializer=lambda value: orjson.dumps(value).decode(),
        json_deserializer=orjson.loads,
        pool_pre_ping=not is_sqlite,
        hide_parameters=True,  # an error's text is logged, and parameters are claims
        **({"connect_args": {"timeout": BUSY_SECONDS}, "execution_options": {"turn": threading.Lock()}} if is_sqlite else {}),
    )
    if is_sqlite:
        event.listen(engine, "connect", _prepare_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
    return engine


def _prepare_sqlite(connection: Any, _record: object) -> None:
    connection.isolation_level = None  # transactions begin where we say so, see _begin_sqlite
    for pragma in (
        "journal_mode=WAL",
        "synchronous=FULL",
        "foreign_keys=ON",
        f"busy_timeout={BUSY_SECONDS * 1000}",
        "cache_size=-32768",
        "wal_autocheckpoint=4000",
        "temp_store=MEMORY",
    ):
        connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection: Connection) -> None:
    # A transaction that reads first and writes later would fail when another one wrote in between: take the lock at once.
    is_writing = connection.get_execution_options().get("writes", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if is_writing else "BEGIN")


@contextmanager
def writing(engine: Engine) -> Iterator[Connection]:
    """One transaction that may write: all of it is committed, or none."""
    with _taking_turns(engine), engine.connect().execution_options(writes=True) as connection, connection.begin():
        yield connection


@contextmanager
def _taking_turns(engine: Engine) -> Iterator[None]:
    """Let one thread write at a time: who waits for SQLite's own lock sleeps up to 100 ms at once, however soon it is free."""
    turn = engine.get_execution_options().get("turn")
    # After the time-out SQLite's own lock decides, and says what is wrong.
    is_ours = turn is not None and turn.acquire(timeout=BUSY_SECONDS)
    try:
        yield
    finally:
        if turn is not None and is_ours:
            turn.release()


@contextmanager
def reading(engine: Engine) -> Iterator[Connection]:
    """One consistent view of the database; nothing is written."""
    with engine.connect() as connection, connection.begin():
        yield connection


def insert_or_skip(connection: Connection, table: type[Table]) -> Any:
    """An INSERT that leaves a row alone which is there already; what came of it is in the result's `rowcount`."""
    dialect = postgresql if connection.dialect.name == "postgresql" else sqlite
    return dialect.insert(table).on_conflict_do_nothing()


def insert_many(connection: Connection, table: type[Table], rows: Sequence[Mapping[str, Any]]) -> int:
    """Insert many rows at once and leave those alone that are there already; returns how many were new.

    Every row names the same columns; the others are NULL.
    """
    if not rows:
        return 0
    return insert_columns(connection, table, {name: [row[name] for row in rows] for name in rows[0]})


def insert_columns(connection: Connection, table: type[Table], values: Mapping[str, Sequence[Any]]) -> int:
    """`insert_many` for rows that are at hand by column: at least one row, every column equally long.

    More than twice as fast as SQLAlchemy's own `executemany`, which builds a dictionary a row. SQLite gets many rows in one statement:
    to run a statement costs it as much as a few columns.
    """
    names, dialect = tuple(values), connection.dialect
    converted = [_convert(values[name], convert) for name, convert in _find_converters(dialect, table, names)]
    rows = list(zip(*converted, strict=True))
    stored = 0
    while dialect.name == "sqlite" and len(rows) >= ROWS_AT_ONCE:
        some, rows = rows[:ROWS_AT_ONCE], rows[ROWS_AT_ONCE:]
        sql = _write_insert(dialect.name, table, names, ROWS_AT_ONCE)
        stored += connection.exec_driver_sql(sql, tuple(itertools.chain.from_iterable(some))).rowcount
    if rows:
        stored += connection.exec_driver_sql(_write_insert(dialect.name, table, names, 1), rows).rowcount
    return stored


def is_one_of(connection: Connection, column: Any, values: Iterable[str]) -> ColumnElement[bool]:
    """A condition that holds where `column` is one of many values.

    SQLite gets them as one JSON text: hundreds of parameters cost more time to write down and to parse than to look up.
    """
    if connection.dialect.name != "sqlite":
        return cast("ColumnElement[bool]", column.in_(list(values)))
    listed = func.json_each(orjson.dumps(list(values)).decode()).table_valued("value")
    return cast("ColumnElement[bool]", column.in_(select(listed.c.value)))


def _convert(values: Sequence[Any], convert: Callable[[Any], Any] | None) -> Sequence[Any]:
    """One column as the driver takes it; a value that stands in every row, such as the time of the batch, is converted once."""
    if convert is None:
        return values
    first = values[0]
    if all(value is first for value in values):
        return [convert(first)] * len(values)
    return [convert(value) for value in values]


@functools.cache
def _write_insert(dialect: str, table: type[Table], names: tuple[str, ...], rows: int) -> str:
    row = f"({', '.join(['?' if dialect == 'sqlite' else '%s'] * len(names))})"
    values = ", ".join([row] * rows)
    return f"INSERT INTO {table.__tablename__} ({', '.join(names)}) VALUES {values} ON CONFLICT DO NOTHING"  # noqa: S608  names of our schema


@functools.cache
def _find_converters(dialect: Dialect, table: type[Table], names: tuple[str, ...]) -> list[tuple[str, Any]]:
    types = [(name, table.__table__.columns[name].type) for name in names]
    is_sqlite = dialect.name == "sqlite"
    return [
        (name, _to_json if is_sqlite and isinstance(type_, JSON) else type_.dialect_impl(dialect).bind_processor(dialect))
        for name, type_ in types
    ]


def _to_json(value: Any) -> str | None:
    return None if value is None else orjson.dumps(value).decode()


def upgrade(engine: Engine) -> None:
    """Bring the schema to this version of Ratchet; doing so twice changes nothing."""
    with engine.connect().execution_options(writes=True) as connection:
        config = _alembic_config()
        config.attributes["connection"] = connection
        alembic.command.upgrade(config, "head")
    with writing(engine) as connection:
        if connection.execute(select(Installation.id)).first() is None:
            connection.execute(insert(Installation).values(id=1, secret=secrets.token_hex(32), created_at=datetime.now(UTC)))


def derive_key(connection: Connection, purpose: str) -> bytes:
    """A key for one purpose, the same for ever on this installation."""
    secret = connection.execute(select(Installation.secret)).scalar_one()
    return hmac.digest(secret.encode(), purpose.encode(), "sha256")


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
