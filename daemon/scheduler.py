"""The role that advances the loop: APScheduler only ticks, and of several daemons the one that holds the lease does the work."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import datetime, timedelta

import structlog
from apscheduler.schedulers.asyncio import AsyncIOScheduler
from sqlalchemy import Engine

from consumers import outages
from daemon import deployments, dispatch, holders
from daemon.herald import Herald
from daemon.pipeline import Pipeline
from storage import db, leases, schema

LEASE = "scheduler"
TERM = timedelta(seconds=30)
RENEW_SECONDS, TICK_SECONDS, RECONCILE_SECONDS, SWEEP_SECONDS = 8, 1, 60, 600
STOP_SECONDS = 20

log = structlog.get_logger()


class Leader:
    """Whether this process is the one that schedules."""

    def __init__(self, engine: Engine, clock: Callable[[], datetime]) -> None:
        self._engine = engine
        self._clock = clock
        self._holder = holders.make_name()
        self._until: datetime | None = None
        self.fence: int | None = None
        """Of the last time that this process led."""

    @property
    def is_leading(self) -> bool:
        """Whether the lease is ours, as far as we know: when it can't be renewed it runs out for us as it does for the others."""
        return self._until is not None and self._clock() < self._until

    def renew(self) -> bool:
        """Take the lease or hold it for longer; returns whether this process leads."""
        now, was_leading = self._clock(), self._until is not None
        with db.writing(self._engine, alone=False) as connection:
            fence = holders.acquire(connection, LEASE, self._holder, now, TERM)
        self._until = None if fence is None else now + TERM
        self.fence = self.fence if fence is None else fence
        if (fence is not None) != was_leading:
            log.info("leading_began" if fence is not None else "leading_ended", holder=self._holder)
        return fence is not None

    def resign(self) -> None:
        """Give the lease back, so that another daemon need not wait for its end."""
        with db.writing(self._engine, alone=False) as connection:
            leases.release(connection, LEASE, self._holder)
        self._until = None


class Scheduler:
    """The jobs of one process; a thread that was begun is always finished."""

    def __init__(self, pipeline: Pipeline, clock: Callable[[], datetime]) -> None:
        self._pipeline = pipeline
        self._machinery = pipeline.machinery
        self._clock = clock
        self._leader = Leader(pipeline.machinery.engine, clock)
        self._herald = Herald(pipeline.machinery.engine, pipeline.machinery.settings.agents)
        self._working: set[asyncio.Task[object]] = set()
        self._failed: list[BaseException] = []
        self._is_over = asyncio.Event()
        self._is_stopping = False
        self._outage = outages.Outage("schedule")

    async def run(self, stop: asyncio.Event) -> None:
        """Tick until `stop`, then let the trainers write their checkpoints and queue their runs again.

        Raises what a tick raised: the database can't be used, and the process is to end.
        """
        scheduler = AsyncIOScheduler(timezone="UTC", job_defaults={"max_instances": 1, "coalesce": True, "misfire_grace_time": None})
        # A tick may take longer than the lease: another job renews it meanwhile.
        jobs = (
            (self._leader.renew, RENEW_SECONDS),
            (self._tick, TICK_SECONDS),
            (self._reconcile, RECONCILE_SECONDS),
            (self._sweep, SWEEP_SECONDS),
            (self._analyze, db.ANALYZE_SECONDS),
        )
        for work, seconds in jobs:
            scheduler.add_job(self._perform, "interval", [work], seconds=seconds)
        scheduler.start()
        waiting = [asyncio.create_task(stop.wait()), asyncio.create_task(self._is_over.wait())]
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        self._is_stopping = True
        for task in waiting:
            task.cancel()
        scheduler.shutdown()
        await asyncio.gather(*self._working, return_exceptions=True)
        if self._failed:
            raise self._failed[0]
        if self._leader.is_leading:
            await asyncio.to_thread(dispatch.stop_all, self._machinery, self._clock, STOP_SECONDS)
            self._leader.resign()

    async def _perform(self, work: Callable[[], object]) -> None:
        task: asyncio.Task[object] = asyncio.create_task(asyncio.to_thread(work))
        self._working.add(task)
        task.add_done_callback(self._working.discard)
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:  # The scheduler was shut down: `run` waits for the thread, and nothing went wrong.
            return
        except Exception as error:  # noqa: BLE001  raised again by `run`, which ends the process; a database that is away is waited for
            if db.is_passing(error):
                self._outage.note(error)
            else:
                self._failed.append(error)
                self._is_over.set()
        else:
            self._outage.end()

    def _tick(self) -> None:
        if self._leader.is_leading or self._leader.renew():
            self._herald.tell(self._leader.fence)
            self._pipeline.advance(self._clock())

    def _reconcile(self) -> None:
        if self._leader.is_leading:
            deployments.reconcile(self._machinery.engine, self._machinery.settings.agents, self._clock())

    def _sweep(self) -> None:
        if self._leader.is_leading:
            self._pipeline.sweep(self._clock(), lambda: self._is_stopping)

    def _analyze(self) -> None:
        if self._leader.is_leading:
            schema.analyze(self._machinery.engine)


async def run(pipeline: Pipeline, clock: Callable[[], datetime], stop: asyncio.Event) -> None:
    """The role `schedule`."""
    await Scheduler(pipeline, clock).run(stop)
