"""The ledger: a hash chain of every decision about versions, labels and policy.

It holds no claim text; a claim is named by an HMAC with the installation's secret.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import orjson
from sqlalchemy import Connection, RowMapping, insert, select, text

from storage.tables import Installation, LedgerEntry

GENESIS = "0" * 64
LOCK = 0x7A7C4E7


def append(connection: Connection, kind: str, agent: str, body: Mapping[str, Any], now: datetime) -> str:
    """Add one entry in the caller's transaction; returns the chain's new head."""
    if connection.dialect.name == "postgresql":
        connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": LOCK})
    last = connection.execute(select(LedgerEntry.seq, LedgerEntry.hash).order_by(LedgerEntry.seq.desc()).limit(1)).first()
    seq, previous = (last.seq + 1, last.hash) if last else (1, GENESIS)
    content = orjson.dumps(dict(body), option=orjson.OPT_SORT_KEYS).decode()
    digest = _hash(seq, now, kind, agent, content, previous)
    row = {"seq": seq, "at": now, "kind": kind, "agent": agent, "claim": body.get("claim"), "body": content, "previous": previous}
    connection.execute(insert(LedgerEntry), [{**row, "hash": digest}])
    return digest


def verify(connection: Connection) -> list[str]:
    """Walk the chain; returns one sentence for each link that does not hold, none when the ledger is whole."""
    problems: list[str] = []
    previous, expected = GENESIS, 1
    for row in connection.execute(select(LedgerEntry.__table__).order_by(LedgerEntry.seq)):
        if row.seq != expected:
            problems.append(f"entry {expected} is missing")
        if row.previous != previous:
            problems.append(f"entry {row.seq} does not follow on the one before it")
        digest = _hash(row.seq, row.at, row.kind, row.agent, row.body, row.previous)
        if row.hash != digest or row.claim != orjson.loads(row.body).get("claim"):
            problems.append(f"entry {row.seq} ({row.kind} of {row.at:%Y-%m-%d %H:%M}) was changed")
        previous, expected = row.hash, row.seq + 1
    return problems


def head(connection: Connection) -> tuple[int, str]:
    """Sequence number and hash of the newest entry: write it down elsewhere, and nobody can cut the chain's end unseen."""
    row = connection.execute(select(LedgerEntry.seq, LedgerEntry.hash).order_by(LedgerEntry.seq.desc()).limit(1)).first()
    return (row.seq, row.hash) if row else (0, GENESIS)


def holds(connection: Connection, digest: str) -> bool:
    """Whether an entry has this hash, or it is where every chain begins: what was once the head must stay in the chain."""
    return digest == GENESIS or connection.execute(select(LedgerEntry.seq).where(LedgerEntry.hash == digest)).first() is not None


def show(connection: Connection, agent: str | None = None, limit: int = 100) -> list[RowMapping]:
    """The newest entries, newest first."""
    query = select(LedgerEntry.__table__).order_by(LedgerEntry.seq.desc()).limit(limit)
    if agent:
        query = query.where(LedgerEntry.agent == agent)
    return list(connection.execute(query).mappings())


def hide(connection: Connection, agent: str, claim_id: str) -> str:
    """The name of a claim in the ledger: the same for ever, and useless without the installation's secret."""
    secret = connection.execute(select(Installation.secret)).scalar_one()
    return hmac.new(secret.encode(), f"{agent}\0{claim_id}".encode(), hashlib.sha256).hexdigest()[:32]


def of_claim(connection: Connection, agent: str, claim_id: str) -> list[RowMapping]:
    """The entries about a claim, oldest first."""
    query = select(LedgerEntry.__table__).where(LedgerEntry.claim == hide(connection, agent, claim_id)).order_by(LedgerEntry.seq)
    return list(connection.execute(query).mappings())


def _hash(seq: int, at: datetime, kind: str, agent: str, body: str, previous: str) -> str:
    at_utc = at.astimezone(UTC).isoformat(timespec="microseconds")  # as the database gives it back
    return hashlib.sha256(orjson.dumps([seq, at_utc, kind, agent, body, previous])).hexdigest()
