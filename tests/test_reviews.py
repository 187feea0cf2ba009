"""A case is shown to one expert at a time, and everything that happens to it is kept."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import Connection, Engine, event

from storage import db, predictions, reviews, schema
from tests.event_fixtures import ANN, handle, make_agent, make_label, make_prediction, send

pytestmark = pytest.mark.databases("sqlite", "postgresql")

AGENTS, TERM = ["adjudication"], timedelta(minutes=15)


@pytest.fixture
def queued(engine: Engine, now: datetime) -> Engine:
    """Three open reviews, c0 the most urgent."""
    send(engine, [make_prediction(number, now, confidence=0.1 + number / 10) for number in range(3)], now)
    handle(engine, make_agent(audit_share=1e-9), now)
    return engine


def lease(engine: Engine, expert: str, at: datetime) -> str | None:
    with db.writing(engine) as connection:
        row = reviews.lease_next(connection, AGENTS, expert, at, TERM)
    return row["claim_id"] if row else None


def test_the_most_urgent_case_comes_first_and_each_expert_has_their_own(queued: Engine, now: datetime) -> None:
    assert [lease(queued, expert, now) for expert in ("ann", "ben", "ann", "eve", "joe")] == ["c0", "c1", "c0", "c2", None]


def test_of_several_agents_the_most_urgent_case_comes_first_and_then_the_oldest(engine: Engine, now: datetime) -> None:
    cases = [("medical", 0.6, 0), ("adjudication", 0.7, 2), ("medical", 0.7, 1), ("adjudication", 0.5, 0)]
    send(engine, [make_prediction(number, now) for number in range(len(cases))], now)
    handle(engine, make_agent(audit_share=1e-9), now)
    with db.writing(engine) as connection:
        known = sorted(
            predictions.read_recent(connection, "adjudication", len(cases), unlabelled_only=False), key=lambda row: row["claim_id"]
        )
        for row, (agent, priority, seconds) in zip(known, cases, strict=True):
            asked = {"prediction": row["id"], "agent": agent, "claim_id": row["claim_id"], "reasons": ["audit"], "priority": priority}
            reviews.open_new(connection, [asked], now + timedelta(seconds=seconds), "ratchet")
        leased = [reviews.lease_next(connection, ["adjudication", "medical"], expert, now, TERM) for expert in "abcde"]
        assert [row["claim_id"] for row in leased if row] == ["c2", "c1", "c0", "c3"]
        assert reviews.lease_next(connection, [], "f", now, TERM) is None


def test_a_lease_that_runs_out_returns_the_case(queued: Engine, now: datetime) -> None:
    assert lease(queued, "ann", now) == "c0"
    assert lease(queued, "ben", now + TERM) == "c0"


def test_a_skipped_case_goes_to_somebody_else(queued: Engine, now: datetime) -> None:
    lease(queued, "ann", now)
    with db.writing(queued) as connection:
        held = reviews.list_live(connection)[0]["id"]
        reviews.skip(connection, held, "ann", "I treated this patient", now)
    assert lease(queued, "ann", now) == "c1"
    assert lease(queued, "ben", now) == "c0"
    with db.reading(queued) as connection:
        steps = [(step["actor"], step["action"]) for step in reviews.history(connection, held)]
    assert steps == [("ratchet", "opened"), ("ann", "leased"), ("ann", "skipped"), ("ben", "leased")]


def test_nobody_acts_on_a_case_that_another_holds(queued: Engine, now: datetime) -> None:
    lease(queued, "ann", now)
    with db.writing(queued) as connection:
        held = reviews.list_live(connection)[0]["id"]
        with pytest.raises(reviews.ReviewClosedError, match="not on lease to ben"):
            reviews.skip(connection, held, "ben", "mine", now)
        with pytest.raises(reviews.ReviewClosedError, match="not on lease to ben"):
            reviews.reveal(connection, held, "ben", now)


def test_seeing_the_models_answer_first_is_recorded_and_forbidden_when_blind(queued: Engine, now: datetime) -> None:
    lease(queued, "ann", now)
    with db.writing(queued) as connection:
        row = reviews.list_live(connection)[0]
        reviews.reveal(connection, row["id"], "ann", now)
        assert reviews.was_revealed(connection, row["id"], "ann")
        case = predictions.read(connection, row["prediction"])
        assert case is not None
        reviews.ask_for_exam(connection, case, "adjudication", None, "exam", now)  # type: ignore[arg-type]
        with pytest.raises(reviews.ReviewClosedError, match="blind"):
            reviews.reveal(connection, row["id"], "ann", now)


def test_an_exam_that_wants_a_case_under_review_adds_its_reason(queued: Engine, now: datetime) -> None:
    with db.writing(queued) as connection:
        before = reviews.list_live(connection)[-1]
        case = predictions.read(connection, before["prediction"])
        assert case is not None
        reviews.ask_for_exam(connection, case, "adjudication", None, "exam", now)  # type: ignore[arg-type]
        after = next(row for row in reviews.list_live(connection) if row["id"] == before["id"])
    assert after["reasons"] == ["below_threshold", "exam"]
    assert after["is_blind"]
    assert after["expires_at"] is None
    assert after["priority"] == reviews.EXAM_PRIORITY


def test_an_answer_takes_the_case_out_of_the_queue(queued: Engine, now: datetime) -> None:
    lease(queued, "ann", now)
    send(queued, [make_label(0, now)], now, ANN)
    handle(queued, make_agent(), now)
    with db.reading(queued) as connection:
        assert reviews.count_live(connection, "adjudication") == {"open": 2, "leased": 0}


class Plans:
    """How SQLite goes about what a connection executes."""

    def __init__(self, connection: Connection) -> None:
        self.steps: list[str] = []
        event.listen(connection, "before_cursor_execute", self._explain)

    def _explain(self, _: Any, cursor: Any, statement: str, parameters: Any, *__: Any) -> None:
        told = cursor.connection.execute(f"EXPLAIN QUERY PLAN {statement}", parameters).fetchall()
        self.steps += [row[-1].split(" (")[0] for row in told]


@pytest.mark.databases("sqlite")
def test_what_is_due_is_found_by_an_index_however_many_reviews_there_are(engine: Engine, now: datetime) -> None:
    with db.writing(engine) as connection:
        plans = Plans(connection)
        reviews.return_expired_leases(connection, now)
        reviews.expire(connection, now)
    assert plans.steps == ["SEARCH reviews USING INDEX reviews_leased", "SEARCH reviews USING INDEX reviews_expiring"]


@pytest.mark.databases("sqlite")
def test_whether_a_case_is_asked_already_is_found_without_a_look_through_all_that_are(queued: Engine) -> None:
    schema.analyze(queued)
    with db.reading(queued) as connection:
        plans = Plans(connection)
        assert reviews.find_live_cases(connection, ["c0", "c1"], [])
    assert not [step for step in plans.steps if step.startswith("SCAN reviews")], "also when it looked at the tables while they were small"
