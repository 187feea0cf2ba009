"""Alarms: what a person should know, one open alarm of a kind for each agent."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

import structlog
from sqlalchemy import Connection, RowMapping, select, update

from storage import bulk, events, ids, ledger
from storage.tables import Alarm

log = structlog.get_logger()


def raise_alarm(
    connection: Connection, agent: str, kind: str, message: str, detail: Mapping[str, Any], now: datetime, *, restate: bool = True
) -> bool:
    """Open an alarm; returns False while one of this kind is open already, which then says the newer message, unless `restate` is off.

    It is announced once: the newer message is no entry in the ledger.
    """
    key = ids.make_ulid(now, agent, kind)
    row = {
        "id": key,
        "agent": agent,
        "kind": kind,
        "message": message,
        "detail": dict(detail),
        "raised_at": now,
    }
    is_new = bulk.insert_new(connection, Alarm, row)
    if is_new:
        head = ledger.append(connection, "alarm", agent, {"kind": kind, "message": message}, now)
        told = {"agent": agent, "kind": kind, "message": message, "ledger": head}
        events.emit(connection, "ratchet.alarm.raised.v1", f"{agent}/{kind}", key, told, now)
    elif restate:
        _restate(connection, agent, kind, message, dict(detail))
    return is_new


def _restate(connection: Connection, agent: str, kind: str, message: str, detail: dict[str, Any]) -> None:
    open_one = (Alarm.agent == agent, Alarm.kind == kind, Alarm.cleared_at.is_(None))
    said = connection.execute(select(Alarm.message, Alarm.detail).where(*open_one)).one_or_none()
    if said is not None and tuple(said) != (message, detail):
        connection.execute(update(Alarm).where(*open_one).values(message=message, detail=detail))


def clear(connection: Connection, agent: str, kind: str, now: datetime) -> bool:
    """Close the open alarm of a kind; returns whether there was one."""
    open_one = update(Alarm).where(Alarm.agent == agent, Alarm.kind == kind, Alarm.cleared_at.is_(None))
    is_cleared = connection.execute(open_one.values(cleared_at=now)).rowcount == 1
    if is_cleared:
        log.info("alarm_cleared", agent=agent, kind=kind)
    return is_cleared


def list_open(connection: Connection, agent: str | None = None) -> list[RowMapping]:
    """The open alarms, oldest first; of one agent, or with an empty name those of the daemon as a whole."""
    query = select(Alarm.__table__).where(Alarm.cleared_at.is_(None)).order_by(Alarm.raised_at)
    if agent is not None:
        query = query.where(Alarm.agent == agent)
    return list(connection.execute(query).mappings())


def list_kind(connection: Connection, agent: str, kind: str) -> list[RowMapping]:
    """Every alarm of a kind, oldest first, open or not."""
    query = select(Alarm.__table__).where(Alarm.agent == agent, Alarm.kind == kind).order_by(Alarm.raised_at)
    return list(connection.execute(query).mappings())


def list_since(connection: Connection, agent: str, since: datetime) -> list[RowMapping]:
    """Every alarm raised since then, open or not."""
    query = select(Alarm.__table__).where(Alarm.agent == agent, Alarm.raised_at >= since).order_by(Alarm.raised_at)
    return list(connection.execute(query).mappings())
