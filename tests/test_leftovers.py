"""daemon.leftovers: of runs that have ended nothing large stays, of all others everything does."""

from __future__ import annotations

import os
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine
from structlog.testing import capture_logs

from daemon import launch, leftovers
from daemon.launchers import ray_jobs
from storage import alarms, artifacts, db, mirror, runs
from tests.pipeline_fixtures import ScriptedLauncher, World, make_base, make_settings

SCRIPTS = {"failed": ["refused"], "parked": ["dies"] * 3, "cancelled": ["hangs"], "running": ["hangs"], "queued": ["dies"]}


@pytest.fixture
def world(engine: Engine, now: Any, tmp_path: Path) -> World:
    made = World(engine, make_settings(tmp_path, make_base(tmp_path / "base")), ScriptedLauncher(), now)
    made.import_history(40)
    return made


def read_run(world: World, run: str) -> Any:
    with db.reading(world.engine) as connection:
        return runs.read(connection, run)


def bring_to(world: World, state: str) -> tuple[str, Path]:
    """A run in this state whose first attempt has left what trainers leave, here and in the store; its id and its folder."""
    world.launcher.script = list(SCRIPTS[state])
    run = world.ask_for_run()
    world.tick()
    folder = Path(read_run(world, run)["folder"])
    fill(folder)
    world.launcher.kept.add(run)
    if state == "parked":
        for _ in range(2):
            world.tick(hours=1)
    if state == "cancelled":
        with db.writing(world.engine) as connection:
            runs.cancel(connection, read_run(world, run), "not wanted", world.now)
    assert read_run(world, run)["state"] == state
    return run, folder


def fill(folder: Path) -> None:
    attempt = launch.find_attempt(folder, 1)
    for place in (attempt / "checkpoints/step-0", attempt / "adapters/one", attempt / "model", folder / "tokens"):
        place.mkdir(parents=True, exist_ok=True)
        (place / "weights.safetensors").write_text("x")
    (attempt / "log.txt").write_text("it said so")


def list_weights(folder: Path) -> set[str]:
    return {path.parent.relative_to(folder).as_posix() for path in folder.rglob("weights.safetensors")}


@pytest.mark.parametrize("state", ["failed", "parked", "cancelled"])
def test_of_a_run_that_ended_without_a_version_only_what_tells_of_it_stays(world: World, state: str) -> None:
    run, folder = bring_to(world, state)
    if state == "cancelled":
        world.pipeline.sweep(world.now)
        assert len(list_weights(folder)) == 4, "its process may still write"
        assert world.launcher.kept == {run}
        world.tick()
    world.pipeline.sweep(world.now)
    assert list_weights(folder) == set()
    assert world.launcher.kept == set()
    assert (launch.find_attempt(folder, 1) / "log.txt").read_text() == "it said so"
    assert (folder / "spec.json").exists()


@pytest.mark.parametrize("state", ["running", "queued"])
def test_a_run_that_has_not_ended_keeps_all_that_it_can_go_on_from(world: World, state: str) -> None:
    run, folder = bring_to(world, state)
    world.pipeline.sweep(world.now)
    assert len(list_weights(folder)) == 4
    assert world.launcher.kept == {run}


def test_what_is_not_of_this_installation_is_left_alone(world: World) -> None:
    fill(world.settings.storage.runs / "by-hand")
    world.launcher.kept = {"of-others"}
    world.pipeline.sweep(world.now)
    assert len(list_weights(world.settings.storage.runs / "by-hand")) == 4
    assert world.launcher.kept == {"of-others"}


def test_a_version_has_all_of_its_weights_after_its_run_was_cleared(world: World) -> None:
    run = world.ask_for_run()
    world.settle()
    row = read_run(world, run)
    assert not list(Path(row["folder"]).glob("attempts/*/adapters"))
    adapters = list(world.settings.storage.adapters.iterdir())
    assert [artifacts.digest_folder(folder) for folder in adapters] == [f"sha256:{folder.name}" for folder in adapters] != []


def test_what_a_daemon_that_was_killed_did_not_clear_the_next_one_does(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    class KilledError(BaseException):
        pass

    def kill(*_: object) -> None:
        raise KilledError

    world.launcher.script = ["hangs"]
    run = world.ask_for_run()
    world.tick()
    folder = Path(read_run(world, run)["folder"])
    world.launcher.finish(folder, 1)
    fill(folder)
    with monkeypatch.context() as patched:
        patched.setattr(leftovers, "clear", kill)
        with pytest.raises(KilledError):
            world.tick()
    assert read_run(world, run)["state"] == "done"
    assert list_weights(folder)
    world.restart()
    world.pipeline.sweep(world.now)
    assert list_weights(folder) == set()


@pytest.mark.databases("sqlite")
def test_tokens_go_after_a_week_and_copies_that_were_cut_short_after_a_day(world: World) -> None:
    storage, started = world.settings.storage, world.now
    tokens = storage.snapshots / "adjudication" / ".set.tokens" / "key.arrow"
    copies = [storage.snapshots / "adjudication" / ".set.1.partial", storage.adapters / ".2.partial", storage.bases / ".3.partial"]
    kept = storage.adapters / "0123"
    for path in (tokens, kept / "weights", *(copy / "weights" for copy in copies)):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    for path in (tokens, kept, *copies):
        os.utime(path, (started.timestamp(), started.timestamp()))
    seen = []
    for later in (timedelta(hours=20), timedelta(hours=30), timedelta(days=8)):
        world.pipeline.sweep(started + later)
        seen.append((tokens.exists(), [copy.exists() for copy in copies]))
    assert seen == [(True, [True] * 3), (True, [False] * 3), (False, [False] * 3)]
    assert kept.exists()


@pytest.mark.databases("sqlite")
def test_what_can_not_be_removed_is_told_once_and_holds_up_nothing_else(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    _, stuck = bring_to(world, "failed")
    _, other = bring_to(world, "failed")
    genuine = leftovers.shutil.rmtree

    def forbid(path: Path, **options: Any) -> None:
        if stuck in path.parents:
            raise PermissionError
        genuine(path, **options)

    monkeypatch.setattr(leftovers.shutil, "rmtree", forbid)
    with capture_logs() as said:
        for _ in range(3):
            world.pipeline.sweep(world.now)
    assert len(list_weights(stuck)) == 4
    assert list_weights(other) == set()
    assert [line.get("path", line.get("names")) for line in said] == [
        *(str(launch.find_attempt(stuck, 1) / name) for name in ("checkpoints", "adapters", "model")),
        str(stuck / "tokens"),
        [other.name],
    ]
    monkeypatch.undo()
    world.restart()
    world.pipeline.sweep(world.now)
    assert list_weights(stuck) == set()


def test_a_store_in_which_nothing_may_be_deleted_is_asked_once_for_each_run(world: World) -> None:
    bring_to(world, "failed")
    world.launcher.forbids = True
    with capture_logs() as said:
        for _ in range(3):
            world.pipeline.sweep(world.now)
    assert len(world.launcher.cleaned) == 1
    assert said == [], "nothing was removed as a whole"


def test_a_copy_of_what_was_trained_long_ago_is_not_taken_for_one_that_was_cut_short(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.launcher.script = ["hangs"]
    run = world.ask_for_run()
    world.tick()
    folder = Path(read_run(world, run)["folder"])
    world.launcher.finish(folder, 1)
    os.utime(launch.find_attempt(folder, 1) / "adapters/candidate", (0, 0))
    genuine, seen = artifacts.move_into_place, []

    def sweep_meanwhile(partial: Path, place: Path) -> bool:
        world.pipeline.sweep(datetime.now(UTC))
        seen.append(partial.exists())
        return genuine(partial, place)

    monkeypatch.setattr(artifacts, "move_into_place", sweep_meanwhile)
    world.settle()
    assert read_run(world, run)["state"] == "done"
    assert seen == [True]


@pytest.mark.databases("sqlite")
def test_what_can_not_be_read_is_told_and_ends_nothing(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> set[str]:
        raise PermissionError("no right to")

    monkeypatch.setattr(world.launcher, "list_kept", fail)
    with capture_logs():
        world.pipeline.sweep(world.now)
    with db.reading(world.engine) as connection:
        told = [alarm["message"] for alarm in alarms.list_open(connection)]
    assert told == ["sweep fails: PermissionError: no right to"]
    monkeypatch.undo()
    world.pipeline.sweep(world.now)
    with db.reading(world.engine) as connection:
        assert alarms.list_open(connection) == []


def test_the_folders_in_a_store_are_what_ray_keeps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = ray_jobs.RayJobs("http://127.0.0.1:1", f"file://{tmp_path}/store", "python")
    assert jobs.list_kept() == set(), "nothing was sent yet"
    mirror.Mirror(f"file://{tmp_path}/store/r1").push(Path(__file__), "spec.json")
    assert jobs.list_kept() == {"r1"}
    jobs.clean_up(tmp_path / "runs/r1")
    assert jobs.list_kept() == set()

    def fail(*_: object) -> set[str]:
        raise ConnectionError

    monkeypatch.setattr(mirror.Mirror, "names", fail)
    with capture_logs() as said:
        assert jobs.list_kept() == set()
    assert [line["event"] for line in said] == ["store_does_not_answer"]
