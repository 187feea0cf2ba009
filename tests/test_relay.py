"""What Ratchet tells reaches the real broker: at least once, in order for each key, by one relay at a time, without a model's answer."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import signal
import threading
import time
import zlib
from datetime import UTC, datetime

import orjson
import pytest
from kafka.admin import ConfigResource, ConfigResourceType
from kafka.future import Future
from pydantic import TypeAdapter
from sqlalchemy import insert

from consumers import announcements, outbox, records, relay, stream
from consumers import broker as brokers
from daemon import holders
from storage import db, dead_letters, events, reviews
from storage.tables import Lease
from tests import broker_fixtures, event_fixtures


@pytest.fixture
def kafka(broker, request):
    return broker_fixtures.make_topics(broker, request.node.name)


@pytest.fixture
def source(kafka, engine):
    agent = event_fixtures.make_agent(threshold=0.99)
    inlet = records.Inlet(engine, {agent.name: agent}, kafka.topics.kinds(), lambda: datetime.now(UTC))
    lease = stream.Lease(holders.make_name(), holders.acquire)
    return stream.Stream(kafka.to_access(), kafka.group, "poll", inlet, kafka.topics.outlets(), lease)


@contextlib.contextmanager
def relaying(source):
    """A relay at work, and then stopped."""
    stopping = threading.Event()
    thread = threading.Thread(target=relay.Relay(source).run, args=[stopping])
    thread.start()
    yield
    stopping.set()
    thread.join(30)
    assert not thread.is_alive()


def count_unsent(engine):
    with db.reading(engine) as connection:
        return reviews.count_unsent(connection) + events.count_by_state(connection)["unsent"]


def wait_until_sent(engine, seconds=30):
    deadline = time.monotonic() + seconds
    while count_unsent(engine):
        assert time.monotonic() < deadline, "it was not sent"
        time.sleep(0.02)


def emit(engine, first, last, key="adjudication/v1"):
    with db.writing(engine) as connection:
        for number in range(first, last):
            at = datetime.fromtimestamp(1_800_000_000 + number, UTC)
            told = {"agent": "adjudication", "kind": "drift", "message": str(number), "ledger": ""}
            events.emit(connection, "ratchet.alarm.raised.v1", f"{key}{number % 3}", str(number), told, at)


def open_reviews(source, numbers):
    at = datetime.now(UTC)
    event_fixtures.send(source.inlet.engine, [event_fixtures.make_prediction(n, at, confidence=0.5) for n in numbers], at)
    event_fixtures.handle(source.inlet.engine, source.inlet.agents["adjudication"], at)


def test_all_of_a_key_goes_to_one_partition_by_its_crc(source, kafka, broker):
    emit(source.inlet.engine, 0, 60)
    with relaying(source):
        wait_until_sent(source.inlet.engine)
    told = broker_fixtures.consume(broker, kafka.topics.events, 60)
    partitions = {(one.key, one.partition) for one in told}
    assert {key: zlib.crc32(key) % kafka.topics.partitions for key, _ in partitions} == dict(partitions)
    assert len(partitions) == 3


def test_a_review_is_told_when_it_opens_and_closes_without_the_models_answer(source, kafka, broker):
    engine, at = source.inlet.engine, datetime.now(UTC)
    open_reviews(source, [1])
    event_fixtures.send(engine, [event_fixtures.make_label(1, at)], at, event_fixtures.ANN)
    event_fixtures.handle(engine, source.inlet.agents["adjudication"], at)
    with relaying(source):
        wait_until_sent(engine)
    told = broker_fixtures.consume(broker, kafka.topics.queue, 2)
    assert {record.key for record in told} == {b"adjudication/c1"}
    opened, closed = (orjson.loads(record.value) for record in told)
    assert (opened["type"], closed["type"]) == ("ratchet.review.opened.v1", "ratchet.review.closed.v1")
    assert opened["data"]["input"] == {"diagnosis": "E11.9", "treatment": "insulin pump"}
    assert not {"decision", "confidence", "probabilities", "reasons", "priority", "model_version"} & opened["data"].keys()
    assert b"APPROVED" not in told[0].value + told[1].value
    for one in (opened, closed):
        TypeAdapter(announcements.ANNOUNCEMENTS[one["type"]]).validate_json(orjson.dumps(one["data"]), strict=True)


@pytest.mark.databases("sqlite", "postgresql")
def test_everything_unsent_is_sent_once_in_order_for_each_key_and_marked(source, kafka, broker):
    emit(source.inlet.engine, 0, 1200)
    with db.writing(source.inlet.engine) as connection:
        letter = dead_letters.park(connection, "claims-7", "can't be read", datetime.now(UTC), key="a")
    with relaying(source):
        wait_until_sent(source.inlet.engine)
    told = broker_fixtures.consume(broker, kafka.topics.events, 1200)
    by_key = {}
    for record in told:
        by_key.setdefault(record.key, []).append(int(orjson.loads(record.value)["data"]["message"]))
    assert {len(numbers) for numbers in by_key.values()} == {400}
    assert all(numbers == sorted(numbers) for numbers in by_key.values())
    (parked,) = broker_fixtures.consume(broker, kafka.topics.dead_letters, 1)
    assert orjson.loads(parked.value)["data"] == {"letter": letter, "reason": "can't be read"}
    assert source.sent.messages == 1201


def test_what_was_sent_and_not_marked_is_sent_again_under_the_same_id(source, kafka, broker, monkeypatch):
    """The same as a relay that is killed between the two."""
    emit(source.inlet.engine, 0, 3)
    monkeypatch.setattr(relay, "WAIT_SECONDS", 0.05)
    genuine, lost = relay.Relay._mark, []

    def fail_once(self, messages, fence):
        if not lost:
            lost.append(messages)
            raise relay.LeaseLostError("killed")
        genuine(self, messages, fence)

    monkeypatch.setattr(relay.Relay, "_mark", fail_once)
    with relaying(source):
        wait_until_sent(source.inlet.engine)
    ids = [orjson.loads(record.value)["id"] for record in broker_fixtures.consume(broker, kafka.topics.events, 6)]
    assert sorted(ids) == sorted(f"ratchet.alarm.raised.v1/{n}" for n in (0, 1, 2, 0, 1, 2))


@pytest.mark.databases("sqlite", "postgresql")
def test_one_relay_sends_and_another_takes_over_when_it_ends(source, monkeypatch):
    monkeypatch.setattr(relay, "WAIT_SECONDS", 0.05)
    other = dataclasses.replace(source, lease=stream.Lease(holders.make_name(), holders.acquire), sent=type(source.sent)())
    with relaying(source):
        emit(source.inlet.engine, 0, 1)
        wait_until_sent(source.inlet.engine)
        with relaying(other):
            emit(source.inlet.engine, 1, 20)
            wait_until_sent(source.inlet.engine)
            assert (source.sent.messages, other.sent.messages) == (20, 0)
    with relaying(other):
        emit(source.inlet.engine, 20, 30)
        wait_until_sent(source.inlet.engine)
    assert other.sent.messages == 10


def test_a_relay_that_lost_its_lease_marks_nothing(source):
    engine, at = source.inlet.engine, datetime.now(UTC)
    emit(engine, 0, 2)
    one = relay.Relay(source)
    with db.writing(engine) as connection:
        connection.execute(insert(Lease).values(name=relay.LEASE, holder="another", fence=7, expires_at=at))
        messages = outbox.read_unsent(connection, source.outlets, 10)
    with pytest.raises(relay.LeaseLostError):
        one._mark(messages, 6)
    assert count_unsent(engine) == 2


def test_behind_a_message_that_failed_nothing_of_its_key_is_marked():
    messages = [outbox.Message("t", key, b"", event=str(n)) for n, key in enumerate((b"a", b"b", b"a", b"b", b"c"))]
    markable = relay.select_markable(messages, [True, False, True, True])
    assert [one.event for one in markable] == ["0", "2"]


def limit_bytes(source, topic, limit):
    with brokers.connect(source.access) as admin:
        admin.alter_configs([ConfigResource(ConfigResourceType.TOPIC, topic, {"max.message.bytes": str(limit)})])


@pytest.mark.databases("sqlite", "postgresql")
def test_a_message_that_the_broker_refuses_for_its_size_is_set_aside_and_the_others_go_on(source, kafka, broker):
    """Of its key too: the one behind it would wait for ever. Replayed when the broker takes it, it is sent."""
    engine = source.inlet.engine
    emit(engine, 0, 3, key="k")
    with db.writing(engine) as connection:
        told = {"agent": "adjudication", "kind": "drift", "message": "x" * 5000, "ledger": ""}
        events.emit(connection, "ratchet.alarm.raised.v1", "k0", "huge", told, datetime.now(UTC))
    emit(engine, 3, 6, key="k")
    limit_bytes(source, kafka.topics.events, 2000)
    with relaying(source):
        wait_until_sent(engine)
    assert {orjson.loads(one.value)["id"].rpartition("/")[2] for one in broker_fixtures.consume(broker, kafka.topics.events, 6)} == set(
        "012345"
    )
    with db.reading(engine) as connection:
        (letter,) = dead_letters.list_parked(connection)
    assert re.match(
        r"the broker takes no message of 5\d\d\d bytes on .*-events: raise max.message.bytes there, and replay it", letter.reason
    )
    (announced,) = broker_fixtures.consume(broker, kafka.topics.dead_letters, 1)
    assert orjson.loads(announced.value)["data"]["letter"] == letter.id
    limit_bytes(source, kafka.topics.events, 10_000)
    with db.writing(engine) as connection:
        dead_letters.replay(connection, letter.id, "ops", datetime.now(UTC))
    with relaying(source):
        wait_until_sent(engine)
    assert b"huge" in b"".join(one.value for one in broker_fixtures.consume(broker, kafka.topics.events, 7))


def test_a_claim_that_its_topic_does_not_take_is_told_without_its_input(source, kafka, broker):
    engine, at = source.inlet.engine, datetime.now(UTC)
    huge = [event_fixtures.make_prediction(n, at, confidence=0.5, input={"text": "x" * 5000}) for n in (1, 2)]
    event_fixtures.send(engine, huge, at)
    event_fixtures.handle(engine, source.inlet.agents["adjudication"], at)
    limit_bytes(source, kafka.topics.queue, 2000)
    with relaying(source):
        wait_until_sent(engine)
    assert [orjson.loads(one.value)["data"]["input"] for one in broker_fixtures.consume(broker, kafka.topics.queue, 2)] == [None, None]
    with db.reading(engine) as connection:
        assert dead_letters.count_parked(connection) == 0


def test_an_announcement_of_a_dead_letter_that_is_refused_makes_no_other_one(source, kafka):
    with db.writing(source.inlet.engine) as connection:
        dead_letters.park(connection, "claims-7", "x" * 5000, datetime.now(UTC), key="a")
    limit_bytes(source, kafka.topics.dead_letters, 2000)
    with relaying(source):
        wait_until_sent(source.inlet.engine)
    with db.reading(source.inlet.engine) as connection:
        assert dead_letters.count_parked(connection) == 1


def test_a_relay_that_was_stopped_between_two_messages_sends_no_more_of_them(source, kafka, broker):
    relay_, sent = relay.Relay(source), []

    class Producer:
        """One that takes longer for a message than the lease lasts."""

        def send(self, *_, **__):
            sent.append(1)
            relay_._renewed_at -= relay.TERM.total_seconds() - relay.DELIVERY_SECONDS + 1

    relay_._renewed_at = time.monotonic()
    with pytest.raises(relay.LeaseLostError):
        relay_._send(Producer(), [outbox.Message("t", b"k", b"v")] * 3, 1)
    assert len(sent) == 1


@pytest.mark.databases("sqlite", "postgresql")
def test_the_next_batch_is_read_and_sent_while_the_last_one_is_underway(source, kafka, broker, monkeypatch):
    """And nothing of it twice, though it is not marked yet."""
    monkeypatch.setattr(relay, "FIRST_BATCH", 4)
    monkeypatch.setattr(relay, "BATCH", 4)
    emit(source.inlet.engine, 0, 20)
    open_reviews(source, range(10))
    underway = []
    genuine = outbox.read_unsent

    def read(connection, outlets, limit, flying=()):
        underway.append(len(flying))
        return genuine(connection, outlets, limit, flying)

    monkeypatch.setattr(outbox, "read_unsent", read)
    with relaying(source):
        wait_until_sent(source.inlet.engine)
    assert underway[:3] == [0, 8, 8]
    numbers = [int(orjson.loads(one.value)["data"]["message"]) for one in broker_fixtures.consume(broker, kafka.topics.events, 20)]
    assert sorted(numbers) == list(range(20))
    assert source.sent.messages == 30


def test_where_messages_are_large_fewer_are_sent_at_once(source, monkeypatch):
    monkeypatch.setattr(relay, "MOST_BYTES_AT_ONCE", 1000)
    emit(source.inlet.engine, 0, 40)
    one = relay.Relay(source)
    sizes = [len(one._read(())) for _ in range(8)]
    assert sizes[0] == 40
    assert max(sizes[-2:]) < 7


@pytest.mark.parametrize("mechanism", ["SCRAM-SHA-512", "PLAIN"])
def test_a_producer_is_let_in_over_tls(source, broker, mechanism):
    secure = dataclasses.replace(source, access=broker_fixtures.secure(broker, mechanism))
    emit(source.inlet.engine, 0, 5)
    with relaying(secure):
        wait_until_sent(source.inlet.engine)


def test_what_the_broker_does_not_take_is_told_and_sent_again_by_the_next_producer(source, monkeypatch):
    monkeypatch.setattr(relay, "FLUSH_SECONDS", 0.3)
    emit(source.inlet.engine, 0, 2)
    astray = dataclasses.replace(source, outlets=dataclasses.replace(source.outlets, events="nowhere"))
    with pytest.raises(relay.UnacknowledgedError, match=r"2 messages were not acknowledged \(KafkaTimeoutError for nowhere\)"):
        relay.Relay(astray).run(threading.Event())
    assert count_unsent(source.inlet.engine) == 2
    with relaying(source):
        wait_until_sent(source.inlet.engine)


def test_a_producer_whose_relay_lost_its_lease_sends_nothing_more(source, kafka, broker):
    number = int((broker.folder / "kafka.pid").read_text())
    try:
        with contextlib.suppress(relay.LeaseLostError), relay._producing(source.access) as producer:
            producer.send(kafka.topics.events, b"1").get(timeout=10)
            os.kill(number, signal.SIGSTOP)
            producer.send(kafka.topics.events, b"2")
            raise relay.LeaseLostError
        producer._sender.join(10)
        assert not producer._sender.is_alive()
    finally:
        os.kill(number, signal.SIGCONT)


def test_a_relay_that_was_held_up_looks_after_its_lease_before_it_sends(source, monkeypatch):
    """It was stopped past its term, and another one took over."""
    monkeypatch.setattr(relay, "RENEW_SECONDS", 0)
    emit(source.inlet.engine, 0, 1)
    one, sent = relay.Relay(source), []
    monkeypatch.setattr(relay.KafkaProducer, "send", lambda *_, **__: sent.append(1))
    with db.writing(source.inlet.engine) as connection:
        connection.execute(insert(Lease).values(name=relay.LEASE, holder="another", fence=7, expires_at=datetime.now(UTC)))
    with pytest.raises(relay.LeaseLostError):
        one._lead(6, threading.Event())
    assert sent == []


def test_what_a_producer_holds_is_given_up_before_the_lease_ends():
    assert relay.TERM.total_seconds() > relay.RENEW_SECONDS + relay.DELIVERY_SECONDS + relay.FLUSH_SECONDS


def test_a_producer_that_keeps_no_promise_is_given_up_once_not_message_by_message(source, kafka, monkeypatch):
    class Broken(Future):
        def get(self, timeout=None):
            waited.append(timeout)
            time.sleep(timeout)

    monkeypatch.setattr(relay, "DELIVERY_SECONDS", 0.1)
    monkeypatch.setattr(relay, "FLUSH_SECONDS", 0.05)
    with db.writing(source.inlet.engine) as connection:
        fence = source.lease.acquire(connection, relay.LEASE, source.lease.holder, datetime.now(UTC), relay.TERM)
    waited, messages = [], [outbox.Message(kafka.topics.events, b"k", b"{}") for _ in range(500)]
    flight = relay.Flight(messages, [Broken() for _ in messages])
    with pytest.raises(relay.UnacknowledgedError, match="500 messages were not acknowledged"):
        relay.Relay(source)._land(flight, fence, threading.Event())
    assert len(waited) < 10
