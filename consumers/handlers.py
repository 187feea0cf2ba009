"""What an event does: predictions are routed, labels close reviews, history becomes labelled cases.

A batch is handled in one transaction. Handlers commute and may run twice: a redelivered prediction keeps its first decision.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import orjson
from sqlalchemy import Connection

from consumers import routing, schemas
from storage import dead_letters, events, exams, labels, ledger, predictions, reviews

PATIENCE = timedelta(days=30)
NEVER_EXPIRE = {routing.AUDIT, routing.MUST_REVIEW, routing.EXAM, routing.WATCH}


@dataclass(frozen=True, slots=True)
class Agent:
    """What a handler needs to know of an agent: its labels, the routing policy in force, and how long a review is worth asking."""

    name: str
    labels: tuple[str, ...]
    policy: routing.RoutingPolicy
    policy_version: int
    review_days: float = 30.0


class RefusedError(ValueError):
    """An event that is well-formed but can't be applied; it becomes a dead letter with this reason."""


def handle_batch(connection: Connection, batch: Sequence[events.Stored], agents: Mapping[str, Agent], now: datetime) -> Counter[str]:
    """Apply stored events in the caller's transaction; returns how many ended in each state.

    When the batch fails as a whole each event is tried alone, so that one bad event costs only itself.
    """
    try:
        with connection.begin_nested():
            return _handle(connection, batch, agents, now)
    except Exception:
        # Whatever one event does wrong must not hold up the others: find it, park it, go on. A database that is
        # gone fails again below, and then the whole transaction does.
        if len(batch) == 1:
            raise
    outcome: Counter[str] = Counter()
    for event in batch:
        outcome += _handle_alone(connection, event, agents, now)
    return outcome


def _handle_alone(connection: Connection, event: events.Stored, agents: Mapping[str, Agent], now: datetime) -> Counter[str]:
    try:
        with connection.begin_nested():
            return _handle(connection, [event], agents, now)
    except Exception as error:  # noqa: BLE001  the reason is kept and shown; a lost connection fails again in park_event
        dead_letters.park_event(connection, event, f"{type(error).__name__} in the handler", now)
        return Counter(dead=1)


def _handle(connection: Connection, batch: Sequence[events.Stored], agents: Mapping[str, Agent], now: datetime) -> Counter[str]:
    outcome: Counter[str] = Counter()
    by_type: dict[str, list[tuple[events.Stored, Any]]] = {}
    for event in batch:
        if event.data is None:
            outcome += _park(connection, event, "its payload was erased", now)
        else:
            by_type.setdefault(event.type, []).append((event, orjson.loads(event.data)))
    for kind, handler in _HANDLERS.items():  # predictions before labels: then fewer labels have to wait
        items = by_type.get(kind, [])
        known = [(event, data) for event, data in items if data["agent"] in agents]
        for event, data in items:
            if data["agent"] not in agents:
                outcome += _park(connection, event, f"agent {data['agent']!r} is not configured any more", now)
        if known:
            outcome += handler(connection, known, agents, now)
    return outcome


def _park(connection: Connection, event: events.Stored, reason: str, now: datetime) -> Counter[str]:
    dead_letters.park_event(connection, event, reason, now)
    return Counter(dead=1)


def _handle_predictions(
    connection: Connection, items: Sequence[tuple[events.Stored, Any]], agents: Mapping[str, Agent], now: datetime
) -> Counter[str]:
    outcome: Counter[str] = Counter()
    rows: list[dict[str, Any]] = []
    for name in dict.fromkeys(data["agent"] for _, data in items):
        mine = [(event, data) for event, data in items if data["agent"] == name]
        outcome += _drop_repeated(connection, mine, now)
        rows += _route_all(connection, agents[name], mine, now)
    predictions.insert_new(connection, rows)
    reviews.open_new(connection, [_to_review(row, agents[row["agent"]], now) for row in rows if row["reasons"]], now, "ratchet")
    events.mark(connection, [row["id"] for row in rows], "handled", now)
    outcome["handled"] += len(rows)
    return outcome + _apply_waiting(connection, rows, agents, now)


def _drop_repeated(connection: Connection, items: list[tuple[events.Stored, Any]], now: datetime) -> Counter[str]:
    """Take out predictions that are stored already: the same again is done, other content under a used id is a conflict."""
    agent = items[0][1]["agent"]
    stored = predictions.find_known(connection, agent, [data["prediction_id"] for _, data in items])
    seen: dict[str, str] = dict(stored)
    repeated = []
    for position, (event, data) in enumerate(items):
        known = seen.setdefault(data["prediction_id"], event.ulid)
        if known != event.ulid:
            repeated.append((position, known))
    outcome: Counter[str] = Counter()
    for position, known in reversed(repeated):
        event, data = items.pop(position)
        first = events.read(connection, known)
        if first is not None and first.data is not None and orjson.loads(first.data) == data:
            events.mark(connection, [event.ulid], "handled", now, f"repeats {known}")
            outcome["handled"] += 1
        else:
            outcome += _park(connection, event, f"prediction id {data['prediction_id']!r} was used for another prediction ({known})", now)
    return outcome


def _route_all(connection: Connection, agent: Agent, items: Sequence[tuple[events.Stored, Any]], now: datetime) -> list[dict[str, Any]]:
    policy = agent.policy
    day = now.replace(hour=0, minute=0, second=0, microsecond=0)
    counts_by_slice = labels.count_by_attributes(connection, agent.name, policy.slice_by) if policy.explore_share else {}
    window = read_window(connection, agent.name, policy, counts_by_slice)
    open_kinds = exams.open_kinds(connection, agent.name)
    opened_today = examined_today = 0
    if policy.budget_per_day is not None:
        opened_today, examined_today = reviews.count_opened(connection, agent.name, day)
    rows = []
    for event, data in items:
        asked = routing.Prediction(
            agent.name, data["claim_id"], data["decision"], data.get("confidence"), data["input"], data.get("attributes") or {}
        )
        state = window.state(
            opened_today=opened_today,
            examined_today=examined_today,
            is_examining="exam" in open_kinds,
            is_watching="watch" in open_kinds,
            slice_labels=counts_by_slice,
        )
        decision = routing.route(asked, policy, state)
        window.add_routed(asked, decision, policy, counts_by_slice)
        opened_today += decision.is_routed
        rows.append(_to_row(event, data, agent, decision, now))
    return rows


def read_window(connection: Connection, agent: str, policy: routing.RoutingPolicy, slice_labels: Mapping[str, int]) -> routing.Window:
    """The agent's last predictions as the router saw them."""
    window = routing.Window(policy.window)
    for confidence, reasons, attributes in predictions.read_routed(connection, agent, policy.window):
        known = routing.rarity(attributes, policy, slice_labels) if policy.explore_share else 0.0
        window.add(confidence, is_must_review=routing.MUST_REVIEW in reasons, rarity=known)
    return window


def _to_row(event: events.Stored, data: Any, agent: Agent, decision: routing.Decision, now: datetime) -> dict[str, Any]:
    return {
        "id": event.ulid,
        "agent": agent.name,
        "prediction_id": data["prediction_id"],
        "claim_id": data["claim_id"],
        "group_key": data.get("group") or data["claim_id"],
        "origin": "served",
        "input": data["input"],
        "input_digest": _digest(data["input"]),
        "attributes": data.get("attributes") or {},
        "decision": data["decision"],
        "confidence": data.get("confidence"),
        "probabilities": data.get("probabilities"),
        "model_version": data.get("model_version"),
        "occurred_at": datetime.fromisoformat(data["occurred_at"]),
        "received_at": now,
        "policy_version": agent.policy_version,
        "reasons": list(decision.reasons),
        "priority": decision.priority,
        "effective_threshold": decision.effective_threshold,
        "inclusion_probability": decision.inclusion_probability,
    }


def _to_review(row: Mapping[str, Any], agent: Agent, now: datetime) -> dict[str, Any]:
    expires_at = None if NEVER_EXPIRE & set(row["reasons"]) else now + timedelta(days=agent.review_days)
    shared = {name: row[name] for name in ("agent", "claim_id", "reasons", "priority")}
    return {**shared, "prediction": row["id"], "expires_at": expires_at}


def _apply_waiting(connection: Connection, rows: Sequence[Mapping[str, Any]], agents: Mapping[str, Agent], now: datetime) -> Counter[str]:
    """Apply labels that came before these predictions."""
    subjects = {f"{row['agent']}/{row[key]}" for row in rows for key in ("claim_id", "prediction_id")}
    waiting = events.read_waiting(connection, subjects)
    if not waiting:
        return Counter()
    return _handle_labels(connection, [(event, orjson.loads(event.data or "{}")) for event in waiting], agents, now)


def _handle_labels(
    connection: Connection, items: Sequence[tuple[events.Stored, Any]], agents: Mapping[str, Agent], now: datetime
) -> Counter[str]:
    outcome: Counter[str] = Counter()
    for event, data in items:
        try:
            with connection.begin_nested():
                outcome[_apply_label(connection, event, data, agents[data["agent"]], now)] += 1
        except RefusedError as refusal:
            outcome += _park(connection, event, str(refusal), now)
    return outcome


def _apply_label(connection: Connection, event: events.Stored, data: Any, agent: Agent, now: datetime) -> str:
    answered_at = datetime.fromisoformat(data["answered_at"])
    target = _find_target(connection, data, answered_at)
    if target is None:
        events.mark(connection, [event.ulid], "waiting", now, "its claim is not known yet")
        return "waiting"
    expert, kind = str(data.get("expert") or event.principal or ""), data.get("kind") or "review"
    _check_label(data, target, expert, agent)
    closed = None
    if kind in labels.READS or kind == "adjudication":
        closed = reviews.close_answered(connection, target["id"], expert, now, data.get("review_id"))
    row = {
        "id": event.ulid,
        "agent": agent.name,
        "claim_id": target["claim_id"],
        "prediction": target["id"],
        "review": closed or data.get("review_id"),
        "expert": expert,
        "kind": kind,
        "answer": data["answer"],
        "rationale": data.get("rationale"),
        "seconds_spent": data.get("seconds_spent"),
        "answered_at": answered_at,
        "received_at": now,
    }
    if labels.insert_new(connection, row):
        claim = ledger.hide(connection, agent.name, target["claim_id"])
        body = {"claim": claim, "label": event.ulid, "kind": kind, "expert": expert, "answer": data["answer"]}
        ledger.append(connection, "label", agent.name, body, now)
    events.mark(connection, [event.ulid], "handled", now)
    return "handled"


def _find_target(connection: Connection, data: Any, at: datetime) -> Any:
    if data.get("review_id") is not None:
        review = reviews.read(connection, data["review_id"])
        if review is None:
            return None
        return {"id": review["prediction"], "claim_id": review["claim_id"], "agent": review["agent"]}
    return predictions.find_labelled(
        connection, data["agent"], claim_id=data.get("claim_id"), prediction_id=data.get("prediction_id"), at=at
    )


def _check_label(data: Any, target: Any, expert: str, agent: Agent) -> None:
    if not expert:
        raise RefusedError("the label names no expert: send `expert`, or post it with the expert's own token")
    if target.get("agent", agent.name) != agent.name:
        raise RefusedError(f"review {data['review_id']} belongs to agent {target['agent']}, not to {agent.name}")
    if data.get("claim_id") not in (None, target["claim_id"]):
        raise RefusedError("claim_id is not the claim of the prediction or review that the label names")
    if data["answer"] not in agent.labels:
        raise RefusedError(f"answer {data['answer']!r} is not one of {', '.join(agent.labels)}")


def _handle_history(
    connection: Connection, items: Sequence[tuple[events.Stored, Any]], agents: Mapping[str, Agent], now: datetime
) -> Counter[str]:
    cases, answers = [], []
    for event, data in items:
        occurred_at = datetime.fromisoformat(data["occurred_at"])
        case_id = f"import:{data['claim_id']}:{event.event_id}"
        shared = {"id": event.ulid, "agent": data["agent"], "claim_id": data["claim_id"], "received_at": now}
        cases.append(
            {
                **shared,
                "prediction_id": case_id,
                "group_key": data.get("group") or data["claim_id"],
                "origin": "import",
                "input": data["input"],
                "input_digest": _digest(data["input"]),
                "attributes": data.get("attributes") or {},
                "occurred_at": occurred_at,
                "reasons": [],
                "priority": 0.0,
            }
        )
        label = {"prediction": event.ulid, "expert": event.source, "kind": "import", "answer": data["answer"]}
        answers.append({**shared, **label, "rationale": data.get("rationale"), "answered_at": occurred_at})
    predictions.insert_new(connection, cases)
    labels.insert_imported(connection, answers)
    events.mark(connection, [event.ulid for event, _ in items], "handled", now)
    return Counter(handled=len(items)) + _apply_waiting(connection, cases, agents, now)


def park_overdue(connection: Connection, now: datetime) -> int:
    """Give up on labels whose claim never came; they stay as dead letters. Returns how many."""
    overdue = events.read_overdue(connection, now, PATIENCE)
    for event in overdue:
        _park(connection, event, f"no prediction for {event.subject.split('/')[0]} came within {PATIENCE.days} days", now)
    return len(overdue)


def _digest(value: Any) -> str:
    return hashlib.sha256(orjson.dumps(value, option=orjson.OPT_SORT_KEYS)).hexdigest()


_Handler = Callable[[Connection, Sequence[tuple[events.Stored, Any]], Mapping[str, Agent], datetime], Counter[str]]
_HANDLERS: dict[str, _Handler] = {
    schemas.PREDICTION: _handle_predictions,
    schemas.LABEL: _handle_labels,
    schemas.HISTORY: _handle_history,
}
