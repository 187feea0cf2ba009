"""The event log: inbox and outbox in one append-only table.

Work is found by a row's state, never by its position: on PostgreSQL the order of keys is not the order of commits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, Literal, cast

import orjson
from msgspec import Struct
from msgspec.structs import astuple
from sqlalchemy import Connection, func, select, text, tuple_, update

from storage import bulk, ids
from storage.tables import Event

Outcome = Literal["stored", "duplicate", "conflict"]
State = Literal["received", "handled"]


class Incoming(Struct, frozen=True, gc=False, array_like=True):
    """An event before it is stored; `data` is JSON text and `digest` the SHA-256 over its canonical form."""

    source: str
    event_id: str
    type: str
    subject: str
    time: datetime
    data: str
    digest: str
    principal: str | None = None


class Receipt(Struct, frozen=True, gc=False):
    """What became of an appended event; a `conflict` names the event that was stored before it."""

    ulid: str
    outcome: Outcome


class Stored(Struct, frozen=True, gc=False):
    """An event as it lies in the log: what it was before, where its payload may be erased, and what became of it."""

    source: str
    event_id: str
    type: str
    subject: str
    time: datetime
    data: str | None
    digest: str
    principal: str | None
    ulid: str
    received_at: datetime
    state: str
    reason: str | None
    handled_at: datetime | None


IS_UNSENT = text("events.state = 'unsent'")
"""Written out as its index says it: an index over few rows serves a query only when its text says that it means those."""
COLUMNS = tuple(getattr(Event, name) for name in Stored.__struct_fields__)


def append(connection: Connection, incoming: Sequence[Incoming], now: datetime, state: State = "received") -> list[Receipt]:
    """Store events that came in, each identity `(source, event_id)` once; what Ratchet itself tells is for `emit`.

    The caller's transaction stores them, and handles those that are `handled` before it ends.
    """
    if not incoming:
        return []
    identities = [(one.source, one.event_id) for one in incoming]
    ulids = ids.make_ulids(now, map("\0".join, identities))
    columns = dict(zip(Incoming.__struct_fields__, zip(*map(astuple, incoming), strict=True), strict=True))
    shared = {"received_at": now, "state": state} | ({"handled_at": now} if state == "handled" else {})
    same = {name: [value] * len(ulids) for name, value in shared.items()}
    if bulk.insert_columns(connection, Event, _sort(connection, {"ulid": ulids, **columns, **same}, identities)) == len(ulids):
        return [Receipt(ulid, "stored") for ulid in ulids]
    found = select(Event.source, Event.event_id, Event.ulid, Event.digest).where(tuple_(Event.source, Event.event_id).in_(identities))
    known = {(row.source, row.event_id): (row.ulid, row.digest) for row in connection.execute(found)}
    return [_receipt(ulid, one, *known[one.source, one.event_id]) for ulid, one in zip(ulids, incoming, strict=True)]


def _sort(connection: Connection, columns: dict[str, Sequence[Any]], identities: Sequence[tuple[str, str]]) -> Mapping[str, Sequence[Any]]:
    """In one order for all: two who store the same events at once would wait for each other, where several write (PostgreSQL)."""
    if connection.dialect.name != "postgresql":
        return columns
    order = sorted(range(len(identities)), key=identities.__getitem__)
    return {name: [values[place] for place in order] for name, values in columns.items()}


def _receipt(ulid: str, one: Incoming, known_ulid: str, known_digest: str) -> Receipt:
    if known_digest != one.digest:
        return Receipt(known_ulid, "conflict")
    return Receipt(known_ulid, "stored" if known_ulid == ulid else "duplicate")


def to_stored(receipts: Sequence[Receipt], incoming: Sequence[Incoming], state: State, now: datetime) -> list[Stored]:
    """Events that were appended just now, as they would be read back."""
    handled_at = now if state == "handled" else None
    pairs = zip(receipts, incoming, strict=True)
    return [cast("Any", Stored)(*astuple(one), receipt.ulid, now, state, None, handled_at) for receipt, one in pairs]


def read_received(connection: Connection, limit: int) -> list[Stored]:
    """The oldest events that nobody has handled yet; on PostgreSQL other consumers skip them until the transaction ends."""
    query = select(*COLUMNS).where(Event.state == "received").order_by(Event.ulid).limit(limit)
    if connection.dialect.name == "postgresql":
        query = query.with_for_update(skip_locked=True)
    return [Stored(*row) for row in connection.execute(query)]


def read_unsent(connection: Connection, limit: int, but: Sequence[str] = ()) -> list[Stored]:
    """The oldest events of our own that nobody has sent yet, in the order in which they were emitted and but for some."""
    query = select(*COLUMNS).where(IS_UNSENT)
    if but:
        query = query.where(bulk.is_none_of(connection, Event.ulid, but))
    return [Stored(*row) for row in connection.execute(query.order_by(Event.number, Event.ulid).limit(limit))]


def has_waiting(connection: Connection) -> bool:
    """Whether any label waits for its prediction."""
    # As text: the statement put together would cost a batch ten times as much.
    return connection.exec_driver_sql("SELECT 1 FROM events WHERE state = 'waiting' LIMIT 1").first() is not None


def read_waiting(connection: Connection, subjects: Iterable[str]) -> list[Stored]:
    """Labels that came before their prediction, for claims that are known now, in order of arrival."""
    query = select(*COLUMNS).where(Event.state == "waiting", bulk.is_one_of(connection, Event.subject, subjects)).order_by(Event.ulid)
    query = query.with_for_update()  # two predictions of one claim: on PostgreSQL the second finds it handled
    return [Stored(*row) for row in connection.execute(query)]


def read_overdue(connection: Connection, now: datetime, patience: timedelta) -> list[Stored]:
    """Events that have waited for their claim longer than `patience`."""
    query = select(*COLUMNS).where(Event.state == "waiting", Event.received_at < now - patience)
    return [Stored(*row) for row in connection.execute(query)]


def read(connection: Connection, ulid: str) -> Stored | None:
    """One event by our own key."""
    row = connection.execute(select(*COLUMNS).where(Event.ulid == ulid)).first()
    return Stored(*row) if row else None


def read_unhandled(connection: Connection, ulids: Iterable[str]) -> list[Stored]:
    """Those of these events that nobody has handled yet, in order of arrival."""
    query = select(*COLUMNS).where(Event.state == "received", bulk.is_one_of(connection, Event.ulid, ulids)).order_by(Event.ulid)
    return [Stored(*row) for row in connection.execute(query)]


def unhandle(connection: Connection, ulids: Sequence[str]) -> None:
    """Leave events to the consumer after all."""
    connection.execute(update(Event).where(bulk.is_one_of(connection, Event.ulid, ulids)).values(state="received", handled_at=None))


def mark(connection: Connection, ulids: Sequence[str], state: str, now: datetime, reason: str | None = None) -> None:
    """Say what became of events."""
    if ulids:
        values: dict[str, Any] = {"state": state, "reason": reason, "handled_at": now}
        connection.execute(update(Event).where(bulk.is_one_of(connection, Event.ulid, ulids)).values(values))


def count_by_state(connection: Connection) -> dict[str, int]:
    """How many events are in each state that needs attention; those done with are not counted, there may be millions."""
    states = ("received", "waiting", "unsent")
    return {state: connection.execute(select(func.count()).select_from(Event).where(Event.state == state)).scalar_one() for state in states}


def oldest_received_at(connection: Connection) -> datetime | None:
    """When the oldest unhandled event came in; None when everything is handled."""
    return connection.execute(select(func.min(Event.received_at)).where(Event.state == "received")).scalar()


def emit(connection: Connection, type_: str, subject: str, key: str, data: Mapping[str, Any], now: datetime) -> None:
    """Have Ratchet itself tell others of something, in the transaction of what is told; what came in is for `append`.

    `key` makes it one event. Those that are unsent have ascending numbers: several are emitted in a millisecond, and a clock may jump back.
    Who emits at the very same moment in another transaction may get the same number; neither of the two is then the earlier one.
    """
    content = orjson.dumps(dict(data), option=orjson.OPT_SORT_KEYS | orjson.OPT_UTC_Z)
    last = connection.execute(select(func.max(Event.number)).where(IS_UNSENT)).scalar()
    event_id = f"{type_}/{key}"
    row = {
        "ulid": ids.make_ulid(now, "ratchet", event_id),
        "source": "ratchet",
        "event_id": event_id,
        "type": type_,
        "subject": subject,
        "time": now,
        "received_at": now,
        "data": content.decode(),
        "digest": hashlib.sha256(content).hexdigest(),
        "state": "unsent",
        "number": (last or 0) + 1,
    }
    bulk.insert_new(connection, Event, row)
