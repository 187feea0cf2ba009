"""The real daemon on a real broker, killed while it reads: what was produced is stored or parked to the last record, and applied once."""

from __future__ import annotations

import threading
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
