"""What routing knows beside the claim, read from the database: an agent's last predictions, and what its budget went to."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime

from sqlalchemy import Connection

from consumers import budget, routing, rules
from storage import exams, predictions, reviews


def read_window(connection: Connection, agent: str, policy: rules.RoutingPolicy, slice_labels: Mapping[str, int]) -> budget.Window:
    """The agent's last predictions as the router saw them."""
    window = budget.Window(policy.window)
    forced = f'"{routing.MUST_REVIEW}"'
    if policy.explore_share:
        routed = predictions.read_routed(connection, agent, policy.window)
        window.fill(
            (confidence, forced in reasons, routing.rarity(attributes, policy, slice_labels)) for confidence, reasons, attributes in routed
        )
    else:
        known = predictions.read_confidences(connection, agent, policy.window)
        window.fill((confidence, forced in reasons, 0.0) for confidence, reasons in known)
    return window


def read_spent(connection: Connection, agent: str, policy: rules.RoutingPolicy, now: datetime) -> budget.Spent:
    """What the agent's budget went to lately; without a budget nobody needs to know."""
    spent = budget.NOTHING_SPENT
    if policy.budget_share is not None:
        asked = exams.count_asked(connection, agent, predictions.find_window_start(connection, agent, policy.window))
        spent = spent._replace(watched=asked["watch"], examined=asked["exam"])
    if policy.budget_per_day is not None:
        opened, examined = reviews.count_opened(connection, agent, now.replace(hour=0, minute=0, second=0, microsecond=0))
        is_examining = exams.is_asking(connection, agent)
        spent = spent._replace(opened_today=opened, examined_today=examined, is_examining=is_examining)
    return spent
