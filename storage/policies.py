"""Policy versions: which threshold, rules, template and labels were in force when a claim was routed or a version judged."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

import structlog
from sqlalchemy import Connection, RowMapping, insert, select

from storage import ledger
from storage.tables import Policy

log = structlog.get_logger()


def record(connection: Connection, agent: str, digest: str, body: Mapping[str, Any], now: datetime) -> int:
    """The number of the agent's policy version with this digest; a changed policy is a new version, in the ledger."""
    last = current(connection, agent)
    if last is not None and last.digest == digest:
        return int(last.version)
    version = last.version + 1 if last else 1
    connection.execute(insert(Policy).values(agent=agent, version=version, digest=digest, body=dict(body), created_at=now))
    ledger.append(connection, "policy", agent, {"version": version, "digest": digest}, now)
    log.info("policy_recorded", agent=agent, version=version)
    return int(version)


def current(connection: Connection, agent: str) -> Any | None:
    """The newest policy version of an agent; None before the first."""
    query = select(Policy.version, Policy.digest, Policy.body, Policy.created_at).where(Policy.agent == agent)
    return connection.execute(query.order_by(Policy.version.desc()).limit(1)).first()


def show(connection: Connection, agent: str, version: int) -> RowMapping | None:
    """One policy version."""
    return connection.execute(select(Policy.__table__).where(Policy.agent == agent, Policy.version == version)).mappings().first()
