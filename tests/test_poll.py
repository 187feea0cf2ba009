"""The poll loop: what the broker lacks is waited for by whoever runs it."""

from __future__ import annotations

import threading
import time
from datetime import UTC, datetime

import orjson
import pytest
from kafka import KafkaConsumer
from kafka.errors import KafkaTimeoutError
from sqlalchemy.exc import OperationalError

from consumers import broker as brokers
from consumers import poll, records
from tests import broker_fixtures, event_fixtures


def test_a_broker_that_goes_away_as_reading_begins_ends_no_process_and_leaves_no_thread(broker, engine, monkeypatch):
    kafka = broker_fixtures.make_topics(broker, "goes-away")
    inlet = records.Inlet(engine, {}, kafka.topics.kinds(), lambda: datetime.now(UTC))
    before = threading.active_count()

    def fail(_consumer):
        raise KafkaTimeoutError

    monkeypatch.setattr(KafkaConsumer, "topics", fail)
    with pytest.raises(brokers.BrokerError, match=r"goes-away can't be read .KafkaTimeoutError"):
        poll.run(kafka.to_access(), kafka.group, inlet, threading.Event())
    assert threading.active_count() == before


def test_the_next_batch_is_read_while_one_is_committed_and_none_is_acknowledged_before_its_transaction(broker, engine, monkeypatch):
    kafka, agent = broker_fixtures.make_topics(broker, "reads-on"), event_fixtures.make_agent()
    inlet = records.Inlet(engine, {agent.name: agent}, kafka.topics.kinds(), lambda: datetime.now(UTC))
    at = datetime.now(UTC)
    broker_fixtures.produce(broker, kafka.topics.predictions, [orjson.dumps(event_fixtures.make_prediction(n, at)) for n in range(30)])
    gate, read, stopping = threading.Event(), [], threading.Event()
    genuine_poll, genuine_store = KafkaConsumer.poll, records.Inlet.store

    def poll_(consumer, **options):
        found = genuine_poll(consumer, **options)
        read.append(sum(map(len, found.values())))
        return found

    def store(inlet, batch, committing):
        def wait_for_the_disk():
            committing()
            assert gate.wait(30)

        genuine_store(inlet, batch, wait_for_the_disk)

    monkeypatch.setattr(poll, "BATCH", 10)
    monkeypatch.setattr(KafkaConsumer, "poll", poll_)
    monkeypatch.setattr(records.Inlet, "store", store)
    thread = threading.Thread(target=poll.run, args=[kafka.to_access(), kafka.group, inlet, stopping])
    thread.start()
    broker_fixtures.wait_until(lambda: len([count for count in read if count]) == 2)
    assert broker_fixtures.read_lag(kafka, kafka.topics.predictions) == 30
    gate.set()
    broker_fixtures.wait_until(lambda: broker_fixtures.read_lag(kafka, kafka.topics.predictions) == 0)
    stopping.set()
    thread.join(30)
    assert not thread.is_alive()
    assert inlet.counters.by_state == {"handled": 30}


def test_after_a_batch_that_fails_none_is_stored_or_acknowledged(broker, engine, monkeypatch):
    kafka, agent = broker_fixtures.make_topics(broker, "fails"), event_fixtures.make_agent()
    inlet = records.Inlet(engine, {agent.name: agent}, kafka.topics.kinds(), lambda: datetime.now(UTC))
    at = datetime.now(UTC)
    broker_fixtures.produce(broker, kafka.topics.predictions, [orjson.dumps(event_fixtures.make_prediction(n, at)) for n in range(30)])
    genuine, tried = records.Inlet.store, []

    def store(inlet, batch, committing):
        tried.append(batch)
        if len(tried) == 2:
            time.sleep(0.5)  # the next one is polled meanwhile
            raise OperationalError("", {}, Exception("gone"))
        genuine(inlet, batch, committing)

    monkeypatch.setattr(poll, "BATCH", 10)
    monkeypatch.setattr(records, "GIVE_UP_SECONDS", 0)
    monkeypatch.setattr(records.Inlet, "store", store)
    with pytest.raises(OperationalError):
        poll.run(kafka.to_access(), kafka.group, inlet, threading.Event())
    assert len(tried) == 2
    assert inlet.counters.by_state == {"handled": 10}
    assert broker_fixtures.read_lag(kafka, kafka.topics.predictions) == 20
