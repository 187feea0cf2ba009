"""What is to be told fits into a record and says what happened."""

from __future__ import annotations

from datetime import UTC, datetime

import orjson

from consumers import outbox, topics
from storage import alarms, db
from tests import event_fixtures

OUTLETS = topics.Outlets("queue", "events", "dead-letters")


def test_a_claim_that_no_broker_would_take_is_told_without_its_input(engine):
    at = datetime.now(UTC)
    huge = event_fixtures.make_prediction(1, at, confidence=0.5, input={str(n): "x" * 190_000 for n in range(6)})
    event_fixtures.send(engine, [huge], at)
    event_fixtures.handle(engine, event_fixtures.make_agent(threshold=0.99), at)
    with db.reading(engine) as connection:
        (message,) = outbox.read_unsent(connection, OUTLETS, 10)
    assert orjson.loads(message.value)["data"]["input"] is None


def test_an_alarm_is_announced_once_with_the_ledgers_head(engine):
    with db.writing(engine) as connection:
        for _ in range(2):
            alarms.raise_alarm(connection, "adjudication", "drift", "inputs look different", {}, datetime.now(UTC))
        (message,) = outbox.read_unsent(connection, OUTLETS, 10)
    told = orjson.loads(message.value)
    assert (told["type"], len(told["data"]["ledger"])) == ("ratchet.alarm.raised.v1", 64)
