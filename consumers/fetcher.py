"""Polls Kafka in a process of its own, beside the one that stores: what needs no database is done here.

It fetches records, parses and checks them, and commits the offsets that it is told to. It ends with whoever began it.
"""

from __future__ import annotations

import gc
import logging
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from typing import Any

import msgspec
from kafka import KafkaConsumer, OffsetAndMetadata, TopicPartition
from kafka.errors import KafkaError

from consumers import broker, records
from consumers.work import describe_error
from storage import dead_letters

POLL_MS, OWING_MS = 200, 10
"""How long a look for records takes at most, and how long while offsets are to be committed soon."""
MOST_OWED = 2
"""So many batches are with the daemon at once: the one it stores, and the next. More would be small, each with its own transaction."""
ORPHANED_SECONDS = 10.0
COMMIT_MS, CLOSE_MS = 10_000, 5_000
METADATA_MS, BOOTSTRAP_MS = 30_000, 5_000
LOG_LINE = "{levelname}\t{name}\t{message}"

Place = tuple[str, int, int]
"""A topic, a partition, and the offset to go on from."""


class Job(msgspec.Struct, frozen=True):
    """Where and as which group to read, which type of event a topic carries, each agent's labels, and how many records at once."""

    access: broker.Access
    group: str
    kinds: dict[str, str]
    labels_of: dict[str, tuple[str, ...]]
    size: int


class Polled(msgspec.Struct, frozen=True, tag=True):
    """A batch of records, topic by topic, and where to go on when they are stored."""

    parts: list[records.Part]
    places: list[Place]


class Committed(msgspec.Struct, frozen=True, tag=True):
    """What became of the offsets of one batch: they are committed, or there is an error."""

    error: str | None


class Failed(msgspec.Struct, frozen=True, tag=True):
    """Nothing more comes: the name of one of `broker`'s errors, and what it says."""

    name: str
    why: str


def main() -> None:
    """Do the job that comes by the channel, a socket whose file descriptor is the argument."""
    for number in (signal.SIGINT, signal.SIGTERM):  # a service manager sends them to all its processes: the other one says when to end
        signal.signal(number, signal.SIG_IGN)
    logging.basicConfig(level=logging.WARNING, format=LOG_LINE, style="{")
    gc.freeze()
    with Connection(int(sys.argv[1])) as channel:
        threading.Thread(target=_end_with, args=[channel], name="end-with", daemon=True).start()
        try:
            failed = work(decode_job(channel.recv_bytes()), channel)
            if failed is not None:
                channel.send_bytes(encode(failed))
        except (EOFError, ConnectionError):
            pass  # whoever began it is gone


def _end_with(channel: Connection) -> None:
    """End the process when whoever began it is gone, and it has not ended by itself soon after: kafka-python may wait for the broker."""
    hangup = select.poll()
    hangup.register(channel.fileno(), 0)  # that is told in any case, and nothing else
    hangup.poll()
    time.sleep(ORPHANED_SECONDS)
    os._exit(1)


def work(job: Job, channel: Connection) -> Failed | None:
    """Do the job; returns what failed. Raises `EOFError` and `ConnectionError` when nobody is at the other end any more."""
    try:
        _fetch(job, channel)
    except broker.BrokerError as error:
        return Failed(type(error).__name__, str(error))
    except KafkaError as error:
        remedy = "all of a group use one consumer, and its user may read topics and group"
        why = f"the group {job.group} can't be read ({type(error).__name__}): {remedy}"
        return Failed(broker.BrokerError.__name__, why)
    except (EOFError, ConnectionError):
        raise
    except Exception as error:  # noqa: BLE001  a traceback would tell its text, and that may be a claim's
        return Failed(broker.BrokerError.__name__, describe_error(error, "the process that polls"))
    return None


def _fetch(job: Job, channel: Connection) -> None:
    """Send batch after batch, and commit between two polls, until an empty message comes."""
    consumer = _open(job)
    try:
        consumer.subscribe(list(job.kinds))
        # It would divide the partitions before it knows of any, and then have none until it looks again.
        consumer.topics()
        owed = 0
        while True:
            while channel.poll(None if owed >= MOST_OWED else 0):
                told = channel.recv_bytes()
                if not told:
                    return
                channel.send_bytes(encode(Committed(_commit(consumer, decode_places(told)))))
                owed -= 1
            polled = consumer.poll(timeout_ms=OWING_MS if owed else POLL_MS)
            if polled:
                channel.send_bytes(encode(_prepare(polled, job)))
                owed += 1
    finally:
        consumer.close(autocommit=False, timeout_ms=CLOSE_MS)


def _open(job: Job) -> KafkaConsumer:
    try:
        return KafkaConsumer(
            group_id=job.group,
            bootstrap_timeout_ms=BOOTSTRAP_MS,
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            allow_auto_create_topics=False,
            max_poll_records=job.size,
            session_timeout_ms=int(broker.SESSION_SECONDS * 1000),
            heartbeat_interval_ms=int(broker.HEARTBEAT_SECONDS * 1000),
            metadata_max_age_ms=METADATA_MS,
            **job.access.to_options(),
        )
    except KafkaError as error:
        raise broker.BrokerAbsentError(f"no broker answers ({type(error).__name__})") from error


def _prepare(polled: Mapping[TopicPartition, Sequence[Any]], job: Job) -> Polled:
    found = [dead_letters.Record(where.topic, where.partition, one.offset, one.value) for where, some in polled.items() for one in some]
    places = [(where.topic, where.partition, some[-1].offset + 1) for where, some in polled.items()]
    return Polled(records.prepare(found, job.kinds, job.labels_of, datetime.now(UTC)), places)


def _commit(consumer: KafkaConsumer, places: Sequence[Place]) -> str | None:
    """Commit, of partitions that others have by now nothing: they have read further. Returns what went wrong."""
    assigned = consumer.assignment()
    offsets = {TopicPartition(topic, partition): OffsetAndMetadata(offset, "", -1) for topic, partition, offset in places}
    ours = {where: offset for where, offset in offsets.items() if where in assigned}
    try:
        if ours:
            consumer.commit(ours, timeout_ms=COMMIT_MS)
    except KafkaError as error:
        # The next commit covers these too. Whoever has the partitions by then reads them again: they are stored once.
        return type(error).__name__
    return None


def _make(type_: type[Any], value: Any) -> Any:
    return type_(value)


encode = msgspec.msgpack.Encoder(enc_hook=str).encode  # of its types it knows all but paths
decode_job = msgspec.msgpack.Decoder(Job, dec_hook=_make).decode
decode_places = msgspec.msgpack.Decoder(list[Place]).decode
decode_told = msgspec.msgpack.Decoder(Polled | Committed | Failed).decode


if __name__ == "__main__":
    main()
