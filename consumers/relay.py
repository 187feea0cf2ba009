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
DELIVERY_SECONDS = 15
"""What a producer holds for longer it gives up: else one that lost its lease in an outage would go on sending beside the next. It gets
nothing later than `RENEW_SECONDS` into a `TERM`. A producer that gave up never recovers (seen with kafka-python 3.0), see `_lead`."""
BOOTSTRAP_SECONDS = 5.0
MOST_BYTES = 900_000
"""Below what a broker takes of one record by default."""

log = structlog.get_logger()


class LeaseLostError(RuntimeError):
    """Another relay works now."""


class UnacknowledgedError(broker.BrokerError):
    """The broker has not taken what was sent."""


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
        """Send until `stopping`, whenever the lease is ours. A database that fails is tried again.

        Raises `BrokerError`: what is not marked is sent again by the next one.
        """
        while not stopping.is_set():
            try:
                with db.writing(self._engine, alone=False) as connection:
                    fence = self._lease.acquire(connection, LEASE, self._lease.holder, self._clock(), TERM)
                if fence is not None:
                    self._lead(fence, stopping)
            except (*db.UNAVAILABLE, LeaseLostError) as error:
                log.warning("relay_interrupted", error=type(error).__name__)
            except KafkaError as error:
                raise broker.BrokerAbsentError(f"nothing can be sent ({type(error).__name__}): look at the broker") from error
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
                if time.monotonic() - self._renewed_at > RENEW_SECONDS:
                    self._mark([], fence)  # before anything is sent: whoever was held up may have lost the lease
                if not messages:
                    stopping.wait(IDLE_SECONDS)
                    continue
                acknowledged, problem = self._send(producer, messages, fence, stopping)
                self._mark(acknowledged, fence)
                if problem is not None and not stopping.is_set():
                    raise UnacknowledgedError(problem)  # this producer may never recover
        with db.writing(self._engine, alone=False) as connection:
            leases.release(connection, LEASE, self._lease.holder)

    def _send(
        self, producer: KafkaProducer, messages: Sequence[Message], fence: int, stopping: threading.Event
    ) -> tuple[list[Message], str | None]:
        """Send, and wait for the broker, holding the lease; returns what may be marked, and why it is not everything if it is not."""
        promises, failure = [], "no answer"
        for message in messages:
            try:
                promises.append(producer.send(message.topic, key=message.key, value=message.value))
            except KafkaError as error:
                failure = f"{type(error).__name__} for {message.topic}"
                break
        deadline = time.monotonic() + DELIVERY_SECONDS + FLUSH_SECONDS
        while promises:
            try:
                producer.flush(timeout=FLUSH_SECONDS)
                break
            except KafkaError:
                if stopping.is_set() or time.monotonic() > deadline:
                    break
                self._mark([], fence)
        done = [promise.is_done and promise.succeeded() for promise in promises]
        if sum(done) == len(messages):
            return list(messages), None
        refused = ((message.topic, promise) for message, promise in zip(messages, promises, strict=False) if promise.is_done)
        failure = next((f"{type(one.exception).__name__} for {topic}" for topic, one in refused if one.failed()), failure)
        problem = f"{len(messages) - sum(done)} messages were not acknowledged ({failure}): they are sent again, look at the broker"
        return _select_markable(messages, done), problem

    def _mark(self, messages: Sequence[Message], fence: int) -> None:
        now = self._clock()
        with db.writing(self._engine, alone=False) as connection:
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
        request_timeout_ms=int(DELIVERY_SECONDS * 500),
        bootstrap_timeout_ms=int(BOOTSTRAP_SECONDS * 1000),
        max_block_ms=int(FLUSH_SECONDS * 1000),
        linger_ms=5,
        batch_size=262_144,
        allow_auto_create_topics=False,
        **access.to_options(),
    )
    try:
        yield producer
        with contextlib.suppress(KafkaError):
            producer.close(timeout=1)
    finally:
        # It must not send what it holds beside the next one: to close it in the usual way leaves its thread at work when that takes long.
        producer._sender.force_close()  # noqa: SLF001
        with contextlib.suppress(KafkaError):
            producer.close(timeout=0)


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
