"""Which predictions go to an expert and why: the budget's lanes, decided by a pure function."""

from __future__ import annotations

import bisect
import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

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
"""How urgent each reason is; a claim below the threshold has 1 - confidence."""

HALF_KNOWN = 10
"""A slice with so many labels is explored half as often as one that was never labelled."""

Health = Literal["ok", "constant", "missing", "saturated"]
HEALTH_SAMPLE, SATURATED_AT, MOSTLY = 20, 0.999, 0.9


class Prediction(NamedTuple):
    """What routing needs to know of a prediction."""

    agent: str
    claim_id: str
    decision: str | None
    confidence: float | None
    input: Mapping[str, Any] = MappingProxyType({})
    attributes: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class MustReview:
    """One rule: `field` is `decision`, `input.NAME` or `attributes.NAME`. A claim that lacks the field does not match."""

    field: str
    op: Literal["equals", "in", "above", "below"]
    value: Any

    def __post_init__(self) -> None:
        """Refuse a field or an operator that can never match."""
        if self.field != "decision" and not self.field.startswith(("input.", "attributes.")):
            message = f"must_review field {self.field!r} is unknown: use decision, input.NAME or attributes.NAME"
            raise ValueError(message)
        if self.op not in ("equals", "in", "above", "below"):
            message = f"must_review op {self.op!r} is unknown: use equals, in, above or below"
            raise ValueError(message)

    def matches(self, prediction: Prediction) -> bool:
        """Whether this claim always goes to an expert."""
        value = prediction.decision if self.field == "decision" else self._read(prediction)
        if value is None:
            return False
        if self.op == "equals":
            return bool(value == self.value)
        if self.op == "in":
            return value in self.value
        number = _number(value)
        return number is not None and (number > self.value if self.op == "above" else number < self.value)

    def _read(self, prediction: Prediction) -> Any:
        place, _, name = self.field.partition(".")
        return (prediction.input if place == "input" else prediction.attributes).get(name)


def _number(value: Any) -> float | None:
    """A number or the text of one; None for anything that can't be compared."""
    if isinstance(value, bool):
        return None
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


@dataclass(frozen=True, slots=True)
class RoutingPolicy:
    """An agent's threshold, rules and budget. Shares are of the traffic, except `exam_share` and `watch_share`.

    Those two are of what the budget leaves a window of claims after must-review and audit. `explore_share` is the chance that a claim of a
    slice which was never labelled is drawn; it falls as the slice's labels grow. Without a budget the fixed threshold decides. A decision
    that is not one of `labels`, where they are known, always goes to an expert.
    """

    threshold: float = 0.7
    budget_share: float | None = None
    budget_per_day: int | None = None
    audit_share: float = 0.02
    explore_share: float = 0.0
    exam_share: float = 0.8
    watch_share: float = 0.4
    must_review: tuple[MustReview, ...] = (MustReview("decision", "equals", "PENDING"),)
    slice_by: tuple[str, ...] = ()
    window: int = 250
    labels: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse shares that are no shares, and an audit that would leave claims with no chance to be seen."""
        shares = {
            "threshold": self.threshold,
            "explore_share": self.explore_share,
            "exam_share": self.exam_share,
            "watch_share": self.watch_share,
        }
        for name, value in {**shares, "budget_share": self.budget_share or 0.0}.items():
            if not 0 <= value <= 1:
                message = f"{name} is {value}: it must lie between 0 and 1"
                raise ValueError(message)
        if not 0 < self.audit_share <= 1:
            message = f"audit_share is {self.audit_share}: it must be above 0 and at most 1, or live accuracy can't be measured"
            raise ValueError(message)
        if self.window < 1 or (self.budget_per_day is not None and self.budget_per_day < 0):
            message = f"window ({self.window}) must be 1 or more and budget_per_day ({self.budget_per_day}) 0 or more"
            raise ValueError(message)

    def must_see(self, prediction: Prediction) -> bool:
        """Whether an expert sees this claim whatever the budget says."""
        if self.labels and prediction.decision not in self.labels:
            return True
        for rule in self.must_review:  # noqa: SIM110  `any` costs as much again, for every prediction
            if rule.matches(prediction):
                return True
        return False


class Spent(NamedTuple):
    """What the budget went to. `opened_today` counts all reviews of the day, `examined_today` those that an exam or a watch asked for.

    `watched` and `examined` are the reviews that a watch and an exam opened while the last window of claims came in. `is_examining`: one of
    them has more to ask about.
    """

    opened_today: int = 0
    examined_today: int = 0
    watched: int = 0
    examined: int = 0
    is_examining: bool = False


NOTHING_SPENT = Spent()


class BudgetState(NamedTuple):
    """What routing knows beside the claim: the last predictions in sum, and what was spent.

    `confidences` are the known ones of claims that no rule sends to review, sorted. `slice_labels` has keys like `region=west`.
    """

    confidences: Sequence[float] = ()
    seen: int = 0
    must_review: int = 0
    rarity: float = 0.0
    spent: Spent = NOTHING_SPENT
    slice_labels: Mapping[str, int] = MappingProxyType({})


class Decision(NamedTuple):
    """Why an expert sees the claim (no reasons: nobody does), how urgently, and the chance it had to be seen."""

    reasons: tuple[str, ...]
    priority: float
    effective_threshold: float
    inclusion_probability: float

    @property
    def is_routed(self) -> bool:
        """Whether a review is opened."""
        return bool(self.reasons)


class Lanes(NamedTuple):
    """The budget divided, as shares of the traffic. `uncertain` and `explore_scale` are rates for the claims no rule sends to review.

    `examined` is what exam and watch took of it before.
    """

    must_review: float
    audit: float
    examined: float
    uncertain: float
    explore_scale: float


class Places(NamedTuple):
    """How many reviews each may open now."""

    watch: float
    exam: float


class Window:
    """The last predictions of an agent, in the order they were handled; the one thing here that changes."""

    def __init__(self, size: int = 250) -> None:
        self._size = size
        self._recent: deque[tuple[float | None, bool, float]] = deque()
        self._confidences: list[float] = []
        self._must_review = 0
        self._rarity = 0.0

    def add(self, confidence: float | None, *, is_must_review: bool, rarity: float = 0.0) -> bool:
        """Take in one prediction and forget the oldest when the window is full; returns whether that changes the sums."""
        before = len(self._recent), self._must_review, self._rarity
        if len(self._recent) == self._size:
            self._forget(*self._recent.popleft())
        self._recent.append((confidence, is_must_review, rarity))
        if is_must_review:
            self._must_review += 1
        else:
            self._rarity += rarity
            if confidence is not None:
                bisect.insort(self._confidences, confidence)
        return before != (len(self._recent), self._must_review, self._rarity)

    def add_routed(self, prediction: Prediction, decision: Decision, policy: RoutingPolicy, slice_labels: Mapping[str, int]) -> bool:
        """Take in a prediction right after it was routed; returns whether that changes the sums."""
        known = rarity(prediction.attributes, policy, slice_labels) if policy.explore_share else 0.0
        return self.add(prediction.confidence, is_must_review=MUST_REVIEW in decision.reasons, rarity=known)

    def _forget(self, confidence: float | None, is_must_review: bool, rarity: float) -> None:
        if is_must_review:
            self._must_review -= 1
            return
        self._rarity = max(0.0, self._rarity - rarity)
        if confidence is not None:
            del self._confidences[bisect.bisect_left(self._confidences, confidence)]

    def fill(self, recent: Iterable[tuple[float | None, bool, float]]) -> None:
        """`add` many to an empty window: confidence, whether a rule sends it to review, rarity; at most as many as it holds."""
        self._recent.extend(recent)
        others = [(confidence, rarity) for confidence, is_must_review, rarity in self._recent if not is_must_review]
        self._confidences = sorted(confidence for confidence, _ in others if confidence is not None)
        self._must_review = len(self._recent) - len(others)
        self._rarity = sum((rarity for _, rarity in others), 0.0)

    def state(self, spent: Spent = NOTHING_SPENT, slice_labels: Mapping[str, int] = MappingProxyType({})) -> BudgetState:
        """The window in sum, as a value that later predictions don't change."""
        return self.view(spent, slice_labels)._replace(confidences=tuple(self._confidences))

    def view(self, spent: Spent, slice_labels: Mapping[str, int]) -> BudgetState:
        """`state` without a copy: its confidences go on with the window, its sums do not."""
        return BudgetState(self._confidences, len(self._recent), self._must_review, self._rarity, spent, slice_labels)

    def health(self) -> Health:
        """Whether these confidences can rank claims at all."""
        return confidence_health(confidence for confidence, _, _ in self._recent)


class Router:
    """Routes predictions one after another, each by those before it; the budget is divided anew only when what it depends on changes.

    Where no share is budgeted, nothing depends on the window, and it stays as it is.
    """

    def __init__(self, policy: RoutingPolicy, window: Window, spent: Spent, slice_labels: Mapping[str, int]) -> None:
        self._policy, self._window, self._spent, self._slice_labels = policy, window, spent, slice_labels
        self._divide()

    def _divide(self) -> None:
        self._state = self._window.view(self._spent, self._slice_labels)
        self._plan = divide_budget(self._policy, self._state)

    def route(self, prediction: Prediction) -> Decision:
        """`route`, and take the prediction in."""
        decision = route(prediction, self._policy, self._state, self._plan)
        is_changed = self._policy.budget_share is not None and self._window.add_routed(
            prediction, decision, self._policy, self._slice_labels
        )
        if decision.reasons and self._policy.budget_per_day is not None:
            self._spent = self._spent._replace(opened_today=self._spent.opened_today + 1)
            is_changed = True
        if is_changed:
            self._divide()
        return decision


def route(prediction: Prediction, policy: RoutingPolicy, state: BudgetState, plan: Lanes | None = None) -> Decision:
    """Decide whether an expert sees this claim, and with what probability claims like it are seen.

    The random lanes draw by hash of the claim, so that a redelivered claim is drawn as before. The probability is over all lanes jointly.
    `plan` is the budget divided, where the caller knows it.
    """
    plan = plan or divide_budget(policy, state)
    agent, claim = prediction.agent, prediction.claim_id
    chance, threshold = _uncertain_chance(prediction.confidence, policy, state, plan)
    explore = policy.explore_share * plan.explore_scale
    if explore:
        explore *= rarity(prediction.attributes, policy, state.slice_labels)
    reasons = []
    if is_forced := policy.must_see(prediction):
        reasons.append(MUST_REVIEW)
    if chance > 0 and (chance >= 1 or bucket("tie", agent, claim) < chance):
        reasons.append(CONFIDENCE_MISSING if prediction.confidence is None else BELOW_THRESHOLD)
    if bucket("audit", agent, claim) < policy.audit_share:
        reasons.append(AUDIT)
    if explore > 0 and bucket("explore", agent, claim) < explore:
        reasons.append(EXPLORE)
    inclusion = 1.0 if is_forced else 1 - (1 - policy.audit_share) * (1 - explore) * (1 - chance)
    return Decision(tuple(reasons), _priority(reasons, prediction.confidence), threshold, inclusion)


def divide_budget(policy: RoutingPolicy, state: BudgetState) -> Lanes:
    """What each lane gets of the traffic. Must-review and audit come first and are never cut.

    Exam and watch ask at once, on stored claims, and the claims of the next window give way to as many. Exploration and uncertainty divide
    the remainder.
    """
    forced = _share_forced(state)
    others = 1 - forced
    audit = others * policy.audit_share
    is_open = _is_day_open(policy, state.spent)
    if policy.budget_share is None:
        return Lanes(forced, audit, 0.0, float(is_open), float(is_open))
    examined = (state.spent.watched + state.spent.examined) / policy.window
    own = _leave(policy, state) - examined
    if not is_open or own <= 0:
        return Lanes(forced, audit, examined, 0.0, 0.0)
    wanted = policy.explore_share * state.rarity / state.seen if state.seen else 0.0
    scale = min(1.0, own / wanted) if wanted > 0 else 1.0
    explored = min(1.0, wanted * scale / others) if others else 0.0
    missed = (1 - policy.audit_share) * (1 - explored)
    rate = policy.audit_share + own / others if others else 0.0
    uncertain = min(1.0, max(0.0, 1 - (1 - rate) / missed)) if missed > 0 else 0.0
    return Lanes(forced, audit, examined, uncertain, scale)


def count_places(policy: RoutingPolicy, state: BudgetState) -> Places:
    """How many reviews a watch and an exam may open now: its part of a window's budget, less what it opened in the last window.

    Must-review and audit come first, then the watch, then the exam. Without any budget it is no limit (infinity): an exam asks at most its
    own number.
    """
    spent = state.spent
    left = math.inf if policy.budget_share is None else _leave(policy, state) * policy.window
    watch = _take_part(policy.watch_share, left, spent.watched)
    exam = _take_part(policy.exam_share, left - spent.watched, spent.examined)
    if policy.budget_per_day is not None:
        today = max(0, policy.budget_per_day - spent.opened_today)
        watch = min(watch, today, _take_part(policy.watch_share, policy.budget_per_day, spent.examined_today))
        exam = min(exam, today, _take_part(policy.exam_share, policy.budget_per_day, spent.examined_today))
    return Places(watch, exam)


def _take_part(share: float, of: float, taken: int) -> float:
    return max(0.0, share * of - taken) if share else 0.0


def _share_forced(state: BudgetState) -> float:
    return state.must_review / state.seen if state.seen else 0.0


def _leave(policy: RoutingPolicy, state: BudgetState) -> float:
    """The share of the traffic that the budget leaves after must-review and audit."""
    forced = _share_forced(state)
    return max(0.0, (policy.budget_share or 0.0) - forced - (1 - forced) * policy.audit_share)


def _is_day_open(policy: RoutingPolicy, spent: Spent) -> bool:
    """Whether today's budget has room for a review that no rule, audit, exam or watch asks for."""
    if policy.budget_per_day is None:
        return True
    own = policy.budget_per_day * (1 - policy.exam_share if spent.is_examining else 1)
    return spent.opened_today < policy.budget_per_day and spent.opened_today - spent.examined_today < own


def _uncertain_chance(confidence: float | None, policy: RoutingPolicy, state: BudgetState, plan: Lanes) -> tuple[float, float]:
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
    if not reasons:
        return 0.0
    doubt = 0.0 if confidence is None else 1 - confidence
    return max(PRIORITIES.get(reason, doubt) for reason in reasons)


def rarity(attributes: Mapping[str, Any], policy: RoutingPolicy, slice_labels: Mapping[str, int]) -> float:
    """1 for a claim with a slice that was never labelled, falling to 0 as its rarest slice gets labels."""
    if not policy.slice_by:
        return 0.0
    fewest = min(slice_labels.get(slice_key(name, attributes.get(name)), 0) for name in policy.slice_by)
    return HALF_KNOWN / (HALF_KNOWN + fewest)


def confidence_health(recent: Iterable[float | None]) -> Health:
    """Whether an agent's recent confidences can rank claims; `ok` while too few are known to tell."""
    values = list(recent)
    if len(values) < HEALTH_SAMPLE:
        return "ok"
    known = [value for value in values if value is not None]
    if 2 * len(known) < len(values):
        return "missing"
    if max(known) - min(known) < 1e-9:  # noqa: PLR2004  the same number but for rounding
        return "constant"
    return "saturated" if sum(value >= SATURATED_AT for value in known) >= MOSTLY * len(known) else "ok"
