"""What each daemon that speaks to Kafka has last told of itself, so that any other process can show it."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection, RowMapping, delete, insert, select, update

from storage.tables import Stream

FRESH = timedelta(seconds=60)
KEPT = timedelta(days=1)


def tell(connection: Connection, holder: str, body: Mapping[str, Any], now: datetime) -> None:
    """Say how one daemon's stream is now; what others said long ago is forgotten."""
    values = {"body": dict(body), "at": now}
    if not connection.execute(update(Stream).where(Stream.holder == holder).values(values)).rowcount:
        connection.execute(delete(Stream).where(Stream.at < now - KEPT))
        connection.execute(insert(Stream).values(holder=holder, **values))


def read_fresh(connection: Connection, now: datetime) -> list[RowMapping]:
    """What was told in the last minute, newest first."""
    query = select(Stream.holder, Stream.at, Stream.body).where(Stream.at > now - FRESH).order_by(Stream.at.desc())
    return list(connection.execute(query).mappings())
