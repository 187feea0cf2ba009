"""What exam and watch rest on: scores of both versions, and which of their claims were asked about."""

from __future__ import annotations

from datetime import datetime, timedelta

import pytest
from sqlalchemy import Engine

from storage import db, exams, ids, labels, predictions, registry, reviews, scores
from tests.event_fixtures import ANN, handle, make_agent, make_label, make_prediction, send

pytestmark = pytest.mark.databases("sqlite", "postgresql")


@pytest.fixture
def scored(engine: Engine, now: datetime) -> Engine:
    """Six claims; v1.1 and v1.0 differ on the even ones, and two came a day later."""
    for number in range(6):
        at = now + timedelta(days=number // 4, seconds=number)
        send(engine, [make_prediction(number, at, confidence=0.99)], at)
    handle(engine, make_agent(audit_share=1.0), now)
    with db.writing(engine) as connection:
        known = predictions.newest_ids(connection, "adjudication", "", 10)
        for version in ("v1.0", "v1.1"):
            shared = {"agent": "adjudication", "version": version, "confidence": 0.9, "probabilities": [0.9, 0.1, 0.0], "scored_at": now}
            answers = ["DENIED" if version == "v1.1" and number % 2 == 0 else "APPROVED" for number in range(6)]
            rows = [{**shared, "prediction": one, "decision": answer} for one, answer in zip(known, answers, strict=True)]
            scores.insert_new(connection, rows)
    return engine


def test_only_differing_claims_are_read_and_a_watch_sees_what_came_since(scored: Engine, now: datetime) -> None:
    with db.reading(scored) as connection:
        found = scores.read_differing(connection, "adjudication", "v1.1", "v1.0")
        assert [(one.claim_id, one.candidate, one.champion) for one in found] == [(f"c{n}", "DENIED", "APPROVED") for n in (0, 2, 4)]
        assert all("audit" in one.reasons for one in found)
        since = ids.after(now + timedelta(hours=1))
        assert [one.claim_id for one in scores.read_differing(connection, "adjudication", "v1.1", "v1.0", since)] == ["c4"]
        assert scores.count_common(connection, "adjudication", "v1.1", "v1.0") == 6
        assert scores.count_common(connection, "adjudication", "v1.1", "v1.0", since) == 2


def test_labelled_audits_are_what_a_version_is_measured_on(scored: Engine, now: datetime) -> None:
    send(scored, [make_label(2, now)], now, ANN)
    handle(scored, make_agent(), now)
    with db.reading(scored) as connection:
        [(prediction, decision)] = scores.read_audited(connection, "adjudication", "v1.1")
        assert decision == "DENIED"
        assert labels.count_fresh(connection, "adjudication") == 1
        assert labels.count_fresh(connection, "adjudication", since=now) == 0
        assert predictions.read_between(connection, "adjudication", prediction, prediction)[0]["id"] == prediction


def test_it_is_known_which_versions_have_answered_real_claims(scored: Engine) -> None:
    with db.reading(scored) as connection:
        assert predictions.has_served(connection, "adjudication", ["v1.0", "another name"])
        assert not predictions.has_served(connection, "adjudication", ["v0"])


def test_an_exam_that_has_nothing_to_ask_leaves_its_part_of_the_day_to_others(engine: Engine, now: datetime) -> None:
    made = registry.Made("b", "sha256:b", None, None, "sha256:t", "p", "sha256:p", ["A", "B"], "sha256:l")
    with db.writing(engine) as connection:
        registry.register_bare(connection, "adjudication", made, now)
        candidate = registry.register(connection, "adjudication", made, now)
        exam = exams.open_new(connection, "adjudication", "exam", candidate, "v0", now, {"defect": None})
        assert exams.is_asking(connection, "adjudication")
        exams.update_report(connection, exam, {"asking": {"is_open": False}})
        assert not exams.is_asking(connection, "adjudication")
        assert [row["id"] for row in exams.list_open(connection, "adjudication")] == [exam]


def test_what_an_exam_asked_counts_until_a_whole_window_of_claims_has_come(engine: Engine, now: datetime) -> None:
    made = registry.Made("b", "sha256:b", None, None, "sha256:t", "p", "sha256:p", ["A", "B"], "sha256:l")
    with db.writing(engine) as connection:
        registry.register_bare(connection, "adjudication", made, now)
        exam = exams.open_new(connection, "adjudication", "exam", registry.register(connection, "adjudication", made, now), "v0", now)
    counts = []
    for day in range(4):
        at = now + timedelta(days=day)
        send(engine, [make_prediction(day, at, confidence=0.99)], at)
        handle(engine, make_agent(), at)
        with db.writing(engine) as connection:
            if day == 1:
                [newest] = predictions.newest_ids(connection, "adjudication", "", 1)
                reviews.ask_for_exam(connection, {"id": newest, "claim_id": "c1"}, "adjudication", exam, "exam", at)
            since = predictions.find_window_start(connection, "adjudication", 2)
            counts.append(exams.count_asked(connection, "adjudication", since))
    assert counts == [{}, {"exam": 1}, {"exam": 1}, {}]
    with db.writing(engine) as connection:
        assert exams.count_asked(connection, "adjudication", now) == {"exam": 1}
        exams.close(connection, exam, "superseded", {}, now)
        assert exams.count_asked(connection, "adjudication", now) == {}, "what nobody answered any more cost nothing"
