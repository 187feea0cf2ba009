"""Events by a real broker, read by Faust and by the poll loop: the same handlers, nothing lost, nothing applied twice."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from datetime import UTC, datetime

import orjson
import pytest
from sqlalchemy import func, select
from sqlalchemy.exc import OperationalError
from structlog.testing import capture_logs

from consumers import broker as brokers
from consumers import kafka as faust_consumer
from consumers import records, schemas, stream, topics
from storage import db, dead_letters, events, leases, tokens
from storage.tables import DeadLetter, Event, Label, Prediction
from tests import broker_fixtures, event_fixtures

SECONDS = 60


@pytest.fixture
def kafka(broker, request):
    return broker_fixtures.make_topics(broker, request.node.name)


@pytest.fixture(params=["faust", "poll"])
def source(request, kafka, engine):
    agent = event_fixtures.make_agent()
    with db.writing(engine) as connection:
        tokens.add(connection, "ann", "reviewer", datetime.now(UTC))
    inlet = records.Inlet(engine, {agent.name: agent}, kafka.topics.kinds(), lambda: datetime.now(UTC))
    lease = stream.Lease("test 1 2 3", leases.acquire)
    return stream.Stream(kafka.to_access(), kafka.group, request.param, inlet, kafka.topics.outlets(), lease)


def count(engine, table, *where):
    with db.reading(engine) as connection:
        return connection.execute(select(func.count()).select_from(table).where(*where)).scalar_one()


def read_until(source, holds):
    """Run the stream until something holds, then stop it as the daemon does."""

    async def read():
        stop = asyncio.Event()
        running = asyncio.create_task(stream.run(source, stop))
        async with asyncio.timeout(SECONDS):
            while not await asyncio.to_thread(holds):
                if running.done():
                    running.result()
                await asyncio.sleep(0.02)
        stop.set()
        await running

    asyncio.run(read())


def predictions(first, last):
    at = datetime.now(UTC)
    return [orjson.dumps(event_fixtures.make_prediction(number, at)) for number in range(first, last)]


def test_a_faust_worker_that_finds_no_broker_leaves_nothing_at_work(engine):
    inlet = records.Inlet(engine, {}, {"predictions": schemas.PREDICTION}, lambda: datetime.now(UTC))

    async def start():
        with pytest.raises(brokers.BrokerAbsentError):
            await faust_consumer.run(brokers.Access("127.0.0.1:1"), "group", inlet, asyncio.Event(), threading.Event())
        return asyncio.all_tasks() - {asyncio.current_task()}

    assert asyncio.run(start()) == set()


@pytest.mark.databases("sqlite", "postgresql")
def test_predictions_labels_and_poison_are_stored_or_parked_and_acknowledged(source, kafka, broker):
    engine = source.inlet.engine
    broker_fixtures.produce(broker, kafka.topics.predictions, [*predictions(0, 600), b"no JSON", None])
    labels = [orjson.dumps(event_fixtures.make_label(n, datetime.now(UTC), expert=e)) for n, e in ((1, "ann"), (2, "eve"))]
    broker_fixtures.produce(broker, kafka.topics.labels, labels)
    read_until(source, lambda: (count(engine, Prediction), count(engine, Label), count(engine, DeadLetter)) == (600, 1, 3))
    assert count(engine, Event, Event.state.in_(["received", "waiting", "dead"])) == 0
    assert [broker_fixtures.read_lag(kafka, name) for name in source.inlet.kinds] == [0, 0]
    with db.reading(engine) as connection:
        origins = {row["origin"].rpartition("/")[0] for row in dead_letters.list_parked(connection)}
    assert origins == {f"{kafka.topics.predictions}/0", f"{kafka.topics.predictions}/1", f"{kafka.topics.labels}/1"}


def test_a_partition_full_of_poison_holds_up_nobody(source, kafka, broker):
    mixed = [one for good in predictions(0, 300) for one in (good, good[:-1])]  # the second of each goes to partition 1
    broker_fixtures.produce(broker, kafka.topics.predictions, mixed)
    read_until(source, lambda: (count(source.inlet.engine, Prediction), count(source.inlet.engine, DeadLetter)) == (300, 300))
    assert broker_fixtures.read_lag(kafka, kafka.topics.predictions) == 0
    assert count(source.inlet.engine, DeadLetter, DeadLetter.partition == 1) == 300


def test_records_are_read_however_they_were_compressed(source, kafka, broker):
    for number, codec in enumerate(("gzip", "lz4", "snappy", "zstd")):
        broker_fixtures.produce(broker, kafka.topics.predictions, predictions(20 * number, 20 * number + 20), codec)
    read_until(source, lambda: count(source.inlet.engine, Prediction) == 80)


def test_what_was_stopped_goes_on_where_it_stopped_and_a_repetition_changes_nothing(source, kafka, broker):
    engine, sent = source.inlet.engine, predictions(0, 100)
    for last in (50, 100):
        broker_fixtures.produce(broker, kafka.topics.predictions, sent[:last])
        read_until(source, lambda last=last: count(engine, Prediction) == last)
    assert source.inlet.progress.records == 150
    assert source.inlet.counters.by_state == {"handled": 100, "duplicate": 50}


def test_a_database_that_is_away_slows_the_stream_and_loses_nothing(source, kafka, broker, monkeypatch):
    monkeypatch.setattr(records, "FIRST_WAIT_SECONDS", 0.05)
    genuine, failures = events.append, [OperationalError("", {}, Exception("locked"))] * 4

    def fail(*arguments):
        if failures:
            raise failures.pop()
        return genuine(*arguments)

    monkeypatch.setattr(events, "append", fail)
    broker_fixtures.produce(broker, kafka.topics.predictions, predictions(0, 40))
    read_until(source, lambda: count(source.inlet.engine, Prediction) == 40)
    assert failures == []


def test_what_can_neither_be_stored_nor_parked_ends_the_stream_and_is_not_passed_over(source, kafka, broker, monkeypatch):
    broker_fixtures.produce(broker, kafka.topics.predictions, predictions(0, 30))
    with monkeypatch.context() as broken:
        broken.setattr(records, "take", lambda *_: 1 / 0)
        broken.setattr(dead_letters, "park_record", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            read_until(source, lambda: False)
    assert broker_fixtures.read_lag(kafka, kafka.topics.predictions) == 30
    read_until(source, lambda: count(source.inlet.engine, Prediction) == 30)


@pytest.mark.parametrize("source", ["faust"], indirect=True)
def test_a_missing_topic_is_said_aloud_and_read_once_it_is_there(broker, engine, source, monkeypatch):
    monkeypatch.setattr(stream, "FIRST_WAIT_SECONDS", 0.1)
    late = broker_fixtures.name_topics(broker, "late")
    inlet = dataclasses.replace(source.inlet, kinds=late.topics.kinds())
    source = dataclasses.replace(source, group="late", inlet=inlet, outlets=late.topics.outlets())
    with capture_logs() as said:

        def holds():
            told = [line["error"] for line in said if line["event"] == "stream_waits"]
            if told and not made:
                assert "there is no topic late-dead-letters, late-events, late-labels, late-predictions, late-queue: run" in told[0]
                made.append(topics.create(late.to_access(), late.topics.describe()))
                broker_fixtures.produce(broker, late.topics.predictions, predictions(0, 1))
            return count(engine, Prediction) == 1

        made = []
        read_until(source, holds)


@pytest.mark.parametrize("mechanism", ["SCRAM-SHA-512", "PLAIN"])
def test_events_come_over_tls_from_a_broker_that_knows_us(source, kafka, broker, mechanism):
    broker_fixtures.produce(broker, kafka.topics.predictions, predictions(0, 10))
    secure = dataclasses.replace(source, access=broker_fixtures.secure(broker, mechanism))
    read_until(secure, lambda: count(source.inlet.engine, Prediction) == 10)
