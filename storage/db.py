"""The database: how it is opened, how a transaction begins, and how the schema is brought up to date."""

from __future__ import annotations

import functools
import hmac
import itertools
import operator
import re
import secrets
import sqlite3
import threading
import time
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
from sqlalchemy import (
    ARRAY,
    JSON,
    URL,
    BigInteger,
    ColumnElement,
    Connection,
    Dialect,
    Engine,
    ExceptionContext,
    Integer,
    Select,
    String,
    any_,
    create_engine,
    event,
    func,
    insert,
    literal,
    make_url,
    select,
    text,
)
from sqlalchemy.exc import ArgumentError, DBAPIError, InterfaceError, InternalError, OperationalError, PendingRollbackError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from storage.tables import Installation, Table

BUSY_SECONDS = 30
LOOK_SECONDS = 0.001
ANALYZE_SECONDS, ANALYZED_ROWS = 3600, 1000
CONNECTIONS, KEPT_CONNECTIONS = 15, 5
MAX_PORT = 65535
OLDEST_SERVER = 15
ROWS_AT_ONCE = (500, 50)
_PASSWORD = re.compile(r"""(://[^:/@\s]*:)\S+(?=@)|([?&][^=&\s]*passw[^=&\s]*=)[^&\s"']*""", re.IGNORECASE)
UNAVAILABLE = (OperationalError, InterfaceError, InternalError, PoolTimeoutError, PendingRollbackError)
"""What is raised when the database can't be reached, is locked for too long, or its disk is full; `is_passing` tells more exactly."""
PASSING_STATES = ("08", "25006", "40", "53", "55P03", "57")
"""SQLSTATEs, or how they begin: no connection, a standby, a deadlock, no room or too many connections, a lock, the server is going."""
PASSING_CODES = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_FULL)
TURN = 0x7A7C4E8


class SchemaOutdatedError(RuntimeError):
    """The database was made by another version of Ratchet."""


class DatabaseUnfitError(RuntimeError):
    """No installation can live in this database."""


class UrlRefusedError(ValueError):
    """No database can be at this address."""


def explain(error: Exception) -> str:
    """Why the database is not available, in one line without the statement and its values."""
    return (str(getattr(error, "orig", None) or "") or type(error).__name__).partition("\n")[0]


def parse_url(url: str) -> URL:
    """The address of a database. Raises `UrlRefusedError`."""
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError) as error:
        raise UrlRefusedError("should be a URL whose port is a number: postgresql://USER:PASSWORD@HOST:5432/NAME") from error
    if parsed.port is not None and not 0 < parsed.port <= MAX_PORT:
        raise UrlRefusedError(f"port {parsed.port} should be between 1 and {MAX_PORT}")
    return parsed.set(drivername="postgresql+psycopg") if parsed.drivername == "postgresql" else parsed


def mask_passwords(text: str) -> str:
    """The text with the passwords of the URLs in it starred: before the host, where they may hold `/` and `@`, and in the query.

    No parser does it: what is refused for being no URL is shown too.
    """
    return _PASSWORD.sub(r"\1\2***", text)


def open_engine(url: str, connections: int = CONNECTIONS) -> Engine:
    """Open the database at `url`; SQLite runs in WAL mode and syncs every commit to the disk. At most so many connections are open at once.

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
        hide_parameters=True,  # an error's text is logged, and parameters are claims
        **(_sqlite_options() if is_sqlite else _postgresql_options(parsed, connections)),
    )
    if is_sqlite:
        event.listen(engine, "connect", _prepare_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
    else:
        event.listen(engine, "handle_error", _hide_detail)
    return engine


def _sqlite_options() -> dict[str, Any]:
    """A connection reads what `analyze` found when it is opened, so it is opened anew now and then."""
    return {"connect_args": {"timeout": BUSY_SECONDS}, "execution_options": {"turn": threading.Lock()}, "pool_recycle": ANALYZE_SECONDS}


def _postgresql_options(url: URL, connections: int) -> dict[str, Any]:
    """A server that is silent is given up; what the URL itself says goes first.

    A process that was frozen within a transaction does not hold up the others for ever: the server ends its session.
    """
    session = {"lock_timeout": BUSY_SECONDS, "idle_in_transaction_session_timeout": 2 * BUSY_SECONDS}
    wanted = {
        "application_name": "ratchet",
        "connect_timeout": 10,
        "keepalives_idle": 30,
        "keepalives_interval": 10,
        "keepalives_count": 3,
        "tcp_user_timeout": BUSY_SECONDS * 1000,
        "options": " ".join(f"-c {name}={seconds}s" for name, seconds in session.items()),
    }
    kept = min(connections, KEPT_CONNECTIONS)
    return {
        # Whoever has waited for a lock must see what its last holder wrote, whatever the server's own setting is.
        "isolation_level": "READ COMMITTED",
        "connect_args": {name: value for name, value in wanted.items() if name not in url.query},
        "pool_pre_ping": True,
        "pool_size": kept,
        "max_overflow": connections - kept,
    }


def _hide_detail(context: ExceptionContext) -> None:
    """Take out of an error what the row held that failed: an error's text is logged, and rows are claims."""
    for error in (context.original_exception, context.sqlalchemy_exception):
        if error is not None and error.args:
            error.args = (str(error.args[0]).partition("\nDETAIL:")[0], *error.args[1:])


def _prepare_sqlite(connection: Any, _record: object) -> None:
    connection.isolation_level = None  # transactions begin where we say so, see _begin_sqlite
    for pragma in (
        "journal_mode=WAL",
        "synchronous=FULL",
        "foreign_keys=ON",
        f"busy_timeout={BUSY_SECONDS * 1000}",
        "cache_size=-8192",
        "wal_autocheckpoint=4000",
        "temp_store=MEMORY",
    ):
        connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection: Connection) -> None:
    if not connection.get_execution_options().get("writes", False):
        connection.exec_driver_sql("BEGIN")
        return
    # A transaction that reads first and writes later would fail when another one wrote in between: take the lock at once. Who waits for
    # another process by SQLite's own wait looks up to 100 ms apart, and in most of that time the lock is nobody's.
    driver: Any = connection.connection.dbapi_connection
    driver.execute("PRAGMA busy_timeout=0")
    try:
        deadline = time.monotonic() + BUSY_SECONDS
        while not _takes_lock(driver) and time.monotonic() < deadline:
            time.sleep(LOOK_SECONDS)
        if not driver.in_transaction:
            connection.exec_driver_sql("BEGIN IMMEDIATE")  # says what is wrong
    finally:
        driver.execute(f"PRAGMA busy_timeout={int(BUSY_SECONDS * 1000)}")


def _takes_lock(driver: sqlite3.Connection) -> bool:
    """Begin to write; False when another process does."""
    try:
        driver.execute("BEGIN IMMEDIATE")
    except sqlite3.OperationalError as error:
        return error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY
    return True


@contextmanager
def writing(engine: Engine, *, alone: bool = True) -> Iterator[Connection]:
    """One transaction that may write: all of it is committed, or none.

    What it reads stays so until it ends, for nobody else writes meanwhile. That costs too much where there are many events: a transaction
    that is not `alone` runs beside others on PostgreSQL, and says itself by `take_turn` from where on it minds them.
    """
    with _taking_turns(engine), engine.connect().execution_options(writes=True) as connection, connection.begin():
        if alone:
            take_turn(connection, alone=True)
        yield connection


def take_turn(connection: Connection, *, alone: bool) -> None:
    """Wait for those who write alone, or to be alone; it lasts until the transaction ends. On SQLite each has been since it began."""
    if connection.dialect.name == "postgresql":
        lock = func.pg_advisory_xact_lock if alone else func.pg_advisory_xact_lock_shared
        connection.execute(select(lock(TURN)))


@contextmanager
def _taking_turns(engine: Engine) -> Iterator[None]:
    """Let one thread write at a time: who waits for SQLite's own lock looks again and again whether it is free."""
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
    options = {"isolation_level": "REPEATABLE READ", "postgresql_readonly": True} if engine.dialect.name == "postgresql" else {}
    with engine.connect().execution_options(**options) as connection, connection.begin():
        yield connection


def read_clock(connection: Connection) -> datetime:
    """What time the PostgreSQL server has, in UTC."""
    return cast("datetime", connection.execute(select(func.clock_timestamp())).scalar_one()).astimezone(UTC)


def is_passing(error: BaseException) -> bool:
    """Whether the database may be there again soon, so that the same transaction is worth another try.

    Nobody can say whether a commit whose answer was lost happened: only what may be done twice is tried again.
    """
    if not isinstance(error, DBAPIError):
        return isinstance(error, (PoolTimeoutError, PendingRollbackError))
    if isinstance(error.orig, sqlite3.Error):
        return getattr(error.orig, "sqlite_errorcode", 0) & 0xFF in PASSING_CODES
    state = getattr(error.orig, "sqlstate", None)
    return error.connection_invalidated or (isinstance(error, UNAVAILABLE) and (state is None or state.startswith(PASSING_STATES)))


def was_cut_off(error: BaseException) -> bool:
    """Whether a transaction ended in its midst, by a lost connection or to end a deadlock: the next try may succeed at once."""
    state = getattr(getattr(error, "orig", None), "sqlstate", None) or ""
    return isinstance(error, DBAPIError) and (error.connection_invalidated or state.startswith("40"))


def insert_new(connection: Connection, table: type[Table], row: Mapping[str, Any]) -> bool:
    """Insert a row and leave one alone that is there already; returns whether it is new."""
    return insert_many(connection, table, [row]) == 1


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
    to run a statement costs it as much as a few columns, and a value that stands in every row is bound once.
    """
    names, dialect = tuple(values), connection.dialect
    converted = {name: _convert(values[name], convert) for name, convert in _find_converters(dialect, table, names)}
    stored = done = 0
    if dialect.name == "sqlite":
        same = tuple(name for name in names if _is_same(converted[name]))
        own = tuple(name for name in names if name not in same)
        shared = [converted[name][0] for name in same]
        rows = list(zip(*(converted[name] for name in own), strict=True))
        for size in ROWS_AT_ONCE:
            while own and len(rows) - done >= size:
                parameters = (*shared, *itertools.chain.from_iterable(rows[done : done + size]))
                stored += connection.exec_driver_sql(_write_insert_of_many(table, same, own, size), parameters).rowcount
                done += size
    rest = list(zip(*(converted[name][done:] for name in names), strict=True))
    if rest:
        stored += connection.exec_driver_sql(_write_insert(dialect.name, table, names), rest).rowcount
    return stored


def is_one_of(connection: Connection, column: Any, values: Iterable[str] | Iterable[int]) -> ColumnElement[bool]:
    """A condition that holds where `column` is one of many values.

    They are one parameter, a JSON text or an array: hundreds cost more time to write down and to parse than to look up.
    """
    if connection.dialect.name != "sqlite":
        return cast("ColumnElement[bool]", column == any_(_to_array(column, values)))
    return cast("ColumnElement[bool]", column.in_(_list(connection, column, values)))


def is_none_of(connection: Connection, column: Any, values: Iterable[str] | Iterable[int]) -> ColumnElement[bool]:
    """A condition that holds where `column` is none of many values."""
    return cast("ColumnElement[bool]", column.not_in(_list(connection, column, values)))


def _list(connection: Connection, column: Any, values: Iterable[str] | Iterable[int]) -> Select[Any]:
    if connection.dialect.name != "sqlite":
        return select(func.unnest(_to_array(column, values)))
    return select(func.json_each(orjson.dumps(list(values)).decode()).table_valued("value").c.value)


def _to_array(column: Any, values: Iterable[str] | Iterable[int]) -> ColumnElement[Any]:
    return literal(list(values), ARRAY(BigInteger if isinstance(column.type, Integer) else String))


def _convert(values: Sequence[Any], convert: Callable[[Any], Any] | None) -> Sequence[Any]:
    """One column as the driver takes it; a value that stands in every row, such as the time of the batch, is converted once."""
    if convert is None:
        return values
    if _is_same(values):
        return [convert(values[0])] * len(values)
    return [convert(value) for value in values]


def _is_same(values: Sequence[Any]) -> bool:
    return all(map(operator.is_, values, itertools.repeat(values[0])))


@functools.cache
def _write_insert(dialect: str, table: type[Table], names: tuple[str, ...]) -> str:
    row = ", ".join(["?" if dialect == "sqlite" else "%s"] * len(names))
    return f"INSERT INTO {table.__tablename__} ({', '.join(names)}) VALUES ({row}) ON CONFLICT DO NOTHING"  # noqa: S608  names of our schema


@functools.lru_cache(maxsize=64)
def _write_insert_of_many(table: type[Table], same: tuple[str, ...], own: tuple[str, ...], rows: int) -> str:
    """An INSERT that takes the values of `same` once, then those of `own` row by row."""
    # Numbers for the shared ones alone: with one for each parameter SQLite takes 12 ms to prepare 500 rows, without 1.
    row = ", ".join([*(f"?{number}" for number in range(1, len(same) + 1)), *"?" * len(own)])
    written = ", ".join([f"({row})"] * rows)
    return f"INSERT INTO {table.__tablename__} ({', '.join(same + own)}) VALUES {written} ON CONFLICT DO NOTHING"  # noqa: S608  the same


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
    """Bring the schema to this version of Ratchet, all of it or nothing; doing so twice, or twice at once, changes nothing."""
    with writing(engine) as connection:
        config = _alembic_config()
        config.attributes["connection"] = connection
        alembic.command.upgrade(config, "head")
        if connection.execute(select(Installation.id)).first() is None:
            connection.execute(insert(Installation).values(id=1, secret=secrets.token_hex(32), created_at=datetime.now(UTC)))


def analyze(engine: Engine) -> None:
    """Let SQLite look at what its indexes hold (tens of ms however large they are): else it takes any of those that fit.

    A PostgreSQL server does so by itself.
    """
    if engine.dialect.name == "sqlite":
        with writing(engine) as connection:
            connection.exec_driver_sql(f"PRAGMA analysis_limit={ANALYZED_ROWS}")
            connection.exec_driver_sql("ANALYZE")


def derive_key(connection: Connection, purpose: str) -> bytes:
    """A key for one purpose, the same for ever on this installation."""
    secret = connection.execute(select(Installation.secret)).scalar_one()
    return hmac.digest(secret.encode(), purpose.encode(), "sha256")


def check(engine: Engine) -> None:
    """Raise `SchemaOutdatedError` with the remedy unless the schema is the one this version of Ratchet was written for.

    Raises `DatabaseUnfitError` for a server that is too old or keeps no Unicode.
    """
    head = alembic.script.ScriptDirectory.from_config(_alembic_config()).get_current_head()
    try:
        with reading(engine) as connection:
            _check_server(connection)
            current = alembic.runtime.migration.MigrationContext.configure(connection).get_current_revision()
    except OperationalError as error:
        raise SchemaOutdatedError(f"the database can't be opened: {' '.join(str(error.orig).split())}") from error
    if current != head:
        raise SchemaOutdatedError(f"the database has schema {current or 'none'}, this version needs {head}: run `ratchet db upgrade`")


def _check_server(connection: Connection) -> None:
    if connection.dialect.name != "postgresql":
        return
    version = connection.execute(text("SHOW server_version")).scalar_one()
    if int(version.partition(".")[0]) < OLDEST_SERVER:
        raise DatabaseUnfitError(f"the server is PostgreSQL {version}: it should be {OLDEST_SERVER} or newer")
    encoding = connection.execute(text("SHOW server_encoding")).scalar_one()
    if encoding != "UTF8":
        raise DatabaseUnfitError(f"the database has the encoding {encoding}: make it anew with ENCODING 'UTF8' TEMPLATE template0")


def _alembic_config() -> alembic.config.Config:
    config = alembic.config.Config()
    config.set_main_option("script_location", str(Path(__file__).with_name("migrations")))
    config.set_main_option("path_separator", "os")
    return config
