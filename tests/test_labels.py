"""What is held true about a claim follows from all answers, by one rule."""

from __future__ import annotations

from datetime import datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import Engine

from storage import db, labels
from tests.event_fixtures import ANN, BEN, OPS, handle, make_agent, make_label, make_prediction, send

pytestmark = pytest.mark.databases("sqlite", "postgresql")

START = datetime.fromisoformat("2026-03-02T09:30:00+00:00")


def answer(kind: str, expert: str, given: str, minutes: int = 0) -> labels.Answer:
    return labels.Answer(f"{kind}-{expert}-{minutes}", kind, expert, given, START + timedelta(minutes=minutes))


def test_late_truth_beats_adjudication_beats_reads_beats_history() -> None:
    ranked = [
        answer("import", "file", "A"),
        answer("review", "ann", "B"),
        answer("adjudication", "ops", "C"),
        answer("late_truth", "court", "D"),
    ]
    held = [labels.settle(ranked[: count + 1]) for count in range(4)]
    assert [truth.answer for truth in held if truth] == ["A", "B", "C", "D"]


def test_reads_that_disagree_count_for_nothing_until_a_third_settles_them() -> None:
    two = [answer("review", "ann", "A"), answer("review", "ben", "B", 1)]
    assert labels.settle(two) is None
    assert labels.is_conflict(two)
    truth = labels.settle([*two, answer("review", "eve", "B", 2)])
    assert truth is not None
    assert truth.answer == "B"


def test_reads_that_agree_are_one_row() -> None:
    truth = labels.settle([answer("review", "ann", "A"), answer("second_read", "ben", "A", 1)])
    assert truth is not None
    assert truth.label_id == "review-ann-0"


ANSWERS = st.lists(
    st.builds(
        answer,
        st.sampled_from(["review", "second_read", "adjudication", "late_truth", "import"]),
        st.sampled_from("xyz"),
        st.sampled_from("AB"),
        st.integers(0, 9),
    ),
    max_size=6,
    unique_by=lambda one: one.label_id,
)


@given(ANSWERS, st.randoms())
def test_the_order_of_arrival_does_not_change_the_truth(answers: list[labels.Answer], shuffler: object) -> None:
    shuffled = list(answers)
    shuffler.shuffle(shuffled)  # type: ignore[attr-defined]
    one, other = labels.settle(answers), labels.settle(shuffled)
    assert (one and one.answer) == (other and other.answer)


def test_a_later_answer_of_the_same_expert_supersedes_and_both_are_kept(engine: Engine, now: datetime) -> None:
    send(engine, [make_prediction(1, now)], now)
    for minutes, given_answer in ((0, "DENIED"), (5, "APPROVED")):
        send(engine, [make_label(1, now + timedelta(minutes=minutes), answer=given_answer)], now, ANN)
        handle(engine, make_agent(), now)
    with db.reading(engine) as connection:
        kept = labels.of_claim(connection, "c1")
        [(truth, _, _)] = labels.read_settled(connection, "adjudication")
    assert [(row["answer"], row["superseded_by"] is None) for row in kept] == [("DENIED", False), ("APPROVED", True)]
    assert truth.answer == "APPROVED"


def test_experts_who_disagree_keep_the_claim_out_until_an_operator_settles_it(engine: Engine, now: datetime) -> None:
    send(engine, [make_prediction(1, now)], now)
    send(engine, [make_label(1, now, answer="DENIED")], now, ANN)
    send(engine, [make_label(1, now, answer="APPROVED")], now, BEN)
    handle(engine, make_agent(), now)
    with db.reading(engine) as connection:
        assert labels.read_settled(connection, "adjudication") == []
        assert len(labels.list_conflicts(connection)) == 1
    send(engine, [make_label(1, now, answer="APPROVED", kind="adjudication")], now, OPS)
    handle(engine, make_agent(), now)
    with db.reading(engine) as connection:
        assert labels.list_conflicts(connection) == []
        assert [truth.answer for truth, _, _ in labels.read_settled(connection, "adjudication")] == ["APPROVED"]
