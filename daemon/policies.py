"""The policy in force: recorded as a version by the daemon when it changed, and handed to the event handlers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any

from sqlalchemy import Connection

from consumers import rules
from daemon.agents import Agent
from storage import policies


def record(connection: Connection, agents: Mapping[str, Agent], now: datetime) -> dict[str, rules.Agent]:
    """What the handlers need to know of every agent; a policy that differs from the last one becomes a new version."""
    return {name: _record_one(connection, agent, now) for name, agent in agents.items()}


def read_in_force(connection: Connection, agents: Mapping[str, Agent], now: datetime) -> dict[str, rules.Agent]:
    """As `record`, but by the policy that the daemon routes with, whatever this process is configured with; the first one is recorded."""
    return {name: _read_one(connection, agent, now) for name, agent in agents.items()}


def read_version(connection: Connection, agent: str) -> int | None:
    """The number of the policy version in force; None before the first."""
    current = policies.current(connection, agent)
    return current and int(current.version)


def list_changes(connection: Connection, agent: str, since: int | None) -> tuple[str, ...]:
    """The keys whose values in the policy in force differ from an earlier version's; one that was not recorded then has not changed."""
    current = policies.current(connection, agent)
    if current is None or since is None or current.version == since:  # as at nearly every tick
        return ()
    known = policies.show(connection, agent, since)
    return tuple(_compare(known["body"], current.body)) if known else ()


def _compare(old: Mapping[str, Any], new: Mapping[str, Any], path: str = "") -> Iterator[str]:
    for key in sorted(old.keys() & new.keys()):
        if isinstance(old[key], dict) and isinstance(new[key], dict):
            yield from _compare(old[key], new[key], f"{path}{key}.")
        elif old[key] != new[key]:
            yield path + key


def _record_one(connection: Connection, agent: Agent, now: datetime) -> rules.Agent:
    version = policies.record(connection, agent.name, agent.policy_digest, agent.policy, now)
    return rules.Agent(agent.name, agent.labels, agent.routing_policy, version, agent.review.expires_days)


def _read_one(connection: Connection, agent: Agent, now: datetime) -> rules.Agent:
    current = policies.current(connection, agent.name)
    if current is None:
        return _record_one(connection, agent, now)
    in_force = Agent.model_validate({**current.body, "prompt": agent.prompt})
    return rules.Agent(agent.name, in_force.labels, in_force.routing_policy, current.version, agent.review.expires_days)
