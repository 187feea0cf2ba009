"""Daemons that share a PostgreSQL server go by its clock, whatever the clock of their own machine does."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import Engine

from daemon import clocks, holders
from storage import db

SECOND = timedelta(seconds=1)
TERM = timedelta(seconds=30)


@pytest.mark.databases("sqlite", "postgresql")
def test_the_time_is_now(engine: Engine) -> None:
    assert abs(clocks.choose(engine)() - datetime.now(UTC)) < SECOND


@pytest.mark.databases("postgresql")
def test_it_goes_on_from_what_the_server_said_and_is_corrected_when_it_is_asked_again(engine: Engine, database: str) -> None:
    seconds = iter([0.0, 0.0, 3600.0, 3600.0, 3600.0, 3600.0])
    clock = clocks.ServerClock(engine, lambda: next(seconds))
    assert abs(clock() - timedelta(hours=1) - datetime.now(UTC)) < SECOND
    clock.refresh()
    assert abs(clock() - datetime.now(UTC)) < SECOND


@pytest.mark.databases("postgresql")
def test_a_machine_whose_clock_is_an_hour_ahead_holds_no_lease_for_longer_than_its_term(
    engine: Engine, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clocks, "read_local", lambda: datetime.now(UTC) + timedelta(hours=1))
    ahead = clocks.choose(engine)
    with db.writing(engine) as connection:
        assert holders.acquire(connection, "scheduler", "elsewhere 1 p n", ahead(), TERM) == 1
    with db.writing(engine) as connection:
        assert holders.acquire(connection, "scheduler", "here 1 p n", datetime.now(UTC), TERM) is None
        assert holders.acquire(connection, "scheduler", "here 1 p n", datetime.now(UTC) + TERM + SECOND, TERM) == 2


@pytest.fixture
def gone(engine: Engine) -> Iterator[clocks.ServerClock]:
    """The clock of a server that answers no more."""
    clock = clocks.ServerClock(engine)
    clock._engine = db.open_engine("postgresql://ratchet@127.0.0.1:1/none")
    yield clock
    clock._engine.dispose()


@pytest.mark.databases("postgresql")
def test_a_server_that_does_not_answer_leaves_the_time_as_it_is_counted(
    gone: clocks.ServerClock, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clocks, "REFRESH_SECONDS", 0.01)

    async def keep() -> None:
        stop = asyncio.Event()
        keeping = asyncio.create_task(clocks.keep(gone, stop))
        await asyncio.sleep(0.2)
        assert not keeping.done()
        stop.set()
        await keeping

    asyncio.run(keep())
    assert abs(gone() - datetime.now(UTC)) < SECOND
