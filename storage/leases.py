"""Leases: who may do what only one may do at a time.

A holder that was stopped past its time has lost the lease, and its fence tells: every new holder's fence is greater.
"""

from __future__ import annotations

from datetime import datetime, timedelta

from sqlalchemy import Connection, or_, select, update

from storage import bulk
from storage.tables import Lease


def acquire(connection: Connection, name: str, holder: str, now: datetime, term: timedelta) -> int | None:
    """Take or renew a lease; returns the fence, or None while somebody else holds it."""
    free = {"name": name, "holder": None, "fence": 0, "expires_at": now}
    bulk.insert_new(connection, Lease, free)
    renewed = update(Lease).where(Lease.name == name, Lease.holder == holder, Lease.expires_at > now)
    row = connection.execute(renewed.values(expires_at=now + term).returning(Lease.fence)).first()
    if row is None:
        taken = update(Lease).where(Lease.name == name, or_(Lease.holder.is_(None), Lease.expires_at <= now))
        values = {"holder": holder, "fence": Lease.fence + 1, "expires_at": now + term}
        row = connection.execute(taken.values(values).returning(Lease.fence)).first()
    return row.fence if row else None


def renew(connection: Connection, name: str, holder: str, fence: int, now: datetime, term: timedelta) -> bool:
    """Go on holding a lease under the same fence, also when its time ran out and nobody else took it. False when somebody did."""
    mine = update(Lease).where(Lease.name == name, Lease.holder == holder, Lease.fence == fence)
    return bool(connection.execute(mine.values(expires_at=now + term)).rowcount)


def release(connection: Connection, name: str, holder: str) -> None:
    """Give a lease back early."""
    connection.execute(update(Lease).where(Lease.name == name, Lease.holder == holder).values(holder=None))


def holder_of(connection: Connection, name: str, now: datetime) -> str | None:
    """Who holds the lease now; None when it is free."""
    return connection.execute(select(Lease.holder).where(Lease.name == name, Lease.expires_at > now)).scalar()
