"""What is laid down for an agent: its labels, its routing policy, and the rules that always send a claim to an expert."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

from msgspec import Struct


class Prediction(Struct, frozen=True, gc=False):
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


@dataclass(frozen=True, slots=True)
class Agent:
    """What a handler needs to know of an agent: its labels, the routing policy in force, and how long a review is worth asking."""

    name: str
    labels: tuple[str, ...]
    policy: RoutingPolicy
    policy_version: int
    review_days: float = 30.0
