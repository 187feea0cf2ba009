"""The schema in a database: brought up to date, compared with this version of Ratchet, and its indexes looked at."""

from __future__ import annotations

import secrets
from datetime import UTC, datetime
from pathlib import Path

import alembic.command
import alembic.config
import alembic.runtime.migration
import alembic.script
from sqlalchemy import Connection, Engine, insert, select, text
from sqlalchemy.exc import OperationalError

from storage import db
from storage.tables import Installation

ANALYZED_ROWS = 1000

OLDEST_SERVER = 15


class SchemaOutdatedError(RuntimeError):
    """The database was made by another version of Ratchet."""


class DatabaseUnfitError(RuntimeError):
    """No installation can live in this database."""


def upgrade(engine: Engine) -> None:
    """Bring the schema to this version of Ratchet, all of it or nothing; doing so twice, or twice at once, changes nothing."""
    with db.writing(engine) as connection:
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
        with db.writing(engine) as connection:
            connection.exec_driver_sql(f"PRAGMA analysis_limit={ANALYZED_ROWS}")
            connection.exec_driver_sql("ANALYZE")


def check(engine: Engine) -> None:
    """Raise `SchemaOutdatedError` with the remedy unless the schema is the one this version of Ratchet was written for.

    Raises `DatabaseUnfitError` for a server that is too old or keeps no Unicode.
    """
    head = alembic.script.ScriptDirectory.from_config(_alembic_config()).get_current_head()
    try:
        with db.reading(engine) as connection:
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
