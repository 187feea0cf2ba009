"""Labels: every answer that was ever given, and which one is the truth about a claim.

Late truth beats adjudication beats reads; reads that agree count once; reads that disagree count for nothing until a third settles them.
Imported history is the truth of a claim only while nobody has read it.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, RowMapping, case, func, select, update

from storage import db
from storage.tables import Label, Prediction

READS = ("review", "second_read")
RANKS = (("late_truth",), ("adjudication",), READS, ("import",))


@dataclass(frozen=True, slots=True)
class Answer:
    """One standing answer on a prediction, as `settle` needs it."""

    label_id: str
    kind: str
    expert: str
    answer: str
    answered_at: datetime


@dataclass(frozen=True, slots=True)
class Truth:
    """What is held true about a claim, and the label that says so."""

    answer: str
    label_id: str
    kind: str


def settle(answers: Sequence[Answer]) -> Truth | None:
    """The truth about one prediction; None while there is no answer or the experts disagree."""
    for kinds in RANKS:
        ranked = sorted((one for one in answers if one.kind in kinds), key=lambda one: (one.answered_at, one.label_id))
        if ranked:
            return _majority(ranked) if kinds == READS else Truth(ranked[-1].answer, ranked[-1].label_id, ranked[-1].kind)
    return None


def is_conflict(answers: Sequence[Answer]) -> bool:
    """Whether experts disagree and nothing has settled it."""
    return bool(answers) and settle(answers) is None


def _majority(reads: Sequence[Answer]) -> Truth | None:
    counts = Counter(one.answer for one in reads).most_common(2)
    if len(counts) > 1 and counts[0][1] == counts[1][1]:
        return None
    first = next(one for one in reads if one.answer == counts[0][0])
    return Truth(first.answer, first.label_id, first.kind)


def insert_new(connection: Connection, row: Mapping[str, Any]) -> bool:
    """Store a label; a later answer of the same expert supersedes the earlier one. False when it is there already.

    First and second reads are one kind here: nobody is their own second reader.
    """
    if not connection.execute(db.insert_or_skip(connection, Label), [dict(row)]).rowcount:
        return False
    same = (
        (Label.prediction == row["prediction"])
        & (Label.expert == row["expert"])
        & Label.kind.in_(READS if row["kind"] in READS else (row["kind"],))
    )
    mine = select(Label.id, Label.answered_at).where(same).order_by(Label.answered_at, Label.id)
    standing = connection.execute(mine).all()
    for earlier, later in itertools.pairwise(standing):
        connection.execute(update(Label).where(Label.id == earlier.id).values(superseded_by=later.id))
    return True


def insert_imported(connection: Connection, rows: Sequence[Mapping[str, Any]]) -> None:
    """Store labels of imported history, many at once; of those on one claim the latest decision stands, then the one imported last."""
    db.insert_many(connection, Label, rows)
    for agent in {row["agent"] for row in rows}:
        _supersede_imported(connection, agent, {row["claim_id"] for row in rows if row["agent"] == agent})


def _supersede_imported(connection: Connection, agent: str, claims: Iterable[str]) -> None:
    standing = select(Label.id, Label.claim_id).where(Label.agent == agent, db.is_one_of(connection, Label.claim_id, claims))
    standing = standing.where(Label.kind == "import", Label.superseded_by.is_(None))
    by_claim: dict[str, list[str]] = {}
    for row in connection.execute(standing.order_by(Label.answered_at, Label.received_at, Label.id)):
        by_claim.setdefault(row.claim_id, []).append(row.id)
    for ids in by_claim.values():
        for earlier, later in itertools.pairwise(ids):
            connection.execute(update(Label).where(Label.id == earlier).values(superseded_by=later))


def of_predictions(connection: Connection, predictions: Iterable[str]) -> dict[str, list[Answer]]:
    """The standing answers on each prediction."""
    query = select(Label.prediction, Label.id, Label.kind, Label.expert, Label.answer, Label.answered_at)
    query = query.where(Label.prediction.in_(list(predictions)), Label.superseded_by.is_(None))
    found: dict[str, list[Answer]] = {}
    for row in connection.execute(query):
        found.setdefault(row.prediction, []).append(Answer(*row[1:]))
    return found


def of_claim(connection: Connection, claim_id: str, agent: str | None = None) -> list[RowMapping]:
    """Every label of a claim, oldest first, without its rationale."""
    columns = [column for column in Label.__table__.columns if column.name != "rationale"]
    query = select(*columns).where(Label.claim_id == claim_id).order_by(Label.answered_at, Label.id)
    if agent:
        query = query.where(Label.agent == agent)
    return list(connection.execute(query).mappings())


def of_review(connection: Connection, review: str, expert: str) -> list[RowMapping]:
    """What an expert answered to a review, oldest first; the last one stands."""
    query = select(Label.id, Label.answer, Label.rationale, Label.answered_at).where(Label.review == review, Label.expert == expert)
    return list(connection.execute(query.order_by(Label.answered_at, Label.received_at, Label.id)).mappings())


def read_settled(connection: Connection, agent: str) -> list[tuple[Truth, RowMapping]]:
    """Every claim of an agent whose truth is settled: the truth, and the case with its input, in order of the answers.

    A case that was imported is left out when people have settled the same claim as it was served.
    Streams nothing: an agent's labelled cases are what experts had the time for.
    """
    standing = select(Label.prediction, Label.id, Label.kind, Label.expert, Label.answer, Label.answered_at)
    standing = standing.where(Label.agent == agent, Label.superseded_by.is_(None))
    by_prediction: dict[str, list[Answer]] = {}
    for row in connection.execute(standing):
        by_prediction.setdefault(row.prediction, []).append(Answer(*row[1:]))
    truths = {truth.label_id: truth for answers in by_prediction.values() if (truth := settle(answers))}
    cases = (
        select(
            Label.id.label("label_id"),
            Label.answered_at,
            Label.rationale,
            Label.received_at,
            Prediction.id.label("prediction"),
            Prediction.prediction_id,
            Prediction.claim_id,
            Prediction.group_key,
            Prediction.input,
            Prediction.attributes,
        )
        .join(Prediction, Prediction.id == Label.prediction)
        .where(Label.agent == agent, Label.superseded_by.is_(None), Prediction.input.is_not(None))
        .order_by(Label.answered_at, Label.id)
    )
    settled = [(truths[row["label_id"]], row) for row in connection.execute(cases).mappings() if row["label_id"] in truths]
    read = {row["claim_id"] for truth, row in settled if truth.kind != "import"}
    return [(truth, row) for truth, row in settled if truth.kind != "import" or row["claim_id"] not in read]


def groups_of_history(connection: Connection, agent: str) -> set[str]:
    """The groups whose first label of all was imported, whatever has come since."""
    first = func.min(Label.received_at)
    imported = func.min(case((Label.kind == "import", Label.received_at)))
    query = select(Prediction.group_key).join(Label, Label.prediction == Prediction.id).where(Label.agent == agent)
    return set(connection.execute(query.group_by(Prediction.group_key).having(imported <= first)).scalars())


def list_conflicts(connection: Connection, agent: str | None = None) -> list[tuple[str, list[Answer]]]:
    """Predictions on which experts disagree, with their answers."""
    disputed = select(Label.prediction).where(Label.superseded_by.is_(None), Label.kind.in_(READS))
    if agent:
        disputed = disputed.where(Label.agent == agent)
    disputed = disputed.group_by(Label.prediction).having(func.count(Label.answer.distinct()) > 1)
    found = of_predictions(connection, list(connection.execute(disputed).scalars()))
    return [(prediction, answers) for prediction, answers in sorted(found.items()) if is_conflict(answers)]


def count_fresh(connection: Connection, agent: str, since: datetime | None = None) -> int:
    """Labels by people, not imported, that no dataset version has yet; of those that came after `since`."""
    query = select(func.count()).select_from(Label).where(Label.agent == agent, Label.dataset.is_(None), Label.kind != "import")
    if since is not None:
        query = query.where(Label.received_at > since)
    return connection.execute(query).scalar_one()


def count_given(connection: Connection, agent: str) -> int:
    """How many answers people gave, superseded ones too."""
    return connection.execute(select(func.count()).select_from(Label).where(Label.agent == agent, Label.kind != "import")).scalar_one()


def list_labelled(connection: Connection, agent: str) -> list[str]:
    """The claims that people answered."""
    return list(connection.execute(select(Label.claim_id).where(Label.agent == agent, Label.kind != "import").distinct()).scalars())


def count_by_attributes(connection: Connection, agent: str, names: Sequence[str]) -> dict[str, int]:
    """How many labelled cases each slice has, under keys like `region=west`."""
    query = select(Prediction.attributes).join(Label, Label.prediction == Prediction.id)
    query = query.where(Label.agent == agent, Label.superseded_by.is_(None))
    counts: Counter[str] = Counter()
    for attributes in connection.execute(query).scalars():
        counts.update(f"{name}={attributes[name]}" for name in names if name in attributes)
    return counts


def count_by_expert(connection: Connection, agent: str, expert: str, since: datetime) -> int:
    """How many cases an expert answered since then; a changed answer is no further case."""
    query = select(func.count(Label.prediction.distinct())).where(Label.agent == agent, Label.expert == expert)
    return connection.execute(query.where(Label.answered_at >= since)).scalar_one()


def mark_in_dataset(connection: Connection, agent: str, label_ids: Sequence[str], number: int) -> None:
    """Say which dataset version holds these labels first."""
    for start in range(0, len(label_ids), 500):
        part = label_ids[start : start + 500]
        connection.execute(update(Label).where(Label.agent == agent, Label.id.in_(part), Label.dataset.is_(None)).values(dataset=number))
