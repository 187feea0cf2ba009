"""Handlers commute, may run twice, and lose nothing."""

from __future__ import annotations

import random
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import Engine
from sqlalchemy.exc import OperationalError

from consumers import embedded, handlers, prediction_handler
from storage import db, dead_letters, events, labels, predictions
from storage.tables import Label, Prediction, Review
from tests.event_fixtures import ANN, PRODUCER, handle, make_agent, make_label, make_prediction, rows, send, undo_all

pytestmark = pytest.mark.databases("sqlite", "postgresql")

ALL_COLUMNS = {Prediction: "prediction_id", Review: "claim_id", Label: "claim_id"}


def test_a_label_whose_claim_never_comes_is_a_dead_letter_after_30_days(engine: Engine, now: datetime) -> None:
    send(engine, [make_label(1, now)], now, ANN)
    handle(engine, make_agent(), now)
    with db.writing(engine) as connection:
        assert handlers.park_overdue(connection, now + timedelta(days=29)) == 0
        assert handlers.park_overdue(connection, now + timedelta(days=31)) == 1
        assert "30 days" in dead_letters.list_parked(connection)[0]["reason"]


def test_one_poisonous_event_costs_only_itself(engine: Engine, now: datetime, monkeypatch: Any) -> None:
    send(engine, [make_prediction(number, now) for number in range(5)], now)
    real = prediction_handler._to_row

    def break_on_c3(event: events.Stored, data: Any, *rest: Any) -> dict[str, Any]:
        if data["claim_id"] == "c3":
            raise ZeroDivisionError
        return real(event, data, *rest)

    monkeypatch.setattr(prediction_handler, "_to_row", break_on_c3)
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
    monkeypatch.setattr(prediction_handler, "_to_row", lambda *_: 1 / 0)
    assert handle(engine, make_agent(), now) == {"dead": 1}


@pytest.mark.databases("sqlite")
@pytest.mark.parametrize("count", [1, 3])
def test_what_a_failing_disk_has_undone_is_nobodys_fault_and_nothing_is_committed_after_it(
    engine: Engine, now: datetime, monkeypatch: Any, count: int
) -> None:
    send(engine, [make_prediction(number, now) for number in range(count)], now)
    with monkeypatch.context() as disk:
        disk.setattr(predictions, "insert_new", undo_all)
        with pytest.raises(OperationalError, match="disk I/O"):
            handle(engine, make_agent(), now)
    assert handle(engine, make_agent(), now) == {"handled": count}
    send(engine, [make_label(0, now)], now, ANN)
    with monkeypatch.context() as disk:
        disk.setattr(labels, "insert_new", undo_all)
        with pytest.raises(OperationalError, match="disk I/O"):
            handle(engine, make_agent(), now)
    assert handle(engine, make_agent(), now) == {"handled": 1}


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


def test_an_agent_that_was_taken_out_of_the_config_costs_no_event(engine: Engine, now: datetime) -> None:
    send(engine, [make_prediction(1, now)], now)
    with db.writing(engine) as connection:
        assert handlers.handle_batch(connection, events.read_received(connection, 9), {}, now) == {"dead": 1}
        assert "not configured" in dead_letters.list_parked(connection)[0]["reason"]


def test_the_embedded_consumer_handles_what_lies_there_and_then_nothing(engine: Engine, now: datetime) -> None:
    agent = make_agent()
    send(engine, [make_prediction(number, now) for number in range(7)], now)
    done = [embedded.handle_next(engine, {agent.name: agent}, now, limit=5) for _ in range(3)]
    assert [counts.total() for counts in done] == [5, 2, 0]
