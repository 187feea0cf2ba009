"""Records from Kafka, whatever reads them: decoded, stored and handled in one transaction, or parked with the reason."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, NamedTuple

import orjson
import structlog
from sqlalchemy import Connection, Engine

from consumers import delivery, embedded, handlers, rules, schemas, work
from consumers.progress import Incoming
from storage import db, dead_letters, events, tokens

PRODUCER = tokens.Principal("kafka", "producer")
"""Who sends what names nobody: whoever the broker lets write to the topic."""
FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 0.5, 15.0
GIVE_UP_SECONDS = 240
"""Shorter than the five minutes after which a group takes a consumer's partitions away."""

Item = schemas.AnyEvent | schemas.Refusal
log = structlog.get_logger()


class Refused(NamedTuple):
    """A record that can't become an event."""

    record: dead_letters.Record
    refusal: schemas.Refusal


class Part(NamedTuple):
    """Records of one topic as another process has read them: their events and the latest time that one tells, where all are good."""

    records: list[dead_letters.Record]
    events: list[events.Incoming] | None = None
    latest: datetime | None = None


class Read(NamedTuple):
    """Records of one topic, read as far as it goes without the database: of labels only that can say whose they are."""

    records: Sequence[dead_letters.Record]
    items: Sequence[Item]
    prepared: delivery.Prepared | None


class Batch(NamedTuple):
    """Records on their way into the database, and what was read of them, or why it could not be."""

    records: Sequence[dead_letters.Record]
    found: Sequence[Read] | Exception


@dataclass(frozen=True, slots=True)
class Inlet:
    """Where records come in; `kinds` says which type of event a topic carries."""

    engine: Engine
    agents: Mapping[str, rules.Agent]
    kinds: Mapping[str, str]
    clock: Callable[[], datetime]
    counters: embedded.Counters = field(default_factory=embedded.Counters)
    progress: Incoming = field(default_factory=Incoming)

    def read(self, records: Sequence[dead_letters.Record]) -> Batch:
        """Parse and check records before their turn in the database comes."""
        try:
            return Batch(records, read(records, self.kinds, self.agents, self.clock()))
        except Exception as error:  # noqa: BLE001  raised in `store`, where each record is tried alone
            return Batch(records, error)

    def receive(self, parts: Sequence[Part]) -> Batch:
        """`read` records that another process has prepared."""
        taken = [record for part in parts for record in part.records]
        try:
            return Batch(taken, [receive(part, self.kinds, self.agents, self.clock()) for part in parts])
        except Exception as error:  # noqa: BLE001  as in `read`
            return Batch(taken, error)

    def take(self, records: Sequence[dead_letters.Record]) -> None:
        """`read` and `store`."""
        self.store(self.read(records))

    def store_patiently(self, batch: Batch, stopping: threading.Event, committing: Callable[[], object] = bool) -> None:
        """As `store`, but a database that is not available is tried again, more and more slowly; meanwhile nothing else is read.

        Raises what the database raised after some minutes, or at once when the process is to stop: nothing was acknowledged then.
        """
        wait, deadline = FIRST_WAIT_SECONDS, time.monotonic() + GIVE_UP_SECONDS
        while True:
            try:
                self.store(batch, committing)
            except db.UNAVAILABLE as error:
                if stopping.is_set() or time.monotonic() > deadline:
                    raise
                self.progress.is_waiting_for_database = True
                log.warning("database_unavailable", action="retry", records=len(batch.records), seconds=wait, error=type(error).__name__)
                stopping.wait(wait)
                wait = min(2 * wait, LONGEST_WAIT_SECONDS)
            else:
                self.progress.is_waiting_for_database = False
                return

    def store(self, batch: Batch, committing: Callable[[], object] = bool) -> None:
        """Store and handle records in one transaction, park what can't be; returns after the commit.

        `committing` is called when nothing is left but to wait for the disk. When the batch fails as a whole each record is tried alone,
        so that one bad record costs only itself.
        """
        began = time.monotonic()
        try:
            with db.writing(self.engine, alone=False) as connection:
                outcome = self._store(connection, batch)
                committing()
        except db.UNAVAILABLE:
            raise
        except Exception as error:  # noqa: BLE001  whatever one record does wrong must not hold up the others, nor be passed over
            if len(batch.records) > 1:
                for record in batch.records:
                    self.take([record])
                return
            outcome = self._park_unknown(batch.records[0], error)
        self.counters.add(outcome)
        self.progress.add(len(batch.records), time.monotonic() - began)

    def _store(self, connection: Connection, batch: Batch) -> Counter[str]:
        if isinstance(batch.found, Exception):
            raise batch.found
        now = self.clock()
        outcome, refused = take(connection, batch.found, self.agents, now)
        for record, refusal in refused:
            park(connection, record, str(refusal), f"{refusal.field}: {refusal.remedy}", now)
        return outcome + Counter(dead=len(refused))

    def _park_unknown(self, record: dead_letters.Record, error: Exception) -> Counter[str]:
        reason = f"{type(error).__name__} when it was stored"
        with db.writing(self.engine) as connection:
            park(connection, record, reason, reason, self.clock())
        return Counter(dead=1)


def park(connection: Connection, record: dead_letters.Record, reason: str, announced: str, now: datetime) -> None:
    """Set a record aside, and say so."""
    letter = dead_letters.park_record(connection, record, reason, announced, now)
    log.warning("record_parked", topic=record.topic, partition=record.partition, offset=record.offset, dead_letter=letter)


def read(records: Sequence[dead_letters.Record], kinds: Mapping[str, str], agents: Mapping[str, rules.Agent], now: datetime) -> list[Read]:
    """Parse and check records, topic by topic: all that needs no database."""
    labels_of = list_labels(agents)
    return [_read(mine, kinds[topic], labels_of, now) for topic, mine in _divide(records, kinds)]


def prepare(
    records: Sequence[dead_letters.Record], kinds: Mapping[str, str], labels_of: Mapping[str, Sequence[str]], now: datetime
) -> list[Part]:
    """`read` for another process, whose clock and database decide: labels, and a topic in which anything is wrong, are left to it."""
    return [_prepare(mine, kinds[topic], labels_of, now) for topic, mine in _divide(records, kinds)]


def receive(part: Part, kinds: Mapping[str, str], agents: Mapping[str, rules.Agent], now: datetime) -> Read:
    """What `read` says of records that another process has prepared."""
    if part.events is None or part.latest is None or part.latest > now + delivery.AHEAD:
        return _read(part.records, kinds[part.records[0].topic], list_labels(agents), now)
    contents = orjson.loads(f"[{','.join([str(event.data) for event in part.events])}]")
    return Read(part.records, (), delivery.Prepared([None] * len(contents), part.events, contents))


def _divide(records: Sequence[dead_letters.Record], topics: Iterable[str]) -> Iterator[tuple[str, list[dead_letters.Record]]]:
    for topic in topics:
        mine = [record for record in records if record.topic == topic]
        if mine:
            yield topic, mine


def _read(records: Sequence[dead_letters.Record], kind: str, labels_of: Mapping[str, Sequence[str]], now: datetime) -> Read:
    items = schemas.parse_each([record.value for record in records], kind)
    return Read(records, items, None if kind == schemas.LABEL else delivery.prepare(items, labels_of, PRODUCER, now))


def _prepare(records: list[dead_letters.Record], kind: str, labels_of: Mapping[str, Sequence[str]], now: datetime) -> Part:
    try:
        read = None if kind == schemas.LABEL else _read(records, kind, labels_of, now)
    except Exception:  # noqa: BLE001  it happens again in `receive`, and then each record is tried alone
        read = None
    if read is None or read.prepared is None or len(read.prepared.good) < len(records):
        return Part(records)
    return Part(records, read.prepared.good, max(data["occurred_at"] for data in read.prepared.contents))


def take(
    connection: Connection, found: Sequence[Read], agents: Mapping[str, rules.Agent], now: datetime
) -> tuple[Counter[str], list[Refused]]:
    """Store and handle records in the caller's transaction; returns how many ended in each state, and those that can't be taken."""
    outcome: Counter[str] = Counter()
    refused: list[Refused] = []
    new: list[work.Item] = []
    for one in found:
        whole = [(one.records, one.prepared)] if one.prepared is not None else _prepare_labels(connection, one, list_labels(agents), now)
        for sent, prepared in whole:
            delivered, stored = delivery.store(connection, prepared, now, "handled")
            new += stored
            outcome += Counter(one.outcome for one in delivered if one.outcome in {"duplicate", "conflict"})
            refused += [
                Refused(record, one.refusal)
                for record, one in zip(sent, delivered, strict=True)
                if one.refusal is not None and one.outcome != "conflict"  # that is parked where it is found
            ]
    return outcome + handlers.handle_new(connection, new, agents, now), refused


def list_labels(agents: Mapping[str, rules.Agent]) -> dict[str, tuple[str, ...]]:
    """The labels of each agent."""
    return {name: agent.labels for name, agent in agents.items()}


def _prepare_labels(
    connection: Connection, found: Read, labels_of: Mapping[str, Sequence[str]], now: datetime
) -> list[tuple[Sequence[dead_letters.Record], delivery.Prepared]]:
    """A label is its expert's, who must be known here by a token."""
    known: dict[str, tokens.Principal | None] = {}
    groups: dict[tokens.Principal, tuple[list[dead_letters.Record], list[Item]]] = {}
    for record, item in zip(found.records, found.items, strict=True):
        principal, checked = _find_sender(connection, item, known)
        sent, theirs = groups.setdefault(principal, ([], []))
        sent.append(record)
        theirs.append(checked)
    return [(sent, delivery.prepare(items, labels_of, principal, now)) for principal, (sent, items) in groups.items()]


def _find_sender(connection: Connection, item: Item, known: dict[str, tokens.Principal | None]) -> tuple[tokens.Principal, Item]:
    if isinstance(item, schemas.Refusal):
        return PRODUCER, item
    data: Any = item["data"]
    expert = data.get("expert")
    if expert is None:
        is_ours = data.get("kind") == "late_truth"
        return PRODUCER, item if is_ours else schemas.Refusal("data.expert", "nothing", "name the expert: nobody else says who answered")
    if expert not in known:
        known[expert] = tokens.read(connection, expert)
    found = known[expert]
    if found is None:
        remedy = "no valid token has this name: `ratchet tokens add NAME --role reviewer` makes the expert known"
        return PRODUCER, schemas.Refusal("data.expert", schemas.shorten(expert), remedy)
    return found, item
