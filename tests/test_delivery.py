"""Everything comes in through one door, with the same rules about who may say what."""

from __future__ import annotations

from datetime import datetime, timedelta

import orjson
import pytest
from sqlalchemy import Engine

from storage import db, dead_letters, events
from tests.event_fixtures import ANN, BEN, OPS, PRODUCER, make_label, make_prediction, send

pytestmark = pytest.mark.databases("sqlite", "postgresql")


def test_a_batch_is_answered_item_by_item_and_the_good_ones_are_stored(engine: Engine, now: datetime) -> None:
    results = send(engine, [make_prediction(1, now), make_prediction(2, now, confidence=2), make_prediction(3, now)], now)
    assert [one.outcome for one in results] == ["stored", "refused", "stored"]
    with db.writing(engine) as connection:
        assert len(events.read_received(connection, 10)) == 2


def test_a_label_is_signed_with_the_name_of_its_token(engine: Engine, now: datetime) -> None:
    [result] = send(engine, [make_label(1, now)], now, ANN)
    with db.reading(engine) as connection:
        stored = events.read(connection, result.ulid or "")
    assert stored is not None
    assert orjson.loads(stored.data or "")["expert"] == "ann"


def test_nobody_answers_in_the_name_of_another(engine: Engine, now: datetime) -> None:
    [result] = send(engine, [make_label(1, now, expert="ann")], now, BEN)
    assert result.outcome == "refused"
    assert result.refusal is not None
    assert result.refusal.field == "data.expert"


def test_each_kind_of_label_takes_its_role(engine: Engine, now: datetime) -> None:
    kinds = ("review", "second_read", "adjudication", "late_truth")
    allowed = {
        who.name: [send(engine, [make_label(1, now, kind=kind)], now, who)[0].outcome != "forbidden" for kind in kinds]
        for who in (ANN, OPS, PRODUCER)
    }
    assert allowed == {
        "ann": [True, True, False, False],
        "ops": [False, False, True, True],
        "inference-1": [False, False, False, True],
    }


def test_a_used_identity_with_other_content_is_a_conflict(engine: Engine, now: datetime) -> None:
    send(engine, [make_prediction(1, now)], now)
    again, other = send(engine, [make_prediction(1, now)], now)[0], send(engine, [make_prediction(1, now, decision="DENIED")], now)[0]
    assert again.outcome == "stored"
    assert other.outcome == "conflict"
    assert other.ulid == again.ulid


def test_what_a_used_identity_came_with_is_kept_once_as_a_dead_letter(engine: Engine, now: datetime) -> None:
    send(engine, [make_prediction(1, now)], now)
    for hours in range(3):
        send(engine, [make_prediction(1, now, decision="DENIED")], now + timedelta(hours=hours))
    with db.reading(engine) as connection:
        [letter] = dead_letters.list_parked(connection)
        kept = dead_letters.show(connection, letter["id"])
    assert "was used for other content" in letter["reason"]
    assert orjson.loads(kept["payload"])["decision"] == "DENIED"


def test_an_answer_from_the_future_is_refused_for_it_would_stand_for_ever(engine: Engine, now: datetime) -> None:
    [fast] = send(engine, [make_label(1, now + timedelta(minutes=5))], now, ANN)
    [wrong] = send(engine, [make_label(1, now + timedelta(days=400))], now, ANN)
    assert (fast.outcome, wrong.outcome) == ("stored", "refused")
    assert wrong.refusal is not None
    assert wrong.refusal.field == "data.answered_at"
    assert "check the clock" in wrong.refusal.remedy
