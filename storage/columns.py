"""What columns are made of: times in UTC, the input inside an event's text, the states a row may be in, indexes over few rows."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import JSON, BigInteger, CheckConstraint, Dialect, Index, TextClause, text
from sqlalchemy.dialects.postgresql import TIMESTAMP
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.types import TypeDecorator, TypeEngine

EPOCH, MICROSECOND = datetime(1970, 1, 1, tzinfo=UTC), timedelta(microseconds=1)


class NoZoneError(ValueError):
    """What a time means that says no zone would depend on the machine."""

    def __init__(self, value: datetime) -> None:
        super().__init__(f"{value!r} has no time zone: pass an aware time")


class UtcTime(TypeDecorator[datetime]):
    """An aware time in UTC: `timestamptz` on PostgreSQL, microseconds since 1970 on SQLite, a quarter of the bytes of a text."""

    impl = BigInteger
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        """The column type of the database in use."""
        return dialect.type_descriptor(TIMESTAMP(timezone=True) if dialect.name == "postgresql" else BigInteger())

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> Any:
        """The time as the database keeps it. Raises `NoZoneError`."""
        if value is None or dialect.name != "postgresql":
            return to_microseconds(value)
        if value.tzinfo is None:
            raise NoZoneError(value)
        return value.astimezone(UTC)

    def process_result_value(self, value: Any, dialect: Dialect) -> datetime | None:
        """The time as it was stored, in UTC."""
        if value is None:
            return None
        at: datetime = value.astimezone(UTC) if dialect.name == "postgresql" else EPOCH + value * MICROSECOND
        return at


def to_microseconds(value: datetime | None) -> int | None:
    """The microseconds since 1970 of an aware time. Raises `NoZoneError`."""
    if value is None:
        return None
    if value.tzinfo is None:
        raise NoZoneError(value)
    return (value - EPOCH) // MICROSECOND


class InputOf(FunctionElement[dict[str, Any]]):
    """The field `input` of an event's JSON text."""

    type = JSON()
    inherit_cache = True


@compiles(InputOf, "sqlite")
def _write_for_sqlite(element: InputOf, compiler: SQLCompiler, **options: Any) -> str:
    return f"json_extract({compiler.process(element.clauses, **options)}, '$.input')"


@compiles(InputOf, "postgresql")
def _write_for_postgresql(element: InputOf, compiler: SQLCompiler, **options: Any) -> str:
    return f"(CAST({compiler.process(element.clauses, **options)} AS JSON) -> 'input')"


def states(column: str, *allowed: str) -> CheckConstraint:
    """The states a row may be in, enforced by the database."""
    # Not as IN: SQLite would sort the list of allowed states anew for every row.
    return CheckConstraint(" OR ".join(f"{column} = {state!r}" for state in allowed), name=f"{column}_is_known")


def partial(name: str, *columns: str | TextClause, where: str, unique: bool = False) -> Index:
    """An index over the few rows that `where` holds for, so that finding work stays fast in a big table."""
    return Index(name, *columns, unique=unique, sqlite_where=text(where), postgresql_where=text(where))
