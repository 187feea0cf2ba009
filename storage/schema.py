"""The schema in a database: brought up to date, compared with this version of Ratchet, and its indexes looked at."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import alembic.command
import alembic.config
import alembic.runtime.migration
import alembic.script
from sqlalchemy import Connection, Engine, insert, inspect, select, text
from sqlalchemy.exc import OperationalError

from storage import db
from storage.tables import Installation

ANALYZED_ROWS = 1000

OLDEST_SERVER = 15


class SchemaOutdatedError(RuntimeError):
    """The database was made by another version of Ratchet."""


class DatabaseMissingError(RuntimeError):
    """Where the configuration says is no database, or one that nobody has written to."""


class DatabaseUnfitError(RuntimeError):
    """No installation can live in this database."""


def upgrade(engine: Engine) -> bool:
    """Bring the schema to this version of Ratchet, all of it or nothing; doing so twice, or twice at once, changes nothing.

    Returns whether it made a new installation, where there was none. Raises `SchemaOutdatedError` for a newer schema, or where the database
    can't be opened, and `DatabaseUnfitError` for a server that is too old or has no Unicode.
    """
    _make_file(engine)
    with _reaching(engine) as connection:
        _check_server(connection)
    with db.writing(engine) as connection:
        config = _alembic_config()
        _refuse_newer(_read_revision(connection), alembic.script.ScriptDirectory.from_config(config))
        config.attributes["connection"] = connection
        alembic.command.upgrade(config, "head")
        is_new = connection.execute(select(Installation.id)).first() is None
        if is_new:
            connection.execute(insert(Installation).values(id=1, secret=secrets.token_hex(32), created_at=datetime.now(UTC)))
    return is_new


def _make_file(engine: Engine) -> None:
    """Make an SQLite file that only its owner may read, for claims will lie in it; SQLite gives the files beside it the same mode."""
    file = db.find_file(engine.url)
    if file is not None and not file.exists():
        file.touch(mode=0o600)


def analyze(engine: Engine) -> None:
    """Let SQLite look at what its indexes hold (tens of ms however large they are): else it takes any of those that fit.

    A PostgreSQL server does so by itself.
    """
    if engine.dialect.name == "sqlite":
        with db.writing(engine) as connection:
            connection.exec_driver_sql(f"PRAGMA analysis_limit={ANALYZED_ROWS}")
            connection.exec_driver_sql("ANALYZE")


def check(engine: Engine) -> None:
    """Raise `SchemaOutdatedError` with the remedy unless the schema is the one this version of Ratchet was written for.

    Raises `DatabaseMissingError` where there is none, and makes none; `DatabaseUnfitError` for a server that is too old or has no Unicode.
    """
    scripts = alembic.script.ScriptDirectory.from_config(_alembic_config())
    file = db.find_file(engine.url)
    if file is not None and not file.exists():
        raise _report_missing(engine)
    with _reaching(engine) as connection:
        _check_server(connection)
        current = _read_revision(connection)
        if current is None and not inspect(connection).get_table_names():
            raise _report_missing(engine)
    _refuse_newer(current, scripts)
    if current != (head := scripts.get_current_head()):
        raise SchemaOutdatedError(f"the database has schema {current or 'none'}, this version needs {head}: run `ratchet db upgrade`")


@contextmanager
def _reaching(engine: Engine) -> Iterator[Connection]:
    """The database, to read a little of it. Raises `SchemaOutdatedError` with the remedy when it can't be opened."""
    try:
        with db.reading(engine) as connection:
            yield connection
    except OperationalError as error:
        what = "that you may write it" if engine.dialect.name == "sqlite" else "that the server runs and lets you in"
        told = " ".join(str(error.orig).split())
        raise SchemaOutdatedError(f"the database can't be opened: {told}. Check database.url, and {what}") from error


def _report_missing(engine: Engine) -> DatabaseMissingError:
    what = "there is no database at" if engine.dialect.name == "sqlite" else "there are no tables in"
    remedy = "restore it from a backup (docs/operations.md), or make a new, empty one with `ratchet db upgrade`"
    return DatabaseMissingError(f"{what} {db.name_place(engine.url)}: {remedy}")


def _read_revision(connection: Connection) -> str | None:
    return alembic.runtime.migration.MigrationContext.configure(connection).get_current_revision()


def _refuse_newer(current: str | None, scripts: alembic.script.ScriptDirectory) -> None:
    """Raise `SchemaOutdatedError` for a schema that this version has never heard of: there are no downgrades."""
    if current is not None and current not in {script.revision for script in scripts.walk_revisions()}:
        remedy = "install that version, or restore the backup from before it (docs/operations.md)"
        raise SchemaOutdatedError(f"the database was made by a newer Ratchet (schema {current}): {remedy}")


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
