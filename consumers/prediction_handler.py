"""What a prediction does: it is routed and stored, an expert may be asked, and labels that came before it are applied.

A redelivered prediction keeps its first decision.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

import orjson
from sqlalchemy import Connection

from consumers import budget, label_handler, routing, rules, windows, work
from storage import events, labels, predictions, reviews

NEVER_EXPIRE = {routing.AUDIT, routing.MUST_REVIEW, routing.EXAM, routing.WATCH}


class RepeatedError(RuntimeError):
    """A prediction id is stored already, or two events bring it: the transaction must not go on with what was stored beside it."""


def handle(connection: Connection, items: Sequence[work.Item], agents: Mapping[str, rules.Agent], now: datetime) -> Counter[str]:
    """Route and store predictions, ask experts, and apply the labels that waited.

    Raises `RepeatedError` unless all of them are new, as in nearly every batch; what it stored must be rolled back then.
    """
    outcome: Counter[str] = Counter()
    rows: list[predictions.New] = []
    for name, mine in _by_agent(items).items():
        new = _route_all(connection, agents[name], mine, now)
        if predictions.insert_new(connection, new) < len(new):
            raise RepeatedError("one of these prediction ids is stored already")
        rows += new
        outcome += work.mark_handled(connection, mine, now)
    return outcome + _ask(connection, rows, agents, now)


def handle_repeated(connection: Connection, items: Sequence[work.Item], agents: Mapping[str, rules.Agent], now: datetime) -> Counter[str]:
    """`handle` those that are new, and settle the others. Raises `RepeatedError` when another consumer stored one a moment ago."""
    outcome: Counter[str] = Counter()
    new: list[work.Item] = []
    for mine in _by_agent(items).values():
        outcome += _drop_repeated(connection, mine, now)
        new += mine
    return outcome + handle(connection, new, agents, now)


def _by_agent(items: Sequence[work.Item]) -> dict[str, list[work.Item]]:
    found: dict[str, list[work.Item]] = {}
    for item in items:
        found.setdefault(item[1]["agent"], []).append(item)
    return found


def _ask(connection: Connection, rows: Sequence[predictions.New], agents: Mapping[str, rules.Agent], now: datetime) -> Counter[str]:
    """Open a review for each that was routed to an expert, and apply the labels that came before."""
    routed = _drop_under_review(connection, [row for row in rows if row.reasons])
    reviews.open_new(connection, [_to_review(row, agents[row.agent], now) for row in routed], now, "ratchet")
    return label_handler.apply_waiting(connection, rows, agents, now)


def _drop_under_review(connection: Connection, rows: Sequence[predictions.New]) -> list[predictions.New]:
    """Leave out what an expert is asked already: the same claim with the same input, predicted once more."""
    asked = reviews.find_live_cases(connection, {row.claim_id for row in rows}, {row.id for row in rows}) if rows else set()
    new = []
    for row in rows:
        case = row.agent, row.claim_id, row.input_digest
        if case not in asked:
            asked.add(case)
            new.append(row)
    return new


def _drop_repeated(connection: Connection, items: list[work.Item], now: datetime) -> Counter[str]:
    """Take out predictions that are stored already: the same again is done, other content under a used id is a conflict."""
    agent = items[0][1]["agent"]
    known = predictions.find_known(connection, agent, [data["prediction_id"] for _, data in items])
    new, repeated = [], []
    for event, data in items:
        if data["prediction_id"] in known:
            repeated.append((event, data))
        else:
            known[data["prediction_id"]] = event.ulid
            new.append((event, data))
    items[:] = new
    outcome: Counter[str] = Counter()
    for event, data in repeated:
        outcome += _settle_repeated(connection, event, data["prediction_id"], known[data["prediction_id"]], now)
    return outcome


def _settle_repeated(connection: Connection, event: events.Stored, prediction_id: str, known: str, now: datetime) -> Counter[str]:
    first = events.read(connection, known)
    if first is None or first.data is None or event.data is None or orjson.loads(first.data) != orjson.loads(event.data):
        return work.park(connection, event, f"prediction id {prediction_id!r} was used for another prediction ({known})", now)
    events.mark(connection, [event.ulid], "handled", now, None if known == event.ulid else f"repeats {known}")
    return Counter(handled=1)


def _route_all(connection: Connection, agent: rules.Agent, items: Sequence[work.Item], now: datetime) -> list[predictions.New]:
    policy = agent.policy
    counts_by_slice = labels.count_by_attributes(connection, agent.name, policy.slice_by) if policy.explore_share else {}
    is_budgeted = policy.budget_share is not None
    window = windows.read_window(connection, agent.name, policy, counts_by_slice) if is_budgeted else budget.Window(policy.window)
    router = routing.Router(policy, window, windows.read_spent(connection, agent.name, policy, now), counts_by_slice)
    rows = []
    for event, data in items:
        get = data.get
        asked = rules.Prediction(agent.name, data["claim_id"], data["decision"], get("confidence"), data["input"], get("attributes") or {})
        rows.append(_to_row(event, data, asked, agent.policy_version, router.route(asked), now))
    return rows


def _to_row(
    event: events.Stored, data: Any, asked: rules.Prediction, policy_version: int, decision: routing.Decision, now: datetime
) -> predictions.New:
    claim, get = asked.claim_id, data.get
    return predictions.New(
        event.ulid,
        asked.agent,
        data["prediction_id"],
        claim,
        get("group") or claim,
        "served",
        work.digest(asked.input),
        asked.attributes,
        work.read_time(data["occurred_at"]),
        now,
        asked.decision,
        asked.confidence,
        get("probabilities"),
        get("model_version"),
        policy_version,
        decision.reasons,
        decision.priority,
        decision.effective_threshold,
        decision.inclusion_probability,
    )


def _to_review(row: predictions.New, agent: rules.Agent, now: datetime) -> dict[str, Any]:
    expires_at = None if NEVER_EXPIRE.intersection(row.reasons) else now + timedelta(days=agent.review_days)
    shared = {"agent": row.agent, "claim_id": row.claim_id, "reasons": row.reasons, "priority": row.priority}
    case_key = reviews.make_case_key(row.agent, row.claim_id, row.input_digest)
    return {**shared, "prediction": row.id, "expires_at": expires_at, "case_key": case_key}
