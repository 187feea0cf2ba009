"""The watch after a promotion: the exam turned round, the new champion against its predecessor on live claims."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from daemon import gate, significance

Move = Literal["rollback", "alarm_drift", "end", "continue"]


@dataclass(frozen=True, slots=True)
class WatchPolicy:
    """How much evidence of harm rolls back, and when the watch has seen enough."""

    alpha: float = 0.1
    max_asked: int = 60
    max_days: float = 30
    audit_min: int = 100
    confidence: float = 0.95


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Right answers of all that a random audit checked."""

    right: int = 0
    total: int = 0

    @property
    def share(self) -> float | None:
        """The accuracy, None when nothing was checked."""
        return self.right / self.total if self.total else None


@dataclass(frozen=True, slots=True)
class Audited:
    """One version's accuracy on random audits: before this promotion and since."""

    before: Accuracy = Accuracy()
    now: Accuracy = Accuracy()


@dataclass(frozen=True, slots=True)
class WatchEvidence:
    """What the watch knows. In `pairs` the candidate is the new champion and the champion its predecessor; only differing claims count.

    `days` have passed since the promotion. `champion` and `predecessor` are their audits, each scored on the same kind of claims.
    """

    pairs: tuple[gate.Pair, ...] = ()
    asked: int = 0
    days: float = 0.0
    champion: Audited = Audited()
    predecessor: Audited = Audited()


@dataclass(frozen=True, slots=True)
class Action:
    """What to do, why in sentences, and the numbers behind it (ready for JSON)."""

    move: Move
    reasons: tuple[str, ...]
    numbers: Mapping[str, Any]


def watch(evidence: WatchEvidence, policy: WatchPolicy) -> Action:
    """Roll back when harm against the predecessor is shown; alarm when both fell behind themselves; end when enough was seen.

    Harm goes first: when the predecessor is better now, going back helps, whatever else has changed. `is_world_changed` is in the
    numbers then too, for the alarm.
    """
    counts = gate.tally(evidence.pairs)
    numbers = report_watch(evidence, counts, policy)
    score = f"where they differ the new champion won {counts.wins} and lost {counts.losses} of {counts.answered}"
    if numbers["evalue_harm"] >= 1 / policy.alpha:
        return Action("rollback", (f"The predecessor is better now: {score} (e-value {numbers['evalue_harm']:.1f}).",), numbers)
    if numbers["is_world_changed"]:
        return Action("alarm_drift", (_explain_drift(evidence),), numbers)
    if counts.answered >= policy.max_asked:
        return Action("end", (f"No harm shown after {counts.answered} answers: {score}.",), numbers)
    if evidence.days >= policy.max_days:
        return Action("end", (f"No harm shown in {evidence.days:.0f} days: {score}.",), numbers)
    return Action("continue", (f"No harm shown so far: {score}.",), numbers)


def report_watch(evidence: WatchEvidence, counts: gate.Tally, policy: WatchPolicy) -> dict[str, Any]:
    """Every number of the watch."""
    fallen = {"champion": _has_fallen(evidence.champion, policy), "predecessor": _has_fallen(evidence.predecessor, policy)}
    return {
        "asked": evidence.asked,
        "answered": counts.answered,
        "days": evidence.days,
        "wins": counts.wins,
        "losses": counts.losses,
        "neither": counts.neither,
        "evalue_harm": significance.mixture_evalue(counts.losses, counts.wins),
        "evalue_better": significance.mixture_evalue(counts.wins, counts.losses),
        "more_losses_to_rollback": _count_losses(counts, policy),
        "audits": {"champion": _describe(evidence.champion), "predecessor": _describe(evidence.predecessor)},
        "fallen": fallen,
        "is_world_changed": all(fallen.values()),
    }


def _has_fallen(audited: Audited, policy: WatchPolicy) -> bool:
    """Whether a version is shown to be below its own accuracy of before, on enough audits since."""
    if audited.now.total < policy.audit_min or not audited.before.total:
        return False
    before, now = audited.before, audited.now
    return significance.fall_test((before.right, before.total), (now.right, now.total)) <= round(1 - policy.confidence, 9)


def _count_losses(counts: gate.Tally, policy: WatchPolicy) -> int:
    """How many more losses in a row would roll back."""
    more = 0
    while significance.mixture_evalue(counts.losses + more, counts.wins) < 1 / policy.alpha:
        more += 1
    return more


def _describe(audited: Audited) -> dict[str, Any]:
    return {
        name: {"right": accuracy.right, "total": accuracy.total, "share": accuracy.share}
        for name, accuracy in (("before", audited.before), ("now", audited.now))
    }


def _explain_drift(evidence: WatchEvidence) -> str:
    parts = [
        f"{name} from {audited.before.share or 0:.3f} to {audited.now.share or 0:.3f} on {audited.now.total} audits"
        for name, audited in (("the champion", evidence.champion), ("its predecessor", evidence.predecessor))
    ]
    return f"The world has changed, not the version: {' and '.join(parts)}, so going back would not help."
