"""Which predictions go to an expert and why: the budget's lanes, decided by a pure function."""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from msgspec import Struct

from consumers import budget, rules
from storage.sampling import bucket, slice_key

BELOW_THRESHOLD, MUST_REVIEW, AUDIT, EXPLORE, CONFIDENCE_MISSING = (
    "below_threshold",
    "must_review",
    "audit",
    "explore",
    "confidence_missing",
)
EXAM, WATCH = "exam", "watch"
PRIORITIES: Mapping[str, float] = MappingProxyType(
    {MUST_REVIEW: 3.0, WATCH: 2.5, EXAM: 2.0, EXPLORE: 0.6, AUDIT: 0.5, CONFIDENCE_MISSING: 0.5}
)
"""How urgent each reason is; a claim below the threshold has 1 - confidence, to two digits: of like cases the oldest comes first."""

HALF_KNOWN = 10
"""A slice with so many labels is explored half as often as one that was never labelled."""


class Decision(Struct, frozen=True, gc=False):
    """Why an expert sees the claim (no reasons: nobody does), how urgently, and the chance it had to be seen."""

    reasons: tuple[str, ...]
    priority: float
    effective_threshold: float
    inclusion_probability: float

    @property
    def is_routed(self) -> bool:
        """Whether a review is opened."""
        return bool(self.reasons)


class Router:
    """Routes predictions one after another, each by those before it; the budget is divided anew only when what it depends on changes.

    Where no share is budgeted, nothing depends on the window, and it stays as it is.
    """

    def __init__(self, policy: rules.RoutingPolicy, window: budget.Window, spent: budget.Spent, slice_labels: Mapping[str, int]) -> None:
        self._policy, self._window, self._spent, self._slice_labels = policy, window, spent, slice_labels
        self._is_budgeted = policy.budget_share is not None or policy.budget_per_day is not None
        self._divide()

    def _divide(self) -> None:
        self._state = self._window.view(self._spent, self._slice_labels)
        self._plan = budget.divide(self._policy, self._state)

    def route(self, prediction: rules.Prediction) -> Decision:
        """`route`, and take the prediction in."""
        decision = route(prediction, self._policy, self._state, self._plan)
        if self._is_budgeted:
            self._take_in(prediction, decision)
        return decision

    def _take_in(self, prediction: rules.Prediction, decision: Decision) -> None:
        is_changed = self._policy.budget_share is not None and add_routed(
            self._window, prediction, decision, self._policy, self._slice_labels
        )
        if decision.reasons and self._policy.budget_per_day is not None:
            self._spent = self._spent._replace(opened_today=self._spent.opened_today + 1)
            is_changed = True
        if is_changed:
            self._divide()


def route(prediction: rules.Prediction, policy: rules.RoutingPolicy, state: budget.State, plan: budget.Lanes | None = None) -> Decision:
    """Decide whether an expert sees this claim, and with what probability claims like it are seen.

    The random lanes draw by hash of the claim, so that a redelivered claim is drawn as before. The probability is over all lanes jointly.
    `plan` is the budget divided, where the caller knows it.
    """
    plan = plan or budget.divide(policy, state)
    agent, claim, confidence, audit = prediction.agent, prediction.claim_id, prediction.confidence, policy.audit_share
    chance, threshold = _uncertain_chance(confidence, policy, state, plan)
    explore = policy.explore_share * plan.explore_scale
    if explore:
        explore *= rarity(prediction.attributes, policy, state.slice_labels)
    is_forced = policy.must_see(prediction)
    reasons = [MUST_REVIEW] if is_forced else []
    if chance and (chance >= 1 or bucket("tie", agent, claim) < chance):
        reasons.append(CONFIDENCE_MISSING if confidence is None else BELOW_THRESHOLD)
    if bucket("audit", agent, claim) < audit:
        reasons.append(AUDIT)
    if explore and bucket("explore", agent, claim) < explore:
        reasons.append(EXPLORE)
    inclusion = 1.0 if is_forced else 1 - (1 - audit) * (1 - explore) * (1 - chance)
    return Decision(tuple(reasons), _priority(reasons, confidence) if reasons else 0.0, threshold, inclusion)


def add_routed(
    window: budget.Window, prediction: rules.Prediction, decision: Decision, policy: rules.RoutingPolicy, slice_labels: Mapping[str, int]
) -> bool:
    """Let the window take in a prediction right after it was routed; returns whether that changes the sums."""
    known = rarity(prediction.attributes, policy, slice_labels) if policy.explore_share else 0.0
    return window.add(prediction.confidence, is_must_review=MUST_REVIEW in decision.reasons, rarity=known)


def _uncertain_chance(
    confidence: float | None, policy: rules.RoutingPolicy, state: budget.State, plan: budget.Lanes
) -> tuple[float, float]:
    """The chance that this claim is among the uncertain ones, and the threshold that this means.

    With a budget the claim is ranked among the recent ones and itself: those that surely lie in the lane's share get 1, those tied at its
    edge divide what remains of it. So the expected share is exact for exchangeable traffic, from the first claim on, and constant
    confidences are thinned at random. A missing confidence can't be ranked and gets the lane's share.
    """
    rate = plan.uncertain
    if policy.budget_share is None:
        is_below = confidence is None or confidence < policy.threshold
        return float(is_below) * rate, policy.threshold if rate else 0.0
    known = state.confidences
    if confidence is None:
        return rate, known[max(0, math.ceil(rate * len(known)) - 1)] if known and rate else 0.0
    below = bisect.bisect_left(known, confidence)
    tied = bisect.bisect_right(known, confidence) - below + 1
    places = rate * (len(known) + 1)
    if places <= 0:
        return 0.0, 0.0
    edge = math.ceil(places) - 1
    threshold = known[edge] if edge < below else confidence if edge < below + tied else known[edge - 1]
    return min(1.0, max(0.0, (places - below) / tied)), threshold


def _priority(reasons: list[str], confidence: float | None) -> float:
    """The most urgent reason counts."""
    doubt = 0.0 if confidence is None else float(f"{1 - confidence:.2g}")
    return max(PRIORITIES.get(reason, doubt) for reason in reasons)


def rarity(attributes: Mapping[str, Any], policy: rules.RoutingPolicy, slice_labels: Mapping[str, int]) -> float:
    """1 for a claim with a slice that was never labelled, falling to 0 as its rarest slice gets labels."""
    if not policy.slice_by:
        return 0.0
    fewest = min(slice_labels.get(slice_key(name, attributes.get(name)), 0) for name in policy.slice_by)
    return HALF_KNOWN / (HALF_KNOWN + fewest)
