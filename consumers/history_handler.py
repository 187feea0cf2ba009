"""What imported history does: a case that was decided before becomes a labelled case."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime

from sqlalchemy import Connection

from consumers import label_handler, rules, work
from storage import labels, predictions


def handle(connection: Connection, items: Sequence[work.Item], agents: Mapping[str, rules.Agent], now: datetime) -> Counter[str]:
    """Store cases with their answers, and apply the labels that waited for them."""
    cases, answers = [], []
    for event, data in items:
        occurred_at = work.read_time(data["occurred_at"])
        case = predictions.New(
            event.ulid,
            data["agent"],
            f"import:{data['claim_id']}:{event.event_id}",
            data["claim_id"],
            data.get("group") or data["claim_id"],
            "import",
            work.digest(data["input"]),
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
    return work.mark_handled(connection, items, now) + label_handler.apply_waiting(connection, cases, agents, now)
