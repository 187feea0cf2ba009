"""What the served traffic tells without labels: whether its inputs have changed, and whether its confidences can rank claims."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import structlog
from sqlalchemy import Connection, RowMapping

from consumers import windows
from daemon import drift, verdicts
from daemon.agents import Agent
from daemon.machinery import Machinery
from storage import alarms, datasets, db, predictions, registry, snapshots

WINDOW = 250
REFERENCE_ROWS = 5000
CONFIDENCE_ALARM, SOURCE = "confidence", "inputs"
REMEDIES = {
    "constant": "its confidences are all the same",
    "missing": "most of its predictions bring no confidence",
    "saturated": "nearly all its confidences are 0.999 or more",
}

log = structlog.get_logger()
Columns = Mapping[str, list[Any]]


def look(machinery: Machinery, agent: Agent, now: datetime) -> None:
    """Look at the last two windows of predictions, once for each new window."""
    with db.reading(machinery.engine) as connection:
        newest = predictions.newest_ids(connection, agent.name, machinery.memory.windows.get(agent.name, ""), WINDOW + 1)
        is_known = agent.name in machinery.memory.windows
        # The identifier that was the newest last time is among them.
        if not newest or len(newest) < WINDOW + is_known:
            return
        window = windows.read_window(connection, agent.name, agent.routing_policy, {})
        reference = _read_reference(machinery, connection, agent.name)
        claims = [] if reference is None else predictions.read_recent(connection, agent.name, 2 * WINDOW, unlabelled_only=False)
    _check_confidences(machinery, agent, window.health(), now)
    if reference is not None and len(claims) == 2 * WINDOW:
        _check_inputs(machinery, agent, reference, claims, now)
    machinery.memory.windows[agent.name] = newest[-1]


def _check_confidences(machinery: Machinery, agent: Agent, health: str, now: datetime) -> None:
    with db.writing(machinery.engine) as connection:
        if health == "ok":
            alarms.clear(connection, agent.name, CONFIDENCE_ALARM, now)
            return
        message = f"{REMEDIES[health]}: they can't say what to review, only random audits and rules can"
        if alarms.raise_alarm(connection, agent.name, CONFIDENCE_ALARM, message, {"health": health}, now):
            log.warning("alarm_raised", agent=agent.name, kind=CONFIDENCE_ALARM, health=health)


def _check_inputs(machinery: Machinery, agent: Agent, reference: Columns, claims: list[RowMapping], now: datetime) -> None:
    before, last = (_to_columns(claim["input"] for claim in part) for part in (claims[:WINDOW], claims[WINDOW:]))
    report = drift.detect(reference, last, drift.detect(reference, before, None))
    if not report.alarms:
        return
    fields = ", ".join(report.alarms)
    detail = {"source": SOURCE, "first": claims[0]["id"], "last": claims[-1]["id"], **report.describe()}
    verdicts.raise_drift(machinery, agent, f"The inputs have changed: {fields}.", detail, claims[0]["occurred_at"], now)


def _read_reference(machinery: Machinery, connection: Connection, agent: str) -> Columns | None:
    """What traffic is compared with: the windows of the last alarm, else the champion's training snapshot; None when there is neither."""
    alarm = next((one for one in reversed(alarms.list_kind(connection, agent, "drift")) if one["detail"].get("source") == SOURCE), None)
    champion = registry.champion(connection, agent)
    number = registry.read(connection, agent, champion)["dataset"] if champion else None
    if alarm is None and number is None:
        return None
    key = alarm["id"] if alarm else f"dataset {number}"
    known = machinery.memory.references.get(agent)
    if known is None or known[0] != key:
        columns = _read_windows(connection, agent, alarm["detail"]) if alarm else _read_snapshot(connection, agent, number or 0)
        known = machinery.memory.references[agent] = (key, columns)
    columns_known: Columns = known[1]
    return columns_known


def _read_windows(connection: Connection, agent: str, detail: Mapping[str, Any]) -> Columns:
    claims = predictions.read_between(connection, agent, detail["first"], detail["last"])
    return _to_columns(claim["input"] for claim in claims)


def _read_snapshot(connection: Connection, agent: str, number: int) -> Columns:
    """An even sample of a snapshot's rows. Reviewed cases were chosen for being unusual: where there is history, it alone counts."""
    folder = Path(datasets.read(connection, agent, number)["folder"])
    rows = list(snapshots.read(folder, ("input", "origin")))
    history = [row for row in rows if row["origin"] == snapshots.IMPORTED]
    chosen = history if len(history) >= 2 * WINDOW else rows
    return _to_columns(json.loads(row["input"]) for row in chosen[:: max(1, len(chosen) // REFERENCE_ROWS)])


def _to_columns(inputs: Iterable[Mapping[str, Any]]) -> Columns:
    """The values of each field; a claim that lacks one has None there."""
    rows = list(inputs)
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}
