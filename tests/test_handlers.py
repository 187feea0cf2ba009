"""Handlers commute, may run twice, and lose nothing."""

from __future__ import annotations

import random
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import Engine, select, update

from consumers import embedded, handlers
from storage import db, dead_letters, events, labels, ledger, predictions, reviews
from storage.tables import Event, Label, Prediction, Review
from tests.event_fixtures import ANN, BEN, OPS, PRODUCER, handle, make_agent, make_history, make_label, make_prediction, send

pytestmark = pytest.mark.databases("sqlite", "postgresql")

ALL_COLUMNS = {Prediction: "prediction_id", Review: "claim_id", Label: "claim_id"}


def rows(engine: Engine, table: Any, *columns: str) -> list[Any]:
    with db.reading(engine) as connection:
        return list(connection.execute(select(*(getattr(table, name) for name in columns))).all())


def test_an_unsure_prediction_becomes_a_review_and_a_sure_one_does_not(engine: Engine, now: datetime) -> None:
    send(engine, [make_prediction(1, now, confidence=0.5), make_prediction(2, now, confidence=0.99)], now)
    assert handle(engine, make_agent(audit_share=1e-9), now) == {"handled": 2}
    assert rows(engine, Review, "claim_id", "reasons") == [("c1", ["below_threshold"])]
    assert dict(rows(engine, Prediction, "claim_id", "inclusion_probability")) == pytest.approx({"c1": 1.0, "c2": 1e-9})


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


def test_a_label_whose_claim_never_comes_is_a_dead_letter_after_30_days(engine: Engine, now: datetime) -> None:
    send(engine, [make_label(1, now)], now, ANN)
    handle(engine, make_agent(), now)
    with db.writing(engine) as connection:
        assert handlers.park_overdue(connection, now + timedelta(days=29)) == 0
        assert handlers.park_overdue(connection, now + timedelta(days=31)) == 1
        assert "30 days" in dead_letters.list_parked(connection)[0]["reason"]


def test_the_same_prediction_under_a_new_event_id_changes_nothing(engine: Engine, now: datetime) -> None:
    first, again = make_prediction(1, now, confidence=0.5), make_prediction(1, now, confidence=0.5)
    again["id"] = "sent again"
    send(engine, [first, again], now)
    assert handle(engine, make_agent(), now) == {"handled": 2}
    assert len(rows(engine, Prediction, "id")) == len(rows(engine, Review, "id")) == 1


def test_a_prediction_id_used_for_another_prediction_is_parked(engine: Engine, now: datetime) -> None:
    first, other = make_prediction(1, now), make_prediction(1, now, decision="DENIED")
    other["id"] = "another"
    send(engine, [first, other], now)
    assert handle(engine, make_agent(), now) == {"handled": 1, "dead": 1}
    with db.reading(engine) as connection:
        [parked] = dead_letters.list_parked(connection)
    assert "'p1'" in parked["reason"]


def test_one_poisonous_event_costs_only_itself(engine: Engine, now: datetime, monkeypatch: Any) -> None:
    send(engine, [make_prediction(number, now) for number in range(5)], now)
    real = handlers._to_row

    def break_on_c3(event: events.Stored, data: Any, *rest: Any) -> dict[str, Any]:
        if data["claim_id"] == "c3":
            raise ZeroDivisionError
        return real(event, data, *rest)

    monkeypatch.setattr(handlers, "_to_row", break_on_c3)
    assert handle(engine, make_agent(), now) == {"handled": 4, "dead": 1}
    monkeypatch.undo()
    with db.writing(engine) as connection:
        [parked] = dead_letters.list_parked(connection)
        assert "ZeroDivisionError" in parked["reason"]
        dead_letters.replay(connection, parked["id"], "ops", now)
    assert handle(engine, make_agent(), now) == {"handled": 1}
    assert len(rows(engine, Prediction, "id")) == 5


def test_a_poisonous_event_that_is_alone_is_parked(engine: Engine, now: datetime, monkeypatch: Any) -> None:
    send(engine, [make_prediction(1, now)], now)
    monkeypatch.setattr(handlers, "_to_row", lambda *_: 1 / 0)
    assert handle(engine, make_agent(), now) == {"dead": 1}


def test_a_prediction_that_is_handled_again_keeps_its_decision(engine: Engine, now: datetime) -> None:
    send(engine, [make_prediction(1, now, confidence=0.5)], now)
    for threshold in (0.1, 0.9):
        with db.writing(engine) as connection:
            connection.execute(update(Event).values(state="received"))
        assert handle(engine, make_agent(threshold=threshold, audit_share=1e-9), now) == {"handled": 1}
    assert rows(engine, Review, "id") == []
    assert rows(engine, Prediction, "effective_threshold") == [(0.1,)]


def test_any_order_and_any_redelivery_ends_in_the_same_state(engine: Engine, new_engine: Callable[[], Engine], now: datetime) -> None:
    sent = [(make_prediction(number, now, confidence=0.5), PRODUCER) for number in range(8)]
    sent += [(make_label(number, now + timedelta(hours=1)), ANN) for number in range(8)]
    other = new_engine()
    generator = random.Random(5)
    for target, order in ((engine, sent), (other, generator.sample(sent, len(sent)) + generator.sample(sent, 6))):
        for event, principal in order:
            send(target, [event], now, principal)
            handle(target, make_agent(), now)
    for table, key in ALL_COLUMNS.items():
        columns = [column.name for column in table.__table__.columns if column.name not in ("id", "review", "effective_threshold")]
        ours, theirs = (sorted(rows(one, table, *columns), key=str) for one in (engine, other))
        assert ours == theirs, key


def test_a_label_names_the_prediction_that_was_the_latest_when_it_was_given(engine: Engine, now: datetime) -> None:
    send(engine, [make_prediction(1, now - timedelta(days=3)), make_prediction(2, now - timedelta(days=1), claim_id="c1")], now)
    handle(engine, make_agent(), now)
    send(engine, [make_label(1, now - timedelta(days=2))], now, ANN)
    send(engine, [make_label(1, now)], now, BEN)
    handle(engine, make_agent(), now)
    with db.reading(engine) as connection:
        named = {row["expert"]: predictions.read(connection, row["prediction"]) for row in labels.of_claim(connection, "c1")}
    assert {expert: row["prediction_id"] for expert, row in named.items() if row} == {"ann": "p1", "ben": "p2"}


def test_a_claim_that_is_predicted_again_is_not_asked_twice_at_once(engine: Engine, now: datetime) -> None:
    unsure = {"claim_id": "c", "confidence": 0.1}
    send(engine, [make_prediction(1, now, **unsure), make_prediction(2, now, **unsure)], now)
    handle(engine, make_agent(), now)
    send(engine, [make_prediction(3, now, **unsure), make_prediction(4, now, **unsure, input={"treatment": "another"})], now)
    handle(engine, make_agent(), now)
    with db.reading(engine) as connection:
        assert len(reviews.list_live(connection)) == 2, "the other input is another case"


def test_a_label_for_a_review_that_never_was_is_a_dead_letter_at_once(engine: Engine, now: datetime) -> None:
    send(engine, [make_prediction(1, now)], now)
    send(engine, [make_label(1, now, review_id="no-such-review")], now, ANN)
    handle(engine, make_agent(), now)
    with db.reading(engine) as connection:
        [letter] = dead_letters.list_parked(connection)
    assert "there is no review 'no-such-review': leave review_id out" in letter["reason"]


def test_history_is_labelled_cases_and_comes_in_once(engine: Engine, now: datetime) -> None:
    for _ in range(2):
        send(engine, [make_history(number, now) for number in range(20)], now)
        handle(engine, make_agent(), now)
    with db.reading(engine) as connection:
        assert len(labels.read_settled(connection, "adjudication")) == 20
        assert labels.count_fresh(connection, "adjudication") == 0
    assert rows(engine, Review, "id") == []


def test_an_agent_that_was_taken_out_of_the_config_costs_no_event(engine: Engine, now: datetime) -> None:
    send(engine, [make_prediction(1, now)], now)
    with db.writing(engine) as connection:
        assert handlers.handle_batch(connection, events.read_received(connection, 9), {}, now) == {"dead": 1}
        assert "not configured" in dead_letters.list_parked(connection)[0]["reason"]


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


def test_the_embedded_consumer_handles_what_lies_there_and_then_nothing(engine: Engine, now: datetime) -> None:
    agent = make_agent()
    send(engine, [make_prediction(number, now) for number in range(7)], now)
    done = [embedded.handle_next(engine, {agent.name: agent}, now, limit=5) for _ in range(3)]
    assert [counts.total() for counts in done] == [5, 2, 0]


def test_a_review_that_nobody_must_answer_expires_and_the_others_stay(engine: Engine, now: datetime) -> None:
    unsure, forced = make_prediction(1, now, confidence=0.1), make_prediction(2, now, decision="PENDING")
    send(engine, [unsure, forced], now)
    handle(engine, make_agent(audit_share=1e-9), now)
    with db.writing(engine) as connection:
        closed = reviews.expire(connection, now + timedelta(days=365))
    assert [row["claim_id"] for row in closed] == ["c1"]
