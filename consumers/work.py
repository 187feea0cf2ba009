"""What handlers are given, an event with its data, and how they say what became of it: handled, or parked with the reason."""

from __future__ import annotations

import hashlib
import traceback
from collections import Counter
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import orjson
import structlog
from sqlalchemy import Connection

from storage import dead_letters, events

Item = tuple[events.Stored, Any]
"""An event and its data, as parsed at the door or read from the log: a time in it is a `datetime` or its text."""

log = structlog.get_logger()


def park(connection: Connection, event: events.Stored, reason: str, now: datetime) -> Counter[str]:
    """Make a dead letter of an event."""
    letter = dead_letters.park_event(connection, event, reason, now)
    log.warning("event_parked", ulid=event.ulid, dead_letter=letter)  # the reason may name a claim
    return Counter(dead=1)


def mark_handled(connection: Connection, items: Sequence[Item], now: datetime) -> Counter[str]:
    """Events that this transaction stored as handled are so already."""
    events.mark(connection, [event.ulid for event, _ in items if event.state != "handled"], "handled", now)
    return Counter(handled=len(items))


def digest(value: Any) -> str:
    """The SHA-256 of JSON, whatever the order of its keys."""
    return hashlib.sha256(orjson.dumps(value, option=orjson.OPT_SORT_KEYS)).hexdigest()


def describe_error(error: Exception, where: str) -> str:
    """Which error it was and at which line, for a log or a dead letter: its text may hold a claim."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} in {where} ({Path(place.filename).name}:{place.lineno})"


def read_time(value: datetime | str) -> datetime:
    """A time of an item's data."""
    return value if isinstance(value, datetime) else datetime.fromisoformat(value)
