"""What could not be handled: kept with its reason until somebody replays or discards it."""

from __future__ import annotations

import hashlib
from datetime import datetime
from typing import Any, NamedTuple

from sqlalchemy import Connection, RowMapping, case, func, select, update

from storage import bulk, events, ids
from storage.tables import DeadLetter, Event

PARKED = "ratchet.dead-letter.parked.v1"


class Record(NamedTuple):
    """One record of a Kafka topic, before anybody knows whether it is an event."""

    topic: str
    partition: int
    offset: int
    value: bytes | None


class UnknownDeadLetterError(LookupError):
    """There is no parked dead letter of this id."""


def park_event(connection: Connection, event: events.Stored, reason: str, now: datetime) -> str:
    """Set an event aside; its payload stays in the log."""
    events.mark(connection, [event.ulid], "dead", now, reason)
    return park(connection, event.subject or event.type, reason, now, event=event.ulid, key=event.ulid)


def park(
    connection: Connection, origin: str, reason: str, now: datetime, *, key: str, event: str | None = None, payload: str | None = None
) -> str:
    """Set something aside that never became an event. While a letter of this `key` is parked, that one stands for both."""
    return _park(connection, key, reason, now, {"event": event, "origin": origin, "payload": payload})


def park_record(connection: Connection, record: Record, reason: str, announced: str, now: datetime) -> str:
    """Set a record from Kafka aside with its bytes and its place. `announced` is the reason without what it holds."""
    digest = hashlib.sha256(record.value or b"").hexdigest()
    origin = f"{record.topic}/{record.partition}/{record.offset}"  # a topic that was made anew has the same places again
    place = {"topic": record.topic, "partition": record.partition, "record_offset": record.offset}
    return _park(connection, f"{origin}/{digest}", reason, now, {"origin": origin, **place, "value": record.value}, announced)


def _park(connection: Connection, key: str, reason: str, now: datetime, told: dict[str, Any], announced: str | None = None) -> str:
    letter = ids.make_ulid(now, "dead letter", key)
    row = {"id": letter, "key": key, "reason": reason, "state": "parked", "at": now, **told}
    if bulk.insert_new(connection, DeadLetter, row):
        events.emit(connection, PARKED, letter, letter, {"letter": letter, "reason": announced or reason}, now)
    parked = select(DeadLetter.id).where(DeadLetter.key == key, DeadLetter.state == "parked")
    return connection.execute(parked).scalar_one()


def list_parked(connection: Connection, limit: int = 100) -> list[RowMapping]:
    """The parked ones, newest first."""
    query = select(DeadLetter.id, DeadLetter.event, DeadLetter.origin, DeadLetter.reason, DeadLetter.at)
    return list(connection.execute(query.where(DeadLetter.state == "parked").order_by(DeadLetter.at.desc()).limit(limit)).mappings())


def count_parked(connection: Connection) -> int:
    """How many wait for somebody."""
    return connection.execute(select(func.count()).select_from(DeadLetter).where(DeadLetter.state == "parked")).scalar_one()


def show(connection: Connection, letter: str) -> dict[str, Any]:
    """One dead letter with the event's payload. Raises `UnknownDeadLetterError`."""
    query = select(DeadLetter.__table__, Event.data, Event.type, Event.source, Event.event_id)
    query = query.join(Event, Event.ulid == DeadLetter.event, isouter=True).where(DeadLetter.id == letter)
    row = connection.execute(query).mappings().first()
    if row is None:
        raise UnknownDeadLetterError(f"there is no dead letter {letter}: `ratchet dead-letters list` shows them")
    return dict(row)


def replay(connection: Connection, letter: str, actor: str, now: datetime) -> None:
    """Put the event of a parked dead letter through the handlers again; one of our own is sent again."""
    event = _close(connection, letter, "replayed", actor, None, now)
    if event is None:
        raise UnknownDeadLetterError(f"dead letter {letter} holds no event that could be replayed: discard it, and send it anew")
    state = case((Event.number.is_(None), "received"), else_="unsent")
    connection.execute(update(Event).where(Event.ulid == event, Event.state == "dead").values(state=state, reason=None, handled_at=None))


def find_record(connection: Connection, letter: str) -> Record | None:
    """The record from Kafka that a parked dead letter holds; None when it holds none."""
    query = select(DeadLetter.topic, DeadLetter.partition, DeadLetter.record_offset, DeadLetter.value)
    row = connection.execute(query.where(DeadLetter.id == letter, DeadLetter.state == "parked", DeadLetter.topic.is_not(None))).first()
    return Record._make(row) if row else None


def close_replayed(connection: Connection, letter: str, actor: str, now: datetime) -> None:
    """Close a parked dead letter whose record has become an event. Raises `UnknownDeadLetterError`."""
    _close(connection, letter, "replayed", actor, None, now)


def discard(connection: Connection, letter: str, actor: str, note: str, now: datetime) -> None:
    """Close a parked dead letter for good, with the reason; its event stays in the log."""
    _close(connection, letter, "discarded", actor, note, now)


def _close(connection: Connection, letter: str, state: str, actor: str, note: str | None, now: datetime) -> str | None:
    change = update(DeadLetter).where(DeadLetter.id == letter, DeadLetter.state == "parked")
    closed = connection.execute(change.values(state=state, closed_at=now, closed_by=actor, note=note).returning(DeadLetter.event)).first()
    if closed is None:
        raise UnknownDeadLetterError(f"there is no parked dead letter {letter}: `ratchet dead-letters list` shows them")
    return closed.event  # type: ignore[no-any-return]
