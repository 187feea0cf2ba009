"""The events that go out: what Ratchet announces when a run ends, a verdict falls, or the champion changes. No claim text is in them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import AwareDatetime, ConfigDict, JsonValue, TypeAdapter, with_config
from typing_extensions import TypedDict

STRICT = ConfigDict(extra="forbid", strict=True)


@with_config(STRICT)
class RunEnded(TypedDict):
    """A training or scoring run came to its end; `error` says why it did not end well."""

    run: str
    kind: Literal["train", "score"]
    state: Literal["done", "failed", "cancelled", "parked"]
    error: str | None


@with_config(STRICT)
class VersionJudged(TypedDict):
    """The one verdict on a version; `ledger` is the head of the ledger with it."""

    version: str
    verdict: Literal["promote", "reject", "superseded"]
    reasons: list[str]
    ledger: str


@with_config(STRICT)
class ChampionChanged(TypedDict):
    """Another version is in service, or is to be: `id` is the deployment. `ledger` is the head of the ledger with the change."""

    id: str
    agent: str
    kind: Literal["promote", "rollback", "revert"]
    version: str
    previous: str | None
    actor: str
    reason: str
    is_forced: bool
    ledger: str


@with_config(STRICT)
class ComparisonClosed(TypedDict):
    """An exam or a watch ended."""

    exam: str
    agent: str
    kind: Literal["exam", "watch"]
    candidate: str
    champion: str
    outcome: str
    reasons: list[str]


@with_config(STRICT)
class DeadLetterParked(TypedDict):
    """Something could not be handled; `ratchet dead-letters show LETTER` shows what it holds."""

    letter: str
    reason: str


@with_config(STRICT)
class ReviewOpened(TypedDict):
    """A case waits for an expert. What a model answered, or how sure it was, is not told; `input` is null when it was erased or is huge."""

    review: str
    agent: str
    claim_id: str
    prediction_id: str
    is_blind: bool
    expires_at: AwareDatetime | None
    input: dict[str, JsonValue] | None
    attributes: dict[str, JsonValue] | None


@with_config(STRICT)
class ReviewEnded(TypedDict):
    """A case waits no more: it was answered, or expired."""

    review: str
    agent: str
    claim_id: str
    prediction_id: str


@with_config(STRICT)
class AlarmRaised(TypedDict):
    """Something that a person should know."""

    agent: str
    kind: str
    message: str
    ledger: str


ANNOUNCEMENTS: dict[str, Any] = {
    "ratchet.run.ended.v1": RunEnded,
    "ratchet.version.judged.v1": VersionJudged,
    "ratchet.champion.promoted.v1": ChampionChanged,
    "ratchet.champion.rolled-back.v1": ChampionChanged,
    "ratchet.champion.reverted.v1": ChampionChanged,
    "ratchet.exam.closed.v1": ComparisonClosed,
    "ratchet.watch.closed.v1": ComparisonClosed,
    "ratchet.alarm.raised.v1": AlarmRaised,
    "ratchet.dead-letter.parked.v1": DeadLetterParked,
    "ratchet.review.opened.v1": ReviewOpened,
    "ratchet.review.closed.v1": ReviewEnded,
    "ratchet.review.expired.v1": ReviewEnded,
}


def json_schemas() -> dict[str, Any]:
    """The JSON Schema of the `data` of every event that goes out, for `docs/`."""
    return {kind: TypeAdapter(model).json_schema() for kind, model in ANNOUNCEMENTS.items()}
