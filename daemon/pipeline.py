"""The loop in one tick: every stage for every agent, in the order in which the data moves.

Each stage finds its work by the state of rows and may be killed at any line: the next tick goes on. No stage holds a transaction while
a process, a file or a server works, and none asks for the time: it comes with the tick.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from datetime import datetime
from typing import Any

import structlog
from sqlalchemy import Engine

from consumers import handlers
from daemon import deployments, devices, dispatch, examination, gate, leftovers, makeup, nvml, policies, traffic, training, verdicts
from daemon.agents import Agent
from daemon.launch import Launcher
from daemon.machinery import Decide, Machinery
from daemon.settings import Settings
from storage import alarms, db, exams, ledger, reviews, runs

ALARM = "pipeline"
Stage = Callable[[Machinery, Agent, datetime], None]
PREPARE: tuple[Stage, ...] = (makeup.ensure_bare, examination.realign, examination.queue_scoring)
COMPARE: tuple[Stage, ...] = (verdicts.ask, verdicts.judge_exam, verdicts.judge_watch, traffic.look)

log = structlog.get_logger()


class Pipeline:
    """The stages around one database, with what they keep in memory between ticks."""

    def __init__(
        self,
        engine: Engine,
        settings: Settings,
        launcher: Launcher,
        decide: Decide = gate.decide,
        read_cards: devices.Read | None = None,
    ) -> None:
        self.machinery = Machinery(engine, settings, launcher, decide, read_cards or nvml.make_reader(settings.storage.runs))

    def tick(self, now: datetime) -> bool:
        """`advance`, and say whether that changed anything."""
        before = self._read_state()
        self.advance(now)
        return self._read_state() != before

    def advance(self, now: datetime) -> None:
        """Advance everything that can be advanced. Raises only when the database can't be used."""
        keep_house(self.machinery, now)
        examine(self.machinery, now)
        train(self.machinery, now)
        deploy(self.machinery, now)

    def sweep(self, now: datetime, is_stopping: Callable[[], bool] = lambda: False) -> None:
        """Remove what is of no more use on disk; to be called now and then."""
        _attempt(self.machinery, "", "sweep", now, functools.partial(leftovers.sweep, self.machinery, now, is_stopping))

    def _read_state(self) -> tuple[Any, ...]:
        """All that a tick can change, but for signs of life."""
        with db.reading(self.machinery.engine) as connection:
            under_way = [(run["id"], run["state"], run["attempt"]) for run in runs.read_in_state(connection, *runs.LIVE)]
            compared = [
                (exam["id"], exam["report"]) for name in self.machinery.settings.agents for exam in exams.list_open(connection, name)
            ]
            waiting = [reviews.count_live(connection, name) for name in self.machinery.settings.agents]
            return under_way, compared, waiting, len(alarms.list_open(connection)), ledger.head(connection)


def keep_house(machinery: Machinery, now: datetime) -> None:
    """Record changed policies, return cases whose lease ran out, drop those not worth asking any more, give up on lost labels."""
    with db.writing(machinery.engine) as connection:
        if not machinery.memory.is_recorded:
            policies.record(connection, machinery.settings.agents, now)
        returned = reviews.return_expired_leases(connection, now)
        expired = len(reviews.expire(connection, now))
        parked = handlers.park_overdue(connection, now)
    machinery.memory.is_recorded = True
    if returned or expired or parked:
        log.info("house_kept", leases_returned=returned, reviews_expired=expired, labels_parked=parked)


def examine(machinery: Machinery, now: datetime) -> None:
    """Score new claims with the versions that are compared, ask where they differ, and act on what the answers say."""
    for stage in PREPARE:
        _for_all(machinery, stage, now)
    _move_runs(machinery, now)
    for stage in COMPARE:
        _for_all(machinery, stage, now)


def train(machinery: Machinery, now: datetime) -> None:
    """Queue a run where a trigger says so, and look after all that are under way."""
    _for_all(machinery, training.queue_due, now)
    _move_runs(machinery, now)


def deploy(machinery: Machinery, now: datetime) -> None:
    """Publish what was changed and ask the servers what they serve."""
    agents = machinery.settings.agents
    _attempt(machinery, "", "deploy", now, functools.partial(deployments.advance, machinery.engine, agents, now))


def _move_runs(machinery: Machinery, now: datetime) -> None:
    # A launcher that waits for its worker has finished what was just started: follow again.
    for stage in (dispatch.follow_all, dispatch.start_queued, dispatch.follow_all):
        _attempt(machinery, "", stage.__name__, now, functools.partial(stage, machinery, now))


def _for_all(machinery: Machinery, stage: Stage, now: datetime) -> None:
    for agent in machinery.settings.agents.values():
        _attempt(machinery, agent.name, stage.__name__, now, functools.partial(stage, machinery, agent, now))


def _attempt(machinery: Machinery, agent: str, stage: str, now: datetime, work: Callable[[], None]) -> None:
    """Do a stage's work; what fails is told and tried again at the next tick, and holds up no other stage or agent."""
    was_well = machinery.memory.is_well.get((agent, stage))
    alarm = f"{ALARM}: {stage}"
    try:
        work()
    except Exception as error:
        if db.is_passing(error):
            raise  # it is no stage's fault
        # A full disk, a folder taken away, a bug: whatever it is, the champion goes on serving. A lost database fails again below.
        if was_well is not False:
            log.exception("stage_failed", agent=agent, stage=stage)
        with db.writing(machinery.engine) as connection:
            alarms.raise_alarm(connection, agent, alarm, f"{stage} fails: {type(error).__name__}: {error}", {}, now)
        machinery.memory.is_well[agent, stage] = False
        return
    if not was_well:
        with db.writing(machinery.engine) as connection:
            alarms.clear(connection, agent, alarm, now)
        machinery.memory.is_well[agent, stage] = True
