"""Reads Kafka with kafka-python's plain poll loop: several times as fast as Faust, in a thread of its own."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import structlog
from kafka import KafkaConsumer, OffsetAndMetadata, TopicPartition
from kafka.errors import KafkaError

from consumers import broker, records
from storage import dead_letters

BATCH = 1000
POLL_MS = 200
COMMIT_MS, CLOSE_MS = 10_000, 5_000
METADATA_MS, BOOTSTRAP_MS = 30_000, 5_000

log = structlog.get_logger()


class Batch:
    """Records on their way into the database, in a thread of its own, and the offsets behind them."""

    def __init__(self, polled: Mapping[TopicPartition, Sequence[Any]], inlet: records.Inlet) -> None:
        self.offsets = {where: OffsetAndMetadata(some[-1].offset + 1, "", -1) for where, some in polled.items()}
        self._records = [
            dead_letters.Record(where.topic, where.partition, one.offset, one.value) for where, some in polled.items() for one in some
        ]
        self._inlet = inlet
        self._committing = threading.Event()
        self._error: BaseException | None = None

    def begin(self, before: Batch | None, stopping: threading.Event) -> None:
        """Read the records, and store them when the batch `before` is stored."""
        self._thread = threading.Thread(target=self._take, args=[before, stopping], name="take", daemon=True)
        self._thread.start()

    def _take(self, before: Batch | None, stopping: threading.Event) -> None:
        try:
            batch = self._inlet.read(self._records)
            if before is not None:
                before.finish()
            self._inlet.store_patiently(batch, stopping, self._committing.set)
        except BaseException as error:  # noqa: BLE001  it is raised where the batch is waited for
            self._error = error
        finally:
            self._committing.set()

    def wait_for_commit(self) -> None:
        """Wait until only the disk is waited for, or all is over."""
        self._committing.wait()

    def finish(self) -> None:
        """Wait for the transaction. Raises what `Inlet.store_patiently` raised, for this batch or one before it."""
        self._thread.join()
        if self._error is not None:
            raise self._error


def run(access: broker.Access, group: str, inlet: records.Inlet, stopping: threading.Event) -> None:
    """Take batch after batch until `stopping`; an offset is committed after the transaction that stored or parked its record.

    Raises `BrokerError` when the broker refuses, and what `Inlet.store_patiently` raises: nothing of that batch was acknowledged.
    """
    consumer = _open(access, group)
    try:
        consumer.subscribe(list(inlet.kinds))
        # It would divide the partitions before it knows of any, and then have none until it looks again.
        consumer.topics()
        _read(consumer, inlet, stopping)
    except KafkaError as error:
        raise broker.BrokerError(f"the group {group} can't be read ({type(error).__name__}): all of a group use one consumer") from error
    finally:
        consumer.close(autocommit=False, timeout_ms=CLOSE_MS)


def _read(consumer: KafkaConsumer, inlet: records.Inlet, stopping: threading.Event) -> None:
    """Read and parse the next batch while one is committed: then nothing but the disk is waited for, and nobody computes beside.

    When the partitions are divided anew what is underway comes again, to whoever has its partition then: it is stored once.
    """
    underway: Batch | None = None
    try:
        while underway is not None or not stopping.is_set():
            if underway is not None:
                underway.wait_for_commit()
            polled = {} if stopping.is_set() else consumer.poll(timeout_ms=POLL_MS if underway is None else 0)
            before, underway = underway, Batch(polled, inlet) if polled else None
            if underway is not None:
                underway.begin(before, stopping)
            if before is not None:
                before.finish()
                _acknowledge(consumer, inlet, before.offsets)
    finally:
        if underway is not None:
            underway.finish()


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


def _acknowledge(consumer: KafkaConsumer, inlet: records.Inlet, offsets: Mapping[TopicPartition, OffsetAndMetadata]) -> None:
    """Of partitions that others have by now nothing: they have read further."""
    ours = {where: offset for where, offset in offsets.items() if where in consumer.assignment()}
    try:
        if ours:
            consumer.commit(ours, timeout_ms=COMMIT_MS)
    except KafkaError as error:
        # The next commit covers these too. Whoever has the partitions by then reads them again: they are stored once.
        log.warning("offsets_not_committed", error=type(error).__name__)
    else:
        inlet.progress.acknowledged_at = time.monotonic()
