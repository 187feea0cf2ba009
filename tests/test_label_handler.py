"""A label finds its prediction, closes its review and is kept, or waits, or is refused."""

from __future__ import annotations

from datetime import datetime, timedelta

import pytest
from sqlalchemy import Engine

from storage import db, dead_letters, labels, ledger, predictions
from storage.tables import Event, Label, Review
from tests.event_fixtures import ANN, BEN, OPS, handle, make_agent, make_label, make_prediction, rows, send

pytestmark = pytest.mark.databases("sqlite", "postgresql")


def test_the_answer_closes_the_review_and_is_kept(engine: Engine, now: datetime) -> None:
    send(engine, [make_prediction(1, now, confidence=0.5)], now)
    handle(engine, make_agent(), now)
    send(engine, [make_label(1, now)], now, ANN)
    handle(engine, make_agent(), now)
    assert rows(engine, Review, "state") == [("answered",)]
    assert rows(engine, Label, "expert", "answer", "kind") == [("ann", "DENIED", "review")]


def test_a_label_that_comes_first_waits_for_its_prediction(engine: Engine, now: datetime) -> None:
    send(engine, [make_label(1, now)], now, ANN)
    assert handle(engine, make_agent(), now) == {"waiting": 1}
    send(engine, [make_prediction(1, now)], now)
    handle(engine, make_agent(), now)
    assert rows(engine, Label, "answer") == [("DENIED",)]
    assert {state for (state,) in rows(engine, Event, "state")} == {"handled"}


def test_a_label_names_the_prediction_that_was_the_latest_when_it_was_given(engine: Engine, now: datetime) -> None:
    send(engine, [make_prediction(1, now - timedelta(days=3)), make_prediction(2, now - timedelta(days=1), claim_id="c1")], now)
    handle(engine, make_agent(), now)
    send(engine, [make_label(1, now - timedelta(days=2))], now, ANN)
    send(engine, [make_label(1, now)], now, BEN)
    handle(engine, make_agent(), now)
    with db.reading(engine) as connection:
        named = {row["expert"]: predictions.read(connection, row["prediction"]) for row in labels.of_claim(connection, "c1")}
    assert {expert: row["prediction_id"] for expert, row in named.items() if row} == {"ann": "p1", "ben": "p2"}


def test_a_label_for_a_review_that_never_was_is_a_dead_letter_at_once(engine: Engine, now: datetime) -> None:
    send(engine, [make_prediction(1, now)], now)
    send(engine, [make_label(1, now, review_id="no-such-review")], now, ANN)
    handle(engine, make_agent(), now)
    with db.reading(engine) as connection:
        [letter] = dead_letters.list_parked(connection)
    assert 'there is no review "no-such-review": leave review_id out' in letter["reason"]


def test_a_label_that_names_a_prediction_of_another_claim_is_a_dead_letter_with_the_remedy(engine: Engine, now: datetime) -> None:
    send(engine, [make_prediction(1, now)], now)
    handle(engine, make_agent(), now)
    send(engine, [make_label(1, now, claim_id="secret", prediction_id="p1")], now, ANN)
    assert handle(engine, make_agent(), now) == {"dead": 1}
    with db.reading(engine) as connection:
        [letter] = dead_letters.list_parked(connection)
        assert letter["reason"].endswith("that the label names: correct it or leave it out")
        assert "secret" not in letter["reason"], "others are told the reason"
        assert '"secret"' in dead_letters.show(connection, letter["id"])["data"], "the operator sees the event"


def test_the_first_reader_is_not_their_own_second_reader(engine: Engine, now: datetime) -> None:
    send(engine, [make_prediction(1, now)], now)
    send(engine, [make_label(1, now), make_label(1, now + timedelta(minutes=1), kind="second_read", answer="APPROVED")], now, ANN)
    handle(engine, make_agent(), now)
    with db.reading(engine) as connection:
        [((truth, *_), case)] = labels.read_cases(connection, labels.read_settled(connection, "adjudication"))
        assert len(labels.of_predictions(connection, [case["prediction"]])[case["prediction"]]) == 1
    assert (truth.answer, truth.kind) == ("APPROVED", "second_read")


def test_labels_are_in_the_ledger_without_the_claims_id(engine: Engine, now: datetime) -> None:
    send(engine, [make_prediction(1, now)], now)
    send(engine, [make_label(1, now, kind="adjudication")], now, OPS)
    handle(engine, make_agent(), now)
    with db.reading(engine) as connection:
        [entry] = ledger.show(connection)
        assert ledger.verify(connection) == []
    assert entry["kind"] == "label"
    assert '"c1"' not in entry["body"]
