"""Reviews: cases that wait for an expert, shown to one at a time, with everything that happened to them.

open → leased → answered | expired ;  leased → open (the lease ran out, or the case was skipped)
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, NamedTuple

from sqlalchemy import Connection, Row, RowMapping, Text, case, cast, func, insert, select, text, update

from storage import bulk, ids
from storage.tables import Prediction, Review, ReviewStep

LIVE = ("open", "leased")
IS_LIVE, IS_OPEN, IS_LEASED, IS_SKIP, IS_UNSENT = map(
    text,
    (
        "reviews.state IN ('open', 'leased')",
        "reviews.state = 'open'",
        "reviews.state = 'leased'",
        "review_steps.action = 'skipped'",
        "review_steps.is_unsent",  # SQLite takes `is_unsent = 1` for another condition
    ),
)
"""Written out as their indexes say it: an index over few rows serves a query only when its text says that it means those."""
EXAM_PRIORITY = 2.0
GIVEN = ("prediction", "agent", "claim_id", "reasons", "priority")
USUAL: Mapping[str, Any] = {"is_blind": False, "exam": None, "expires_at": None, "case_key": None}
"""What a new review must say of itself, and what it may."""
TOLD = frozenset({"opened", "answered", "expired"})
"""The steps that others are told of."""


class Told(NamedTuple):
    """A step that others are told of, with its case; `input` and `attributes` are JSON text."""

    step: int
    review: str
    action: str
    at: datetime
    agent: str
    claim_id: str
    is_blind: bool
    expires_at: datetime | None
    prediction_id: str
    input: str | None
    attributes: str | None


class ReviewClosedError(RuntimeError):
    """The review can't be acted on: it is closed, unknown, or another expert has it."""


def open_new(connection: Connection, rows: Sequence[Mapping[str, Any]], now: datetime, actor: str) -> None:
    """Open reviews; a row has prediction, agent, claim_id, reasons, priority and may have is_blind, exam, expires_at and case_key.

    A case that is under review already is not opened twice, also when two predictions of it are handled at the same moment.
    """
    if not rows:
        return
    if connection.dialect.name == "postgresql":  # two who open the same cases in different orders would wait for each other
        rows = sorted(rows, key=lambda row: row.get("case_key") or 0)
    count = len(rows)
    columns: dict[str, Sequence[Any]] = {name: [row[name] for row in rows] for name in GIVEN}
    columns |= {name: [row.get(name, usual) for row in rows] for name, usual in USUAL.items()}
    keys = ids.make_ulids(now, map(_about, columns["prediction"], columns["exam"]))
    columns |= {"id": keys, "state": ["open"] * count, "opened_at": [now] * count}
    opened = list(zip(keys, columns["reasons"], strict=True))
    if bulk.insert_columns(connection, Review, columns) < count:
        query = select(Review.id).where(bulk.is_one_of(connection, Review.id, keys))
        present = set(connection.execute(query).scalars())
        opened = [one for one in opened if one[0] in present]
    if opened:
        same = {"at": now, "actor": actor, "action": "opened", "is_unsent": True}
        own = {"review": [key for key, _ in opened], "note": [", ".join(reasons) for _, reasons in opened]}
        bulk.insert_columns(connection, ReviewStep, own | {name: [value] * len(opened) for name, value in same.items()})


def make_case_key(agent: str, claim_id: str, input_digest: str) -> int:
    """What two predictions have in common that are one case for an expert: 63 bits of a hash."""
    case_ = f"{agent}\0{claim_id}\0{input_digest}".encode()
    return int.from_bytes(hashlib.sha256(case_).digest()[:8], "big") >> 1


def find_live_cases(connection: Connection, claims: Iterable[str], but: Collection[str]) -> set[tuple[str, str, str]]:
    """The cases of these claims that wait for an expert, by other predictions than those in `but`: agent, claim, digest of the input."""
    dialect = connection.dialect.name
    found = connection.exec_driver_sql(_LIVE_CASES[dialect], (bulk.write_list(dialect, claims),))
    return {(agent, claim, digest) for prediction, agent, claim, digest in found if prediction not in but}


_LIVE_CASES = {
    # Not as a join: SQLite might look through all live reviews, of which there may be tens of thousands, for these few claims.
    dialect: f"""SELECT id, agent, claim_id, input_digest FROM predictions WHERE claim_id {is_one_of}
    AND EXISTS (SELECT 1 FROM reviews WHERE reviews.prediction = predictions.id AND {IS_LIVE})"""  # noqa: S608  no value is in it
    for dialect, is_one_of in (("sqlite", "IN (SELECT value FROM json_each(?))"), ("postgresql", "= ANY(%s)"))
}
"""As text: it is asked for every batch and every single event, and to put it together takes longer than to search."""


def _about(prediction: str, exam: str | None) -> str:
    return f"review\0{prediction}\0{exam or ''}"


def ask_for_exam(connection: Connection, prediction: Mapping[str, Any], agent: str, exam: str, reason: str, now: datetime) -> None:
    """Ask for a blind answer on a stored claim: a new review, or one more reason on the one that is open."""
    live = select(Review.id, Review.reasons).where(Review.prediction == prediction["id"], IS_LIVE)
    known = connection.execute(live).first()
    if known is None:
        row = {
            "prediction": prediction["id"],
            "agent": agent,
            "claim_id": prediction["claim_id"],
            "reasons": [reason],
            "priority": EXAM_PRIORITY,
        }
        open_new(connection, [{**row, "is_blind": True, "exam": exam}], now, "ratchet")
        return
    reasons = [*known.reasons, *({reason} - set(known.reasons))]
    change = update(Review).where(Review.id == known.id)
    connection.execute(
        change.values(
            reasons=reasons,
            is_blind=True,
            exam=exam,
            expires_at=None,
            priority=case((Review.priority > EXAM_PRIORITY, Review.priority), else_=EXAM_PRIORITY),
        )
    )
    _step(connection, known.id, now, "ratchet", "reason added", reason)


def lease_next(connection: Connection, agents: Sequence[str], expert: str, now: datetime, term: timedelta) -> RowMapping | None:
    """The case that the expert should look at now: the one on lease to them, else the most urgent open one they did not skip."""
    return_expired_leases(connection, now)
    mine = connection.execute(select(Review.id, Review.agent).where(IS_LEASED, Review.leased_by == expert))
    held = next((row.id for row in mine if row.agent in agents), None)
    if held is None:
        firsts = [first for agent in agents if (first := _find_first(connection, agent, expert)) is not None]
        if not firsts:
            return None
        most_urgent = min(firsts, key=lambda first: (-first.priority, first.opened_at, first.id))
        return lease(connection, most_urgent.id, expert, now, term)
    connection.execute(update(Review).where(Review.id == held).values(lease_until=now + term))
    return read(connection, held)


def _find_first(connection: Connection, agent: str, expert: str) -> Row[str, float, datetime] | None:
    """The most urgent open case of one agent that the expert did not skip: of several at once, no index has the order."""
    skipped = select(ReviewStep.review).where(IS_SKIP, ReviewStep.actor == expert)
    free = select(Review.id, Review.priority, Review.opened_at)
    free = free.where(IS_OPEN, IS_LIVE, Review.agent == agent, Review.id.not_in(skipped))  # live: as its index says
    free = free.order_by(Review.priority.desc(), Review.opened_at, Review.id).limit(1)
    if connection.dialect.name == "postgresql":
        free = free.with_for_update(skip_locked=True)
    return connection.execute(free).first()


def lease(connection: Connection, review: str, expert: str, now: datetime, term: timedelta) -> RowMapping | None:
    """Give an open case to an expert."""
    _step(connection, review, now, expert, "leased", None)
    values = {"state": "leased", "leased_by": expert, "lease_until": now + term}
    connection.execute(update(Review).where(Review.id == review, Review.state == "open").values(values))
    return read(connection, review)


def read(connection: Connection, review: str) -> RowMapping | None:
    """One review with the claim's input and what the model answered; callers hide the answer from an expert who has not decided."""
    joined = select(
        Review.__table__,
        Prediction.input,
        Prediction.attributes,
        Prediction.prediction_id,
        Prediction.decision,
        Prediction.confidence,
        Prediction.model_version,
        Prediction.occurred_at,
    ).join(Prediction, Prediction.id == Review.prediction)
    return connection.execute(joined.where(Review.id == review)).mappings().first()


def skip(connection: Connection, review: str, expert: str, reason: str, now: datetime) -> None:
    """Give a case back with a reason; it is not shown to this expert again. Raises `ReviewClosedError`."""
    held = update(Review).where(Review.id == review, Review.state == "leased", Review.leased_by == expert)
    if not connection.execute(held.values(state="open", leased_by=None, lease_until=None)).rowcount:
        raise ReviewClosedError(f"review {review} is not on lease to {expert}: ask for the next one")
    _step(connection, review, now, expert, "skipped", reason)


def reveal(connection: Connection, review: str, expert: str, now: datetime) -> None:
    """Record that the expert chose to see the model's answer before giving their own. Raises `ReviewClosedError`."""
    row = connection.execute(select(Review.state, Review.leased_by, Review.is_blind).where(Review.id == review)).first()
    if row is None or row.leased_by != expert:
        raise ReviewClosedError(f"review {review} is not on lease to {expert}: ask for the next one")
    if row.is_blind:
        raise ReviewClosedError(f"review {review} is blind: the model's answer is shown after yours")
    _step(connection, review, now, expert, "revealed", None)


def last_holder(connection: Connection, review: str) -> str | None:
    """Who had the case last, whatever has become of it since; None when nobody ever had."""
    query = select(ReviewStep.actor).where(ReviewStep.review == review, ReviewStep.action == "leased")
    return connection.execute(query.order_by(ReviewStep.id.desc()).limit(1)).scalar()


def close_answered(connection: Connection, prediction: str, expert: str, now: datetime, review: str | None) -> str | None:
    """Close the live review that a label answers: the one it names, else the prediction's; returns its key, None if none was open."""
    target = Review.id == review if review is not None else Review.prediction == prediction
    live = update(Review).where(target, Review.prediction == prediction, IS_LIVE)
    values = {"state": "answered", "closed_at": now, "leased_by": None, "lease_until": None}
    closed = connection.execute(live.values(values).returning(Review.id)).scalar()
    if closed is not None:
        _step(connection, closed, now, expert, "answered", None)
    return closed


def return_expired_leases(connection: Connection, now: datetime) -> int:
    """Put cases whose lease ran out back into the queue; returns how many."""
    lapsed = select(Review.id, Review.leased_by).where(IS_LEASED, Review.lease_until <= now)
    rows = connection.execute(lapsed).all()
    for row in rows:
        change = update(Review).where(Review.id == row.id, Review.state == "leased", Review.lease_until <= now)
        connection.execute(change.values(state="open", leased_by=None, lease_until=None))
        _step(connection, row.id, now, row.leased_by, "lease ran out", None)
    return len(rows)


def expire(connection: Connection, now: datetime) -> list[RowMapping]:
    """Close open reviews past their expiry; audit, must-review and exam cases have none."""
    overdue = update(Review).where(IS_OPEN, Review.expires_at <= now)
    rows = connection.execute(overdue.values(state="expired", closed_at=now).returning(Review.id, Review.agent, Review.claim_id)).mappings()
    closed = list(rows)
    for row in closed:
        _step(connection, row["id"], now, "ratchet", "expired", None)
    return closed


def withdraw_exam(connection: Connection, exam: str, now: datetime) -> None:
    """Close the open reviews that only an ended exam asked for."""
    rows = connection.execute(select(Review.id, Review.reasons).where(Review.exam == exam, Review.state == "open")).all()
    for row in rows:
        if set(row.reasons) <= {"exam", "watch"}:
            connection.execute(update(Review).where(Review.id == row.id).values(state="expired", closed_at=now))
            _step(connection, row.id, now, "ratchet", "expired", "its exam ended")


def history(connection: Connection, review: str) -> list[RowMapping]:
    """Everything that happened to a review, in order."""
    query = select(ReviewStep.at, ReviewStep.actor, ReviewStep.action, ReviewStep.note).where(ReviewStep.review == review)
    return list(connection.execute(query.order_by(ReviewStep.id)).mappings())


def of_prediction(connection: Connection, prediction: str) -> list[RowMapping]:
    """Every review of a prediction, oldest first."""
    query = select(Review.id, Review.state, Review.reasons, Review.is_blind, Review.exam, Review.opened_at, Review.closed_at)
    return list(connection.execute(query.where(Review.prediction == prediction).order_by(Review.opened_at, Review.id)).mappings())


def was_revealed(connection: Connection, review: str, expert: str) -> bool:
    """Whether the expert saw the model's answer before giving their own."""
    query = select(ReviewStep.id).where(ReviewStep.review == review, ReviewStep.actor == expert, ReviewStep.action == "revealed")
    return connection.execute(query).first() is not None


def count_live(connection: Connection, agent: str) -> dict[str, int]:
    """How many reviews wait, by state."""
    query = select(Review.state, func.count()).where(Review.agent == agent, IS_LIVE).group_by(Review.state)
    return dict.fromkeys(LIVE, 0) | {row[0]: row[1] for row in connection.execute(query)}


def count_opened(connection: Connection, agent: str, since: datetime) -> tuple[int, int]:
    """How many reviews were opened since then, and how many of them for an exam or a watch."""
    query = select(func.count(), func.count(Review.exam)).where(Review.agent == agent, Review.opened_at >= since)
    row = connection.execute(query).one()
    return row[0], row[1]


def list_live(connection: Connection, agent: str | None = None, limit: int = 100) -> list[RowMapping]:
    """The queue, most urgent first, without claim contents."""
    query = select(Review.__table__).where(IS_LIVE).order_by(Review.priority.desc(), Review.opened_at, Review.id).limit(limit)
    if agent:
        query = query.where(Review.agent == agent)
    return list(connection.execute(query).mappings())


def of_exam(connection: Connection, exam: str) -> list[RowMapping]:
    """The reviews that an exam asked for."""
    query = select(Review.id, Review.prediction, Review.state).where(Review.exam == exam)
    return list(connection.execute(query).mappings())


def read_unsent(connection: Connection, limit: int, but: Sequence[int] = ()) -> list[Told]:
    """The oldest openings and endings that nobody has sent yet, in order and but for some, without what a model answered."""
    step = select(ReviewStep.id, ReviewStep.review, ReviewStep.action, ReviewStep.at)
    case_ = step.add_columns(Review.agent, Review.claim_id, Review.is_blind, Review.expires_at)
    # As text: nobody needs to read what goes out as it lies there.
    whole = case_.add_columns(Prediction.prediction_id, cast(Prediction.input, Text), cast(Prediction.attributes, Text))
    joined = whole.join(Review, Review.id == ReviewStep.review).join(Prediction, Prediction.id == Review.prediction).where(IS_UNSENT)
    if but:
        joined = joined.where(bulk.is_none_of(connection, ReviewStep.id, but))
    return list(map(Told._make, connection.execute(joined.order_by(ReviewStep.id).limit(limit))))


def count_unsent(connection: Connection) -> int:
    """How many openings and endings wait to be sent."""
    return connection.execute(select(func.count()).select_from(ReviewStep).where(IS_UNSENT)).scalar_one()


def mark_sent(connection: Connection, steps: Sequence[int]) -> None:
    """Say that these steps were sent."""
    if steps:
        connection.execute(update(ReviewStep).where(bulk.is_one_of(connection, ReviewStep.id, steps)).values(is_unsent=False))


def _step(connection: Connection, review: str, at: datetime, actor: str, action: str, note: str | None) -> None:
    step = {"review": review, "at": at, "actor": actor, "action": action, "note": note, "is_unsent": action in TOLD}
    connection.execute(insert(ReviewStep).values(step))
