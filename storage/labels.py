"""Labels: every answer that was ever given, and which one is the truth about a case: a claim with one input, however often predicted.

Late truth beats adjudication beats reads; reads that agree count once; reads that disagree count for nothing until a third settles them.
Imported history is the truth of a claim only while nobody has read it.
"""

from __future__ import annotations

import itertools
import operator
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple

from sqlalchemy import Connection, RowMapping, and_, bindparam, case, func, select, update
from sqlalchemy.orm import aliased

from storage import bulk
from storage.sampling import slice_key
from storage.tables import Label, Prediction

READS = ("review", "second_read")
CASE = ("agent", "claim_id", "input_digest")
"""What predictions of the same case share."""
IS_STANDING_READ = and_(Label.superseded_by.is_(None), Label.kind.in_(bindparam("reads", READS, expanding=True, literal_execute=True)))
"""Written out in the SQL: an index over these alone serves a query only when its text says that it means those."""
READ_ROWS = 500
RANKS = (("late_truth",), ("adjudication",), READS, ("import",))


@dataclass(frozen=True, slots=True)
class Answer:
    """One standing answer on a case, as `settle` needs it."""

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
    """The truth about one case; None while there is no answer or the experts disagree."""
    for kinds in RANKS:
        ranked = sorted((one for one in answers if one.kind in kinds), key=lambda one: (one.answered_at, one.label_id))
        if kinds == READS:  # an expert who read the same case twice counts once, as they said last
            ranked = sorted({one.expert: one for one in ranked}.values(), key=lambda one: (one.answered_at, one.label_id))
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
    if not bulk.insert_new(connection, Label, row):
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
    bulk.insert_many(connection, Label, rows)
    for agent in {row["agent"] for row in rows}:
        _supersede_imported(connection, agent, {row["claim_id"] for row in rows if row["agent"] == agent})


def _supersede_imported(connection: Connection, agent: str, claims: Iterable[str]) -> None:
    standing = select(Label.id, Label.claim_id).where(Label.agent == agent, bulk.is_one_of(connection, Label.claim_id, claims))
    standing = standing.where(Label.kind == "import", Label.superseded_by.is_(None))
    by_claim: dict[str, list[str]] = {}
    for row in connection.execute(standing.order_by(Label.answered_at, Label.received_at, Label.id)):
        by_claim.setdefault(row.claim_id, []).append(row.id)
    for ids in by_claim.values():
        for earlier, later in itertools.pairwise(ids):
            connection.execute(update(Label).where(Label.id == earlier).values(superseded_by=later))


def of_predictions(connection: Connection, predictions: Iterable[str]) -> dict[str, list[Answer]]:
    """The standing answers on the case of each prediction, whichever prediction of the same input they were given on."""
    if not (wanted := set(predictions)):
        return {}
    labelled = aliased(Prediction)
    query = select(Prediction.id, Label.id, Label.kind, Label.expert, Label.answer, Label.answered_at)
    is_same_case = and_(*(getattr(labelled, name) == getattr(Prediction, name) for name in CASE))
    query = query.join(labelled, is_same_case).join(Label, Label.prediction == labelled.id)
    query = query.where(bulk.is_one_of(connection, Prediction.id, wanted), Label.superseded_by.is_(None))
    found: dict[str, list[Answer]] = {}
    for row in connection.execute(query):
        found.setdefault(row[0], []).append(Answer(*row[1:]))
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


class Settled(NamedTuple):
    """A case whose truth is settled: what it is, since when, and all labels that stand on the case; see `read_cases`."""

    truth: Truth
    answered_at: datetime
    labels: tuple[str, ...]


def read_settled(connection: Connection, agent: str) -> list[Settled]:
    """Every case of an agent whose truth is settled, in order of the answers; without its input, which may be long.

    A case that was imported is left out when people have settled the same claim as it was served.
    """
    columns = (Label.id, Label.kind, Label.expert, Label.answer, Label.answered_at)
    query = select(*columns, Prediction.claim_id, Prediction.input_digest).join(Prediction, Prediction.id == Label.prediction)
    query = query.where(Label.agent == agent, Label.superseded_by.is_(None), Prediction.input.is_not(None))
    query = query.order_by(Prediction.claim_id, Prediction.input_digest, Label.answered_at, Label.id)
    answers = connection.execute(query.execution_options(yield_per=READ_ROWS))
    claims = itertools.groupby(answers, operator.attrgetter("claim_id"))
    settled = [one for _, rows in claims for one in _settle_claim(rows)]
    return sorted(settled, key=lambda one: (one.answered_at, one.truth.label_id))


def _settle_claim(rows: Iterable[Any]) -> list[Settled]:
    """The settled cases of one claim, whose labels come case by case."""
    settled = []
    for _, same in itertools.groupby(rows, operator.attrgetter("input_digest")):
        answers = {row.id: Answer(*row[:5]) for row in same}
        if truth := settle(list(answers.values())):
            settled.append(Settled(truth, answers[truth.label_id].answered_at, tuple(answers)))
    return [one for one in settled if one.truth.kind != "import"] or settled


def read_cases(connection: Connection, settled: Iterable[Settled]) -> Iterator[tuple[Settled, RowMapping]]:
    """Each settled case with its claim, its input and the rationale of its truth, in their order, some hundreds in memory at a time."""
    columns = (Label.id, Label.rationale, Label.prediction, Prediction.claim_id, Prediction.group_key, Prediction.input)
    query = select(*columns, Prediction.input_digest, Prediction.attributes).join(Prediction, Prediction.id == Label.prediction)
    waiting = iter(settled)
    while part := list(itertools.islice(waiting, READ_ROWS)):
        ids = [one.truth.label_id for one in part]
        cases = {row["id"]: row for row in connection.execute(query.where(bulk.is_one_of(connection, Label.id, ids))).mappings()}
        yield from ((one, cases[one.truth.label_id]) for one in part)


def groups_of_history(connection: Connection, agent: str) -> set[str]:
    """The groups whose first label of all was imported, whatever has come since."""
    first = func.min(Label.received_at)
    imported = func.min(case((Label.kind == "import", Label.received_at)))
    query = select(Prediction.group_key).join(Label, Label.prediction == Prediction.id).where(Label.agent == agent)
    return set(connection.execute(query.group_by(Prediction.group_key).having(imported <= first)).scalars())


def list_conflicts(connection: Connection, agent: str | None = None) -> list[tuple[str, list[Answer]]]:
    """Cases on which experts disagree, each by its first prediction that was read, with the answers."""
    # First the few claims with different answers, from the index alone: most cases were read once.
    claims = select(Label.agent, Label.claim_id).where(IS_STANDING_READ).group_by(Label.agent, Label.claim_id)
    claims = claims.having(func.min(Label.answer) < func.max(Label.answer))
    if agent:
        claims = claims.where(Label.agent == agent)
    differing = claims.subquery()
    is_of_these = and_(differing.c.agent == Label.agent, differing.c.claim_id == Label.claim_id)
    read = select(func.min(Prediction.id)).join(Label, Label.prediction == Prediction.id).join(differing, is_of_these)
    disputed = (
        read.where(IS_STANDING_READ).group_by(*(getattr(Prediction, name) for name in CASE)).having(func.count(Label.answer.distinct()) > 1)
    )
    found = of_predictions(connection, connection.execute(disputed).scalars())
    return [(prediction, answers) for prediction, answers in sorted(found.items()) if is_conflict(answers)]


def count_fresh(connection: Connection, agent: str, since: datetime | None = None) -> int:
    """Cases that people settled by a label which no dataset version has yet; of labels that came after `since`."""
    query = select(Label.id, Label.prediction).where(Label.agent == agent, Label.dataset.is_(None), Label.kind != "import")
    if since is not None:
        query = query.where(Label.received_at > since)
    fresh = {row.id: row.prediction for row in connection.execute(query)}
    answers = of_predictions(connection, set(fresh.values()))
    return len({truth.label_id for given in answers.values() if (truth := settle(given))} & fresh.keys())


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
        counts.update(slice_key(name, attributes.get(name)) for name in names)
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
