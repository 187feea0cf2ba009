"""What Ratchet has to tell: the unsent events and review steps, as the records that others read, and what becomes of one nobody takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple

import orjson
from sqlalchemy import Connection

from consumers.topics import Outlets
from storage import dead_letters, events, reviews

STEPS = {"opened": "ratchet.review.opened.v1", "answered": "ratchet.review.closed.v1", "expired": "ratchet.review.expired.v1"}
MOST_BYTES = 900_000
"""Below what a broker takes of one record by default."""


class Message(NamedTuple):
    """One row as a record: `event` or `step` says which row is to be marked."""

    topic: str
    key: bytes
    value: bytes
    event: str | None = None
    step: int | None = None


def read_unsent(connection: Connection, outlets: Outlets, limit: int, underway: Sequence[Message] = ()) -> list[Message]:
    """What is to be sent next, in order; what is `underway` is not marked yet, and left out."""
    own = events.read_unsent(connection, limit, [one.event for one in underway if one.event is not None])
    steps = reviews.read_unsent(connection, limit, [one.step for one in underway if one.step is not None])
    return [_from_event(one, outlets) for one in own] + [_from_step(step, outlets) for step in steps]


def _from_event(one: events.Stored, outlets: Outlets) -> Message:
    topic = outlets.dead_letters if one.type == dead_letters.PARKED else outlets.events
    value = _wrap(one.type, one.event_id, one.subject, one.time, orjson.Fragment(one.data or "{}"))
    return Message(topic, one.subject.encode(), value, event=one.ulid)


def _from_step(one: reviews.Told, outlets: Outlets) -> Message:
    """A review that was opened, with what an expert may see before answering, or that was closed or expired."""
    subject, kind = f"{one.agent}/{one.claim_id}", STEPS[one.action]
    data: dict[str, Any] = {"review": one.review, "agent": one.agent, "claim_id": one.claim_id, "prediction_id": one.prediction_id}
    if one.action == "opened":
        data |= {"is_blind": one.is_blind, "expires_at": one.expires_at}
        data |= {"input": orjson.Fragment(one.input or "null"), "attributes": orjson.Fragment(one.attributes or "null")}
    message = Message(outlets.queue, subject.encode(), _wrap(kind, f"{kind}/{one.review}", subject, one.at, data), step=one.step)
    return message if len(message.value) <= MOST_BYTES else shorten(message)


def shorten(message: Message) -> Message:
    """A message without what a claim held; others stay as they are."""
    told = orjson.loads(message.value)
    if "input" not in told["data"]:
        return message
    return message._replace(value=orjson.dumps({**told, "data": {**told["data"], "input": None, "attributes": None}}))


def _wrap(kind: str, event_id: str, subject: str, at: datetime, data: Mapping[str, Any] | orjson.Fragment) -> bytes:
    envelope = {
        "specversion": "1.0",
        "id": event_id,
        "source": "ratchet",
        "type": kind,
        "subject": subject,
        "time": at,
        "datacontenttype": "application/json",
        "data": data,
    }
    return orjson.dumps(envelope, option=orjson.OPT_UTC_Z)


def park(connection: Connection, message: Message, reason: str, now: datetime, *, is_told: bool) -> None:
    """Make a dead letter of a message, and send it no more; where nobody could be told of that one, its event alone says so."""
    if message.event is None:
        letter = {"key": f"step/{message.step}", "payload": message.value.decode()}
        dead_letters.park(connection, message.key.decode(), reason, now, **letter)
        reviews.mark_sent(connection, [message.step] if message.step is not None else [])
        return
    event = events.read(connection, message.event)
    if event is not None and is_told:
        dead_letters.park_event(connection, event, reason, now)
    else:
        events.mark(connection, [message.event], "dead", now, reason)
