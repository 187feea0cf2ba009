"""Sends what Ratchet has to tell: rows are found because they are unsent, and marked once the broker has acknowledged them.

One relay works at a time, by a lease; what it marks it marks under its fence. A message may be sent twice, and then has the same id.
While one batch is on its way the next one is read, written down and handed over.
"""

from __future__ import annotations

import contextlib
import threading
import time
import zlib
from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta
from typing import Any, NamedTuple

import structlog
from kafka import KafkaProducer
from kafka.errors import KafkaError, MessageSizeTooLargeError, RecordListTooLargeError
from kafka.future import Future
from kafka.partitioner.default import DefaultPartitioner
from sqlalchemy import Connection

from consumers import broker, outbox
from consumers.stream import Stream
from storage import db, events, leases, reviews

LEASE = "relay"
TERM = timedelta(seconds=30)
FIRST_BATCH, BATCH = 250, 2000
IDLE_SECONDS, FLUSH_SECONDS, WAIT_SECONDS, RENEW_SECONDS = 0.25, 5.0, 5.0, 8.0
DELIVERY_SECONDS = 15
"""What a producer holds for longer it gives up: else one that lost its lease in an outage would go on sending beside the next. It gets
nothing that it might hold past the end of a `TERM`. A producer that gave up never recovers (seen with kafka-python 3.0), see `_lead`."""
BOOTSTRAP_SECONDS = 5.0
MOST_BYTES_AT_ONCE = 8_000_000
TOO_LARGE = (MessageSizeTooLargeError, RecordListTooLargeError)

log = structlog.get_logger()


class LeaseLostError(RuntimeError):
    """Another relay works now."""


class UnacknowledgedError(broker.BrokerError):
    """The broker has not taken what was sent."""


class Flight(NamedTuple):
    """Messages on their way, with what the producer promises of each that it took; `failure` says why it took no more."""

    messages: Sequence[outbox.Message] = ()
    promises: Sequence[Future] = ()
    failure: str = "no answer"


class Relay:
    """Sends from one database to one broker, while its lease is ours."""

    def __init__(self, stream: Stream) -> None:
        self._engine, self._clock = stream.inlet.engine, stream.inlet.clock
        self._access, self._outlets, self._lease, self._progress = stream.access, stream.outlets, stream.lease, stream.sent
        self._renewed_at = 0.0
        self._limit = FIRST_BATCH

    def run(self, stopping: threading.Event) -> None:
        """Send until `stopping`, whenever the lease is ours. A database that fails is tried again.

        Raises `BrokerError`: what is not marked is sent again by the next one.
        """
        while not stopping.is_set():
            try:
                self._renewed_at = time.monotonic()
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
        self._progress.is_leading = True
        while not stopping.is_set():
            with _producing(self._access) as producer:
                refused = self._send_all(producer, fence, stopping)
            for message in refused:
                self._send_alone(message, fence)
        with db.writing(self._engine, alone=False) as connection:
            leases.release(connection, LEASE, self._lease.holder)

    def _send_all(self, producer: KafkaProducer, fence: int, stopping: threading.Event) -> list[outbox.Message]:
        """Send what is unsent, batch after batch, until `stopping`, or until the broker refuses messages for their size: returns those."""
        flight = Flight()
        while flight.messages or not stopping.is_set():
            messages = [] if stopping.is_set() else self._read(flight.messages)
            following = self._send(producer, messages, fence)
            refused = self._land(flight, fence, stopping)
            if refused:
                return refused
            if not messages and not flight.messages:
                stopping.wait(IDLE_SECONDS)
            flight = following
        return []

    def _read(self, underway: Sequence[outbox.Message]) -> list[outbox.Message]:
        """What is to be sent next: fewer rows at once where they are large."""
        with db.reading(self._engine) as connection:
            messages = outbox.read_unsent(connection, self._outlets, self._limit, underway)
        if sum(len(message.value) for message in messages) > MOST_BYTES_AT_ONCE:
            self._limit = max(1, self._limit // 2)
        elif len(messages) >= self._limit:
            self._limit = min(2 * self._limit, BATCH)
        return messages

    def _send(self, producer: KafkaProducer, messages: Sequence[outbox.Message], fence: int) -> Flight:
        """Hand messages to the producer. Whoever was held up may have lost the lease, and looks after it before."""
        if time.monotonic() - self._renewed_at > RENEW_SECONDS:
            self._mark([], fence)
        promises: list[Future] = []
        for message in messages:
            if time.monotonic() - self._renewed_at > TERM.total_seconds() - DELIVERY_SECONDS:
                raise LeaseLostError("it may run out before the broker has the next message: the process was stopped meanwhile")
            try:
                promises.append(producer.send(message.topic, key=message.key, value=message.value))
            except TOO_LARGE as error:
                promises.append(Future().failure(error))
            except KafkaError as error:
                return Flight(messages, promises, f"{type(error).__name__} for {message.topic}")
        return Flight(messages, promises)

    def _land(self, flight: Flight, fence: int, stopping: threading.Event) -> list[outbox.Message]:
        """Wait for the broker, holding the lease, and mark what it acknowledged; returns what it refuses for its size.

        Raises `UnacknowledgedError` when something else was not acknowledged: this producer may never recover.
        """
        if not flight.messages:
            return []
        deadline = time.monotonic() + DELIVERY_SECONDS + FLUSH_SECONDS
        for promise in flight.promises:
            while not promise.is_done and time.monotonic() < deadline and not stopping.is_set():
                with contextlib.suppress(KafkaError):
                    promise.get(timeout=FLUSH_SECONDS)
                if not promise.is_done:
                    self._mark([], fence)
        done = [promise.is_done and promise.succeeded() for promise in flight.promises]
        self._mark(select_markable(flight.messages, done), fence)
        if sum(done) == len(flight.messages) or stopping.is_set():
            return []
        failed = [
            (one, promise.exception)
            for one, promise in zip(flight.messages, flight.promises, strict=False)
            if promise.is_done and promise.failed()
        ]
        refused = [message for message, error in failed if isinstance(error, TOO_LARGE)]
        if refused:
            return refused
        failure = next((f"{type(error).__name__} for {one.topic}" for one, error in failed), flight.failure)
        missing = len(flight.messages) - sum(done)
        raise UnacknowledgedError(f"{missing} messages were not acknowledged ({failure}): they are sent again, look at the broker")

    def _send_alone(self, message: outbox.Message, fence: int) -> None:
        """Send a message that was refused for its size once more, without a claim's input; refused again it is set aside.

        What comes after it of its key goes on without it: else nothing would be sent any more.
        """
        self._mark([], fence)
        short = outbox.shorten(message)
        with _producing(self._access) as producer:
            try:
                producer.send(short.topic, key=short.key, value=short.value).get(timeout=DELIVERY_SECONDS + FLUSH_SECONDS)
            except TOO_LARGE:
                self._set_aside(short, fence)
            else:
                self._mark([short], fence)

    def _set_aside(self, message: outbox.Message, fence: int) -> None:
        reason = (
            f"the broker takes no message of {len(message.value)} bytes on {message.topic}: raise max.message.bytes there, and replay it"
        )
        with self._holding(fence) as (connection, now):
            outbox.park(connection, message, reason, now, is_told=message.topic != self._outlets.dead_letters)
        log.error("message_refused", topic=message.topic, bytes=len(message.value), ulid=message.event, step=message.step)

    def _mark(self, messages: Sequence[outbox.Message], fence: int) -> None:
        with self._holding(fence) as (connection, now):
            events.mark(connection, [one.event for one in messages if one.event is not None], "sent", now)
            reviews.mark_sent(connection, [one.step for one in messages if one.step is not None])
        self._progress.messages += len(messages)

    @contextlib.contextmanager
    def _holding(self, fence: int) -> Iterator[tuple[Connection, datetime]]:
        """A transaction in which the lease is ours, and for longer. Raises `LeaseLostError`."""
        now, began = self._clock(), time.monotonic()
        with db.writing(self._engine, alone=False) as connection:
            if not leases.renew(connection, LEASE, self._lease.holder, fence, now, TERM):
                raise LeaseLostError(f"the lease {LEASE} with the fence {fence} is another one's now")
            yield connection, now
        self._renewed_at = began


def select_markable(messages: Sequence[outbox.Message], are_acknowledged: Sequence[bool]) -> Sequence[outbox.Message]:
    """What was acknowledged; of a key whose earlier message was not, nothing: sent again it must come after that."""
    if sum(are_acknowledged) == len(messages):
        return messages
    behind: set[tuple[str, bytes]] = set()
    markable = []
    for message, is_acknowledged in zip(messages, [*are_acknowledged, *[False] * (len(messages) - len(are_acknowledged))], strict=True):
        if not is_acknowledged:
            behind.add((message.topic, message.key))
        elif (message.topic, message.key) not in behind:
            markable.append(message)
    return markable


class Crc32Partitioner(DefaultPartitioner):  # type: ignore[misc]
    """A key's partition by CRC-32, as librdkafka divides keys (`consistent`): kafka-python's murmur2 is half of what a message costs."""

    def partition(self, topic: str, key: object, serialized_key: bytes | None, value: object, serialized: object, cluster: Any) -> int:
        """The same for a key as long as the topic has as many partitions; they are numbered from 0 on."""
        if serialized_key is None:
            return int(super().partition(topic, key, serialized_key, value, serialized, cluster))
        return zlib.crc32(serialized_key) % len(cluster.partitions_for_topic(topic))


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
        partitioner=Crc32Partitioner(),
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
