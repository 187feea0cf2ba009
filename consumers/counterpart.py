"""The other end of the topics: sends what Ratchet takes in and hears what it tells, as somebody else's producer or review page does."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson
from kafka import KafkaConsumer, KafkaProducer, TopicPartition
from kafka.errors import KafkaError

from consumers import broker, schemas

SEND_SECONDS = 60


@dataclass(frozen=True, slots=True)
class Sender:
    """Sends events."""

    producer: KafkaProducer

    def send(self, topic: str, events: Sequence[Mapping[str, Any]]) -> None:
        """Send, and wait until the broker has all of them. Raises `BrokerAbsentError`."""
        try:
            sent = [self.producer.send(topic, key=schemas.subject_of(one["data"]).encode(), value=orjson.dumps(one)) for one in events]
            for promise in sent:
                promise.get(SEND_SECONDS)
        except KafkaError as error:
            why = f"{len(events)} events for {topic} were not acknowledged ({type(error).__name__})"
            raise broker.BrokerAbsentError(f"{why}: look at the broker") from error


@dataclass(frozen=True, slots=True)
class Listener:
    """Hears one topic from its beginning."""

    consumer: KafkaConsumer

    def hear(self, seconds: float) -> list[dict[str, Any]]:
        """The events that came since the last call; waits so long for the first."""
        polled = self.consumer.poll(timeout_ms=int(1000 * seconds))
        return [orjson.loads(one.value) for some in polled.values() for one in some]


@contextlib.contextmanager
def sending(access: broker.Access) -> Iterator[Sender]:
    """A sender, closed afterwards."""
    producer = KafkaProducer(linger_ms=5, allow_auto_create_topics=False, **access.to_options())
    try:
        yield Sender(producer)
    finally:
        with contextlib.suppress(KafkaError):
            producer.close(timeout=1)


@contextlib.contextmanager
def listening(access: broker.Access, topic: str) -> Iterator[Listener]:
    """A listener of its own, in no group, closed afterwards."""
    consumer = KafkaConsumer(auto_offset_reset="earliest", allow_auto_create_topics=False, **access.to_options())
    try:
        consumer.assign([TopicPartition(topic, number) for number in consumer.partitions_for_topic(topic) or ()])
        yield Listener(consumer)
    finally:
        consumer.close(autocommit=False, timeout_ms=1000)
