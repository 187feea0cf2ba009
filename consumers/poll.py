"""Reads Kafka with kafka-python's plain poll loop: several times as fast as Faust, in a thread of its own."""

from __future__ import annotations

import threading
import time

import structlog
from kafka import KafkaConsumer
from kafka.errors import KafkaError

from consumers import broker, records
from storage import dead_letters

BATCH = 1000
POLL_MS = 200
COMMIT_MS, CLOSE_MS = 10_000, 5_000
METADATA_MS, BOOTSTRAP_MS = 30_000, 5_000

log = structlog.get_logger()


def run(access: broker.Access, group: str, inlet: records.Inlet, stopping: threading.Event) -> None:
    """Take batch after batch until `stopping`; an offset is committed after the transaction that stored or parked its record.

    Raises `BrokerError` when the broker refuses, and what `Inlet.take_patiently` raises: nothing of that batch was acknowledged.
    """
    consumer = _open(access, group)
    try:
        consumer.subscribe(list(inlet.kinds))
        # It would divide the partitions before it knows of any, and then have none until it looks again.
        consumer.topics()
        while not stopping.is_set():
            polled = consumer.poll(timeout_ms=POLL_MS)
            batch = [
                dead_letters.Record(where.topic, where.partition, one.offset, one.value) for where, some in polled.items() for one in some
            ]
            if batch:
                inlet.take_patiently(batch, stopping)
                _acknowledge(consumer, inlet)
    except KafkaError as error:
        raise broker.BrokerError(f"the group {group} can't be read ({type(error).__name__}): all of a group use one consumer") from error
    finally:
        consumer.close(autocommit=False, timeout_ms=CLOSE_MS)


def _open(access: broker.Access, group: str) -> KafkaConsumer:
    try:
        return KafkaConsumer(
            group_id=group,
            bootstrap_timeout_ms=BOOTSTRAP_MS,
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            allow_auto_create_topics=False,
            max_poll_records=BATCH,
            session_timeout_ms=int(broker.SESSION_SECONDS * 1000),
            heartbeat_interval_ms=int(broker.HEARTBEAT_SECONDS * 1000),
            metadata_max_age_ms=METADATA_MS,
            **access.to_options(),
        )
    except KafkaError as error:
        raise broker.BrokerAbsentError(f"no broker answers ({type(error).__name__})") from error


def _acknowledge(consumer: KafkaConsumer, inlet: records.Inlet) -> None:
    try:
        consumer.commit(timeout_ms=COMMIT_MS)
    except KafkaError as error:
        # The next commit covers these too. Whoever has the partitions by then reads them again: they are stored once.
        log.warning("offsets_not_committed", error=type(error).__name__)
    else:
        inlet.progress.acknowledged_at = time.monotonic()
