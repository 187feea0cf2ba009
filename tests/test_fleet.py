"""Several daemons on one PostgreSQL and one broker, each with its own role, as on several machines."""

from __future__ import annotations

import contextlib
from datetime import UTC, datetime

import httpx
import orjson
import pytest
from sqlalchemy import func, select

from storage import db, streams
from storage.tables import Event, Prediction
from tests import broker_fixtures, daemon_fixtures, event_fixtures, fault_fixtures

SIZE = 200
QUICK = "from consumers import broker; broker.SESSION_SECONDS, broker.HEARTBEAT_SECONDS = 3.0, 0.5"
"""A consumer that was killed is missed sooner; the group asks so seldom by default that the test would wait ten seconds."""


@pytest.fixture
def fleet(broker, postgres, tmp_path):
    """Starts one daemon with one role in the common home; all that live at the end are killed."""
    name = postgres.make_database()
    kafka = broker_fixtures.make_topics(broker, "fleet")
    secrets = daemon_fixtures.make_home(tmp_path, postgres.url(name))
    settings = {**fault_fixtures.to_settings(kafka, "faust"), "DATABASE__URL": postgres.url(name)}
    engine, daemons = db.open_engine(postgres.url(name)), []

    def start(role):
        daemon = daemon_fixtures.Daemon(tmp_path, f"{role}-{len(daemons)}.log", **settings)
        daemons.append(daemon.begin("--role", role, patch=QUICK))
        return daemon

    yield start, engine, kafka, secrets
    for daemon in daemons:
        with contextlib.suppress(ProcessLookupError):
            daemon.kill()
    engine.dispose()
    postgres.take_back(name)


def count(engine, table, *where):
    with db.reading(engine) as connection:
        return connection.execute(select(func.count()).select_from(table).where(*where)).scalar_one()


def read_shares(engine):
    """How many records each process has read, by its number."""
    with db.reading(engine) as connection:
        told = streams.read_fresh(connection, datetime.now(UTC))
    return {int(row["holder"].split()[1]): row["body"]["records"] for row in told}


def test_two_consumers_share_the_partitions_and_a_third_takes_over_when_one_dies(fleet, broker):
    start, engine, kafka, secrets = fleet
    at, sent = datetime.now(UTC), 0

    def produce():
        nonlocal sent
        numbers, sent = range(sent, sent + SIZE), sent + SIZE
        made = [orjson.dumps(event_fixtures.make_prediction(n, at, confidence=0.1)) for n in numbers]
        broker_fixtures.produce(broker, kafka.topics.predictions, made)

    def is_shared(*consumers):
        produce()
        consumers[0].wait_for(lambda: count(engine, Prediction) == sent)
        shares = read_shares(engine)
        return all(shares.get(one.process.pid, 0) > 0 for one in consumers)

    first, second, web, scheduler = start("consume"), start("consume"), start("web"), start("schedule")
    first.wait_for(lambda: is_shared(first, second))
    first.kill()
    third = start("consume")
    second.wait_for(lambda: is_shared(second, third))
    assert broker_fixtures.read_lag(kafka, kafka.topics.predictions) < sent

    prediction = event_fixtures.make_prediction(sent, at)
    headers = {"Authorization": f"Bearer {secrets['node']}"}
    assert httpx.post(f"{web.wait_for(lambda: web.url)}/v1/predictions", json=prediction, headers=headers, trust_env=False).is_success
    second.wait_for(lambda: count(engine, Event, Event.state == "handled") == sent + 1)
    scheduler.wait_for(lambda: "leading_began" in scheduler.events())
    told = httpx.get(f"{web.ops_url}/metrics", trust_env=False).text
    assert all(f"{one.process.pid}" in told for one in (second, third))
    assert [one.stop() for one in (web, scheduler, second, third)] == [0, 0, 0, 0]
