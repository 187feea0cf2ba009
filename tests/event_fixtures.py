"""Events as producers and reviewers send them, for the tests of everything that handles them."""

from __future__ import annotations

import hashlib
import sqlite3
from collections import Counter
from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any

import orjson
from sqlalchemy import Connection, Engine, select
from sqlalchemy.exc import OperationalError

from consumers import delivery, handlers, rules, schemas
from storage import db, events, tokens

LABELS = ("APPROVED", "DENIED", "PENDING")
PRODUCER = tokens.Principal("inference-1", "producer")
ANN, BEN, OPS = tokens.Principal("ann", "reviewer"), tokens.Principal("ben", "reviewer"), tokens.Principal("ops", "operator")


def make_agent(**policy: Any) -> rules.Agent:
    """An adjudication agent; keywords change its routing policy."""
    return rules.Agent("adjudication", LABELS, rules.RoutingPolicy(**policy), policy_version=1)


def make_prediction(number: int, at: datetime, **changes: Any) -> dict[str, Any]:
    """A prediction event; `changes` replace fields of its data."""
    data = {
        "prediction_id": f"p{number}",
        "agent": "adjudication",
        "claim_id": f"c{number}",
        "group": f"member-{number}",
        "input": {"diagnosis": "E11.9", "treatment": "insulin pump"},
        "decision": "APPROVED",
        "confidence": 0.95,
        "model_version": "v1.0",
        "attributes": {"region": "west"},
        "occurred_at": at.isoformat(),
    }
    return envelope(schemas.PREDICTION, f"p{number}", {**data, **changes}, "node-1")


def make_label(number: int, at: datetime, **changes: Any) -> dict[str, Any]:
    """A label event for claim `number`."""
    data = {"agent": "adjudication", "claim_id": f"c{number}", "answer": "DENIED", "answered_at": at.isoformat()}
    merged = {**data, **changes}
    key = hashlib.sha256(orjson.dumps(merged)).hexdigest()[:16]
    return envelope(schemas.LABEL, f"l{number}-{key}", merged, "review-ui")


def make_history(number: int, at: datetime, **changes: Any) -> dict[str, Any]:
    """A case of imported history."""
    data = {
        "agent": "adjudication",
        "claim_id": f"h{number}",
        "group": f"old-{number}",
        "input": {"diagnosis": "I10", "treatment": f"treatment {number}"},
        "answer": "APPROVED" if number % 2 else "DENIED",
        "occurred_at": (at - timedelta(days=400 - number)).isoformat(),
    }
    return envelope(schemas.HISTORY, f"h{number}", {**data, **changes}, "import:adjudication")


def envelope(kind: str, event_id: str, data: Mapping[str, Any], source: str) -> dict[str, Any]:
    """A CloudEvent around data."""
    return {"specversion": "1.0", "type": kind, "source": source, "id": event_id, "data": dict(data)}


def send(
    engine: Engine, sent: list[dict[str, Any]], now: datetime, principal: tokens.Principal = PRODUCER, agent: str = "adjudication"
) -> list[delivery.Delivered]:
    """Deliver events of one type and one agent through the one door."""
    items = schemas.parse(orjson.dumps(sent), sent[0]["type"])
    with db.writing(engine) as connection:
        return delivery.deliver(connection, items, {agent: LABELS}, principal, now)


def handle(engine: Engine, agent: rules.Agent, now: datetime) -> Counter[str]:
    """Handle everything that lies unhandled."""
    with db.writing(engine) as connection:
        return handlers.handle_batch(connection, events.read_received(connection, 1000), {agent.name: agent}, now)


def undo_all(connection: Connection, _rows: object) -> None:
    """What SQLite does when the disk fails it: undo the whole transaction, whatever savepoints there are."""
    driver: Any = connection.connection.dbapi_connection
    driver.rollback()
    raise OperationalError("INSERT", {}, sqlite3.OperationalError("disk I/O error"))


def rows(engine: Engine, table: Any, *columns: str) -> list[Any]:
    """What a table holds in these columns."""
    with db.reading(engine) as connection:
        return list(connection.execute(select(*(getattr(table, name) for name in columns))).all())
