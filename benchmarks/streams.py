"""Streams: Ratchet's two consumers and its relay on a real broker, each against the barest program that does the same by the same library.

Every worker is a process of its own. The broker, which is started here, lets those that join a group within three seconds begin together.
Records lie in the topic before a worker begins; a rate goes from its first commit to its last. What `ratchet up` does beside is left out.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import itertools
import logging
import multiprocessing
import os
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median, quantiles
from typing import Any, NamedTuple

import orjson
import structlog
from kafka import KafkaConsumer, KafkaProducer
from rich.console import Console

from benchmarks import tables
from benchmarks.figures import Figure, finish
from benchmarks.ingest import make_event
from consumers import broker, kafka, outbox, poll, records, relay, schemas, stream, topics
from daemon import holders, service
from storage import db, dead_letters, reviews, schema
from tests.broker_fixtures import START, find_port
from tests.event_fixtures import make_agent
from tests.process_fixtures import list_children

PARTITIONS, WAIT_SECONDS, RATE, LINGER_MS, FLUSH = 4, 120, 200, 5, 500
SMALL = 10_000
OUTLETS = topics.Outlets("queue", "events", "letters")
SPAWN = multiprocessing.get_context("spawn")
console = Console(stderr=True)


class Job(NamedTuple):
    """What a worker is to do: consumers (`faust`, `poll`) read `topic` as `group`, relays send what the database has unsent."""

    kind: str
    is_bare: bool
    bootstrap: str
    database: Path
    topic: str = ""
    group: str = ""

    @property
    def access(self) -> broker.Access:
        return broker.Access(self.bootstrap)


class Batch(NamedTuple):
    """A commit: at which monotonic time, after how much CPU time of the worker, and which records (partition, offset)."""

    at: float
    cpu: float
    places: list[tuple[int, int]]


@dataclass
class Work:
    """What a worker did, and the most memory that it took, in MiB."""

    batches: list[Batch]
    memory: float

    @property
    def count(self) -> int:
        """How many records after the first batch: with that the clock starts."""
        return sum(len(batch.places) for batch in self.batches[1:])


@dataclass
class Tally:
    """Where a worker notes what is committed; `total` counts for all workers of a group."""

    total: Any
    batches: list[Batch] = field(default_factory=list)
    memory: float = 0.0

    def note(self, places: list[tuple[int, int]]) -> None:
        cpu, memory = measure_children(self._children)
        self.batches.append(Batch(time.monotonic(), time.process_time() + cpu, places))
        self.memory = max(self.memory, memory)
        with self.total.get_lock():
            self.total.value += len(places)

    @functools.cached_property
    def _children(self) -> list[int]:
        """The process that the poll consumer polls in."""
        return list_children(os.getpid())


@dataclass(frozen=True, slots=True)
class TimedInlet(records.Inlet):
    """Ratchet's inlet, with a note of each commit."""

    tally: Tally = field(kw_only=True)

    def store(self, batch: records.Batch, committing: Callable[[], object] = bool) -> None:
        records.Inlet.store(self, batch, committing)
        self.tally.note([(one.partition, one.offset) for one in batch.records])


def measure_children(numbers: Sequence[int]) -> tuple[float, float]:
    """CPU seconds of processes so far, and the most memory that they have taken, in MiB."""
    ticks = [int(one) for number in numbers for one in Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[11:13]]
    told = [Path(f"/proc/{number}/status").read_text().partition("VmHWM:")[2] for number in numbers]
    return sum(ticks) / os.sysconf("SC_CLK_TCK"), sum(int(one.split()[0]) for one in told) / 1024


def utc_now() -> datetime:
    return datetime.now(UTC)


# What a worker's process does.


def work(job: Job, done: Any, total: Any, told: Connection) -> None:
    """Do the job until `done`, then tell what was done."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    service.calm_collector()
    tally = Tally(total)
    WORKERS[job.kind, job.is_bare](job, done, tally)
    told.send(Work(tally.batches, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 + tally.memory))


def consume_by_faust(job: Job, done: Any, tally: Tally) -> None:
    asyncio.run(_follow(lambda stop, stopping: kafka.run(job.access, job.group, make_inlet(job, tally), stop, stopping), done))


def consume_by_poll(job: Job, done: Any, tally: Tally) -> None:
    stopping = threading.Event()
    threading.Thread(target=lambda: (done.wait(), stopping.set()), daemon=True).start()
    poll.run(job.access, job.group, make_inlet(job, tally), stopping)


def consume_by_bare_faust(job: Job, done: Any, tally: Tally) -> None:
    """As the user's guide has it, with the same settings, batches and threads as ours."""

    async def run(stop: asyncio.Event, _: threading.Event) -> None:
        with tempfile.TemporaryDirectory() as folder:
            app = kafka.make_app(job.access, job.group, folder)
            topic = app.topic(job.topic, key_type=bytes, value_type=bytes, key_serializer="raw", value_serializer="raw")
            store = BareStore(job.database)

            @app.agent(topic)  # type: ignore[untyped-decorator]
            async def consume(batches: Any) -> None:
                async for batch in batches.noack_take(kafka.BATCH, within=kafka.WITHIN_SECONDS):
                    await asyncio.to_thread(store.insert, [event.value for event in batch])
                    for event in batch:
                        event.ack()
                    tally.note([(event.message.partition, event.message.offset) for event in batch])

            await app.start()
            await stop.wait()
            await app.stop()

    asyncio.run(_follow(run, done))


async def _follow(run: Callable[[asyncio.Event, threading.Event], Any], done: Any) -> None:
    stop, stopping, loop = asyncio.Event(), threading.Event(), asyncio.get_running_loop()

    def wait() -> None:
        done.wait()
        stopping.set()
        loop.call_soon_threadsafe(stop.set)

    threading.Thread(target=wait, daemon=True).start()
    await run(stop, stopping)


def consume_by_bare_poll(job: Job, done: Any, tally: Tally) -> None:
    store = BareStore(job.database)
    reader = KafkaConsumer(
        bootstrap_servers=job.bootstrap,
        group_id=job.group,
        enable_auto_commit=False,
        auto_offset_reset="earliest",
        max_poll_records=poll.BATCH,
    )
    reader.subscribe([job.topic])
    reader.topics()
    while not done.is_set():
        polled = [record for some in reader.poll(timeout_ms=200).values() for record in some]
        if polled:
            store.insert([record.value for record in polled])
            reader.commit()
            tally.note([(record.partition, record.offset) for record in polled])
    reader.close()


class BareStore:
    """Decodes a batch and inserts it by one `executemany`: durable, each identity once, and nothing more."""

    def __init__(self, path: Path) -> None:
        self._connection = sqlite3.connect(path, check_same_thread=False)
        for pragma in ("journal_mode=WAL", "synchronous=FULL"):
            self._connection.execute(f"PRAGMA {pragma}")
        self._connection.execute("CREATE TABLE IF NOT EXISTS events (source TEXT, id TEXT, data TEXT, UNIQUE (source, id))")

    def insert(self, values: Sequence[bytes]) -> None:
        events = [orjson.loads(value) for value in values]
        rows = [(event["source"], event["id"], orjson.dumps(event["data"]).decode()) for event in events]
        with self._connection:
            self._connection.executemany("INSERT OR IGNORE INTO events VALUES (?, ?, ?)", rows)


def send_by_relay(job: Job, done: Any, tally: Tally) -> None:
    """Ratchet's relay; what it has marked is looked at every 5 ms."""
    source = make_stream(job, tally)
    stopping = threading.Event()
    sending = threading.Thread(target=relay.Relay(source).run, args=[stopping])
    sending.start()
    seen = 0
    while not done.wait(0.005):
        sent = source.sent.messages
        if sent > seen:
            tally.note([(0, 0)] * (sent - seen))
            seen = sent
    stopping.set()
    sending.join()


def send_barely(job: Job, done: Any, tally: Tally) -> None:
    """The same bytes, already at hand, by kafka-python's producer as it is; nothing is read, and nothing marked."""
    with db.reading(db.open_engine(f"sqlite:///{job.database}")) as connection:
        messages = outbox.read_unsent(connection, OUTLETS, 10_000_000)
    producer = KafkaProducer(bootstrap_servers=job.bootstrap, enable_idempotence=True, acks="all", linger_ms=LINGER_MS, batch_size=262_144)
    for first in range(0, len(messages), FLUSH):
        some = messages[first : first + FLUSH]
        for message in some:
            producer.send(message.topic, key=message.key, value=message.value)
        producer.flush()
        tally.note([(0, 0)] * len(some))
    producer.close()
    done.wait()


WORKERS: dict[tuple[str, bool], Callable[[Job, Any, Tally], None]] = {
    ("faust", False): consume_by_faust,
    ("faust", True): consume_by_bare_faust,
    ("poll", False): consume_by_poll,
    ("poll", True): consume_by_bare_poll,
    ("relay", False): send_by_relay,
    ("relay", True): send_barely,
}


def make_inlet(job: Job, tally: Tally) -> TimedInlet:
    """An inlet with the policy that a new agent has: about a quarter of the events becomes reviews."""
    agent = make_agent(threshold=0.7)
    engine = db.open_engine(f"sqlite:///{job.database}")
    return TimedInlet(engine, {agent.name: agent}, {job.topic: schemas.PREDICTION}, utc_now, tally=tally)


def make_stream(job: Job, tally: Tally) -> stream.Stream:
    lease = stream.Lease(holders.make_name(), holders.acquire)
    return stream.Stream(job.access, "relay", "poll", make_inlet(job, tally), OUTLETS, lease)


# What the benchmark's own process does.


@dataclass
class Bench:
    """A broker, a folder for the databases, and the numbers that make every event, topic and group a new one."""

    bootstrap: str
    folder: Path
    events: Iterator[int] = field(default_factory=itertools.count)
    names: Iterator[int] = field(default_factory=itertools.count)

    def make_topic(self, count: int) -> str:
        """A topic of four partitions with so many new events."""
        name = f"events-{next(self.names)}"
        make_topics(self.bootstrap, [name])
        producer = make_producer(self.bootstrap, linger_ms=20, compression_type="lz4")
        for number in range(count):
            producer.send(name, orjson.dumps(make_event(next(self.events))), partition=number % PARTITIONS)
        producer.flush()
        producer.close()
        return name

    @contextlib.contextmanager
    def working(self, kind: str, topic: str, *, bare: bool = False, workers: int = 1, database: Path | None = None) -> Iterator[Crew]:
        """Workers on a new database, or on this one; they end together."""
        path = database or self.folder / f"{next(self.names)}.db"
        if not bare:
            upgrade(path)
        crew = Crew(Job(kind, bare, self.bootstrap, path, topic, f"group-{next(self.names)}"), workers)
        try:
            yield crew
        finally:
            crew.end()
            if database is None:
                remove(path)


class Crew:
    """Workers of one group in processes of their own, and what they have told at their end."""

    def __init__(self, job: Job, workers: int) -> None:
        self._done, self._total = SPAWN.Event(), SPAWN.Value("q", 0)
        self._pipes = [SPAWN.Pipe(duplex=False) for _ in range(workers)]
        arguments = [(job, self._done, self._total, sender) for _, sender in self._pipes]
        self._processes = [SPAWN.Process(target=work, args=one, daemon=True) for one in arguments]
        for process in self._processes:
            process.start()

    def wait_for(self, count: int) -> None:
        """Wait until so many records are committed."""
        until = time.monotonic() + WAIT_SECONDS
        while self._total.value < count:
            if time.monotonic() > until or not all(process.is_alive() for process in self._processes):
                raise SystemExit(f"{self._total.value} of {count} records were handled")
            time.sleep(0.02)

    def finish(self) -> list[Work]:
        """Let them stop; returns what each did."""
        self._done.set()
        return [receiver.recv() for receiver, _ in self._pipes]

    def end(self) -> None:
        self._done.set()
        for process in self._processes:
            process.join(20)
            process.kill()


class Measured(NamedTuple):
    """Of a crew: records a second, CPU µs of a record, and the memory of the largest worker in MiB."""

    rate: float
    cpu: float
    memory: float


def judge_works(works: Sequence[Work]) -> Measured:
    """From the first commit of any to the last."""
    count = sum(one.count for one in works)
    began, ended = min(one.batches[0].at for one in works), max(one.batches[-1].at for one in works)
    cpu = sum(one.batches[-1].cpu - one.batches[0].cpu for one in works)
    return Measured(count / (ended - began), cpu / count * 1e6, max(one.memory for one in works))


def measure_reading(bench: Bench, runs: int, count: int) -> Iterator[Figure]:
    """Events handled a second, by one worker and by two."""
    cells = {
        "bare Faust": ("faust", True, 1),
        "Faust": ("faust", False, 1),
        "bare poll": ("poll", True, 1),
        "poll": ("poll", False, 1),
        "two Faust": ("faust", False, 2),
        "two poll": ("poll", False, 2),
    }
    found: dict[str, list[Measured]] = {name: [] for name in cells}
    topic = bench.make_topic(count)
    for run in range(runs):
        for name, (kind, bare, workers) in cells.items():
            with bench.working(kind, topic, bare=bare, workers=workers) as crew:
                crew.wait_for(count)
                found[name].append(judge_works(crew.finish()))
        tell(run, runs, found)
    yield from compare("events/s handled by a Faust worker", found["Faust"], found["bare Faust"], at_least=0.7)
    yield from compare("events/s handled by the poll consumer", found["poll"], found["bare poll"], at_least=0.4)
    yield from compare("the poll consumer against the Faust worker, events/s", found["poll"], found["Faust"], at_least=2)
    for name, goal in (("Faust", 1.25), ("poll", None)):
        yield from compare(f"two workers ({name}) against one, events/s", found[f"two {name}"], found[name], at_least=goal)
        cpu = [median(one.cpu for one in found[which]) for which in (f"two {name}", name)]
        yield Figure(f"two workers ({name}) against one, CPU µs an event", *cpu, at_most=1.1 if goal else None)


def measure_relay(bench: Bench, runs: int, count: int) -> Iterator[Figure]:
    """Messages acknowledged and marked a second, each a review that was opened."""
    make_topics(bench.bootstrap, [OUTLETS.queue, OUTLETS.events, OUTLETS.dead_letters])
    full = bench.folder / "unsent.db"
    count = fill_outbox(full, count, bench.events)
    found: dict[str, list[Measured]] = {"bare producer": [], "relay": []}
    for run in range(runs):
        for name, rates in found.items():
            path = bench.folder / f"{next(bench.names)}.db"
            shutil.copy(full, path)
            with bench.working("relay", "", bare=name != "relay", database=path) as crew:
                crew.wait_for(count)
                rates.append(judge_works(crew.finish()))
            remove(path)
        tell(run, runs, found)
    yield from compare("messages/s sent by the relay", found["relay"], found["bare producer"], at_least=0.8)


def fill_outbox(path: Path, count: int, numbers: Iterator[int]) -> int:
    """Ask about so many predictions, all but those that are quite sure; returns how many reviews nobody has told of."""
    upgrade(path)
    engine, agent = db.open_engine(f"sqlite:///{path}"), make_agent(threshold=1.0)
    inlet = records.Inlet(engine, {agent.name: agent}, {"t": schemas.PREDICTION}, utc_now)
    values = [orjson.dumps(make_event(next(numbers))) for _ in range(count)]
    for first in range(0, count, 1000):
        inlet.take([dead_letters.Record("t", 0, first + place, value) for place, value in enumerate(values[first : first + 1000])])
    with db.reading(engine) as connection:
        unsent = reviews.count_unsent(connection)
    engine.dispose()
    return unsent


def measure_latency(bench: Bench, runs: int, seconds: float) -> Iterator[Figure]:
    """From `send` to the commit, in ms, at 200 events a second."""
    cells = {"bare Faust": ("faust", True), "Faust": ("faust", False), "bare poll": ("poll", True), "poll": ("poll", False)}
    found: dict[str, list[list[float]]] = {name: [] for name in cells}
    for run in range(runs):
        for name, (kind, bare) in cells.items():
            topic = bench.make_topic(RATE)  # these warm the worker up
            with bench.working(kind, topic, bare=bare) as crew:
                crew.wait_for(RATE)
                sent = produce_steadily(bench, topic, int(seconds * RATE))
                crew.wait_for(RATE + len(sent))
                (work_,) = crew.finish()
            committed = {place: batch.at for batch in work_.batches for place in batch.places}
            found[name].append(quantiles([(committed[place] - at) * 1000 for place, at in sent.items()], n=100))
        told = ", ".join(f"{name} {values[-1][49]:.1f} / {values[-1][98]:.1f}" for name, values in found.items())
        console.print(f"run {run + 1}/{runs}: {told} ms", soft_wrap=True)
    limits: dict[str, dict[int, dict[str, float]]] = {"Faust": {50: {}, 99: {}}, "poll": {50: {"at_most": 15}, 99: {"at_most": 30}}}
    for name, percents in limits.items():
        for percent, goal in percents.items():
            ours, bare_ = ([one[percent - 1] for one in found[which]] for which in (name, f"bare {name}"))
            title = f"{name}: sent to handled, p{percent}, ms"
            if name == "Faust":
                yield Figure(title, median(ours), median(bare_), at_most=1.3)
            else:
                yield Figure(title, median(ours), **goal)
                yield Figure(f"{title}, against bare poll", median(ours), median(bare_))
            yield Figure(f"{title}, least of the runs", min(ours), min(bare_))
            yield Figure(f"{title}, most", max(ours), max(bare_))


def produce_steadily(bench: Bench, topic: str, count: int) -> dict[tuple[int, int], float]:
    """Send at an even pace; returns when each record was sent, by its place."""
    producer, promises = make_producer(bench.bootstrap, linger_ms=LINGER_MS), []
    began = time.monotonic()
    for number in range(count):
        value = orjson.dumps(make_event(next(bench.events)))
        time.sleep(max(0.0, began + number / RATE - time.monotonic()))
        promises.append((time.monotonic(), producer.send(topic, value, partition=number % PARTITIONS)))
    producer.flush()
    producer.close()
    return {(promise.get().partition, promise.get().offset): at for at, promise in promises}


def measure_stored(bench: Bench, runs: int, count: int, rows: int) -> Iterator[Figure]:
    """The same events into a database of `rows` predictions and into one of ten thousand."""
    paths = {size: bench.folder / f"stored-{size}.db" for size in (SMALL, rows)}
    for size, path in paths.items():
        began = time.monotonic()
        upgrade(path)
        engine = db.open_engine(f"sqlite:///{path}")
        tables.fill(engine, 1, size)
        engine.dispose()
        console.print(f"{size} predictions stored in {time.monotonic() - began:.0f} s")
    found: dict[tuple[str, int], list[Measured]] = {(kind, size): [] for kind in ("faust", "poll") for size in paths}
    for run in range(runs):
        for kind in ("faust", "poll"):
            # Whoever comes second finds the topic in the broker's memory: so each is second in every other run.
            for size, path in list(paths.items())[:: -1 if run % 2 else 1]:
                topic = bench.make_topic(count)
                with bench.working(kind, topic, database=path) as crew:
                    crew.wait_for(count)
                    found[kind, size].append(judge_works(crew.finish()))
        tell(run, runs, {f"{kind} on {size}": values for (kind, size), values in found.items()})
    for kind in ("faust", "poll"):
        big, small = found[kind, rows], found[kind, SMALL]
        yield from compare(f"{kind} with {rows:,} events stored against {SMALL:,}, events/s", big, small, at_least=0.9)
        memory = [median(one.memory for one in which) for which in (big, small)]
        yield Figure(f"{kind} with {rows:,} events stored against {SMALL:,}, MiB", *memory, at_most=1.1)


def compare(name: str, ours: Sequence[Measured], theirs: Sequence[Measured], at_least: float | None = None) -> Iterator[Figure]:
    """The goal is for the medians; the least and the most are each against the same of the baseline."""
    for told, choose, goal in (("", median, at_least), (", least of the runs", min, None), (", most", max, None)):
        yield Figure(f"{name}{told}", choose([one.rate for one in ours]), choose([one.rate for one in theirs]), at_least=goal)


def tell(run: int, runs: int, found: dict[str, list[Measured]]) -> None:
    told = ", ".join(f"{name} {ones[-1].rate:.0f} ({ones[-1].cpu:.0f} µs)" for name, ones in found.items())
    console.print(f"run {run + 1}/{runs}: {told} events/s (CPU an event)", soft_wrap=True)


def make_producer(bootstrap: str, **options: Any) -> KafkaProducer:
    return KafkaProducer(bootstrap_servers=bootstrap, batch_size=262_144, **options)


def make_topics(bootstrap: str, names: Sequence[str]) -> None:
    topics.create(broker.Access(bootstrap), [topics.Topic(name, PARTITIONS, 1, 1, 1) for name in names])


def upgrade(path: Path) -> None:
    engine = db.open_engine(f"sqlite:///{path}")
    schema.upgrade(engine)
    engine.dispose()


def remove(path: Path) -> None:
    for one in path.parent.glob(f"{path.name}*"):
        one.unlink()


@contextlib.contextmanager
def serve_broker(folder: Path) -> Iterator[str]:
    """A broker that waits three seconds for more members before a new group begins; gone afterwards."""
    folder.mkdir()
    extra = folder / "extra.properties"
    extra.write_text("group.initial.rebalance.delay.ms=3000\n")
    port = str(find_port())
    try:
        subprocess.run([START, "start", folder, port], check=True, stdout=subprocess.DEVNULL, env={**os.environ, "KAFKA_EXTRA": str(extra)})
        yield f"127.0.0.1:{port}"
    finally:
        subprocess.run([START, "wipe", folder], check=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--events", type=int, default=40_000, help="in a run")
    parser.add_argument("--messages", type=int, default=20_000, help="that the relay sends in a run")
    parser.add_argument("--seconds", type=float, default=10, help="of events at 200 a second in a run")
    parser.add_argument("--stored", type=int, default=0, help="predictions in the big database, such as 10000000; about 2.5 GB a million")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument(
        "--only", nargs="+", choices=["reading", "relay", "latency", "stored"], default=["reading", "relay", "latency", "stored"]
    )
    parser.add_argument("--folder", type=Path, help="where the broker and the databases are made and removed")
    asked = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # so that the broker ends too
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    figures: list[Figure] = []
    with (
        tempfile.TemporaryDirectory(prefix="ratchet-streams-", dir=asked.folder) as folder,
        serve_broker(Path(folder) / "broker") as bootstrap,
    ):
        bench = Bench(bootstrap, Path(folder))
        if "reading" in asked.only:
            figures += measure_reading(bench, asked.runs, asked.events)
        if "relay" in asked.only:
            figures += measure_relay(bench, asked.runs, asked.messages)
        if "latency" in asked.only:
            figures += measure_latency(bench, asked.runs, asked.seconds)
        if "stored" in asked.only and asked.stored:
            figures += measure_stored(bench, asked.runs, asked.events // 2, asked.stored)
    finish("streams", figures)


if __name__ == "__main__":
    main()
