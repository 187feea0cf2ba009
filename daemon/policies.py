"""The policy in force: recorded as a version by the daemon when it changed, and handed to the event handlers."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime

from sqlalchemy import Connection

from consumers import handlers
from daemon.agents import Agent
from storage import policies


def record(connection: Connection, agents: Mapping[str, Agent], now: datetime) -> dict[str, handlers.Agent]:
    """What the handlers need to know of every agent; a policy that differs from the last one becomes a new version."""
    return {name: _record_one(connection, agent, now) for name, agent in agents.items()}


def read_in_force(connection: Connection, agents: Mapping[str, Agent], now: datetime) -> dict[str, handlers.Agent]:
    """As `record`, but by the policy that the daemon routes with, whatever this process is configured with; the first one is recorded."""
    return {name: _read_one(connection, agent, now) for name, agent in agents.items()}


def _record_one(connection: Connection, agent: Agent, now: datetime) -> handlers.Agent:
    version = policies.record(connection, agent.name, agent.policy_digest, agent.policy, now)
    return handlers.Agent(agent.name, agent.labels, agent.routing_policy, version, agent.review.expires_days)


def _read_one(connection: Connection, agent: Agent, now: datetime) -> handlers.Agent:
    current = policies.current(connection, agent.name)
    if current is None:
        return _record_one(connection, agent, now)
    in_force = Agent.model_validate({**current.body, "prompt": agent.prompt})
    return handlers.Agent(agent.name, in_force.labels, in_force.routing_policy, current.version, agent.review.expires_days)
