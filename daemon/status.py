"""How things stand: agents, champions, queues, labels until the next run, running training, alarms; for a person and for a program."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection, Engine, RowMapping

from consumers import budget
from daemon.agents import Agent
from storage import alarms, db, dead_letters, events, exams, labels, predictions, registry, reviews, runs, streams

UNAVAILABLE = db.UNAVAILABLE
HEALTH_WINDOW = 250


def collect(engine: Engine, agents: Mapping[str, Agent], now: datetime) -> dict[str, Any]:
    """Everything at one moment, without claim text."""
    with db.reading(engine) as connection:
        oldest = events.oldest_received_at(connection)
        return {
            "at": now,
            "events": {**events.count_by_state(connection), "oldest_seconds": (now - oldest).total_seconds() if oldest else None},
            "stream": describe_stream(connection, now),
            "dead_letters": dead_letters.count_parked(connection),
            "alarms": _list_alarms(connection, ""),
            "agents": {name: _describe_agent(connection, agent, now) for name, agent in agents.items()},
        }


def describe_stream(connection: Connection, now: datetime) -> dict[str, Any] | None:
    """Kafka, as the daemons that speak to it have told in the last minute; None when none does."""
    told = streams.read_fresh(connection, now)
    if not told:
        return None
    newest = told[0]["body"]
    problem = next((row["body"]["problem"] for row in told if row["body"]["problem"]), None)  # one daemon's is nobody else's
    backlog = events.count_by_state(connection)["unsent"] + reviews.count_unsent(connection)
    shown = ("consumer", "batches", "records", "batch_seconds", "last_records", "last_seconds", "is_relaying", "sent")
    daemons = {" ".join(row["holder"].split()[:2]): {name: row["body"][name] for name in shown} for row in told}
    return {"problem": problem, "lag": newest["lag"], "oldest_seconds": newest["oldest_seconds"], "backlog": backlog, "daemons": daemons}


def begin_day(now: datetime) -> datetime:
    """When the day began, in UTC."""
    return now.replace(hour=0, minute=0, second=0, microsecond=0)


def _describe_agent(connection: Connection, agent: Agent, now: datetime) -> dict[str, Any]:
    fresh = labels.count_fresh(connection, agent.name)
    recent = predictions.read_confidences(connection, agent.name, HEALTH_WINDOW)
    return {
        "champion": _describe_champion(connection, agent.name),
        "predictions_last_day": predictions.count_since(connection, agent.name, now - timedelta(days=1)),
        "confidences": budget.confidence_health(confidence for confidence, _ in recent),
        "reviews": reviews.count_live(connection, agent.name),
        "conflicts": len(labels.list_conflicts(connection, agent.name)),
        "labels": {"fresh": fresh, "until_run": max(agent.triggers.new_labels - fresh, 0)},
        "run": _describe_run(_find_run(connection, agent.name)),
        "exams": [_describe_exam(row) for kind in ("exam", "watch") if (row := exams.read_open(connection, agent.name, kind))],
        "alarms": _list_alarms(connection, agent.name),
    }


def _list_alarms(connection: Connection, agent: str) -> list[dict[str, Any]]:
    """The open alarms of an agent; those of the daemon as a whole belong to the agent without a name."""
    return [{name: row[name] for name in ("kind", "message", "raised_at")} for row in alarms.list_open(connection, agent)]


def _describe_champion(connection: Connection, agent: str) -> dict[str, Any] | None:
    version = registry.champion(connection, agent)
    if version is None:
        return None
    row = registry.read(connection, agent, version)
    change = registry.history(connection, agent)[-1]
    return {
        "version": version,
        "serving_name": registry.serving_name(row),
        "since": change["requested_at"],
        "deployment": change["state"],
        "is_forced": row["is_forced"],
    }


def _find_run(connection: Connection, agent: str) -> RowMapping | None:
    """The run that goes on or waits; else the last one, if that ended badly."""
    for kind in ("train", "score"):
        live = runs.read_live(connection, agent, kind)
        if live is not None:
            return live
    last = runs.read_last(connection, agent, "train")
    return last if last is not None and last["state"] in ("failed", "parked") else None


def _describe_run(run: RowMapping | None) -> dict[str, Any] | None:
    if run is None:
        return None
    progress = run["progress"] or {}
    done, whole = progress.get("step", progress.get("rows")), progress.get("steps", progress.get("of"))
    shown = {name: run[name] for name in ("id", "kind", "state", "reason", "attempt", "device", "error")}
    return {
        **shown,
        "phase": progress.get("phase"),
        "share": done / whole if whole and done is not None else None,
        "loss": progress.get("loss"),
        "eta_seconds": progress.get("eta_seconds"),
        "heartbeat_at": run["heartbeat_at"],
    }


def _describe_exam(exam: RowMapping) -> dict[str, Any]:
    counts = {name: exam["report"].get(name) for name in ("asked", "wins", "losses")}
    return {name: exam[name] for name in ("kind", "candidate", "champion", "opened_at")} | counts
