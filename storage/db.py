"""The database: how it is opened, how a transaction begins, and which of its failures pass."""

from __future__ import annotations

import re
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import orjson
from sqlalchemy import URL, Connection, Engine, ExceptionContext, create_engine, event, func, make_url, select
from sqlalchemy.exc import (
    ArgumentError,
    DBAPIError,
    DisconnectionError,
    InterfaceError,
    InternalError,
    OperationalError,
    PendingRollbackError,
)
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

BUSY_SECONDS = 30
LOOK_SECONDS = 0.001
ANALYZE_SECONDS = 3600
PAGE_BYTES, LOG_BYTES = 8192, 2**24
CONNECTIONS, KEPT_CONNECTIONS = 15, 5
MAX_PORT = 65535
_PASSWORD = re.compile(r"""(://[^:/@\s]*:)\S+(?=@)|([?&][^=&\s]*passw[^=&\s]*=)[^&\s"']*""", re.IGNORECASE)
UNAVAILABLE = (OperationalError, InterfaceError, InternalError, PoolTimeoutError, PendingRollbackError)
"""What is raised when the database can't be reached, is locked for too long, or its disk is full; `is_passing` tells more exactly."""
PASSING_STATES = ("08", "25006", "40", "53", "55P03", "57")
"""SQLSTATEs, or how they begin: no connection, a standby, a deadlock, no room or too many connections, a lock, the server is going."""
PASSING_CODES = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_FULL)
DAMAGE_CODES = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
TURN = 0x7A7C4E8


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


def find_file(url: URL) -> Path | None:
    """The file of an SQLite database; None for one in memory, or on a server."""
    name = url.database or ""
    is_file = url.get_backend_name() == "sqlite" and name not in {"", ":memory:"} and not name.startswith("file:")
    return Path(name) if is_file else None


def name_place(url: URL) -> str:
    """Where a database is, as it may be shown: its file, or its address without passwords."""
    return str(find_file(url) or mask_passwords(url.render_as_string(hide_password=True)))


def mask_passwords(text: str) -> str:
    """The text with the passwords of the URLs in it starred: before the host, where they may hold `/` and `@`, and in the query.

    No parser does it: what is refused for being no URL is shown too.
    """
    return _PASSWORD.sub(r"\1\2***", text)


def open_engine(url: str, connections: int = CONNECTIONS) -> Engine:
    """Open the database at `url`; SQLite runs in WAL mode and syncs every commit to the disk. At most so many connections are open at once.

    To connect makes no SQLite file, `schema.upgrade` does: a file that is gone is an error at the next transaction. Raises
    `UrlRefusedError`, also when the folder of an SQLite file is missing.
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
        if (file := find_file(parsed)) is not None:
            place = _Place(file)
            event.listen(engine, "do_connect", place.open_existing)
            event.listen(engine, "checkout", place.check)
            event.listen(engine, "engine_disposed", place.forget)
    else:
        event.listen(engine, "handle_error", _hide_detail)
    return engine


def _sqlite_options() -> dict[str, Any]:
    """A connection reads what `schema.analyze` found when it is opened, so it is opened anew now and then."""
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


class _Place:
    """The file of an SQLite database, and which one was opened there first.

    To connect makes none. One that was deleted or replaced is not written to any more: what it took would be lost, and SQLite would apply
    the log of the old one to the new one.
    """

    def __init__(self, file: Path) -> None:
        self._file = file.absolute()
        self._opened: tuple[int, int] | None = None

    def open_existing(self, _dialect: object, _record: object, arguments: list[Any], options: dict[str, Any]) -> None:
        """Before a connection is opened. Raises `sqlite3.OperationalError` unless the file is there, the same as before."""
        found = self._identify()
        if found is None:
            raise sqlite3.OperationalError(f"there is no {self._file}: restore it from a backup (docs/operations.md)")
        if found != (self._opened or found):
            remedy = "stop every process that uses it, restore it (docs/operations.md)"
            raise sqlite3.OperationalError(f"{self._file} was replaced by another file: {remedy}")
        self._opened = found
        arguments[:], options["uri"] = [f"{self._file.as_uri()}?mode=rw"], True

    def check(self, _connection: object, _record: object, _proxy: object) -> None:
        """Before an open connection is used: it is opened anew, and that says what is wrong."""
        if self._identify() != self._opened:
            raise DisconnectionError(f"{self._file} is not the file that it was")

    def forget(self, _engine: object) -> None:
        """After all connections were closed: whatever lies there may be opened."""
        self._opened = None

    def _identify(self) -> tuple[int, int] | None:
        try:
            found = self._file.stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        return found.st_dev, found.st_ino


def _prepare_sqlite(connection: Any, _record: object) -> None:
    connection.isolation_level = None  # transactions begin where we say so, see _begin_sqlite
    connection.execute(f"PRAGMA page_size={PAGE_BYTES}")  # of a new file; others keep theirs
    (page_bytes,) = connection.execute("PRAGMA page_size").fetchone()
    for pragma in (
        "journal_mode=WAL",
        "synchronous=FULL",
        "foreign_keys=ON",
        f"busy_timeout={BUSY_SECONDS * 1000}",
        "cache_size=-8192",
        f"wal_autocheckpoint={LOG_BYTES // page_bytes}",
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
    """One transaction that may write: all of it is committed, or none, and then it raises.

    What it reads stays so until it ends, for nobody else writes meanwhile. That costs too much where there are many events: a transaction
    that is not `alone` runs beside others on PostgreSQL, and says itself by `take_turn` from where on it minds them.
    """
    with _taking_turns(engine), engine.connect().execution_options(writes=True) as connection, connection.begin():
        if alone:
            take_turn(connection, alone=True)
        yield connection
        if is_over(connection):  # nothing is left to commit, and the driver would not say so
            raise OperationalError("COMMIT", {}, sqlite3.OperationalError("the transaction was undone: is the disk well?"))


@contextmanager
def savepoint(connection: Connection) -> Iterator[None]:
    """A part of a transaction: what it wrote is undone when it raises, and the transaction can go on.

    Raises what the database says when it can't undo the part: then nothing of the transaction is left. It is as `Connection.begin_nested`,
    which costs each batch of events a fortieth of its time.
    """
    connection.exec_driver_sql("SAVEPOINT part")
    try:
        yield
    except BaseException as error:
        is_told = isinstance(error, (DBAPIError, PendingRollbackError))
        with suppress(DBAPIError, PendingRollbackError) if is_told else nullcontext():
            connection.exec_driver_sql("ROLLBACK TO SAVEPOINT part")
            connection.exec_driver_sql("RELEASE SAVEPOINT part")  # else it would be the one that an outer part goes back to
        raise
    connection.exec_driver_sql("RELEASE SAVEPOINT part")


def is_over(connection: Connection) -> bool:
    """Whether a transaction has ended by itself, so that nothing may be committed: SQLite undoes all of it when the disk fails it."""
    return connection.invalidated or (
        connection.dialect.name == "sqlite" and not cast("sqlite3.Connection", connection.connection.dbapi_connection).in_transaction
    )


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


def is_damage(error: BaseException) -> bool:
    """Whether what lies in the file of an SQLite database is none any more."""
    return isinstance(error, DBAPIError) and getattr(error.orig, "sqlite_errorcode", 0) & 0xFF in DAMAGE_CODES


def was_cut_off(error: BaseException) -> bool:
    """Whether a transaction ended in its midst, by a lost connection or to end a deadlock: the next try may succeed at once."""
    state = getattr(getattr(error, "orig", None), "sqlstate", None) or ""
    return isinstance(error, DBAPIError) and (error.connection_invalidated or state.startswith("40"))
