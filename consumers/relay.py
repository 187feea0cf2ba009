"""Sends what Ratchet has to tell: rows are found because they are unsent, and marked once the broker has acknowledged them.

One relay works at a time, by a lease; what it marks it marks under its fence. A message may be sent twice, and then has the same id.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, NamedTuple

import orjson
import structlog
from kafka import KafkaProducer
from kafka.errors import KafkaError
from sqlalchemy import Connection, RowMapping

from consumers import broker
from consumers.stream import Stream
from consumers.topics import Outlets
from storage import db, dead_letters, events, leases, reviews

LEASE = "relay"
TERM = timedelta(seconds=30)
BATCH = 500
IDLE_SECONDS, FLUSH_SECONDS, WAIT_SECONDS, RENEW_SECONDS = 0.25, 5.0, 5.0, 8.0
DELIVERY_SECONDS = 120
"""Shorter ones expire in an outage that a producer would outlive; after that one never recovers (seen with kafka-python 3.0)."""
MOST_BYTES = 900_000
"""Below what a broker takes of one record by default."""

log = structlog.get_logger()


class LeaseLostError(RuntimeError):
    """Another relay works now."""


class Message(NamedTuple):
    """One row as a record: `event` or `step` says which row is to be marked."""

    topic: str
    key: bytes
    value: bytes
    event: str | None = None
    step: int | None = None


class Relay:
    """Sends from one database to one broker, while its lease is ours."""

    def __init__(self, stream: Stream) -> None:
        self._engine, self._clock = stream.inlet.engine, stream.inlet.clock
        self._access, self._outlets, self._lease, self._progress = stream.access, stream.outlets, stream.lease, stream.sent
        self._renewed_at = 0.0

    def run(self, stopping: threading.Event) -> None:
        """Send until `stopping`, whenever the lease is ours. A database or a broker that fails is tried again."""
        while not stopping.is_set():
            try:
                with db.writing(self._engine) as connection:
                    fence = self._lease.acquire(connection, LEASE, self._lease.holder, self._clock(), TERM)
                if fence is not None:
                    self._lead(fence, stopping)
            except (*db.UNAVAILABLE, KafkaError, LeaseLostError) as error:
                log.warning("relay_interrupted", error=type(error).__name__)
            finally:
                self._progress.is_leading = False
            stopping.wait(WAIT_SECONDS)

    def _lead(self, fence: int, stopping: threading.Event) -> None:
        log.info("relay_leads", fence=fence)
        self._progress.is_leading, self._renewed_at = True, time.monotonic()
        with _producing(self._access) as producer:
            while not stopping.is_set():
                with db.reading(self._engine) as connection:
                    messages = read_unsent(connection, self._outlets, BATCH)
                acknowledged = self._send(producer, messages, fence, stopping) if messages else []
                if messages or time.monotonic() - self._renewed_at > RENEW_SECONDS:
                    self._mark(acknowledged, fence)
                if len(acknowledged) < len(messages):
                    return  # this producer may never recover: the next one sends the others again
                if not messages:
                    stopping.wait(IDLE_SECONDS)
        with db.writing(self._engine) as connection:
            leases.release(connection, LEASE, self._lease.holder)

    def _send(self, producer: KafkaProducer, messages: Sequence[Message], fence: int, stopping: threading.Event) -> list[Message]:
        """Send, and wait for the broker; returns what may be marked. The lease is held meanwhile, whoever loses it sends no more."""
        promises = []
        for message in messages:
            try:
                promises.append(producer.send(message.topic, key=message.key, value=message.value))
            except KafkaError as error:
                log.warning("message_not_sent", topic=message.topic, error=type(error).__name__)
                break
        deadline = time.monotonic() + DELIVERY_SECONDS + FLUSH_SECONDS
        while promises and time.monotonic() < deadline and not stopping.is_set():
            try:
                producer.flush(timeout=FLUSH_SECONDS)
                break
            except KafkaError:
                self._mark([], fence)
        return _select_markable(messages, [promise.is_done and promise.succeeded() for promise in promises])

    def _mark(self, messages: Sequence[Message], fence: int) -> None:
        now = self._clock()
        with db.writing(self._engine) as connection:
            if not leases.renew(connection, LEASE, self._lease.holder, fence, now, TERM):
                raise LeaseLostError(f"the lease {LEASE} with the fence {fence} is another one's now")
            events.mark(connection, [one.event for one in messages if one.event is not None], "sent", now)
            reviews.mark_sent(connection, [one.step for one in messages if one.step is not None])
        self._progress.messages += len(messages)
        self._renewed_at = time.monotonic()


def _select_markable(messages: Sequence[Message], are_acknowledged: Sequence[bool]) -> list[Message]:
    """What was acknowledged; of a key whose earlier message was not, nothing: sent again it must come after that."""
    behind: set[tuple[str, bytes]] = set()
    markable = []
    for message, is_acknowledged in zip(messages, [*are_acknowledged, *[False] * (len(messages) - len(are_acknowledged))], strict=True):
        if not is_acknowledged:
            behind.add((message.topic, message.key))
        elif (message.topic, message.key) not in behind:
            markable.append(message)
    return markable


@contextlib.contextmanager
def _producing(access: broker.Access) -> Iterator[KafkaProducer]:
    producer = KafkaProducer(
        enable_idempotence=True,
        acks="all",
        delivery_timeout_ms=int(DELIVERY_SECONDS * 1000),
        request_timeout_ms=int(DELIVERY_SECONDS * 250),
        max_block_ms=int(FLUSH_SECONDS * 1000),
        linger_ms=5,
        batch_size=262_144,
        allow_auto_create_topics=False,
        **access.to_options(),
    )
    try:
        yield producer
    finally:
        with contextlib.suppress(KafkaError):
            producer.close(timeout=1)


def read_unsent(connection: Connection, outlets: Outlets, limit: int) -> list[Message]:
    """What is to be sent next, in order."""
    own = [_from_event(one, outlets) for one in events.read_unsent(connection, limit)]
    return own + [_from_step(row, outlets) for row in reviews.read_unsent(connection, limit)]


def _from_event(one: events.Stored, outlets: Outlets) -> Message:
    topic = outlets.dead_letters if one.type == dead_letters.PARKED else outlets.events
    value = _wrap(one.type, one.event_id, one.subject, one.time, orjson.Fragment(one.data or "{}"))
    return Message(topic, one.subject.encode(), value, event=one.ulid)


STEPS = {"opened": "ratchet.review.opened.v1", "answered": "ratchet.review.closed.v1", "expired": "ratchet.review.expired.v1"}


def _from_step(row: RowMapping, outlets: Outlets) -> Message:
    """A review that was opened, with what an expert may see before answering, or that was closed or expired."""
    subject, kind = f"{row['agent']}/{row['claim_id']}", STEPS[row["action"]]
    data: dict[str, Any] = {name: row[name] for name in ("review", "agent", "claim_id", "prediction_id")}
    if row["action"] == "opened":
        data |= {name: row[name] for name in ("is_blind", "expires_at", "input", "attributes")}
    value = _wrap(kind, f"{kind}/{row['review']}", subject, row["at"], data)
    if len(value) > MOST_BYTES:
        value = _wrap(kind, f"{kind}/{row['review']}", subject, row["at"], {**data, "input": None, "attributes": None})
    return Message(outlets.queue, subject.encode(), value, step=row["step"])


def _wrap(kind: str, event_id: str, subject: str, at: datetime, data: Mapping[str, Any] | orjson.Fragment) -> bytes:
    envelope = {"specversion": "1.0", "id": event_id, "source": "ratchet", "type": kind, "subject": subject, "time": at}
    return orjson.dumps({**envelope, "datacontenttype": "application/json", "data": data}, option=orjson.OPT_UTC_Z)
