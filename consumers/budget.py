"""How many reviews there may be: the last predictions, what was spent, and the shares of rules, audit, watch, exam and doubt."""

from __future__ import annotations

import bisect
import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Literal, NamedTuple

from consumers.rules import RoutingPolicy

Health = Literal["ok", "constant", "missing", "saturated"]

HEALTH_SAMPLE, SATURATED_AT, MOSTLY = 20, 0.999, 0.9


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


class State(NamedTuple):
    """What routing knows beside the claim: the last predictions in sum, and what was spent.

    `confidences` are the known ones of claims that no rule sends to review, sorted. `slice_labels` has keys like `region=west`.
    """

    confidences: Sequence[float] = ()
    seen: int = 0
    must_review: int = 0
    rarity: float = 0.0
    spent: Spent = NOTHING_SPENT
    slice_labels: Mapping[str, int] = MappingProxyType({})


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

    def state(self, spent: Spent = NOTHING_SPENT, slice_labels: Mapping[str, int] = MappingProxyType({})) -> State:
        """The window in sum, as a value that later predictions don't change."""
        return self.view(spent, slice_labels)._replace(confidences=tuple(self._confidences))

    def view(self, spent: Spent, slice_labels: Mapping[str, int]) -> State:
        """`state` without a copy: its confidences go on with the window, its sums do not."""
        return State(self._confidences, len(self._recent), self._must_review, self._rarity, spent, slice_labels)

    def health(self) -> Health:
        """Whether these confidences can rank claims at all."""
        return confidence_health(confidence for confidence, _, _ in self._recent)


def divide(policy: RoutingPolicy, state: State) -> Lanes:
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


def count_places(policy: RoutingPolicy, state: State) -> Places:
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


def _share_forced(state: State) -> float:
    return state.must_review / state.seen if state.seen else 0.0


def _leave(policy: RoutingPolicy, state: State) -> float:
    """The share of the traffic that the budget leaves after must-review and audit."""
    forced = _share_forced(state)
    return max(0.0, (policy.budget_share or 0.0) - forced - (1 - forced) * policy.audit_share)


def _is_day_open(policy: RoutingPolicy, spent: Spent) -> bool:
    """Whether today's budget has room for a review that no rule, audit, exam or watch asks for."""
    if policy.budget_per_day is None:
        return True
    own = policy.budget_per_day * (1 - policy.exam_share if spent.is_examining else 1)
    return spent.opened_today < policy.budget_per_day and spent.opened_today - spent.examined_today < own


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
