"""A real PostgreSQL server for the tests, and databases in it that are made in a moment by copying one that has the schema."""

from __future__ import annotations

import contextlib
import itertools
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from storage import db, schema
from storage.tables import Table

SCRIPT = Path(__file__).parents[1] / "deploy" / "postgres.sh"
NOT_INSTALLED = 3
SETTINGS = ("fsync=off", "full_page_writes=off", "shared_buffers=32MB", "max_connections=60")
"""A crash of the server loses nothing that the operating system has: only a power cut would."""
TEMPLATE, REVISION = "migrated", "SELECT version_num FROM alembic_version"
EMPTY = "; ".join(f"DELETE FROM {table.name}" for table in reversed(Table.metadata.sorted_tables) if table.name != "installation")


class Server:
    """A server of this test session. Databases are named by number; `TEMPLATE` is what they are copied from."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._numbers = itertools.count(1)
        self._free: list[str] = []
        self._revision: list[tuple[object, ...]] = []

    def call(self, action: str, *settings: str) -> None:
        """Do what `deploy/postgres.sh` does: start, stop, kill, wipe."""
        done = subprocess.run([SCRIPT, action, self.folder, *settings], check=False, capture_output=True, text=True, cwd="/")
        if done.returncode == NOT_INSTALLED:
            pytest.skip(done.stderr.strip())
        assert done.returncode == 0, done.stderr

    def start(self, *settings: str) -> None:
        """Start it, or do nothing when it runs; the later of two settings holds."""
        self.call("start", *SETTINGS, *settings)

    def url(self, database: str) -> str:
        """The address of a database, as a user writes it."""
        return f"postgresql://ratchet@/{database}?host={self.folder}"

    def execute(self, statement: str, database: str = "postgres") -> list[tuple[object, ...]]:
        """Do something as the server's owner, outside of any transaction."""
        with psycopg.connect(self.url(database), autocommit=True) as connection:
            done = connection.execute(statement)  # type: ignore[call-overload]
            return list(done) if done.description else []

    def make_template(self) -> None:
        """Migrate the database that the others are copied from."""
        self.execute(f"CREATE DATABASE {TEMPLATE}")
        engine = db.open_engine(self.url(TEMPLATE))
        schema.upgrade(engine)
        engine.dispose()
        self._revision = self.execute(REVISION, TEMPLATE)

    def make_database(self) -> str:
        """A database with the current schema and nothing in it; returns its name."""
        if self._free:
            return self._free.pop()
        name = f"test_{next(self._numbers)}"
        self.execute(f"CREATE DATABASE {name} TEMPLATE {TEMPLATE}")
        return name

    def take_back(self, name: str) -> None:
        """Empty a database for another test, whoever still uses it: that is ten times as fast as to copy one."""
        self.execute(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}' AND pid <> pg_backend_pid()")
        try:
            self.execute(EMPTY, name)
            is_as_before = self.execute(REVISION, name) == self._revision
        except psycopg.errors.UndefinedTable:
            is_as_before = False
        if is_as_before:
            self._free.append(name)
        else:  # the test changed its schema
            self.execute(f"DROP DATABASE {name} WITH (FORCE)")


@contextlib.contextmanager
def running_server() -> Iterator[Server]:
    """A fresh server with its template; gone afterwards. Skips the test where PostgreSQL is not installed."""
    # Not below pytest's own folder, which another user may not enter; and a socket's path must be short.
    with tempfile.TemporaryDirectory(prefix="ratchet-pg-", ignore_cleanup_errors=True) as parent:
        Path(parent).chmod(0o711)
        server = Server(Path(parent) / "pg")
        server.start()
        try:
            server.make_template()
            yield server
        finally:
            server.call("wipe")
