"""A daemon that reads Kafka while something goes wrong: what is sent meanwhile, what is done to whom, and how what is left is counted."""

from __future__ import annotations

import contextlib
import itertools
import resource
import signal
import socket
import sqlite3
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import orjson
import psycopg
from kafka import KafkaProducer
from kafka.errors import KafkaError
from sqlalchemy import Engine, func, select, text

from consumers import records, rules, schemas
from daemon import config, policies
from daemon.kafka import Kafka
from storage import db, dead_letters
from storage.tables import DeadLetter, Event, Label, Prediction, Review, ReviewStep
from tests import broker_fixtures, daemon_fixtures, event_fixtures, postgres_fixtures, process_fixtures

CHUNK = 20
IN_ORDER = 500
LOOK_SECONDS = 0.1
MIB = 1 << 20
LETTER = "The patient reports pain in the left knee after a fall. " * 75
Made = list[tuple[str, bytes]]


@dataclass(frozen=True)
class Pace:
    """How long faults last, in seconds, how many events come twice, and how many at once, with long texts, while the database is locked;
    `patch` is Python that is run before the daemon.

    The long form has the time-outs of production and outlasts them. The short form shortens both.
    """

    patch: str = ""
    outage: float = 150.0
    interruption: float = 10.0
    silence: float = 60.0
    lock: float = 40.0
    life: float = 4.0
    deaths: int = 5
    repeated: int = 100_000
    backlog: int = 50_000
    chunk_seconds: float = 0.2
    settle: float = 600.0


LONG = Pace()
CLOCK = """
from datetime import timedelta
from pathlib import Path
from daemon import clocks
genuine = clocks.read_local
clocks.read_local = lambda: genuine() - timedelta(hours=Path("clock-is-back").exists())
"""
"""The daemon's clock is an hour back while a file is there."""
SHORT_PATCH = """
from consumers import broker, records, relay, stream
from storage import db
broker.PROBE_SECONDS, broker.SESSION_SECONDS, broker.HEARTBEAT_SECONDS = 1.0, 2.0, 0.5
relay.DELIVERY_SECONDS, relay.FLUSH_SECONDS, relay.WAIT_SECONDS = 2, 0.5, 0.5
records.LONGEST_WAIT_SECONDS = stream.LONGEST_WAIT_SECONDS = db.BUSY_SECONDS = 1
stream.END_SECONDS = 5
"""
SHORT = Pace(
    SHORT_PATCH,
    outage=0,
    interruption=1,
    silence=4,
    lock=2.5,
    life=0.5,
    deaths=1,
    repeated=2000,
    backlog=1000,
    chunk_seconds=0.1,
    settle=90,  # less than the watchdog takes: what is passed over is not mended by it unseen
)


@contextlib.contextmanager
def repeating(name: str, seconds: float, work: Callable[[], object]) -> Iterator[None]:
    """Do something again and again, in a thread, until this ends; raises what it raised."""
    over, failed = threading.Event(), []

    def repeat_work() -> None:
        try:
            while not over.wait(seconds):
                work()
        except BaseException as error:  # noqa: BLE001  it is raised where it is seen
            failed.append(error)

    thread = threading.Thread(target=repeat_work, name=name)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
    if failed:
        raise failed[0]


class Traffic:
    """Events that go on coming: predictions, labels, repetitions, and records that are no events; each is sent until it is acknowledged."""

    def __init__(self, bootstrap: str, kafka: Kafka, pace: Pace) -> None:
        self._bootstrap, self._names, self._pace = bootstrap, kafka.topics, pace
        self._at = datetime.now(UTC) - timedelta(hours=3)
        self._numbers = itertools.count()
        self.acknowledged: Made = []
        self.is_poisoning = False
        self.retries = 0
        self._producer: KafkaProducer | None = None

    @contextlib.contextmanager
    def flowing(self) -> Iterator[None]:
        """Events come until this ends; all that were sent are acknowledged then."""
        with repeating("traffic", self._pace.chunk_seconds, lambda: self.send(self.make(CHUNK))):
            yield

    def send(self, made: Made) -> None:
        """Send events in order for each claim until all are acknowledged; by another producer when one is not."""
        while True:
            try:
                self._producer = self._producer or self._open()
                for promise in [self._send(self._producer, topic, value) for topic, value in made]:
                    promise.get(timeout=150)
            except KafkaError:
                self.retries += 1
                self.close()
            else:
                self.acknowledged += made
                return

    def _send(self, producer: KafkaProducer, topic: str, value: bytes) -> Any:
        """By its claim to a partition; while one is poisoned what is no event to the first, and all others to the second."""
        return producer.send(topic, key=_find_key(value), value=value, partition=int(value.startswith(b"{")) if self.is_poisoning else None)

    def close(self) -> None:
        producer, self._producer = self._producer, None
        if producer is not None:
            with contextlib.suppress(KafkaError):
                producer.close(timeout=1)

    def make(self, count: int, letter: str = "") -> Made:
        """The next events, in order; each claim with that letter."""
        return [one for number in itertools.islice(self._numbers, count) for one in self._make(number, letter)]

    def _make(self, number: int, letter: str) -> Made:
        claim = event_fixtures.make_prediction(number, self._at, confidence=0.1 if number % 2 else 0.95)
        if letter:
            claim["data"]["input"]["letter"] = letter
        made = [(self._names.predictions, orjson.dumps(claim))]
        if number % 5 == 0:
            label = event_fixtures.make_label(number, self._at + timedelta(seconds=1), expert="ann")
            made.append((self._names.labels, orjson.dumps(label)))
        if number % 10 == 0:
            made.append(made[0])
        if number % 50 == 0 or self.is_poisoning:
            made.append((self._names.predictions, b"no event %d" % number))
        return made

    def _open(self) -> KafkaProducer:
        return KafkaProducer(
            bootstrap_servers=self._bootstrap, linger_ms=5, allow_auto_create_topics=False, reconnect_backoff_max_ms=500, max_block_ms=5000
        )


def _find_key(value: bytes) -> bytes:
    with contextlib.suppress(orjson.JSONDecodeError):
        return f"adjudication/{orjson.loads(value)['data']['claim_id']}".encode()
    return value


class Proxy:
    """Stands between a daemon and its broker, and passes everything on; or takes connections and never answers."""

    def __init__(self, port: int, target: int) -> None:
        self._target = target
        self._answers = threading.Event()
        self._answers.set()
        self._open: list[socket.socket] = []
        self._listening = socket.create_server(("127.0.0.1", port), backlog=128)
        threading.Thread(target=self._listen, name="proxy", daemon=True).start()

    @contextlib.contextmanager
    def silent(self) -> Iterator[None]:
        """Nothing is answered; what was sent meanwhile is lost at the end, as when the broker is started again."""
        self._answers.clear()
        try:
            yield
        finally:
            self._cut()
            self._answers.set()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        self._cut()
        self._answers.set()

    def _listen(self) -> None:
        with contextlib.suppress(OSError):  # it was closed
            while True:
                near, _ = self._listening.accept()
                try:
                    far = socket.create_connection(("127.0.0.1", self._target), timeout=5)
                except OSError:
                    near.close()
                    continue
                far.settimeout(None)
                self._open += [near, far]
                for pair in ((near, far), (far, near)):
                    threading.Thread(target=self._pass_on, args=pair, name="proxy", daemon=True).start()

    def _pass_on(self, source: socket.socket, drain: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while received := source.recv(65536):
                self._answers.wait()
                drain.sendall(received)
        for one in (source, drain):
            _hang_up(one)

    def _cut(self) -> None:
        for one in self._open:
            _hang_up(one)
        self._open.clear()


def _hang_up(one: socket.socket) -> None:
    with contextlib.suppress(OSError):
        one.shutdown(socket.SHUT_RDWR)
    one.close()


class Tally(NamedTuple):
    """What is left: all but the first three should be 0."""

    acknowledged: int
    stored: int
    parked: int
    lost: int
    twice: int
    differing: int
    unread: int
    untold: int
    disordered: int
    deaths: int

    @property
    def faults(self) -> dict[str, int]:
        """What is not as it should be."""
        return {name: value for name, value in self._asdict().items() if value and name not in {"acknowledged", "stored", "parked"}}


class Trial:
    """One installation that reads Kafka through a proxy, and everything that was sent to it."""

    def __init__(self, folder: Path, broker: broker_fixtures.Broker, consumer: str, pace: Pace, url: str | None = None) -> None:
        self.broker, self.pace, self.home = broker, pace, folder / "home"
        self.kafka = broker_fixtures.make_topics(broker, f"faults-{folder.name}")
        # Only one can stand at the proxy's port: what is about the server needs none.
        self.proxy = Proxy(broker.proxy, broker.proxied) if url is None or url.startswith("sqlite") else None
        self.url = url or f"sqlite:///{self.home}/ratchet.db"
        self.secrets = daemon_fixtures.make_home(self.home, url)
        self.settings = {**to_settings(self.kafka, consumer), "DATABASE__URL": self.url}
        if self.proxy is not None:
            self.settings["KAFKA__BOOTSTRAP"] = f"127.0.0.1:{broker.proxy}"
        self.engine = db.open_engine(self.url)
        self.traffic = Traffic(broker.bootstrap, self.kafka, pace)
        self.daemons: list[daemon_fixtures.Daemon] = []
        self.roles: tuple[str, ...] = ("consume",)
        self.deaths = 0
        self.waited, self.grown = 0.0, 0.0
        """Of a database that was locked: so many MiB of records waited for it, and so many MiB more did the daemon take meanwhile."""
        self._replayed = 0
        self._replay: Engine | None = None

    @property
    def database(self) -> Path:
        """The file of an SQLite database."""
        return Path(self.url.removeprefix("sqlite:///"))

    @property
    def daemon(self) -> daemon_fixtures.Daemon:
        """The one that was started last."""
        return self.daemons[-1]

    def begin(self, *roles: str, patch: str = "") -> daemon_fixtures.Daemon:
        """Begin one more daemon, with the roles of the last one if none are named."""
        self.roles = roles or self.roles
        daemon = daemon_fixtures.Daemon(self.home, f"{len(self.daemons)}.log", **self.settings)
        self.daemons.append(daemon)
        arguments = [one for role in self.roles for one in ("--role", role)]
        return daemon.begin(*arguments, patch=f"{CLOCK}\n{self.pace.patch}\n{patch}")

    def start(self, *roles: str) -> daemon_fixtures.Daemon:
        """Start one more daemon, and wait until it answers."""
        daemon = self.begin(*roles)
        daemon.wait_for(lambda: daemon.ops_url)
        return daemon

    def post(self, count: int) -> None:
        """Send predictions by HTTP, whatever is with the broker."""
        made = [one for one in self.traffic.make(count) if one[0] == self.kafka.topics.predictions and one[1].startswith(b"{")]
        headers = {"Authorization": f"Bearer {self.secrets['node']}", "Content-Type": "application/cloudevents-batch+json"}
        body = b"[" + b",".join(value for _, value in made) + b"]"
        answer = httpx.post(f"{self.daemon.url}/v1/predictions", content=body, headers=headers, trust_env=False, timeout=60)
        assert answer.status_code == 202, answer.text
        self.traffic.acknowledged += made

    def count_given_up(self) -> int:
        """How often the relay has given a producer up because the broker did not acknowledge what it held."""
        told = [line for line in self.daemon.lines() if line["event"] == "stream_waits"]
        return sum("were not acknowledged" in line["error"] for line in told)

    def read_ready(self) -> Any:
        """What the daemon says of its readiness."""
        return httpx.get(f"{self.daemon.ops_url}/readyz", trust_env=False, timeout=30).json()

    def events(self) -> Counter[str]:
        """How often each thing was logged by the daemon that was started last."""
        return Counter(self.daemon.events())

    @contextlib.contextmanager
    def watching_memory(self) -> Iterator[None]:
        """Look how much memory the daemon and its children take more than at the beginning; the most is `grown`."""
        number = self.daemon.process.pid
        seen = [measure_memory(number)]
        with repeating("memory", LOOK_SECONDS, lambda: seen.append(measure_memory(number))):
            yield
        self.grown = max(seen) - seen[0]

    def count(self, table: Any, *where: Any) -> int:
        """How many rows there are."""
        with db.reading(self.engine) as connection:
            return connection.execute(select(func.count()).select_from(table).where(*where)).scalar_one()

    def read_more(self, count: int = 2 * CHUNK) -> None:
        """Wait until so many more predictions are stored."""
        goal = self.count(Prediction) + count
        self.wait_for(lambda: self.count(Prediction) >= goal)

    def wait_for(self, holds: Callable[[], Any]) -> Any:
        """Wait until something holds; a daemon that ends meanwhile is started again, as by a service manager, and counted."""
        deadline = time.monotonic() + self.pace.settle
        while not (found := holds()):
            if self.daemon.process.poll() is not None:
                self.deaths += 1
                self.start()
            assert time.monotonic() < deadline, f"it did not happen: {self.daemon.log.read_text()[-2000:]}"
            time.sleep(LOOK_SECONDS)
        return found

    def settle(self) -> Tally:
        """Wait until everything is read, handled and told, then count."""
        wanted = _find_identities(self.traffic.acknowledged)
        poison = _find_poison(self.traffic.acknowledged)
        ours = Event.type.in_([schemas.PREDICTION, schemas.LABEL])
        self.wait_for(lambda: self.count(Event, ours, Event.state == "handled") >= len(wanted))
        self.wait_for(lambda: len(self._read_parked()) >= len(poison))
        self.wait_for(lambda: not self.count(Event, Event.state == "unsent") + self.count(ReviewStep, ReviewStep.is_unsent))
        unread = self._read_unread()
        deaths, self.deaths = self.deaths, 0
        with db.reading(self.engine) as connection:
            stored = {(row.source, row.event_id) for row in connection.execute(select(Event.source, Event.event_id).where(ours))}
            twice = sum(connection.execute(text(query)).scalar_one() for query in APPLIED_TWICE)
            entered = [orjson.loads(body)["label"] for (body,) in connection.execute(text("SELECT body FROM ledger WHERE kind = 'label'"))]
            twice += len(entered) - len(set(entered))
        parked = self._read_parked()
        untold, disordered = self._compare_told()
        expected, found = read_rows(self._replay_in_order()), read_rows(self.engine)
        return Tally(
            acknowledged=len(wanted) + len(poison),
            stored=len(stored & wanted),
            parked=len(parked & poison),
            lost=len(wanted - stored) + len(poison - parked),
            twice=twice,
            differing=sum(((expected - found) + (found - expected)).values()) + len(stored - wanted) + len(parked - poison),
            unread=unread,
            untold=untold,
            disordered=disordered,
            deaths=deaths,
        )

    def close(self) -> None:
        """Leave no process behind."""
        for daemon in self.daemons:
            daemon.kill()
        self.traffic.close()
        if self.proxy is not None:
            self.proxy.close()
        self.engine.dispose()
        if self._replay is not None:
            self._replay.dispose()

    def _read_parked(self) -> set[bytes]:
        with db.reading(self.engine) as connection:
            return set(connection.execute(select(DeadLetter.value).where(DeadLetter.value.is_not(None))).scalars())

    def _read_unread(self) -> int:
        """What is not acknowledged to the broker, after a while for the commits that are under way."""
        deadline = time.monotonic() + 15
        while (unread := sum(broker_fixtures.read_lag(self.kafka, name) for name in self.kafka.topics.kinds())) and (
            time.monotonic() < deadline
        ):
            time.sleep(0.1)
        return unread

    def _compare_told(self) -> tuple[int, int]:
        """How many steps of reviews the broker was not told, and how many reviews it was told to be closed before they were opened."""
        topic = self.kafka.topics.queue
        told = [orjson.loads(one.value) for one in broker_fixtures.consume(self.broker, topic, broker_fixtures.read_lag(self.kafka, topic))]
        first = dict(reversed([(one["id"], place) for place, one in enumerate(told)]))
        closed = [one["data"]["review"] for one in told if one["type"] == "ratchet.review.closed.v1"]
        late = len(told)
        disordered = sum(
            first.get(f"ratchet.review.opened.v1/{one}", late) > first[f"ratchet.review.closed.v1/{one}"] for one in set(closed)
        )
        return abs(self.count(ReviewStep, ReviewStep.action.in_(["opened", "answered"])) - len(first)), disordered

    def _replay_in_order(self) -> Engine:
        """The same events in the order in which they were made, one batch after another, in a database of its own."""
        if self._replay is None:
            self._replay = db.open_engine(f"sqlite:///{self.home}/replay.db")
            daemon_fixtures.prepare(self._replay)
        settings = config.load(self.home / config.FILE, self.daemons[0].environment)
        with db.writing(self._replay) as connection:
            agents = policies.record(connection, settings.agents, datetime.now(UTC))
        replay(self._replay, agents, self.kafka, self.traffic.acknowledged, self._replayed)
        self._replayed = len(self.traffic.acknowledged)
        return self._replay


def measure_memory(number: int) -> float:
    """MiB that a process and its children take."""
    numbers = (number, *process_fixtures.list_children(number))
    pages = sum(int(Path(f"/proc/{one}/statm").read_text().split()[1]) for one in numbers)
    return pages * resource.getpagesize() / MIB


def to_settings(kafka: Kafka, consumer: str) -> dict[str, str]:
    """The variables by which a daemon reads what a test sends."""
    names = {f"KAFKA__TOPICS__{key.upper()}": getattr(kafka.topics, key) for key in ("predictions", "labels", "queue", "events")}
    names["KAFKA__TOPICS__DEAD_LETTERS"] = kafka.topics.dead_letters
    return {"KAFKA__BOOTSTRAP": str(kafka.bootstrap), "KAFKA__GROUP": kafka.group, "KAFKA__CONSUMER": consumer, **names}


def replay(engine: Engine, agents: dict[str, rules.Agent], kafka: Kafka, made: Made, first: int = 0) -> None:
    """Take records in the order in which they were made, from a place on."""
    inlet = records.Inlet(engine, agents, kafka.topics.kinds(), lambda: datetime.now(UTC))
    for start in range(first, len(made), IN_ORDER):
        some = enumerate(made[start : start + IN_ORDER], start)
        inlet.take([dead_letters.Record(topic, 0, place, value) for place, (topic, value) in some])


APPLIED_TWICE = (
    "SELECT count(*) FROM (SELECT 1 FROM events GROUP BY source, event_id HAVING count(*) > 1) AS twice",
    "SELECT count(*) FROM (SELECT 1 FROM predictions GROUP BY agent, prediction_id HAVING count(*) > 1) AS twice",
    "SELECT count(*) FROM (SELECT 1 FROM labels GROUP BY prediction, expert HAVING count(*) > 1) AS twice",
    "SELECT count(*) FROM (SELECT 1 FROM reviews GROUP BY prediction HAVING count(*) > 1) AS twice",
    "SELECT count(*) FROM (SELECT 1 FROM review_steps GROUP BY review, action HAVING count(*) > 1) AS twice",
)
"""Each counts a thing that happened twice and should have happened once."""
ROWS = (
    select(
        Prediction.prediction_id,
        Prediction.claim_id,
        Prediction.group_key,
        Prediction.input_digest,
        Prediction.decision,
        Prediction.confidence,
        Prediction.occurred_at,
        Prediction.reasons,
        Prediction.priority,
        Prediction.effective_threshold,
        Prediction.inclusion_probability,
    ),
    select(Prediction.prediction_id, Review.state, Review.reasons, Review.priority, Review.is_blind).join(
        Prediction, Prediction.id == Review.prediction
    ),
    select(
        Prediction.prediction_id, Label.expert, Label.kind, Label.answer, Label.answered_at, Label.review.is_not(None), Label.superseded_by
    ).join(Prediction, Prediction.id == Label.prediction),
)
"""What events leave, less the keys and times that depend on when they came."""


def read_rows(engine: Engine) -> Counter[str]:
    """Predictions as they were routed, the state of reviews, and labels."""
    with db.reading(engine) as connection:
        return Counter(f"{kind} {tuple(row)}" for kind, query in enumerate(ROWS) for row in connection.execute(query))


def _find_identities(made: Sequence[tuple[str, bytes]]) -> set[tuple[str, str]]:
    parsed = [orjson.loads(value) for _, value in made if value.startswith(b"{")]
    return {(one["source"], one["id"]) for one in parsed}


def _find_poison(made: Sequence[tuple[str, bytes]]) -> set[bytes]:
    return {value for _, value in made if not value.startswith(b"{")}


def silence(trial: Trial) -> None:
    """The broker takes connections and answers nothing, for longer than a consumer is missed; afterwards all goes on."""
    trial.read_more()
    assert trial.proxy is not None
    with trial.proxy.silent():
        time.sleep(trial.pace.silence)
    trial.read_more()


def kill_broker(trial: Trial) -> None:
    """The broker gets SIGKILL and is away until the relay has given its producer up; events come by HTTP meanwhile."""
    trial.read_more()
    before, began = trial.count_given_up(), time.monotonic()
    trial.broker.kill()
    try:
        trial.post(CHUNK)
        trial.wait_for(lambda: trial.count_given_up() > before)
        trial.wait_for(lambda: time.monotonic() - began >= trial.pace.outage)
        trial.post(CHUNK)
    finally:
        trial.broker.start()
    trial.read_more()


def interrupt_broker(trial: Trial) -> None:
    """The broker gets SIGKILL and is back after some seconds."""
    trial.read_more()
    trial.broker.kill()
    try:
        time.sleep(trial.pace.interruption)
    finally:
        trial.broker.start()
    trial.read_more()


def lock(trial: Trial) -> None:
    """Another process holds SQLite's lock, for longer than anybody waits for it, and more records wait than a consumer may hold."""
    trial.read_more()
    backlog = trial.traffic.make(trial.pace.backlog, LETTER)
    with contextlib.closing(sqlite3.connect(trial.database, isolation_level=None)) as other:
        before, until = trial.events()["database_unavailable"], time.monotonic() + trial.pace.lock
        other.execute("PRAGMA busy_timeout = 30000")
        other.execute("BEGIN IMMEDIATE")
        with trial.watching_memory():
            for first in range(0, len(backlog), IN_ORDER):
                trial.traffic.send(backlog[first : first + IN_ORDER])
            time.sleep(max(0.0, until - time.monotonic()))
            trial.wait_for(lambda: trial.events()["database_unavailable"] > before)
        other.execute("ROLLBACK")
    trial.read_more(trial.pace.backlog)
    trial.waited = sum(len(value) for _, value in backlog) / MIB


def fill_disk(trial: Trial) -> None:
    """Not a byte is left on the database's disk, until somebody makes room."""
    trial.read_more()
    before, ballast = trial.events()["database_unavailable"], trial.database.with_name("ballast")
    with ballast.open("wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12):
            with contextlib.suppress(OSError):
                while True:
                    file.write(bytes(size))
    try:
        trial.wait_for(lambda: trial.events()["database_unavailable"] > before)
        if "bytes free" not in trial.read_ready().get("error", {"value": ""})["value"]:
            raise RuntimeError("the daemon says that it is ready, with a full disk")
    finally:
        ballast.unlink()
    trial.read_more()


def turn_clock_back(trial: Trial) -> None:
    """The clock of the daemon jumps back an hour, and later forward again."""
    sign = trial.home / "clock-is-back"
    trial.read_more()
    sign.touch()
    trial.read_more(5 * CHUNK)
    sign.unlink()
    trial.read_more()


def poison(trial: Trial) -> None:
    """Every record of a partition is malformed."""
    trial.traffic.is_poisoning = True
    trial.read_more(5 * CHUNK)


def repeat(trial: Trial) -> None:
    """The same events come twice, all of them."""
    made = trial.traffic.make(trial.pace.repeated)
    for _ in range(2):
        for first in range(0, len(made), IN_ORDER):
            trial.traffic.send(made[first : first + IN_ORDER])


def join_and_die(trial: Trial) -> None:
    """Workers of one group join, share the partitions, and are killed while they read, again and again; each is a scheduler too."""
    for _ in range(trial.pace.deaths):
        before = trial.daemon
        trial.start("consume", "web", "schedule")
        trial.read_more()
        time.sleep(trial.pace.life)
        assert "leading_began" not in trial.daemon.events(), "one leads already"
        before.kill()
        trial.read_more()
        trial.wait_for(lambda: "leading_began" in trial.daemon.events())


KILL_BEFORE_MARKING = """
import os, signal
genuine_mark = relay.Relay._mark
def mark(self, messages, fence):
    if messages:
        os.kill(os.getpid(), signal.SIGKILL)
    genuine_mark(self, messages, fence)
relay.Relay._mark = mark
"""


def kill_relay(trial: Trial) -> None:
    """The process of the relay gets SIGKILL between sending and marking."""
    trial.daemon.kill()
    dying = trial.begin("consume", patch=f"from consumers import relay{KILL_BEFORE_MARKING}")
    assert dying.process.wait(trial.pace.settle) == -signal.SIGKILL
    trial.start("consume", "web", "schedule")
    trial.read_more()


KILL_IN_A_BATCH = """
import os, signal
from consumers import records
genuine_take = records.Inlet.{name}
def kill(self, *arguments):
    genuine_take(self, *arguments)
    os.kill(os.getpid(), signal.SIGKILL)
records.Inlet.{name} = kill
"""
"""After `_store` a batch is written and not committed, after `store` it is committed and not acknowledged."""


def kill_consumer(trial: Trial) -> None:
    """A consumer gets SIGKILL in the middle of a batch, and another one between its commit and its acknowledgement."""
    for name in ("_store", "store"):
        trial.daemon.kill()
        dying = trial.begin("consume", patch=KILL_IN_A_BATCH.format(name=name))
        assert dying.process.wait(trial.pace.settle) == -signal.SIGKILL
    trial.start("consume", "web", "schedule")
    trial.read_more()


def crash_server(trial: Trial, server: postgres_fixtures.Server) -> None:
    """The PostgreSQL server crashes and comes back."""
    trial.read_more()
    before = trial.events()["database_unavailable"]
    server.call("kill")
    try:
        trial.daemon.wait_for(lambda: trial.events()["database_unavailable"] > before)
    finally:
        server.start()
    trial.read_more()


def refuse_connections(trial: Trial, server: postgres_fixtures.Server) -> None:
    """The PostgreSQL server has no connection left for us, and ends those that we have."""
    trial.read_more()
    before = trial.events()["database_unavailable"]
    server.execute("ALTER ROLE narrow CONNECTION LIMIT 0")
    try:
        server.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'narrow'")
        trial.daemon.wait_for(lambda: trial.events()["database_unavailable"] > before)
    finally:
        server.execute("ALTER ROLE narrow CONNECTION LIMIT -1")
    trial.read_more()


def make_narrow(server: postgres_fixtures.Server, name: str) -> str:
    """The address of a database for a user whose connections can be limited."""
    with contextlib.suppress(psycopg.errors.DuplicateObject):
        server.execute("CREATE ROLE narrow LOGIN")
    server.execute("GRANT ALL ON ALL TABLES IN SCHEMA public TO narrow; GRANT ALL ON ALL SEQUENCES IN SCHEMA public TO narrow", name)
    return server.url(name).replace("ratchet@", "narrow@")


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[bool]:
    """A disk of its own that can be filled, in `folder`; or none, and the folder is as it was: only root may mount one."""
    is_mounted = (
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], check=False, capture_output=True).returncode == 0
    )
    try:
        yield is_mounted
    finally:
        if is_mounted:
            subprocess.run(["umount", "--lazy", folder], check=True)
