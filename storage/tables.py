"""The schema: every table, its states and its indexes, in the order in which the data moves.

Times are aware UTC. Identifiers are ULIDs made from a time and what the row is about, so that a replay makes the same ones.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any, ClassVar

from sqlalchemy import (
    JSON,
    BigInteger,
    CheckConstraint,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    LargeBinary,
    String,
    Text,
    UniqueConstraint,
    select,
    text,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, column_property, mapped_column

from storage.columns import InputOf, UtcTime, partial, states


class Table(DeclarativeBase):
    """Everything that Ratchet remembers."""

    type_annotation_map: ClassVar[dict[Any, Any]] = {
        datetime: UtcTime,
        dict[str, Any]: JSON,
        list[str]: JSON,
        list[float]: JSON,
    }


class Installation(Table):
    """One row: who this installation is, and the key that hides claim ids in the ledger."""

    __tablename__ = "installation"
    id: Mapped[int] = mapped_column(primary_key=True)
    secret: Mapped[str]
    created_at: Mapped[datetime]


class Event(Table):
    """Everything that came in or goes out, once each; the payload may be erased, its digest stays. Our own have a number: their order."""

    __tablename__ = "events"
    ulid: Mapped[str] = mapped_column(String(26), primary_key=True)
    source: Mapped[str]
    event_id: Mapped[str]
    type: Mapped[str]
    subject: Mapped[str]
    time: Mapped[datetime]
    received_at: Mapped[datetime]
    principal: Mapped[str | None]
    data: Mapped[str | None] = mapped_column(Text)
    digest: Mapped[str]
    state: Mapped[str]
    reason: Mapped[str | None]
    handled_at: Mapped[datetime | None]
    number: Mapped[int | None] = mapped_column(BigInteger)
    __table_args__ = (
        UniqueConstraint("source", "event_id"),
        states("state", "received", "handled", "waiting", "dead", "unsent", "sent"),
        partial("events_received", "ulid", where="state = 'received'"),
        partial("events_waiting", "subject", where="state = 'waiting'"),
        partial("events_unsent", "number", "ulid", where="state = 'unsent'"),
    )


class Policy(Table):
    """A version of an agent's policy: its threshold, rules, budget, template and labels, and how its versions are judged."""

    __tablename__ = "policies"
    agent: Mapped[str] = mapped_column(primary_key=True)
    version: Mapped[int] = mapped_column(primary_key=True)
    digest: Mapped[str]
    body: Mapped[dict[str, Any]]
    created_at: Mapped[datetime]


class Prediction(Table):
    """What a model said about a claim and how it was routed; `import` rows stand for a case decided before.

    `id` is the key of the event that told of it. The claim's input lies there alone, and is erased there.
    """

    __tablename__ = "predictions"
    id: Mapped[str] = mapped_column(String(26), primary_key=True)
    agent: Mapped[str]
    prediction_id: Mapped[str]
    claim_id: Mapped[str]
    group_key: Mapped[str]
    origin: Mapped[str]
    input_digest: Mapped[str]
    attributes: Mapped[dict[str, Any]]
    decision: Mapped[str | None]
    confidence: Mapped[float | None]
    probabilities: Mapped[dict[str, Any] | None]
    model_version: Mapped[str | None]
    occurred_at: Mapped[datetime]
    received_at: Mapped[datetime]
    policy_version: Mapped[int | None]
    reasons: Mapped[list[str]]
    priority: Mapped[float]
    effective_threshold: Mapped[float | None]
    inclusion_probability: Mapped[float | None]
    input: Mapped[dict[str, Any] | None] = column_property(
        select(InputOf(Event.data)).where(Event.ulid == id).correlate_except(Event).label("input")  # noqa: A003  the column above
    )
    __table_args__ = (
        UniqueConstraint("agent", "prediction_id"),
        states("origin", "served", "import"),
        Index("predictions_of_claim", "claim_id"),
        partial("predictions_served", "agent", "id", where="origin = 'served'"),
    )


class Score(Table):
    """What a version answers on a stored claim when it is asked offline, for an exam or a watch."""

    __tablename__ = "scores"
    prediction: Mapped[str] = mapped_column(ForeignKey("predictions.id"), primary_key=True)
    agent: Mapped[str] = mapped_column(primary_key=True)
    version: Mapped[str] = mapped_column(primary_key=True)
    decision: Mapped[str]
    confidence: Mapped[float]
    probabilities: Mapped[list[float]]
    scored_at: Mapped[datetime]
    __table_args__ = (Index("scores_of_version", "agent", "version", "prediction"),)


class Review(Table):
    """A case waiting for an expert; `exam` names the exam or watch that asked, `case_key` is the same for the same claim and input."""

    __tablename__ = "reviews"
    id: Mapped[str] = mapped_column(String(26), primary_key=True)
    agent: Mapped[str]
    prediction: Mapped[str] = mapped_column(ForeignKey("predictions.id"), index=True)
    claim_id: Mapped[str]
    reasons: Mapped[list[str]]
    priority: Mapped[float]
    state: Mapped[str]
    is_blind: Mapped[bool]
    exam: Mapped[str | None] = mapped_column(ForeignKey("exams.id"))
    opened_at: Mapped[datetime]
    expires_at: Mapped[datetime | None]
    leased_by: Mapped[str | None]
    lease_until: Mapped[datetime | None]
    closed_at: Mapped[datetime | None]
    case_key: Mapped[int | None] = mapped_column(BigInteger)
    __table_args__ = (
        states("state", "open", "leased", "answered", "expired"),
        CheckConstraint("(state = 'leased') = (leased_by IS NOT NULL)", name="a_lease_has_a_holder"),
        partial("reviews_live", "agent", text("priority DESC"), "opened_at", where="state IN ('open', 'leased')"),
        partial("one_live_review", "prediction", where="state IN ('open', 'leased')", unique=True),
        partial("one_live_review_of_a_case", "claim_id", "case_key", where="state IN ('open', 'leased') AND exam IS NULL", unique=True),
        partial("reviews_leased", "lease_until", where="state = 'leased'"),
        partial("reviews_expiring", "expires_at", where="state = 'open' AND expires_at IS NOT NULL"),
        Index("reviews_opened", "agent", "opened_at"),
        partial("reviews_of_exam", "exam", where="exam IS NOT NULL"),
    )


class ReviewStep(Table):
    """One thing that happened to a review: who did what, and when; what others may want to know of it is unsent until it is told."""

    __tablename__ = "review_steps"
    id: Mapped[int] = mapped_column(BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=True)
    review: Mapped[str] = mapped_column(ForeignKey("reviews.id"), index=True)
    at: Mapped[datetime]
    actor: Mapped[str]
    action: Mapped[str]
    note: Mapped[str | None]
    is_unsent: Mapped[bool] = mapped_column(default=False)
    __table_args__ = (
        partial("review_steps_unsent", "id", where="is_unsent"),
        partial("review_steps_skipped", "actor", "review", where="action = 'skipped'"),
    )


class Label(Table):
    """One answer of an expert, an appeal or imported history; never changed, only superseded by a later one."""

    __tablename__ = "labels"
    id: Mapped[str] = mapped_column(String(26), primary_key=True)
    agent: Mapped[str]
    claim_id: Mapped[str]
    prediction: Mapped[str] = mapped_column(ForeignKey("predictions.id"), index=True)
    review: Mapped[str | None] = mapped_column(ForeignKey("reviews.id"))
    expert: Mapped[str]
    kind: Mapped[str]
    answer: Mapped[str]
    rationale: Mapped[str | None] = mapped_column(Text)
    seconds_spent: Mapped[float | None]
    answered_at: Mapped[datetime]
    received_at: Mapped[datetime]
    superseded_by: Mapped[str | None]
    dataset: Mapped[int | None]
    __table_args__ = (
        states("kind", "review", "second_read", "adjudication", "late_truth", "import"),
        Index("labels_of_claim", "agent", "claim_id"),
        partial("labels_fresh", "agent", "answered_at", where="dataset IS NULL"),
        partial("labels_read", "agent", "claim_id", "answer", where="superseded_by IS NULL AND kind IN ('review', 'second_read')"),
    )


class DatasetVersion(Table):
    """An immutable snapshot of an agent's settled labels; the rows and their label ids are in its folder."""

    __tablename__ = "dataset_versions"
    agent: Mapped[str] = mapped_column(primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)
    root: Mapped[str]
    folder: Mapped[str]
    parent: Mapped[int | None]
    rows: Mapped[int]
    manifest: Mapped[dict[str, Any]]
    created_at: Mapped[datetime]


class Version(Table):
    """A model version: what it is made of, by digest, and the one verdict on it."""

    __tablename__ = "versions"
    agent: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(primary_key=True)
    major: Mapped[int]
    minor: Mapped[int]
    base_path: Mapped[str]
    base_digest: Mapped[str]
    adapter_path: Mapped[str | None]
    adapter_digest: Mapped[str | None]
    tokenizer_digest: Mapped[str]
    prompt: Mapped[str] = mapped_column(Text)
    prompt_form: Mapped[str]
    prompt_digest: Mapped[str]
    labels: Mapped[list[str]]
    labels_digest: Mapped[str]
    temperature: Mapped[float]
    parent: Mapped[str | None]
    dataset: Mapped[int | None]
    run: Mapped[str | None]
    verdict: Mapped[str | None]
    verdict_at: Mapped[datetime | None]
    is_forced: Mapped[bool] = mapped_column(default=False)
    created_at: Mapped[datetime]
    __table_args__ = (
        UniqueConstraint("agent", "major", "minor"),
        CheckConstraint("verdict IN ('promote', 'reject', 'superseded')", name="verdict_is_known"),
    )

    @property
    def serving_name(self) -> str:
        """The name it is served under; it is never used for other weights."""
        return f"{self.agent}-{self.name}-{(self.adapter_digest or self.base_digest).removeprefix('sha256:')[:12]}"


class Run(Table):
    """One run of a trainer, from the trigger to its result or its parking: `train`, or `score` new claims for an exam."""

    __tablename__ = "runs"
    id: Mapped[str] = mapped_column(String(26), primary_key=True)
    agent: Mapped[str]
    kind: Mapped[str]
    exam: Mapped[str | None]
    state: Mapped[str]
    trigger: Mapped[str]
    reason: Mapped[str]
    actor: Mapped[str]
    options: Mapped[dict[str, Any]]
    dataset: Mapped[int | None]
    version: Mapped[str | None]
    folder: Mapped[str | None]
    attempt: Mapped[int] = mapped_column(default=0)
    failures: Mapped[int] = mapped_column(default=0)
    checkpoint: Mapped[int] = mapped_column(default=0)
    device: Mapped[str | None]
    fence: Mapped[int | None]
    heartbeat_at: Mapped[datetime | None]
    progress: Mapped[dict[str, Any] | None]
    not_before: Mapped[datetime | None]
    error: Mapped[str | None] = mapped_column(Text)
    result: Mapped[dict[str, Any] | None]
    created_at: Mapped[datetime]
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]
    __table_args__ = (
        states("state", "queued", "leased", "running", "done", "failed", "cancelled", "parked"),
        states("kind", "train", "score"),
        partial("one_live_run", "agent", "kind", where="state IN ('queued', 'leased', 'running')", unique=True),
        Index("runs_of_agent", "agent", "created_at"),
    )


class Exam(Table):
    """A candidate against the champion (`exam`), or a new champion against its predecessor (`watch`)."""

    __tablename__ = "exams"
    id: Mapped[str] = mapped_column(String(26), primary_key=True)
    agent: Mapped[str]
    kind: Mapped[str]
    candidate: Mapped[str]
    champion: Mapped[str]
    state: Mapped[str]
    opened_at: Mapped[datetime]
    closed_at: Mapped[datetime | None]
    outcome: Mapped[str | None]
    report: Mapped[dict[str, Any]]
    __table_args__ = (
        ForeignKeyConstraint(["agent", "candidate"], ["versions.agent", "versions.name"]),
        ForeignKeyConstraint(["agent", "champion"], ["versions.agent", "versions.name"]),
        states("kind", "exam", "watch"),
        states("state", "open", "closed"),
        partial("one_open_exam", "agent", "kind", where="state = 'open'", unique=True),
    )


class Alias(Table):
    """A mutable name over versions; `champion` is the one in service."""

    __tablename__ = "aliases"
    agent: Mapped[str] = mapped_column(primary_key=True)
    alias: Mapped[str] = mapped_column(primary_key=True)
    version: Mapped[str]
    deployment: Mapped[str]
    changed_at: Mapped[datetime]


class Deployment(Table):
    """One change of the champion: who, why, and whether the server confirmed it."""

    __tablename__ = "deployments"
    id: Mapped[str] = mapped_column(String(26), primary_key=True)
    agent: Mapped[str]
    number: Mapped[int]
    kind: Mapped[str]
    version: Mapped[str]
    previous: Mapped[str | None]
    actor: Mapped[str]
    reason: Mapped[str]
    is_forced: Mapped[bool]
    state: Mapped[str]
    requested_at: Mapped[datetime]
    published_at: Mapped[datetime | None]
    confirmed_at: Mapped[datetime | None]
    detail: Mapped[str | None]
    __table_args__ = (
        UniqueConstraint("agent", "number"),
        states("kind", "promote", "rollback", "revert"),
        states("state", "requested", "confirmed", "unverified", "unconfirmed", "reverted", "superseded"),
        partial("deployments_requested", "agent", where="state IN ('requested', 'unconfirmed')"),
    )


class Lease(Table):
    """Who may do a thing that only one may do at a time; the fence grows with every holder."""

    __tablename__ = "leases"
    name: Mapped[str] = mapped_column(primary_key=True)
    holder: Mapped[str | None]
    fence: Mapped[int]
    expires_at: Mapped[datetime]


class Stream(Table):
    """What one daemon that speaks to Kafka has last told of itself: lag, batches, what keeps it."""

    __tablename__ = "streams"
    holder: Mapped[str] = mapped_column(primary_key=True)
    at: Mapped[datetime]
    body: Mapped[dict[str, Any]]


class LedgerEntry(Table):
    """One link of the hash chain; no claim text, and claim ids only as HMAC. `claim` is the body's, where an index finds it."""

    __tablename__ = "ledger"
    seq: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    at: Mapped[datetime]
    kind: Mapped[str]
    agent: Mapped[str]
    claim: Mapped[str | None]
    body: Mapped[str] = mapped_column(Text)
    previous: Mapped[str]
    hash: Mapped[str]
    __table_args__ = (partial("ledger_of_claim", "claim", where="claim IS NOT NULL"),)


class DeadLetter(Table):
    """What could not be handled, with its reason, until somebody replays or discards it; a record from Kafka with its bytes and place."""

    __tablename__ = "dead_letters"
    id: Mapped[str] = mapped_column(String(26), primary_key=True)
    key: Mapped[str]
    event: Mapped[str | None]
    origin: Mapped[str]
    reason: Mapped[str] = mapped_column(Text)
    payload: Mapped[str | None] = mapped_column(Text)
    topic: Mapped[str | None]
    partition: Mapped[int | None]
    record_offset: Mapped[int | None] = mapped_column(BigInteger)
    value: Mapped[bytes | None] = mapped_column(LargeBinary)
    state: Mapped[str]
    at: Mapped[datetime]
    closed_at: Mapped[datetime | None]
    closed_by: Mapped[str | None]
    note: Mapped[str | None]
    __table_args__ = (
        states("state", "parked", "replayed", "discarded"),
        partial("dead_letters_parked", "at", where="state = 'parked'"),
        partial("one_parked_letter_of_a_key", "key", where="state = 'parked'", unique=True),
    )


class Alarm(Table):
    """Something a person should know: drift, an unconfirmed rollback, a confidence that says nothing."""

    __tablename__ = "alarms"
    id: Mapped[str] = mapped_column(String(26), primary_key=True)
    agent: Mapped[str]
    kind: Mapped[str]
    message: Mapped[str]
    detail: Mapped[dict[str, Any]]
    raised_at: Mapped[datetime]
    cleared_at: Mapped[datetime | None]
    __table_args__ = (partial("one_alarm_of_a_kind", "agent", "kind", where="cleared_at IS NULL", unique=True),)


class Token(Table):
    """An access token, by the digest of its secret."""

    __tablename__ = "tokens"
    name: Mapped[str] = mapped_column(primary_key=True)
    role: Mapped[str]
    digest: Mapped[str] = mapped_column(unique=True)
    created_at: Mapped[datetime]
    revoked_at: Mapped[datetime | None]
    __table_args__ = (states("role", "producer", "reviewer", "operator"),)
