"""A prediction is routed once, and an expert is asked once about a case."""

from __future__ import annotations

from datetime import datetime, timedelta

import orjson
import pytest
from sqlalchemy import Engine, update

from consumers import delivery, embedded, rules, schemas
from storage import db, dead_letters, reviews
from storage.tables import Event, Prediction, Review
from tests.event_fixtures import LABELS, PRODUCER, handle, make_agent, make_prediction, rows, send

pytestmark = pytest.mark.databases("sqlite", "postgresql")


def test_an_unsure_prediction_becomes_a_review_and_a_sure_one_does_not(engine: Engine, now: datetime) -> None:
    send(engine, [make_prediction(1, now, confidence=0.5), make_prediction(2, now, confidence=0.99)], now)
    assert handle(engine, make_agent(audit_share=1e-9), now) == {"handled": 2}
    assert rows(engine, Review, "claim_id", "reasons") == [("c1", ["below_threshold"])]
    assert dict(rows(engine, Prediction, "claim_id", "inclusion_probability")) == pytest.approx({"c1": 1.0, "c2": 1e-9})


def test_the_same_prediction_under_a_new_event_id_changes_nothing(engine: Engine, now: datetime) -> None:
    first, again = make_prediction(1, now, confidence=0.5), make_prediction(1, now, confidence=0.5)
    again["id"] = "sent again"
    send(engine, [first, again], now)
    assert handle(engine, make_agent(), now) == {"handled": 2}
    assert len(rows(engine, Prediction, "id")) == len(rows(engine, Review, "id")) == 1


def test_a_repetition_among_one_agents_predictions_costs_those_of_another_nothing(engine: Engine, now: datetime) -> None:
    scribe = rules.Agent("scribe", LABELS, rules.RoutingPolicy(audit_share=1e-9), policy_version=1)
    known = {"adjudication": make_agent(audit_share=1e-9), "scribe": scribe}
    unsure = {"confidence": 0.5}
    sent = [make_prediction(1, now, **unsure, **changes) for changes in ({}, {"agent": "scribe", "claim_id": "s"}, {})]
    for event, one in zip(sent, ("first", "scribe's", "again"), strict=True):
        event["id"] = one
    items = schemas.parse(orjson.dumps(sent), schemas.PREDICTION)
    with db.writing(engine) as connection:
        delivery.deliver(connection, items, dict.fromkeys(known, LABELS), PRODUCER, now)
    assert embedded.handle_next(engine, known, now) == {"handled": 3}
    assert sorted(rows(engine, Prediction, "agent", "claim_id")) == [("adjudication", "c1"), ("scribe", "s")]
    assert sorted(rows(engine, Review, "claim_id")) == [("c1",), ("s",)]


def test_a_prediction_id_used_for_another_prediction_is_parked(engine: Engine, now: datetime) -> None:
    first, other = make_prediction(1, now), make_prediction(1, now, decision="DENIED")
    other["id"] = "another"
    send(engine, [first, other], now)
    assert handle(engine, make_agent(), now) == {"handled": 1, "dead": 1}
    with db.reading(engine) as connection:
        [parked] = dead_letters.list_parked(connection)
    assert "'p1'" in parked["reason"]


def test_a_prediction_that_is_handled_again_keeps_its_decision(engine: Engine, now: datetime) -> None:
    send(engine, [make_prediction(1, now, confidence=0.5)], now)
    for threshold in (0.1, 0.9):
        with db.writing(engine) as connection:
            connection.execute(update(Event).values(state="received"))
        assert handle(engine, make_agent(threshold=threshold, audit_share=1e-9), now) == {"handled": 1}
    assert rows(engine, Review, "id") == []
    assert rows(engine, Prediction, "effective_threshold") == [(0.1,)]


def test_a_claim_that_is_predicted_again_is_not_asked_twice_at_once(engine: Engine, now: datetime) -> None:
    unsure = {"claim_id": "c", "confidence": 0.1}
    send(engine, [make_prediction(1, now, **unsure), make_prediction(2, now, **unsure)], now)
    handle(engine, make_agent(), now)
    send(engine, [make_prediction(3, now, **unsure), make_prediction(4, now, **unsure, input={"treatment": "another"})], now)
    handle(engine, make_agent(), now)
    with db.reading(engine) as connection:
        assert len(reviews.list_live(connection)) == 2, "the other input is another case"


def test_a_review_that_nobody_must_answer_expires_and_the_others_stay(engine: Engine, now: datetime) -> None:
    unsure, forced = make_prediction(1, now, confidence=0.1), make_prediction(2, now, decision="PENDING")
    send(engine, [unsure, forced], now)
    handle(engine, make_agent(audit_share=1e-9), now)
    with db.writing(engine) as connection:
        closed = reviews.expire(connection, now + timedelta(days=365))
    assert [row["claim_id"] for row in closed] == ["c1"]
