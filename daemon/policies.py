"""The policy in force: recorded as a version when it changed, and handed to the event handlers."""

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


def _record_one(connection: Connection, agent: Agent, now: datetime) -> handlers.Agent:
    version = policies.record(connection, agent.name, agent.policy_digest, agent.policy, now)
    return handlers.Agent(agent.name, agent.labels, agent.routing_policy, version, agent.review.expires_days)
