"""What time it is: where several machines share a PostgreSQL server they go by its clock, for leases compare times of all of them."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

from sqlalchemy import Engine

from storage import db

REFRESH_SECONDS = 30.0
ELAPSED = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
"""What counts the seconds in between: nobody can set it, and it goes on while the machine sleeps."""


class ServerClock:
    """The time of the database's server, asked now and then and counted on from there: a clock of ours that jumps changes nothing."""

    def __init__(self, engine: Engine, count: Callable[[], float] = lambda: time.clock_gettime(ELAPSED)) -> None:
        self._engine, self._count = engine, count
        self.refresh()

    def __call__(self) -> datetime:
        """The time now, in UTC."""
        return self._began_at + timedelta(seconds=self._count())

    def refresh(self) -> None:
        """Ask the server."""
        with db.reading(self._engine) as connection:
            before = self._count()
            at = db.read_clock(connection)
            self._began_at = at - timedelta(seconds=(before + self._count()) / 2)


def read_local() -> datetime:
    """This machine's own clock."""
    return datetime.now(UTC)


def choose(engine: Engine) -> Callable[[], datetime]:
    """The clock of everything that runs for real: SQLite lies on one machine, and all go by that one's."""
    return ServerClock(engine) if engine.dialect.name == "postgresql" else read_local


async def keep(clock: Callable[[], datetime], stop: asyncio.Event) -> None:
    """Ask the server again until `stop`; while it does not answer its time is counted on."""
    while not stop.is_set():
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), REFRESH_SECONDS)
        if isinstance(clock, ServerClock) and not stop.is_set():
            with contextlib.suppress(*db.UNAVAILABLE):
                await asyncio.to_thread(clock.refresh)
