"""A reviewer's desk: the case to look at now, what its expert may see of it, and what they decide.

The model's answer, and all that hints at it, is shown to an expert only after they answered, or chose to see it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Literal

import orjson
from pydantic import BaseModel, ConfigDict
from sqlalchemy import Connection, Engine, RowMapping

from consumers import delivery, handlers, rules, schemas
from daemon import status
from storage import db, events, labels, reviews, tokens

Source = Literal["api", "review-page"]
CLOSED = {"leased": "with another expert now", "answered": "answered by another expert", "expired": "not asked any more"}


class UnknownReviewError(LookupError):
    """There is no review of this id."""


class AnswerRefusedError(ValueError):
    """The event door did not take the answer."""

    def __init__(self, refusal: schemas.Refusal) -> None:
        super().__init__(str(refusal))
        self.refusal = refusal


class Value(BaseModel):
    """A frozen value that OpenAPI can describe."""

    model_config = ConfigDict(frozen=True, protected_namespaces=())


class ModelAnswer(Value):
    """What the model said."""

    answer: str
    confidence: float | None
    version: str | None


class ExpertAnswer(Value):
    """What this expert said."""

    ulid: str
    answer: str
    rationale: str | None
    answered_at: datetime


class Step(Value):
    """One thing that happened to a review."""

    at: datetime
    actor: str
    action: str
    note: str | None


class Case(Value):
    """A review as one person may see it: `input` while it is theirs, `model`, `reasons` and `history` once they can't be swayed."""

    id: str
    agent: str
    claim_id: str
    state: Literal["open", "leased", "answered", "expired"]
    answers: tuple[str, ...]
    is_blind: bool
    is_yours: bool
    opened_at: datetime
    lease_until: datetime | None
    input: dict[str, Any] | None = None
    attributes: dict[str, Any] | None = None
    yours: ExpertAnswer | None = None
    model: ModelAnswer | None = None
    reasons: list[str] | None = None
    history: list[Step] | None = None


class Answered(Value):
    """What became of an answer; `ulid` names its event."""

    ulid: str
    outcome: Literal["stored", "duplicate"]


@dataclass(frozen=True, slots=True)
class Progress:
    """An expert's day, and what still waits."""

    answered_today: int
    waiting: int


@dataclass(frozen=True, slots=True)
class Desk:
    """Everything that experts do with reviews; `leases` says for each agent how long a case is somebody's."""

    engine: Engine
    agents: Mapping[str, rules.Agent]
    leases: Mapping[str, timedelta]
    clock: Callable[[], datetime]

    def take_next(self, expert: tokens.Principal, agent: str | None = None) -> Case | None:
        """Lease the case that the expert should look at now; None when nothing waits for them."""
        now, asked = self.clock(), [agent] if agent else list(self.agents)
        with db.writing(self.engine) as connection:
            row = reviews.lease_next(connection, asked, expert.name, now, timedelta(minutes=15))
            if row is not None:  # it is theirs now; how long depends on whose it is
                row = reviews.lease_next(connection, [row["agent"]], expert.name, now, self.leases[row["agent"]])
            return self._show(connection, row, expert) if row is not None else None

    def take_back(self, review: str, expert: tokens.Principal) -> Case:
        """The case once more, on lease to the expert where nobody else has it; one that they answered is shown as it is.

        Raises `UnknownReviewError`, `reviews.ReviewClosedError`.
        """
        now = self.clock()
        with db.writing(self.engine) as connection:
            reviews.return_expired_leases(connection, now)
            row = _read(connection, review)
            if not labels.of_review(connection, review, expert.name) and not _is_held(row, expert):
                if row["state"] != "open":
                    raise reviews.ReviewClosedError(f"review {review} is {CLOSED[row['state']]}: ask for the next one")
                reviews.lease(connection, review, expert.name, now, self.leases[row["agent"]])
            return self._show(connection, _read(connection, review), expert)

    def look_at(self, review: str, person: tokens.Principal) -> Case:
        """A review as the person may see it. Raises `UnknownReviewError`."""
        with db.reading(self.engine) as connection:
            return self._show(connection, _read(connection, review), person)

    def answer(
        self, review: str, expert: tokens.Principal, answer: str, rationale: str | None, seconds_spent: float | None, source: Source
    ) -> Answered:
        """Send the expert's answer through the event door; the same answer again is the same label, another one supersedes it.

        An answer is taken while nobody else has the case, and from whoever had it when another answer closed it: that is a second read.
        Raises `UnknownReviewError`, `reviews.ReviewClosedError`, `AnswerRefusedError`.
        """
        now = self.clock()
        with db.writing(self.engine) as connection:
            reviews.return_expired_leases(connection, now)
            row = _read(connection, review)
            given = labels.of_review(connection, review, expert.name)
            if given and (given[-1]["answer"], given[-1]["rationale"]) == (answer, rationale):
                return Answered(ulid=given[-1]["id"], outcome="duplicate")
            is_second = row["state"] == "answered" and reviews.last_holder(connection, review) == expert.name
            if not (given or is_second or row["state"] == "open" or _is_held(row, expert)):
                raise reviews.ReviewClosedError(f"review {review} is {CLOSED[row['state']]}: ask for the next one")
            data = {"agent": row["agent"], "claim_id": row["claim_id"], "review_id": review, "answer": answer, "answered_at": now}
            optional = {"rationale": rationale, "seconds_spent": seconds_spent, "kind": "second_read" if is_second and not given else None}
            data |= {name: value for name, value in optional.items() if value is not None}
            envelope = {"specversion": "1.0", "type": schemas.LABEL, "source": source, "id": f"{review}/{expert.name}/{len(given) + 1}"}
            return self._deliver(connection, {**envelope, "data": data}, expert, now)

    def _deliver(self, connection: Connection, event: Mapping[str, Any], expert: tokens.Principal, now: datetime) -> Answered:
        """Store the label as any other, and handle it at once, so that the review is closed before the next one is asked for."""
        labels_of = {name: agent.labels for name, agent in self.agents.items()}
        delivered = delivery.deliver(connection, schemas.parse(orjson.dumps([event]), schemas.LABEL), labels_of, expert, now)[0]
        if delivered.refusal is not None or delivered.ulid is None:
            raise AnswerRefusedError(delivered.refusal or schemas.Refusal("answer", delivered.outcome, "was not taken"))
        handlers.handle_batch(connection, events.read_unhandled(connection, [delivered.ulid]), self.agents, now)
        return Answered(ulid=delivered.ulid, outcome="stored")

    def skip(self, review: str, expert: tokens.Principal, reason: str) -> None:
        """Give the case back with a reason. Raises `UnknownReviewError`, `reviews.ReviewClosedError`."""
        with db.writing(self.engine) as connection:
            _read(connection, review)
            reviews.skip(connection, review, expert.name, reason, self.clock())

    def reveal(self, review: str, expert: tokens.Principal) -> Case:
        """Record that the expert wants to see the model's answer first. Raises as `skip`; a blind review is closed to this."""
        with db.writing(self.engine) as connection:
            if not _is_held(_read(connection, review), expert):
                raise reviews.ReviewClosedError(f"review {review} is not on lease to {expert.name}: ask for the next one")
            reviews.reveal(connection, review, expert.name, self.clock())
            return self._show(connection, _read(connection, review), expert)

    def count(self, expert: tokens.Principal) -> Progress:
        """How far the expert has come today (in UTC), over all agents."""
        since = status.begin_day(self.clock())
        with db.reading(self.engine) as connection:
            done = sum(labels.count_by_expert(connection, agent, expert.name, since) for agent in self.agents)
            return Progress(done, sum(reviews.count_live(connection, agent)["open"] for agent in self.agents))

    def _show(self, connection: Connection, row: RowMapping, person: tokens.Principal) -> Case:
        given = labels.of_review(connection, row["id"], person.name)
        is_held, is_operator = _is_held(row, person), person.role == "operator"
        has_revealed = reviews.was_revealed(connection, row["id"], person.name)
        case = Case(
            **{name: row[name] for name in ("id", "agent", "claim_id", "state", "is_blind", "opened_at")},
            answers=self.agents[row["agent"]].labels if row["agent"] in self.agents else (),
            is_yours=is_held,
            lease_until=row["lease_until"] if is_held or is_operator else None,
        )
        shown: dict[str, Any] = {}
        if is_held or given or is_operator:
            shown |= {"input": row["input"], "attributes": row["attributes"]}
        if given:
            last = given[-1]
            shown["yours"] = ExpertAnswer(ulid=last["id"], **{name: last[name] for name in ("answer", "rationale", "answered_at")})
        if given or is_operator or (is_held and has_revealed and not row["is_blind"]):
            shown["model"] = ModelAnswer(answer=row["decision"], confidence=row["confidence"], version=row["model_version"])
            shown |= {"reasons": row["reasons"], "history": [Step(**step) for step in reviews.history(connection, row["id"])]}
        return case.model_copy(update=shown)


def _read(connection: Connection, review: str) -> RowMapping:
    row = reviews.read(connection, review)
    if row is None:
        raise UnknownReviewError(f"there is no review {review}: ask for the next one")
    return row


def _is_held(row: RowMapping, expert: tokens.Principal) -> bool:
    return bool(row["state"] == "leased" and row["leased_by"] == expert.name)
