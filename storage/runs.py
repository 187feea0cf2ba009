"""Runs: every run of a trainer from the trigger to its result, and which attempt at it may publish.

queued → leased → running → done | failed | cancelled ;  leased, running → queued (stopped, died or lost its lease; resumes from its
checkpoint) ;  parked after too many attempts without a newer checkpoint. Each change names the state it starts from, so that of two
processes that try only one succeeds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, Literal

from sqlalchemy import Connection, RowMapping, insert, select, update

from storage import events, ids
from storage.tables import Run

Kind = Literal["train", "score"]
LIVE = ("queued", "leased", "running")
ENDED = ("done", "failed", "cancelled", "parked")


class RunUnderWayError(RuntimeError):
    """The agent has a run of this kind that has not ended."""


class UnknownRunError(LookupError):
    """There is no run of this id."""


def queue(
    connection: Connection,
    agent: str,
    kind: Kind,
    trigger: str,
    reason: str,
    actor: str,
    options: Mapping[str, Any],
    now: datetime,
    *,
    exam: str | None = None,
) -> str:
    """Ask for a run; returns its id. Raises `RunUnderWayError` while the agent has one of this kind that has not ended."""
    live = read_live(connection, agent, kind)
    if live is not None:
        raise RunUnderWayError(f"agent {agent}: {kind} run {live['id']} is {live['state']}; `ratchet runs cancel {live['id']}` ends it")
    run = ids.make_ulid(now, "run", agent, kind, trigger, reason)
    row = {"id": run, "agent": agent, "kind": kind, "exam": exam, "trigger": trigger, "reason": reason, "actor": actor}
    state = {"state": "queued", "attempt": 0, "failures": 0, "checkpoint": 0, "created_at": now}
    connection.execute(insert(Run).values(**row, **state, options=dict(options)))
    return run


def read(connection: Connection, run: str) -> RowMapping:
    """One run. Raises `UnknownRunError`."""
    row = connection.execute(select(Run.__table__).where(Run.id == run)).mappings().first()
    if row is None:
        raise UnknownRunError(f"there is no run {run}: `ratchet runs list` shows them")
    return row


def read_live(connection: Connection, agent: str, kind: Kind) -> RowMapping | None:
    """The agent's run of this kind that has not ended."""
    query = select(Run.__table__).where(Run.agent == agent, Run.kind == kind, Run.state.in_(LIVE))
    return connection.execute(query).mappings().first()


def read_last(connection: Connection, agent: str, kind: Kind, *, with_cancelled: bool = False) -> RowMapping | None:
    """The agent's newest run of this kind; those that somebody cancelled count only when asked for."""
    query = select(Run.__table__).where(Run.agent == agent, Run.kind == kind)
    if not with_cancelled:
        query = query.where(Run.state != "cancelled")
    return connection.execute(query.order_by(Run.created_at.desc(), Run.id.desc()).limit(1)).mappings().first()


def read_in_state(connection: Connection, *states: str) -> list[RowMapping]:
    """Every run in one of these states, oldest first."""
    query = select(Run.__table__).where(Run.state.in_(states)).order_by(Run.created_at, Run.id)
    return list(connection.execute(query).mappings())


def read_on_device(connection: Connection) -> list[RowMapping]:
    """Every run that has a device, those that were cancelled there included, oldest first."""
    query = select(Run.__table__).where(Run.state.in_(("leased", "running", "cancelled")), Run.device.is_not(None))
    return list(connection.execute(query.order_by(Run.created_at, Run.id)).mappings())


def list_all(connection: Connection, agent: str | None = None, limit: int = 100) -> list[RowMapping]:
    """The newest runs, newest first."""
    query = select(Run.__table__).order_by(Run.created_at.desc(), Run.id.desc()).limit(limit)
    return list(connection.execute(query.where(Run.agent == agent) if agent else query).mappings())


def lease(connection: Connection, run: RowMapping, device: str, fence: int, folder: str) -> bool:
    """Claim a queued run for a device: a new attempt with the lease's fence. False when it is not queued any more."""
    values = {"state": "leased", "attempt": run["attempt"] + 1, "device": device, "fence": fence, "folder": folder, "progress": None}
    return _move(connection, run, ("queued",), values)


def explain(connection: Connection, run: RowMapping, why: str) -> None:
    """Note why a queued run waits."""
    _move(connection, run, ("queued",), {"error": why})


def begin(connection: Connection, run: RowMapping, now: datetime) -> bool:
    """Say that a leased run's process works. False when somebody else took the run."""
    values = {"state": "running", "heartbeat_at": now, "started_at": run["started_at"] or now, "error": None}
    return _move(connection, run, ("leased",), values)


def set_dataset(connection: Connection, run: str, dataset: int | None) -> None:
    """Note what a run learns from, None for texts alone; all its attempts learn from the same."""
    connection.execute(update(Run).where(Run.id == run).values(dataset=dataset))


def set_version(connection: Connection, run: str, version: str) -> None:
    """Note the candidate that a run made."""
    connection.execute(update(Run).where(Run.id == run).values(version=version))


def let_go(connection: Connection, run: RowMapping) -> None:
    """Note that a cancelled run's process has ended and its device is free."""
    connection.execute(update(Run).where(Run.id == run["id"], Run.state == "cancelled").values(device=None))


def beat(connection: Connection, run: RowMapping, progress: Mapping[str, Any], now: datetime) -> bool:
    """Keep a running run's newest sign of life."""
    return _move(connection, run, ("running",), {"progress": dict(progress), "heartbeat_at": now})


def finish(connection: Connection, run: RowMapping, result: Mapping[str, Any], now: datetime) -> bool:
    """End a run with its result. False when this attempt is not the one that runs."""
    values = {"state": "done", "result": dict(result), "finished_at": now, "error": None}
    return _end(connection, run, ("running",), values, now)


def requeue(connection: Connection, run: RowMapping, why: str, failures: int, checkpoint: int, not_before: datetime | None) -> bool:
    """Put a run back into the queue; the next attempt goes on from the newest checkpoint."""
    values = {"state": "queued", "error": why, "failures": failures, "checkpoint": checkpoint, "not_before": not_before}
    return _move(connection, run, ("leased", "running"), {**values, "device": None, "fence": None})


def give_up(connection: Connection, run: RowMapping, state: Literal["failed", "parked"], why: str, now: datetime) -> bool:
    """End a run that can't be done (`failed`: refused for a reason) or that fails again and again (`parked`)."""
    return _end(connection, run, ("leased", "running"), {"state": state, "error": why, "finished_at": now}, now)


def cancel(connection: Connection, run: RowMapping, why: str, now: datetime) -> bool:
    """End a run because a person said so. False when it had ended."""
    return _end(connection, run, LIVE, {"state": "cancelled", "error": why, "finished_at": now}, now)


def _end(connection: Connection, run: RowMapping, states: Sequence[str], values: Mapping[str, Any], now: datetime) -> bool:
    if not _move(connection, run, states, values):
        return False
    told = {"run": run["id"], "kind": run["kind"], "state": values["state"], "error": values.get("error")}
    events.emit(connection, "ratchet.run.ended.v1", f"{run['agent']}/{run['id']}", run["id"], told, now)
    return True


def _move(connection: Connection, run: RowMapping, states: Sequence[str], values: Mapping[str, Any]) -> bool:
    """Change this attempt of a run if it is in one of the states; a run that has a newer attempt is somebody else's."""
    change = update(Run).where(Run.id == run["id"], Run.state.in_(states), Run.attempt == run["attempt"])
    return bool(connection.execute(change.values(**values)).rowcount)
