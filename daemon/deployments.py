"""Deployments: the champion changes, its server is told and asked, and what is not confirmed is reverted or tried again.

requested → confirmed | unverified | unconfirmed → reverted: a promotion that no server confirms in time is taken back, a rollback never
is. State is in the rows: a process may die at any line, and the next call goes on. No transaction is open while a server is spoken to.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime, timedelta

import structlog
from sqlalchemy import Connection, Engine, RowMapping

from daemon import holders
from daemon.agents import Agent
from daemon.serving import publisher
from storage import alarms, db, leases, registry

ROLLBACK_UNCONFIRMED = "rollback_unconfirmed"
PROMOTION_REVERTED = "promotion_reverted"
NOT_SERVED = "champion_not_served"
OPEN = ("requested", "unconfirmed")
POLL_SECONDS = 0.1

log = structlog.get_logger()


class PromotionRefusedError(ValueError):
    """This version may not become the champion as asked."""


class RollbackRefusedError(ValueError):
    """There is nothing to go back to as asked."""


def promote(connection: Connection, agent: str, version: str, actor: str, reason: str, now: datetime, *, force: bool = False) -> str:
    """Make a version the champion in the caller's transaction; returns the deployment. `daemon.examination` then watches it.

    Without the verdict *promote* that takes `force` and a reason, and the version is marked for ever; its verdict stays what it is.
    Raises `PromotionRefusedError`, `registry.UnknownVersionError`, `registry.ChampionChangedError`.
    """
    row = registry.read(connection, agent, version)
    champion = registry.champion(connection, agent)
    if version == champion:
        raise PromotionRefusedError(f"{version} is the champion of {agent} already")
    is_forced = row["verdict"] != "promote"
    if is_forced and not (force and reason.strip()):
        verdict = f"has the verdict {row['verdict']}" if row["verdict"] else "has no verdict yet"
        raise PromotionRefusedError(
            f'{version} {verdict}: to promote it all the same give --force and --reason "…", which is kept for ever'
        )
    return registry.change_champion(connection, agent, version, champion, "promote", actor, reason, now, is_forced=is_forced)


def rollback(connection: Connection, agent: str, actor: str, reason: str, now: datetime, *, to: str | None = None) -> str:
    """Go back to `to`, or to the champion before this one, in the caller's transaction; returns the deployment.

    What was gone back from is only promoted again, with all that a promotion asks for.
    Raises `RollbackRefusedError`, `registry.UnknownVersionError`, `registry.ChampionChangedError`.
    """
    if not reason.strip():
        raise RollbackRefusedError('a rollback needs a reason, which is kept for ever: give --reason "…"')
    champion = registry.champion(connection, agent)
    target = to or registry.predecessor(connection, agent)
    if champion is None or target is None:
        raise RollbackRefusedError(f"{agent} has no version before {champion or 'the first one'}: there is nothing to go back to")
    registry.read(connection, agent, target)
    if target == champion:
        raise RollbackRefusedError(f"{target} is the champion of {agent} already")
    if target not in {change["version"] for change in registry.history(connection, agent)}:
        raise RollbackRefusedError(f"{target} was never in service, so nothing goes back to it: use `ratchet promote {target}`")
    before = [version for version in registry.list_succession(connection, agent) if version != champion]
    if target not in before:
        others = f" or go back to {', '.join(reversed(before))}" if before else ""
        raise RollbackRefusedError(f"{target} was gone back from: use `ratchet promote {target}`{others}")
    return registry.change_champion(connection, agent, target, champion, "rollback", actor, reason, now)


def advance(engine: Engine, agents: Mapping[str, Agent], now: datetime) -> None:
    """Publish what waits to be published, ask for what was published, and settle what can be settled."""
    with db.reading(engine) as connection:
        waiting = dict.fromkeys(row["agent"] for row in registry.read_requested(connection))
    for name in waiting:
        if name in agents:
            _advance_agent(engine, agents[name], now)


def _advance_agent(engine: Engine, agent: Agent, now: datetime) -> None:
    with _lease(engine, agent, now) as is_ours:
        tried: set[str] = set()
        while is_ours and (found := _read_next(engine, agent)) and found[0]["id"] not in tried:
            deployment, target = found
            tried.add(deployment["id"])
            began = time.monotonic()
            answer = _try(engine, publisher.choose(agent), deployment, target, agent, now)
            if answer is not None:
                # Nobody was spoken to where there is nobody to ask: on a simulated clock the same run then has the same times.
                took = timedelta(0) if answer.state == "unverified" else timedelta(seconds=time.monotonic() - began)
                _settle(engine, agent, deployment, answer, now + took)


def _read_next(engine: Engine, agent: Agent) -> tuple[RowMapping, publisher.Target] | None:
    with db.reading(engine) as connection:
        deployment = next(iter(registry.read_requested(connection, agent.name)), None)
        return None if deployment is None else (deployment, _find_target(connection, agent, deployment["version"]))


def _find_target(connection: Connection, agent: Agent, version: str) -> publisher.Target:
    """What the agent's server is to serve, on a base that it holds as exams do."""
    row = dict(registry.read(connection, agent.name, version))
    return publisher.to_target(row, in_4bit=agent.training.serve_in_4bit)


def _try(
    engine: Engine, server: publisher.Publisher, deployment: RowMapping, target: publisher.Target, agent: Agent, now: datetime
) -> publisher.Answer | None:
    """Publish if that is due, and ask; None when a newer change came between.

    Even a server that has the right digest is told once: what it reads at its next start must be right too. It is not told again before
    the time-out, since a server that restarts at each telling would never come up.
    """
    published_at = deployment["published_at"]
    if published_at is None or now - published_at >= timedelta(seconds=agent.publisher.timeout_seconds):
        failure = _tell(server, target)
        if failure is not None:
            return failure
        with db.writing(engine) as connection:
            if not registry.mark_published(connection, deployment["id"], now):
                return None
    return _ask(server, target)


def _tell(server: publisher.Publisher, target: publisher.Target) -> publisher.Answer | None:
    """Publish; None when the server was told, else why not."""
    try:
        server.publish(target)
    except publisher.PublishFailedError as error:
        return publisher.Answer("untold", _make_storable(str(error)))
    except Exception as error:  # noqa: BLE001 — a server may answer anything: that is its agent's trouble and nobody else's
        return _report_failure(target, error)
    return None


def _ask(server: publisher.Publisher, target: publisher.Target) -> publisher.Answer:
    try:
        answer = server.ask(target)
    except Exception as error:  # noqa: BLE001 — as above
        return _report_failure(target, error)
    return publisher.Answer(answer.state, _make_storable(answer.detail))


def _report_failure(target: publisher.Target, error: Exception) -> publisher.Answer:
    log.warning("publisher_failed", agent=target.agent, version=target.version, error=type(error).__name__, exc_info=error)
    return publisher.Answer("unreachable", f"the publisher of {target.agent} failed ({type(error).__name__})")


def _make_storable(detail: str) -> str:
    """The text without what no database takes: a server's words may hold half a character, or NUL."""
    return detail.encode(errors="replace").decode().replace("\0", "?")


def _settle(engine: Engine, agent: Agent, deployment: RowMapping, answer: publisher.Answer, now: datetime) -> None:
    is_late = now - deployment["requested_at"] >= timedelta(seconds=agent.publisher.timeout_seconds)
    if answer.state in {"confirmed", "unverified"}:
        _accept(engine, deployment, answer, now)
    elif deployment["kind"] == "promote" and deployment["previous"] is not None:
        if is_late:
            _revert(engine, deployment, answer, now)
    elif is_late or answer.state == "untold":
        _insist(engine, deployment, answer, now)


def _accept(engine: Engine, deployment: RowMapping, answer: publisher.Answer, now: datetime) -> None:
    with db.writing(engine) as connection:
        if not registry.settle_deployment(connection, deployment["id"], answer.state, answer.detail, now):
            return
        for kind in (ROLLBACK_UNCONFIRMED, NOT_SERVED, *([PROMOTION_REVERTED] if deployment["kind"] == "promote" else [])):
            alarms.clear(connection, deployment["agent"], kind, now)
    _log_change("deployment_settled", deployment, answer.state, answer.detail)


def _revert(engine: Engine, deployment: RowMapping, answer: publisher.Answer, now: datetime) -> None:
    """Take an unconfirmed promotion back; the way back is published like any other change, and never given up."""
    agent, version = deployment["agent"], deployment["version"]
    reason = f"the promotion of {version} was not confirmed: {answer.detail}"
    with contextlib.suppress(registry.ChampionChangedError), db.writing(engine) as connection:
        if not registry.settle_deployment(connection, deployment["id"], "unconfirmed", answer.detail, now):
            return
        registry.settle_deployment(connection, deployment["id"], "reverted", answer.detail, now)
        registry.change_champion(connection, agent, deployment["previous"], version, "revert", "ratchet", reason, now)
        alarms.raise_alarm(connection, agent, PROMOTION_REVERTED, reason, {"deployment": deployment["id"], "version": version}, now)
        _log_change("promotion_reverted", deployment, "reverted", answer.detail)


def _insist(engine: Engine, deployment: RowMapping, answer: publisher.Answer, now: datetime) -> None:
    """Go on trying, and tell somebody: where we go back to is where we must be."""
    kind = NOT_SERVED if deployment["kind"] == "promote" else ROLLBACK_UNCONFIRMED
    with db.writing(engine) as connection:
        if registry.settle_deployment(connection, deployment["id"], "unconfirmed", answer.detail, now):
            detail = {"deployment": deployment["id"], "version": deployment["version"]}
            message = f"{deployment['version']} is not confirmed by its server: {answer.detail}"
            alarms.raise_alarm(connection, deployment["agent"], kind, message, detail, now)
            _log_change("deployment_unconfirmed", deployment, "unconfirmed", answer.detail)


def reconcile(engine: Engine, agents: Mapping[str, Agent], now: datetime) -> None:
    """See that the champions are still served: a server that reports another version is told again, one that is silent is alarmed."""
    for agent in agents.values():
        with _lease(engine, agent, now) as is_ours:
            target = _read_settled(engine, agent) if is_ours else None
            if target is not None:
                _reassert(engine, agent.name, publisher.choose(agent), target, now)


def _read_settled(engine: Engine, agent: Agent) -> publisher.Target | None:
    """The champion, unless its deployment is still on its way."""
    with db.reading(engine) as connection:
        deployment = registry.in_force(connection, agent.name)
        if deployment is None or deployment["state"] in OPEN:
            return None
        return _find_target(connection, agent, deployment["version"])


def _reassert(engine: Engine, agent: str, server: publisher.Publisher, target: publisher.Target, now: datetime) -> None:
    answer = _ask(server, target)
    if answer.state == "different":
        # A server that does not answer is not told: it may be starting, and a restart at each look would keep it from that.
        log.warning("champion_not_served", agent=agent, version=target.version, detail=answer.detail)
        answer = _tell(server, target) or _ask(server, target)
    if answer.state == "unverified":
        return
    with db.reading(engine) as connection:
        is_alarmed = any(alarm["kind"] == NOT_SERVED for alarm in alarms.list_open(connection, agent))
    if answer.state == "confirmed" and not is_alarmed:
        return
    with db.writing(engine) as connection:
        if answer.state == "confirmed":
            alarms.clear(connection, agent, NOT_SERVED, now)
        else:
            message = f"{target.version} is the champion, but it is not served: {answer.detail}"
            alarms.raise_alarm(connection, agent, NOT_SERVED, message, {"version": target.version}, now)


def await_settled(
    engine: Engine, agent: Agent, deployment: str, clock: Callable[[], datetime], sleep: Callable[[float], None] = time.sleep
) -> RowMapping:
    """Advance until the server has confirmed or the time is up; returns the deployment's row. Nothing here needs the daemon."""
    deadline = clock() + timedelta(seconds=agent.publisher.timeout_seconds)
    now = clock()
    while True:
        advance(engine, {agent.name: agent}, now)
        with db.reading(engine) as connection:
            row = registry.read_deployment(connection, deployment)
        if row["state"] not in OPEN or now > deadline:
            return row
        sleep(POLL_SECONDS)
        now = clock()
        # Another attempt may take as long again; what is only requested is looked at once more, to be called late.
        if row["state"] == "unconfirmed" and now > deadline:
            return row


@contextlib.contextmanager
def _lease(engine: Engine, agent: Agent, now: datetime) -> Iterator[bool]:
    """Whether this call is the one that speaks to the agent's server; another may be at it in the daemon or on a command line."""
    name, holder = f"deploy:{agent.name}", holders.make_name()
    term = timedelta(seconds=3 * agent.publisher.timeout_seconds + 60)
    with db.writing(engine) as connection:
        fence = holders.acquire(connection, name, holder, now, term)
    try:
        yield fence is not None
    finally:
        if fence is not None:
            with db.writing(engine) as connection:
                leases.release(connection, name, holder)


def _log_change(event: str, deployment: RowMapping, state: str, detail: str) -> None:
    about = {name: deployment[name] for name in ("agent", "kind", "version")}
    log.info(event, **about, deployment=deployment["id"], state=state, detail=detail)
