"""The real daemon on a real broker, killed while it reads: what was produced is stored or parked to the last record, and applied once."""

from __future__ import annotations

import signal
import threading
from collections import Counter
from datetime import UTC, datetime

import httpx
import orjson
import pytest
from sqlalchemy import func, select

from storage import db
from storage.tables import DeadLetter, Event, Prediction, Review, ReviewStep
from tests import broker_fixtures, daemon_fixtures, event_fixtures

BATCHES, SIZE = 30, 100


def to_settings(kafka, consumer):
    names = {f"KAFKA__TOPICS__{key.upper()}": getattr(kafka.topics, key) for key in ("predictions", "labels", "queue", "events")}
    names["KAFKA__TOPICS__DEAD_LETTERS"] = kafka.topics.dead_letters
    return {"KAFKA__BOOTSTRAP": kafka.bootstrap, "KAFKA__GROUP": kafka.group, "KAFKA__CONSUMER": consumer, **names}


def count(engine, table, *where):
    with db.reading(engine) as connection:
        return connection.execute(select(func.count()).select_from(table).where(*where)).scalar_one()


def produce_all(broker, topic):
    """Predictions that all go to an expert, one of ten twice, and a record that is no event in every batch."""
    at = datetime.now(UTC)
    for first in range(0, BATCHES * SIZE, SIZE):
        some = [orjson.dumps(event_fixtures.make_prediction(n, at, confidence=0.1)) for n in range(first, first + SIZE)]
        broker_fixtures.produce(broker, topic, [*some, *some[::10], b"no event %d" % first])


@pytest.mark.parametrize("consumer", ["faust", "poll"])
def test_a_consumer_that_is_killed_while_it_reads_loses_nothing_and_repeats_nothing(broker, tmp_path, consumer):
    kafka = broker_fixtures.make_topics(broker, f"killed-{consumer}")
    daemon_fixtures.make_home(tmp_path)
    daemon = daemon_fixtures.Daemon(tmp_path, **to_settings(kafka, consumer))
    engine = db.open_engine(f"sqlite:///{tmp_path}/ratchet.db")
    producer = threading.Thread(target=produce_all, args=[broker, kafka.topics.predictions])
    daemon.start("--role", "consume")
    producer.start()
    daemon.wait_for(lambda: count(engine, Prediction) > SIZE)
    daemon.kill()
    producer.join()
    assert count(engine, Prediction) < BATCHES * SIZE
    daemon.start("--role", "consume")
    daemon.wait_for(lambda: count(engine, Prediction) == BATCHES * SIZE and count(engine, DeadLetter) == BATCHES)
    daemon.wait_for(lambda: count(engine, Event, Event.state == "unsent") + count(engine, ReviewStep, ReviewStep.is_unsent) == 0)
    told = daemon.wait_for(lambda: httpx.get(f"{daemon.ops_url}/readyz", trust_env=False).json()["stream"])
    assert told["problem"] is None
    assert daemon.stop() == 0
    assert broker_fixtures.read_lag(kafka, kafka.topics.predictions) == 0
    assert count(engine, Event, Event.state == "handled") == BATCHES * SIZE
    assert count(engine, Review) == BATCHES * SIZE
    told = broker_fixtures.consume(broker, kafka.topics.queue, broker_fixtures.read_lag(kafka, kafka.topics.queue))
    assert len({orjson.loads(record.value)["id"] for record in told}) == BATCHES * SIZE
    engine.dispose()


KILL_BEFORE_MARKING = """
import os, signal
from consumers import relay
genuine = relay.Relay._mark
def mark(self, messages, fence):
    if messages:
        os.kill(os.getpid(), signal.SIGKILL)
    genuine(self, messages, fence)
relay.Relay._mark = mark
"""


def test_a_relay_that_is_killed_between_sending_and_marking_sends_again_under_the_same_ids(broker, tmp_path):
    kafka = broker_fixtures.make_topics(broker, "relay-killed")
    daemon_fixtures.make_home(tmp_path)
    daemon = daemon_fixtures.Daemon(tmp_path, **to_settings(kafka, "poll"))
    engine, at = db.open_engine(f"sqlite:///{tmp_path}/ratchet.db"), datetime.now(UTC)
    event_fixtures.send(engine, [event_fixtures.make_prediction(n, at, confidence=0.1) for n in range(20)], at)
    event_fixtures.handle(engine, event_fixtures.make_agent(), at)
    daemon.begin("--role", "consume", patch=KILL_BEFORE_MARKING)
    assert daemon.process.wait(60) == -signal.SIGKILL
    assert count(engine, ReviewStep, ReviewStep.is_unsent) == 20
    daemon.start("--role", "consume")
    daemon.wait_for(lambda: count(engine, ReviewStep, ReviewStep.is_unsent) == 0)
    assert daemon.stop() == 0
    ids = [orjson.loads(record.value)["id"] for record in broker_fixtures.consume(broker, kafka.topics.queue, 40)]
    assert set(Counter(ids).values()) == {2}
    assert len(set(ids)) == 20
    engine.dispose()


@pytest.mark.parametrize("consumer", ["faust", "poll"])
def test_a_broker_that_is_killed_stops_neither_http_nor_the_end_of_the_process(tmp_path, consumer, request):
    (tmp_path / "kafka").mkdir()
    broker = broker_fixtures.make_broker(tmp_path / "kafka")
    request.addfinalizer(broker.kill)
    kafka = broker_fixtures.make_topics(broker, "outage")
    secrets = daemon_fixtures.make_home(tmp_path)
    daemon = daemon_fixtures.Daemon(tmp_path, **to_settings(kafka, consumer))
    engine, at = db.open_engine(f"sqlite:///{tmp_path}/ratchet.db"), datetime.now(UTC)

    def post(number):
        sent = event_fixtures.make_prediction(number, at)
        headers = {"Authorization": f"Bearer {secrets['node']}"}
        return httpx.post(f"{daemon.url}/v1/predictions", json=sent, headers=headers, trust_env=False).status_code

    def produce(number):
        broker_fixtures.produce(broker, kafka.topics.predictions, [orjson.dumps(event_fixtures.make_prediction(number, at))])

    def look():
        answer = httpx.get(f"{daemon.ops_url}/readyz", trust_env=False)
        assert answer.status_code == 200
        return answer.json()["stream"]

    daemon.start("--role", "consume", "--role", "web")
    request.addfinalizer(daemon.kill)
    produce(1)
    daemon.wait_for(lambda: count(engine, Prediction) == 1)
    broker.kill()
    daemon.wait_for(lambda: (look() or {}).get("problem"))
    assert post(2) == 202
    broker.start()
    produce(3)
    daemon.wait_for(lambda: count(engine, Prediction) == 3)
    broker.kill()
    assert daemon.stop(seconds=35) == 0
    engine.dispose()
