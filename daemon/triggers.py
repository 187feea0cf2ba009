"""When to train: a pure decision on facts that the caller has read."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Literal, NamedTuple

Kind = Literal["manual", "policy", "drift", "labels", "cron"]


@dataclass(frozen=True, slots=True)
class TriggerPolicy:
    """What starts a training. `labels` is how many new ones suffice by themselves; but for another question the rest need `labels_min`."""

    labels: int = 75
    labels_min: int = 1
    on_drift: bool = True
    on_policy_change: bool = True


@dataclass(frozen=True, slots=True)
class TriggerFacts:
    """What is known at a tick. `new_labels` are settled and were in no dataset yet; the last training's facts are None before the first.

    `last_cron_due_at` is the last time the agent's schedule fell due. `drift_alarm_at` is the last drift alarm's time, with its words.
    A question is what is asked of the models, and of which base; `policy_changes` are the policy's keys that changed since then.
    """

    new_labels: int = 0
    is_training: bool = False
    last_trained_at: datetime | None = None
    last_cron_due_at: datetime | None = None
    drift_alarm_at: datetime | None = None
    drift_reason: str = ""
    question_digest: str | None = None
    trained_question_digest: str | None = None
    policy_changes: tuple[str, ...] = ()
    manual_reason: str | None = None


class Trigger(NamedTuple):
    """Why a training starts: the kind and a sentence, both stored with the run."""

    kind: Kind
    reason: str


def should_retrain(facts: TriggerFacts, policy: TriggerPolicy) -> Trigger | None:
    """The first cause that holds, strongest first; None while a training is under way or nothing calls for one."""
    if facts.is_training:
        return None
    return _by_hand(facts) or _by_policy(facts, policy) or _by_drift(facts, policy) or _by_labels(facts, policy) or _by_cron(facts, policy)


def _by_hand(facts: TriggerFacts) -> Trigger | None:
    return Trigger("manual", facts.manual_reason) if facts.manual_reason is not None else None


def _by_policy(facts: TriggerFacts, policy: TriggerPolicy) -> Trigger | None:
    """A prompt or policy other than the one trained with; before the first training there is nothing that it could have changed from."""
    if not policy.on_policy_change:
        return None
    if facts.trained_question_digest not in (None, facts.question_digest):
        return Trigger("policy", f"Prompt, labels or base changed from {facts.trained_question_digest} to {facts.question_digest}.")
    if facts.policy_changes and facts.new_labels >= policy.labels_min:
        return Trigger("policy", f"The policy changed in {', '.join(facts.policy_changes)}, with {facts.new_labels} new labels.")
    return None


def _by_drift(facts: TriggerFacts, policy: TriggerPolicy) -> Trigger | None:
    if not policy.on_drift or not _is_new(facts.drift_alarm_at, facts) or facts.new_labels < policy.labels_min:
        return None
    return Trigger("drift", f"Drift alarm. {facts.drift_reason}".strip())


def _by_labels(facts: TriggerFacts, policy: TriggerPolicy) -> Trigger | None:
    if facts.new_labels < policy.labels:
        return None
    return Trigger("labels", f"{facts.new_labels} new labels (a training starts at {policy.labels}).")


def _by_cron(facts: TriggerFacts, policy: TriggerPolicy) -> Trigger | None:
    if facts.last_cron_due_at is None or not _is_new(facts.last_cron_due_at, facts) or facts.new_labels < policy.labels_min:
        return None
    return Trigger("cron", f"The schedule fell due at {facts.last_cron_due_at.isoformat()} with {facts.new_labels} new labels.")


def _is_new(happened_at: datetime | None, facts: TriggerFacts) -> bool:
    """Whether it happened after the last training began."""
    return happened_at is not None and (facts.last_trained_at is None or happened_at > facts.last_trained_at)
