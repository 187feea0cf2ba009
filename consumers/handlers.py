"""What an event does: predictions are routed, labels close reviews, history becomes labelled cases.

A batch is handled in one transaction. Handlers commute and may run twice: a redelivered prediction keeps its first decision.
"""

from __future__ import annotations

import hashlib
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import orjson
import structlog
from sqlalchemy import Connection

from consumers import budget, routing, rules, schemas
from storage import db, dead_letters, events, exams, labels, ledger, predictions, reviews

PATIENCE = timedelta(days=30)
NEVER_EXPIRE = {routing.AUDIT, routing.MUST_REVIEW, routing.EXAM, routing.WATCH}


Item = tuple[events.Stored, Any]
"""An event and its data, as parsed at the door or read from the log: a time in it is a `datetime` or its text."""

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Agent:
    """What a handler needs to know of an agent: its labels, the routing policy in force, and how long a review is worth asking."""

    name: str
    labels: tuple[str, ...]
    policy: rules.RoutingPolicy
    policy_version: int
    review_days: float = 30.0


class PredictedMeanwhileError(RuntimeError):
    """A prediction id was used by two events at the same moment: tried again, the later one is a repetition or a conflict."""


class RefusedError(ValueError):
    """An event that is well-formed but can't be applied; it becomes a dead letter with this reason."""


def handle_batch(connection: Connection, batch: Sequence[events.Stored], agents: Mapping[str, Agent], now: datetime) -> Counter[str]:
    """Apply stored events in the caller's transaction; returns how many ended in each state.

    When the batch fails as a whole each event is tried alone, so that one bad event costs only itself.
    """
    _take_turn(connection, batch)
    try:
        with connection.begin_nested():
            return _handle(connection, [_read(event) for event in batch], agents, now)
    except Exception as error:
        # Whatever one event does wrong must not hold up the others: find it, park it, go on. A database that is
        # gone is no event's fault: the whole transaction fails.
        if db.is_passing(error) or (len(batch) == 1 and isinstance(error, db.UNAVAILABLE)):
            raise
    outcome: Counter[str] = Counter()
    for event in batch:
        outcome += _handle_alone(connection, event, agents, now)
    return outcome


def handle_new(connection: Connection, items: Sequence[Item], agents: Mapping[str, Agent], now: datetime) -> Counter[str]:
    """Apply events that the caller's transaction stored as handled; returns how many ended in each state.

    They are taken in the order in which the consumer would read them, so that both decide alike. When the batch fails it is left to
    the consumer, which finds the event at fault; whoever sent it need not wait for that.
    """
    if not items:
        return Counter()
    _take_turn(connection, [event for event, _ in items])
    try:
        with connection.begin_nested():
            return _handle(connection, sorted(items, key=_by_ulid), agents, now)
    except Exception as error:
        if db.is_passing(error):
            raise
        events.unhandle(connection, [event.ulid for event, _ in items])
        log.warning("left_to_the_consumer", events=len(items), error=type(error).__name__)
        return Counter()


def _handle_alone(connection: Connection, event: events.Stored, agents: Mapping[str, Agent], now: datetime) -> Counter[str]:
    try:
        with connection.begin_nested():
            return _handle(connection, [_read(event)], agents, now)
    except Exception as error:
        if db.is_passing(error):
            raise
        place = traceback.extract_tb(error.__traceback__)[-1]
        return _park(connection, event, f"{type(error).__name__} in the handler ({Path(place.filename).name}:{place.lineno})", now)


def _take_turn(connection: Connection, batch: Sequence[events.Stored]) -> None:
    """Predictions are handled beside others, labels alone: else a label and its prediction, each not seeing the other, would both wait."""
    db.take_turn(connection, alone=any(event.type == schemas.LABEL for event in batch))


def _by_ulid(item: Item) -> str:
    return item[0].ulid


def _read(event: events.Stored) -> Item:
    return event, None if event.data is None else orjson.loads(event.data)


def _handle(connection: Connection, items: Sequence[Item], agents: Mapping[str, Agent], now: datetime) -> Counter[str]:
    outcome: Counter[str] = Counter()
    by_type: dict[str, list[Item]] = {}
    for item in items:
        event, data = item
        if data is None:
            outcome += _park(connection, event, "its payload was erased", now)
        elif data["agent"] not in agents:
            outcome += _park(connection, event, f"agent {data['agent']!r} is not configured any more", now)
        else:
            by_type.setdefault(event.type, []).append(item)
    for kind, handler in _HANDLERS.items():  # predictions before labels: then fewer labels have to wait
        if kind in by_type:
            outcome += handler(connection, by_type[kind], agents, now)
    return outcome


def _park(connection: Connection, event: events.Stored, reason: str, now: datetime) -> Counter[str]:
    letter = dead_letters.park_event(connection, event, reason, now)
    log.warning("event_parked", ulid=event.ulid, dead_letter=letter)  # the reason may name a claim
    return Counter(dead=1)


def _handle_predictions(connection: Connection, items: Sequence[Item], agents: Mapping[str, Agent], now: datetime) -> Counter[str]:
    outcome: Counter[str] = Counter()
    rows: list[predictions.New] = []
    by_agent: dict[str, list[Item]] = {}
    for item in items:
        by_agent.setdefault(item[1]["agent"], []).append(item)
    for name, mine in by_agent.items():
        new = _route_unknown(connection, agents[name], mine, now)
        if new is None:
            outcome += _drop_repeated(connection, mine, now)
            new = _route_all(connection, agents[name], mine, now)
            if predictions.insert_new(connection, new) < len(new):
                raise PredictedMeanwhileError("another consumer stored one of these prediction ids a moment ago")
        rows += new
        outcome += _mark_handled(connection, mine, now)
    routed = _drop_under_review(connection, [row for row in rows if row.reasons])
    reviews.open_new(connection, [_to_review(row, agents[row.agent], now) for row in routed], now, "ratchet")
    return outcome + _apply_waiting(connection, rows, agents, now)


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


def _mark_handled(connection: Connection, items: Sequence[Item], now: datetime) -> Counter[str]:
    """Events that this transaction stored as handled are so already."""
    events.mark(connection, [event.ulid for event, _ in items if event.state != "handled"], "handled", now)
    return Counter(handled=len(items))


def _drop_repeated(connection: Connection, items: list[Item], now: datetime) -> Counter[str]:
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
        return _park(connection, event, f"prediction id {prediction_id!r} was used for another prediction ({known})", now)
    events.mark(connection, [event.ulid], "handled", now, None if known == event.ulid else f"repeats {known}")
    return Counter(handled=1)


def _route_unknown(connection: Connection, agent: Agent, items: Sequence[Item], now: datetime) -> list[predictions.New] | None:
    """Route and store predictions, none of which is known, as in nearly every batch; None, and nothing is stored, when one is."""
    with connection.begin_nested() as attempt:
        rows = _route_all(connection, agent, items, now)
        if predictions.insert_new(connection, rows) == len(rows):
            return rows
        attempt.rollback()
    return None


def _route_all(connection: Connection, agent: Agent, items: Sequence[Item], now: datetime) -> list[predictions.New]:
    policy = agent.policy
    counts_by_slice = labels.count_by_attributes(connection, agent.name, policy.slice_by) if policy.explore_share else {}
    is_budgeted = policy.budget_share is not None
    window = read_window(connection, agent.name, policy, counts_by_slice) if is_budgeted else budget.Window(policy.window)
    router = routing.Router(policy, window, read_spent(connection, agent.name, policy, now), counts_by_slice)
    rows = []
    for event, data in items:
        attributes = data.get("attributes") or {}
        asked = rules.Prediction(agent.name, data["claim_id"], data["decision"], data.get("confidence"), data["input"], attributes)
        rows.append(_to_row(event, data, agent, router.route(asked), now))
    return rows


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


def _to_row(event: events.Stored, data: Any, agent: Agent, decision: routing.Decision, now: datetime) -> predictions.New:
    claim, get = data["claim_id"], data.get
    return predictions.New(
        event.ulid,
        agent.name,
        data["prediction_id"],
        claim,
        get("group") or claim,
        "served",
        _digest(data["input"]),
        get("attributes") or {},
        _read_time(data["occurred_at"]),
        now,
        data["decision"],
        get("confidence"),
        get("probabilities"),
        get("model_version"),
        agent.policy_version,
        *decision,
    )


def _to_review(row: predictions.New, agent: Agent, now: datetime) -> dict[str, Any]:
    expires_at = None if NEVER_EXPIRE.intersection(row.reasons) else now + timedelta(days=agent.review_days)
    shared = {"agent": row.agent, "claim_id": row.claim_id, "reasons": row.reasons, "priority": row.priority}
    case_key = reviews.make_case_key(row.agent, row.claim_id, row.input_digest)
    return {**shared, "prediction": row.id, "expires_at": expires_at, "case_key": case_key}


def _apply_waiting(connection: Connection, rows: Sequence[predictions.New], agents: Mapping[str, Agent], now: datetime) -> Counter[str]:
    """Apply labels that came before these predictions."""
    if not events.has_waiting(connection):
        return Counter()
    subjects = {f"{row.agent}/{key}" for row in rows for key in (row.claim_id, row.prediction_id)}
    waiting = events.read_waiting(connection, subjects)
    return _handle_labels(connection, [(event, orjson.loads(event.data or "{}")) for event in waiting], agents, now)


def _handle_labels(connection: Connection, items: Sequence[Item], agents: Mapping[str, Agent], now: datetime) -> Counter[str]:
    outcome: Counter[str] = Counter()
    for event, data in items:
        try:
            with connection.begin_nested():
                outcome[_apply_label(connection, event, data, agents[data["agent"]], now)] += 1
        except RefusedError as refusal:
            outcome += _park(connection, event, str(refusal), now)
    return outcome


def _apply_label(connection: Connection, event: events.Stored, data: Any, agent: Agent, now: datetime) -> str:
    answered_at = _read_time(data["answered_at"])
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
    _mark_handled(connection, [(event, data)], now)
    return "handled"


def _find_target(connection: Connection, data: Any, at: datetime) -> Any:
    if data.get("review_id") is not None:
        review = reviews.read(connection, data["review_id"])
        if review is None:
            told = schemas.shorten(data["review_id"])
            raise RefusedError(f"there is no review {told}: leave review_id out, or use the id that /v1/reviews gave")
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


def _handle_history(connection: Connection, items: Sequence[Item], agents: Mapping[str, Agent], now: datetime) -> Counter[str]:
    cases, answers = [], []
    for event, data in items:
        occurred_at = _read_time(data["occurred_at"])
        case = predictions.New(
            event.ulid,
            data["agent"],
            f"import:{data['claim_id']}:{event.event_id}",
            data["claim_id"],
            data.get("group") or data["claim_id"],
            "import",
            _digest(data["input"]),
            data.get("attributes") or {},
            occurred_at,
            now,
        )
        cases.append(case)
        label = {"prediction": event.ulid, "expert": event.source, "kind": "import", "answer": data["answer"], "answered_at": occurred_at}
        shared = {"id": event.ulid, "agent": data["agent"], "claim_id": data["claim_id"], "received_at": now}
        answers.append({**shared, **label, "rationale": data.get("rationale")})
    predictions.insert_new(connection, cases)
    labels.insert_imported(connection, answers)
    return _mark_handled(connection, items, now) + _apply_waiting(connection, cases, agents, now)


def park_overdue(connection: Connection, now: datetime) -> int:
    """Give up on labels whose claim never came; they stay as dead letters. Returns how many."""
    overdue = events.read_overdue(connection, now, PATIENCE)
    for event in overdue:
        _park(connection, event, f"no prediction for {event.subject.split('/')[0]} came within {PATIENCE.days} days", now)
    return len(overdue)


def _digest(value: Any) -> str:
    return hashlib.sha256(orjson.dumps(value, option=orjson.OPT_SORT_KEYS)).hexdigest()


def _read_time(value: datetime | str) -> datetime:
    return value if isinstance(value, datetime) else datetime.fromisoformat(value)


_Handler = Callable[[Connection, Sequence[Item], Mapping[str, Agent], datetime], Counter[str]]
_HANDLERS: dict[str, _Handler] = {
    schemas.PREDICTION: _handle_predictions,
    schemas.LABEL: _handle_labels,
    schemas.HISTORY: _handle_history,
}
