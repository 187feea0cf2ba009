"""How far the group is behind the broker, partition by partition, and whether reading has come to a stop: then the process ends."""

from __future__ import annotations

import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import structlog
from kafka import TopicPartition
from kafka.admin import OffsetSpec
from kafka.errors import KafkaError

from consumers import broker
from consumers.stream import Stream
from storage import db, streams

if TYPE_CHECKING:
    from kafka.admin import KafkaAdminClient

PERIOD_SECONDS = 5.0
STALL_SECONDS = 120.0
LOOKS = 6
"""So many looks after an outage the offsets may still be on their way."""
KEPT = 500
"""So many samples are kept; of more, every second one is forgotten."""
Place = tuple[str, int]

log = structlog.get_logger()


class StalledError(RuntimeError):
    """Records wait, and none of their partition is acknowledged at the broker: only a new process helps."""


class Sample(NamedTuple):
    """At one moment (monotonic seconds), for each partition: the end, what the group has acknowledged before, and what we had last."""

    at: float
    ends: Mapping[Place, int]
    done: Mapping[Place, int]
    ours: Mapping[Place, int] = MappingProxyType({})

    def lags(self) -> dict[Place, int]:
        """How many records of each partition wait."""
        return {place: max(0, end - self.done[place]) for place, end in self.ends.items()}


def read(admin: KafkaAdminClient, group: str, topics: Iterable[str], at: float) -> Sample:
    """Ask the broker. Raises `KafkaError`."""
    told = admin.describe_topics(list(topics))
    places = [TopicPartition(topic["name"], part["partition_index"]) for topic in told for part in topic["partitions"]]
    committed = admin.list_group_offsets({group: places})[group]
    done = {place: committed[place].offset for place in places if place in committed and committed[place].offset >= 0}
    ends = admin.list_partition_offsets(dict.fromkeys(places, OffsetSpec.LATEST))
    new = [place for place in places if place not in done]
    if new:
        done |= {place: found.offset for place, found in admin.list_partition_offsets(dict.fromkeys(new, OffsetSpec.EARLIEST)).items()}
    return Sample(at, *({tuple(place): value for place, value in one.items()} for one in ({p: e.offset for p, e in ends.items()}, done)))


def find_stalled(samples: Sequence[Sample], acknowledged_at: float | None, now: float) -> list[Place]:
    """The partitions of which nothing was acknowledged for `STALL_SECONDS` while their lag grew; none while we acknowledge others."""
    if acknowledged_at is not None and now - acknowledged_at < STALL_SECONDS:
        return []
    first = _look_back(samples, now)
    if first is None:
        return []
    last = samples[-1]
    return [place for place, end in last.ends.items() if first.done.get(place) == last.done[place] < first.ends.get(place, 0) < end]


def find_skipped(samples: Sequence[Sample], now: float) -> list[Place]:
    """The partitions of which we had a record `STALL_SECONDS` ago, and the group has still not acknowledged it.

    Faust commits what follows on what is committed. Where it passed over a record it commits no more, and only a new process reads that
    again. After an outage it gets some looks' time to commit.
    """
    first = _look_back(samples, now)
    if first is None or samples[-min(LOOKS, len(samples))].at <= first.at:
        return []
    done = samples[-1].done
    return [place for place, offset in first.ours.items() if place in done and done[place] <= offset]


def find_cut(sample: Sample) -> str | None:
    """What to do about a partition that ends before what the group has acknowledged: what comes in between, Faust takes for read."""
    cut = sorted(place for place, end in sample.ends.items() if sample.done[place] > end)
    if not cut:
        return None
    (topic, partition), end, done = cut[0], sample.ends[cut[0]], sample.done[cut[0]]
    return (
        f"{topic}/{partition} ends at {end}, and the group has acknowledged {done}: the broker lost records. "
        "Stop reading, reset the group's offsets to the earliest, and start again: what is stored already is stored once"
    )


def _look_back(samples: Sequence[Sample], now: float) -> Sample | None:
    """The latest sample of `STALL_SECONDS` ago or before."""
    return next((sample for sample in reversed(samples) if now - sample.at >= STALL_SECONDS), None)


def find_oldest(samples: Sequence[Sample], now: float) -> float | None:
    """For how long the oldest record that waits has waited, in seconds, as far as we have seen; None when none waits."""
    if not samples:
        return None
    done = samples[-1].done
    for sample in samples:
        if any(end > done.get(place, end) for place, end in sample.ends.items()):
            return now - sample.at
    return None


class Watch:
    """Looks every few seconds, and tells what it saw to the table `streams`, where every process finds it."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._admin: KafkaAdminClient | None = None
        self._samples: deque[Sample] = deque()

    def run(self, stopping: threading.Event) -> None:
        """Look until `stopping`. Raises `StalledError`."""
        try:
            while not stopping.is_set():
                problem = self._look()
                self._tell(problem)
                self._check()
                stopping.wait(PERIOD_SECONDS)
        finally:
            self._close()

    def _look(self) -> str | None:
        """Take a sample; returns what kept us from it."""
        try:
            if self._admin is None:
                self._admin = broker.connect(self._stream.access)
            sample = read(self._admin, self._stream.group, self._stream.inlet.kinds, time.monotonic())
        except broker.BrokerError as error:
            return str(error)
        except KafkaError as error:
            self._close()
            return f"the broker does not tell the lag ({type(error).__name__})"
        self._samples.append(sample._replace(ours=dict(self._stream.inlet.progress.acknowledged)))
        if len(self._samples) > KEPT:
            self._samples = deque(list(self._samples)[::2])
        return find_cut(sample)

    def _tell(self, problem: str | None) -> None:
        incoming, outgoing = self._stream.inlet.progress, self._stream.sent
        lags = self._samples[-1].lags() if self._samples else {}
        body = {
            "consumer": self._stream.consumer,
            "problem": problem or next(iter(self._stream.problems.values()), None),
            "lag": {f"{topic}/{partition}": lag for (topic, partition), lag in lags.items()},
            "oldest_seconds": find_oldest(self._samples, time.monotonic()),
            "batches": incoming.batches,
            "records": incoming.records,
            "batch_seconds": incoming.seconds,
            "last_records": incoming.last_records,
            "last_seconds": incoming.last_seconds,
            "is_relaying": outgoing.is_leading,
            "sent": outgoing.messages,
        }
        try:
            with db.writing(self._stream.inlet.engine, alone=False) as connection:
                streams.tell(connection, self._stream.lease.holder, body, self._stream.inlet.clock())
        except db.UNAVAILABLE as error:
            log.warning("database_unavailable", action="tell_lag", error=type(error).__name__)

    def _check(self) -> None:
        incoming, now = self._stream.inlet.progress, time.monotonic()
        if incoming.began_at is None or now - incoming.began_at < STALL_SECONDS:  # a missing topic is waited for: HTTP goes on meanwhile
            return
        stalled = find_stalled(self._samples, incoming.acknowledged_at, now) or find_skipped(self._samples, now)
        if not stalled or incoming.is_waiting_for_database:  # a database that stays away ends the process by itself
            return
        lags = self._samples[-1].lags()
        log.error(
            "stream_stalled",
            partitions={f"{topic}/{partition}": lags[topic, partition] for topic, partition in stalled},
            seconds=STALL_SECONDS,
            acknowledged_before=None if incoming.acknowledged_at is None else round(now - incoming.acknowledged_at),
            last_batch_seconds=round(incoming.last_seconds, 3),
            threads=describe_threads(),
        )
        told = f"nothing of {len(stalled)} partitions was acknowledged at the broker for {STALL_SECONDS:.0f} s"
        raise StalledError(f"{told}, and records wait")

    def _close(self) -> None:
        if self._admin is not None:
            self._admin.close()
            self._admin = None


def describe_threads() -> dict[str, Any]:
    """Where each thread is: file, line and function, never a value."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    frames = {names.get(ident, str(ident)): traceback.extract_stack(frame)[-1] for ident, frame in sys._current_frames().items()}  # noqa: SLF001
    return {name: f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for name, frame in frames.items()}
