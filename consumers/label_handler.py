"""What a label does: it closes its review and is kept, or waits until its claim is predicted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import orjson
from sqlalchemy import Connection

from consumers import rules, schemas, work
from storage import db, events, labels, ledger, predictions, reviews


class RefusedError(ValueError):
    """An event that is well-formed but can't be applied; it becomes a dead letter with this reason."""


def handle(connection: Connection, items: Sequence[work.Item], agents: Mapping[str, rules.Agent], now: datetime) -> Counter[str]:
    """Apply labels one by one: each closes its review and is kept, waits for its prediction, or is parked with what is wrong."""
    outcome: Counter[str] = Counter()
    for event, data in items:
        try:
            with db.savepoint(connection):
                outcome[_apply_label(connection, event, data, agents[data["agent"]], now)] += 1
        except RefusedError as refusal:
            outcome += work.park(connection, event, str(refusal), now)
    return outcome


def apply_waiting(
    connection: Connection, rows: Sequence[predictions.New], agents: Mapping[str, rules.Agent], now: datetime
) -> Counter[str]:
    """Apply labels that came before these predictions."""
    if not events.has_waiting(connection):
        return Counter()
    subjects = {f"{row.agent}/{key}" for row in rows for key in (row.claim_id, row.prediction_id)}
    waiting = events.read_waiting(connection, subjects)
    return handle(connection, [(event, orjson.loads(event.data or "{}")) for event in waiting], agents, now)


def _apply_label(connection: Connection, event: events.Stored, data: Any, agent: rules.Agent, now: datetime) -> str:
    answered_at = work.read_time(data["answered_at"])
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
    work.mark_handled(connection, [(event, data)], now)
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


def _check_label(data: Any, target: Any, expert: str, agent: rules.Agent) -> None:
    if not expert:
        raise RefusedError("the label names no expert: send `expert`, or post it with the expert's own token")
    if target.get("agent", agent.name) != agent.name:
        raise RefusedError(f"review {data['review_id']} belongs to agent {target['agent']}, not to {agent.name}")
    if data.get("claim_id") not in (None, target["claim_id"]):
        raise RefusedError("claim_id is not the claim of the prediction or review that the label names: correct it or leave it out")
    if data["answer"] not in agent.labels:
        # Others are told the reason, and nothing of what the event holds: the letter itself shows that.
        raise RefusedError(f"its answer is none of {', '.join(agent.labels)} any more")
