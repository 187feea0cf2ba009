"""The relay is killed between sending and marking, and the broker beside HTTP and before the end of the daemon."""

from __future__ import annotations

import signal
from collections import Counter
from datetime import UTC, datetime

import httpx
import orjson
import pytest
from sqlalchemy import func, select

from storage import db
from storage.tables import Prediction, ReviewStep
from tests import broker_fixtures, daemon_fixtures, event_fixtures, fault_fixtures


def count(engine, table, *where):
    with db.reading(engine) as connection:
        return connection.execute(select(func.count()).select_from(table).where(*where)).scalar_one()


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
    daemon = daemon_fixtures.Daemon(tmp_path, **fault_fixtures.to_settings(kafka, "poll"))
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
    daemon = daemon_fixtures.Daemon(tmp_path, **fault_fixtures.to_settings(kafka, consumer))
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
