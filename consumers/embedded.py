"""Handles the events that lie in the table: the consumer that needs no broker."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime

import structlog
from sqlalchemy import Engine

from consumers import handlers, outages, rules
from storage import db, events

BATCH = 500
IDLE_SECONDS = 0.5

log = structlog.get_logger()


@dataclass(slots=True)
class Counters:
    """What this consumer has done since it began; the daemon exports it."""

    by_state: Counter[str] = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, outcome: Counter[str]) -> None:
        """Count a batch that is committed, in whatever thread it was handled."""
        with self.lock:
            self.by_state += outcome
        log.debug("batch_handled", **outcome)


def handle_next(engine: Engine, agents: Mapping[str, rules.Agent], now: datetime, limit: int = BATCH) -> Counter[str]:
    """Handle the oldest unhandled events in one transaction; empty when there are none."""
    with db.reading(engine) as connection:
        if events.oldest_received_at(connection) is None:
            return Counter()
    with db.writing(engine, alone=False) as connection:
        batch = events.read_received(connection, limit)
        return handlers.handle_batch(connection, batch, agents, now)


async def run(
    engine: Engine,
    agents: Mapping[str, rules.Agent],
    clock: Callable[[], datetime],
    stop: asyncio.Event,
    wake: asyncio.Event,
    counters: Counters,
) -> None:
    """Handle events until `stop`; `wake` says that there are new ones. A batch that was begun is finished.

    A database that is away is waited for: its transaction was not committed, or its events are marked as handled. Any other failure of it
    is an error of the whole process, and the service manager starts anew.
    """
    outage = outages.Outage("consume")
    while not stop.is_set():
        pause = IDLE_SECONDS
        try:
            outcome = await asyncio.to_thread(handle_next, engine, agents, clock())
        except db.UNAVAILABLE as error:
            if not db.is_passing(error):
                raise
            pause = outage.note(error)
        else:
            outage.end()
            if outcome:
                counters.add(outcome)
                continue
        wake.clear()
        waiting = [asyncio.create_task(wake.wait()), asyncio.create_task(stop.wait())]
        _, pending = await asyncio.wait(waiting, timeout=pause, return_when=asyncio.FIRST_COMPLETED)
        for task in pending:
            task.cancel()
