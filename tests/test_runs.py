"""Runs: one live run of a kind, and of two processes that try to move it only one succeeds."""

from __future__ import annotations

from datetime import datetime, timedelta

import pytest
from sqlalchemy import Engine

from storage import db, leases, runs

pytestmark = pytest.mark.databases("sqlite", "postgresql")

TERM = timedelta(seconds=60)


def queue(engine: Engine, now: datetime, agent: str = "adjudication") -> str:
    with db.writing(engine) as connection:
        return runs.queue(connection, agent, "train", "manual", "a test", "ops", {}, now)


def test_an_agent_has_one_live_run_of_a_kind(engine: Engine, now: datetime) -> None:
    first = queue(engine, now)
    with pytest.raises(runs.RunUnderWayError, match=first):
        queue(engine, now)
    queue(engine, now, "scribe")
    with db.writing(engine) as connection:
        assert runs.cancel(connection, runs.read(connection, first), "ops", now)
    assert queue(engine, now + TERM) != first


def test_a_run_goes_through_its_states_and_each_step_only_once(engine: Engine, now: datetime) -> None:
    run = queue(engine, now)
    with db.writing(engine) as connection:
        queued = runs.read(connection, run)
        assert runs.lease(connection, queued, "cpu", 1, "/runs/1")
        assert not runs.lease(connection, queued, "cpu", 2, "/runs/1")
        leased = runs.read(connection, run)
        assert (leased["state"], leased["attempt"], leased["fence"]) == ("leased", 1, 1)
        assert not runs.finish(connection, leased, {}, now)
        assert runs.begin(connection, leased, now)
        running = runs.read(connection, run)
        assert runs.beat(connection, running, {"step": 1}, now)
        assert runs.finish(connection, running, {"seconds": 1}, now)
        assert not runs.finish(connection, running, {"seconds": 2}, now)
        assert runs.read(connection, run)["result"] == {"seconds": 1}
        assert runs.read_live(connection, "adjudication", "train") is None


def test_an_attempt_that_was_put_back_can_move_nothing_any_more(engine: Engine, now: datetime) -> None:
    run = queue(engine, now)
    with db.writing(engine) as connection:
        runs.lease(connection, runs.read(connection, run), "cpu", 1, "/runs/1")
        first = runs.read(connection, run)
        runs.begin(connection, first, now)
        assert runs.requeue(connection, first, "no sign of life", 1, 0, now)
        runs.lease(connection, runs.read(connection, run), "cpu", 2, "/runs/1")
        runs.begin(connection, runs.read(connection, run), now)
        assert not runs.finish(connection, first, {}, now)
        assert not runs.requeue(connection, first, "again", 1, 0, now)
        assert runs.read(connection, run)["attempt"] == 2


def test_a_run_nobody_knows_is_named(engine: Engine) -> None:
    with db.reading(engine) as connection, pytest.raises(runs.UnknownRunError, match="XYZ"):
        runs.read(connection, "XYZ")


def test_a_lease_that_ran_out_is_renewed_under_its_fence_until_somebody_takes_it(engine: Engine, now: datetime) -> None:
    with db.writing(engine) as connection:
        fence = leases.acquire(connection, "device:cpu", "run/1", now, TERM)
        assert fence is not None
        later = now + 2 * TERM
        assert leases.renew(connection, "device:cpu", "run/1", fence, later, TERM)
        assert leases.acquire(connection, "device:cpu", "other/1", later, TERM) is None
        assert leases.acquire(connection, "device:cpu", "other/1", later + 2 * TERM, TERM) == fence + 1
        assert not leases.renew(connection, "device:cpu", "run/1", fence, later, TERM)
