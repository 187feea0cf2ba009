"""The registry: which versions there are, which one is the champion, and every change of it.

Numbers are given at registration and never used again. A verdict is written once. Only the alias says who is in service.

    deployments: requested → confirmed | unverified | unconfirmed → reverted ; superseded when a newer one comes first
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from sqlalchemy import Connection, RowMapping, exists, func, insert, select, update
from sqlalchemy.orm import aliased

from storage import bulk, events, ids, ledger
from storage.tables import Alias, Deployment, Version

CHAMPION = "champion"
BARE = "v0"
Change = Literal["promote", "rollback", "revert"]
Verdict = Literal["promote", "reject", "superseded"]
EVENTS: Mapping[Change, str] = {
    "promote": "ratchet.champion.promoted.v1",
    "rollback": "ratchet.champion.rolled-back.v1",
    "revert": "ratchet.champion.reverted.v1",
}


class UnknownVersionError(LookupError):
    """There is no version of this name."""


class ChampionChangedError(RuntimeError):
    """Somebody else changed the champion first: look again before deciding."""


@dataclass(frozen=True, slots=True)
class Made:
    """What a version is made of. `is_major`: a new base, template or label set."""

    base_path: str
    base_digest: str
    adapter_path: str | None
    adapter_digest: str | None
    tokenizer_digest: str
    prompt: str
    prompt_digest: str
    labels: list[str]
    labels_digest: str
    temperature: float = 1.0
    prompt_form: str = "plain"
    parent: str | None = None
    dataset: int | None = None
    run: str | None = None


def register_bare(connection: Connection, agent: str, made: Made, now: datetime) -> None:
    """Register the bare base as v0 and put it into service where nothing is."""
    row = {**_columns(made), "agent": agent, "name": BARE, "major": 0, "minor": 0, "is_forced": False, "created_at": now}
    if bulk.insert_new(connection, Version, row) and champion(connection, agent) is None:
        change_champion(connection, agent, BARE, None, "promote", "ratchet", "the base is in service before anything is trained", now)


def register(connection: Connection, agent: str, made: Made, now: datetime) -> str:
    """Give a new version its number; the same run registers once. Major when base, template or labels differ from every minor before."""
    if made.run is not None:
        known = connection.execute(select(Version.name).where(Version.agent == agent, Version.run == made.run)).scalar()
        if known is not None:
            return str(known)
    newest = select(Version.major, Version.minor, Version.base_digest, Version.prompt_digest, Version.labels_digest)
    last = connection.execute(newest.where(Version.agent == agent).order_by(Version.major.desc(), Version.minor.desc()).limit(1)).first()
    is_same_kind = last is not None and tuple(last[2:]) == (made.base_digest, made.prompt_digest, made.labels_digest)
    major, minor = (1, 0) if last is None or last.major == 0 else (last.major, last.minor + 1) if is_same_kind else (last.major + 1, 0)
    name = f"v{major}.{minor}"
    connection.execute(
        insert(Version).values(agent=agent, name=name, major=major, minor=minor, is_forced=False, created_at=now, **_columns(made))
    )
    body = {"version": name, "base": made.base_digest, "adapter": made.adapter_digest, "dataset": made.dataset, "run": made.run}
    ledger.append(connection, "version registered", agent, body, now)
    return name


def _columns(made: Made) -> dict[str, Any]:
    return {name: getattr(made, name) for name in Made.__dataclass_fields__}


def read(connection: Connection, agent: str, version: str) -> RowMapping:
    """One version with its `serving_name`. Raises `UnknownVersionError` with the names that exist."""
    row = connection.execute(select(Version.__table__).where(Version.agent == agent, Version.name == version)).mappings().first()
    if row is None:
        names = ", ".join(one["name"] for one in list_all(connection, agent)) or "none yet"
        raise UnknownVersionError(f"agent {agent} has no version {version!r}: there are {names}")
    return row


def serving_name(row: Mapping[str, Any] | RowMapping) -> str:
    """The name a version is served under; it is never used for other weights."""
    return f"{row['agent']}-{row['name']}-{(row['adapter_digest'] or row['base_digest']).removeprefix('sha256:')[:12]}"


def list_all(connection: Connection, agent: str | None = None) -> list[RowMapping]:
    """Every version, oldest first."""
    query = select(Version.__table__).order_by(Version.agent, Version.major, Version.minor)
    return list(connection.execute(query.where(Version.agent == agent) if agent else query).mappings())


def champion(connection: Connection, agent: str) -> str | None:
    """The version in service."""
    return connection.execute(select(Alias.version).where(Alias.agent == agent, Alias.alias == CHAMPION)).scalar()


def champion_at(connection: Connection, agent: str, at: datetime) -> str | None:
    """The version that was in service at a time in the past."""
    change = deployment_at(connection, agent, at)
    return change["version"] if change else None


def deployment_at(connection: Connection, agent: str, at: datetime) -> RowMapping | None:
    """The change that had brought the champion of that time into service."""
    query = select(Deployment.__table__).where(Deployment.agent == agent, Deployment.requested_at <= at)
    return connection.execute(query.order_by(Deployment.number.desc()).limit(1)).mappings().first()


def find(connection: Connection, agent: str, name: str) -> RowMapping | None:
    """The version of this name or serving name; a producer may send either."""
    return next((row for row in list_all(connection, agent) if name in (row["name"], serving_name(row))), None)


def give_verdict(connection: Connection, agent: str, version: str, verdict: Verdict, reasons: list[str], now: datetime) -> bool:
    """Write the verdict on a version, once. False when it has one."""
    change = update(Version).where(Version.agent == agent, Version.name == version, Version.verdict.is_(None))
    if not connection.execute(change.values(verdict=verdict, verdict_at=now)).rowcount:
        return False
    body = {"version": version, "verdict": verdict, "reasons": reasons}
    head = ledger.append(connection, "verdict", agent, body, now)
    events.emit(connection, "ratchet.version.judged.v1", f"{agent}/{version}", f"{agent}/{version}", {**body, "ledger": head}, now)
    return True


def change_champion(
    connection: Connection,
    agent: str,
    version: str,
    expected: str | None,
    kind: Change,
    actor: str,
    reason: str,
    now: datetime,
    *,
    is_forced: bool = False,
) -> str:
    """Move the alias from `expected` to `version` and ask for its deployment; returns the deployment.

    Raises `ChampionChangedError` when the champion is no longer `expected`, `UnknownVersionError` when there is no such version.
    """
    read(connection, agent, version)
    number = _count_changes(connection, agent) + 1
    deployment = ids.make_ulid(now, agent, str(number))
    if expected is None:
        row = {"agent": agent, "alias": CHAMPION, "version": version, "deployment": deployment, "changed_at": now}
        moved = bulk.insert_new(connection, Alias, row)
    else:
        alias = update(Alias).where(Alias.agent == agent, Alias.alias == CHAMPION, Alias.version == expected)
        moved = connection.execute(alias.values(version=version, deployment=deployment, changed_at=now)).rowcount == 1
    if not moved:
        raise ChampionChangedError(f"agent {agent}: the champion is {champion(connection, agent)}, not {expected}: look again")
    older = update(Deployment).where(Deployment.agent == agent, Deployment.state.in_(("requested", "unconfirmed")))
    connection.execute(older.values(state="superseded"))
    row = {"id": deployment, "agent": agent, "kind": kind, "version": version, "previous": expected, "actor": actor, "reason": reason}
    values = {**row, "number": number, "is_forced": is_forced, "state": "requested", "requested_at": now}
    connection.execute(insert(Deployment).values(values))
    if is_forced:
        connection.execute(update(Version).where(Version.agent == agent, Version.name == version).values(is_forced=True))
    body = {**row, "is_forced": is_forced}
    head = ledger.append(connection, kind, agent, body, now)
    events.emit(connection, EVENTS[kind], f"{agent}/{version}", deployment, {**body, "ledger": head}, now)
    return deployment


def _count_changes(connection: Connection, agent: str) -> int:
    return connection.execute(select(func.coalesce(func.max(Deployment.number), 0)).where(Deployment.agent == agent)).scalar_one()


def read_deployment(connection: Connection, deployment: str) -> RowMapping:
    """One change of the champion."""
    return connection.execute(select(Deployment.__table__).where(Deployment.id == deployment)).mappings().one()


def mark_published(connection: Connection, deployment: str, now: datetime) -> bool:
    """Keep when the server was told last; False when the deployment was settled or superseded meanwhile."""
    live = update(Deployment).where(Deployment.id == deployment, Deployment.state.in_(("requested", "unconfirmed")))
    return bool(connection.execute(live.values(published_at=now)).rowcount)


def read_requested(connection: Connection, agent: str | None = None) -> list[RowMapping]:
    """Deployments that no server has confirmed yet, and rollbacks that are to be tried again."""
    query = select(Deployment.__table__).where(Deployment.state.in_(("requested", "unconfirmed")))
    query = query.order_by(Deployment.agent, Deployment.number)
    return list(connection.execute(query.where(Deployment.agent == agent) if agent else query).mappings())


def settle_deployment(connection: Connection, deployment: str, state: str, detail: str | None, now: datetime) -> bool:
    """Say how a requested deployment ended; False when it had been settled before."""
    change = update(Deployment).where(
        Deployment.id == deployment, Deployment.state.in_(("requested", "unconfirmed")), Deployment.state != state
    )
    confirmed_at = now if state in ("confirmed", "unverified") else None
    row = connection.execute(
        change.values(state=state, detail=detail, confirmed_at=confirmed_at).returning(Deployment.agent, Deployment.version)
    ).first()
    if row is None:
        return False
    ledger.append(connection, f"deployment {state}", row.agent, {"deployment": deployment, "version": row.version, "detail": detail}, now)
    return True


def in_force(connection: Connection, agent: str) -> RowMapping | None:
    """The change that brought the champion into service."""
    query = select(Deployment.__table__).join(Alias, Alias.deployment == Deployment.id)
    return connection.execute(query.where(Alias.agent == agent, Alias.alias == CHAMPION)).mappings().first()


def history(connection: Connection, agent: str | None = None) -> list[RowMapping]:
    """Every change of the champion, oldest first."""
    query = select(Deployment.__table__).order_by(Deployment.agent, Deployment.number)
    return list(connection.execute(query.where(Deployment.agent == agent) if agent else query).mappings())


def list_changes(connection: Connection, agent: str, after: int) -> list[RowMapping]:
    """The changes of an agent's champion that came after the one of that number, oldest first."""
    query = select(Deployment.__table__).where(Deployment.agent == agent, Deployment.number > after)
    return list(connection.execute(query.order_by(Deployment.number)).mappings())


def predecessor(connection: Connection, agent: str) -> str | None:
    """The version that a rollback goes back to: the champion before this one, leaving out those that were gone back from."""
    now = champion(connection, agent)
    return next((version for version in reversed(list_succession(connection, agent)) if version != now), None)


def list_succession(connection: Connection, agent: str) -> list[str]:
    """The versions that led to the champion, it among them, oldest first: without those that were gone back from and not promoted since."""
    path: list[str] = []
    for change in history(connection, agent):
        version = change["version"]
        if version in path and change["kind"] != "promote":
            del path[path.index(version) + 1 :]
        elif change["state"] != "reverted":
            path = [*(one for one in path if one != version), version]
    return path


def latest_candidate(connection: Connection, agent: str) -> RowMapping | None:
    """The newest trained version that was neither rejected nor rolled back for good: where the next run continues.

    Who promotes a version again after a rollback says that it did no harm: a drill, or an error.
    """
    again = aliased(Deployment)
    came_back = exists().where(again.agent == agent, again.version == Deployment.previous, again.number > Deployment.number)
    harmful = select(Deployment.previous).where(Deployment.agent == agent, Deployment.kind == "rollback", Deployment.previous.is_not(None))
    harmful = harmful.where(~came_back)
    query = select(Version.__table__).where(Version.agent == agent, Version.name != BARE, Version.name.not_in(harmful))
    query = query.where(func.coalesce(Version.verdict, "") != "reject").order_by(Version.major.desc(), Version.minor.desc()).limit(1)
    return connection.execute(query).mappings().first()
