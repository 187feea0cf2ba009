"""The role that ticks: one leader, the real trainer process, and an end that loses nothing."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine

from daemon import dispatch, leftovers, scheduler
from daemon.launchers import processes
from daemon.pipeline import Pipeline
from storage import db, registry, runs
from tests import model_fixtures
from tests.pipeline_fixtures import ScriptedLauncher, World, make_base, make_settings
from trainers import spec

pytestmark = pytest.mark.databases("sqlite", "postgresql")


def clock() -> datetime:
    return datetime.now(UTC)


async def run_until(pipeline: Pipeline, holds: Callable[[], bool], seconds: float = 100) -> None:
    """The role, until something holds; then it is stopped."""
    stop = asyncio.Event()
    role = asyncio.create_task(scheduler.run(pipeline, clock, stop))
    deadline = time.monotonic() + seconds
    while not holds() and not role.done():
        assert time.monotonic() < deadline, "it did not happen in time"
        await asyncio.sleep(0.05)
    stop.set()
    await role


@pytest.fixture(autouse=True)
def _tick_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "TICK_SECONDS", 0.3)


def state_of(engine: Engine, run: str) -> str:
    with db.reading(engine) as connection:
        return str(runs.read(connection, run)["state"])


def test_only_one_of_two_daemons_leads_and_the_other_takes_over(engine: Engine, now: datetime) -> None:
    times = [now]
    first, second = (scheduler.Leader(engine, lambda: times[0]) for _ in range(2))
    assert (first.renew(), second.renew()) == (True, False)
    times[0] += scheduler.TERM / 2
    assert (first.renew(), second.renew()) == (True, False)
    first.resign()
    assert (second.renew(), first.renew()) == (True, False)
    times[0] += 2 * scheduler.TERM
    assert first.renew(), "a leader that does not come back is replaced"


@pytest.mark.databases("sqlite")
def test_the_real_trainer_is_run_as_a_process_of_its_own(engine: Engine, tmp_path: Path) -> None:
    options = spec.Options(epochs=1, batch_rows=16)
    settings = make_settings(tmp_path, model_fixtures.tiny_base(tmp_path / "base"), training=options)
    world = World(engine, settings, processes.Processes(settings.training.python), clock())
    world.import_history(40)
    run = world.ask_for_run()

    def is_over() -> bool:
        with db.reading(engine) as connection:
            is_promoted = registry.champion(connection, "adjudication") == "v1.0"
        return is_promoted or state_of(engine, run) in ("failed", "parked")

    asyncio.run(run_until(world.pipeline, is_over))
    with db.reading(engine) as connection:
        assert runs.read(connection, run)["error"] is None
        assert registry.champion(connection, "adjudication") == "v1.0"


def test_at_the_end_the_trainer_is_stopped_and_its_run_queued_again(engine: Engine, tmp_path: Path) -> None:
    launcher = ScriptedLauncher(script=["hangs"])
    world = World(engine, make_settings(tmp_path, make_base(tmp_path / "base")), launcher, clock())
    world.import_history(40)
    run = world.ask_for_run()
    asyncio.run(run_until(world.pipeline, lambda: state_of(engine, run) == "running"))
    assert state_of(engine, run) == "queued"
    assert next(at_once for _, _, at_once in launcher.stopped) is False
    with db.reading(engine) as connection:
        assert runs.read(connection, run)["failures"] == 0
    launcher.script = []
    world.now = clock() + timedelta(seconds=1)
    world.settle()
    assert state_of(engine, run) == "done"


def test_a_late_trainer_is_killed(engine: Engine, tmp_path: Path) -> None:
    class Deaf(ScriptedLauncher):
        def stop(self, run_dir: Path, attempt: int, *, at_once: bool = False) -> None:
            if at_once:
                super().stop(run_dir, attempt, at_once=True)

    world = World(engine, make_settings(tmp_path, make_base(tmp_path / "base")), Deaf(script=["hangs"]), clock())
    world.import_history(40)
    run = world.ask_for_run()
    world.tick()
    dispatch.stop_all(world.pipeline.machinery, clock, 0.2)
    assert state_of(engine, run) == "queued"


@pytest.mark.databases("sqlite")
def test_a_stop_in_the_midst_of_a_tick_waits_for_it_and_logs_no_error(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    world = World(engine, make_settings(tmp_path, make_base(tmp_path / "base")), ScriptedLauncher(), clock())
    ticks: list[str] = []

    def advance(_: datetime) -> None:
        ticks.append("began")
        time.sleep(0.5)
        ticks.append("ended")

    monkeypatch.setattr(world.pipeline, "advance", advance)
    asyncio.run(run_until(world.pipeline, lambda: ticks[-1:] == ["began"]))
    assert ticks[-1] == "ended"
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


def test_a_database_that_can_not_be_used_ends_the_role(engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(engine, make_settings(tmp_path, make_base(tmp_path / "base")), ScriptedLauncher(), clock())

    def fail(*_: Any) -> bool:
        raise OSError("disk I/O error")

    monkeypatch.setattr(world.pipeline, "advance", fail)
    with pytest.raises(OSError, match="disk I/O error"):
        asyncio.run(run_until(world.pipeline, lambda: False))


@pytest.mark.databases("sqlite")
def test_what_is_of_no_more_use_is_removed_now_and_then(engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(engine, make_settings(tmp_path, make_base(tmp_path / "base")), ScriptedLauncher(), clock())
    swept: list[datetime] = []
    monkeypatch.setattr(scheduler, "SWEEP_SECONDS", 1)
    monkeypatch.setattr(world.pipeline, "sweep", lambda now, _: swept.append(now))
    asyncio.run(run_until(world.pipeline, lambda: bool(swept)))
    assert swept


@pytest.mark.databases("sqlite")
def test_a_stop_does_not_wait_until_all_is_removed(engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(engine, make_settings(tmp_path, make_base(tmp_path / "base")), ScriptedLauncher(), clock())
    copies = [world.settings.storage.bases / f".{number}.partial" for number in range(400)]
    for copy in copies:
        copy.mkdir(parents=True)
        os.utime(copy, (0, 0))
    genuine = leftovers.remove

    def take_longer(path: Path) -> bool:
        time.sleep(0.1)
        return genuine(path)

    monkeypatch.setattr(scheduler, "SWEEP_SECONDS", 1)
    monkeypatch.setattr(leftovers, "remove", take_longer)
    asyncio.run(run_until(world.pipeline, lambda: not all(copy.exists() for copy in copies)))
    assert any(copy.exists() for copy in copies)
