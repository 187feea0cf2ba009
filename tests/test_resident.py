"""The daemon with two places and trainers that stay: two agents train at once, a trainer is killed, the next run finds the base loaded."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine

from storage import db, runs
from tests import model_fixtures
from tests.daemon_fixtures import Daemon, find_trainers, is_trainer, make_home
from tests.event_fixtures import make_history, send
from tests.process_fixtures import list_children

AGENTS = ("adjudication", "scribe")
SECOND = """
[agents.scribe]
labels = ["APPROVED", "DENIED", "PENDING"]
prompt = "prompts/adjudication.j2"
"""
SETTINGS = {
    "BASE_MODEL": "base",
    "PUBLISHER__KIND": "none",
    "TRAINING__EPOCHS": "40",
    "TRAINING__BATCH_ROWS": "4",
    "TRAINING__CHECKPOINT_STEPS": "20",
}
PATIENCE_SECONDS = 120
pytestmark = pytest.mark.timeout(400)


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    """The database of a home with a base, two agents, and decided cases for both."""
    home = tmp_path / "claims"
    make_home(home)
    model_fixtures.tiny_base(home / "base")
    with (home / "ratchet.toml").open("a") as file:
        file.write(SECOND)
    engine, now = db.open_engine(f"sqlite:///{home}/ratchet.db"), datetime.now(UTC)
    for agent in AGENTS:
        send(engine, [make_history(number, now, agent=agent) | {"id": f"{agent}-{number}"} for number in range(40)], now, agent=agent)
    yield engine
    engine.dispose()


@pytest.fixture
def daemon(engine: Engine, tmp_path: Path) -> Iterator[Daemon]:
    """A daemon that was told to train both agents; it and its trainers are gone after the test."""
    agents = {f"AGENTS__{agent.upper()}__{name}": value for agent in AGENTS for name, value in SETTINGS.items()}
    daemon = Daemon(tmp_path / "claims", DEVICES__SLOTS='["cpu", "cpu:1"]', DEVICES__KEEP_WARM_MINUTES="5", **agents)
    for agent in AGENTS:
        daemon.call("train", "--agent", agent, "--reason", "the first version")
    daemon.start()
    yield daemon
    daemon.kill()
    for number in find_trainers(daemon.home):
        os.killpg(number, signal.SIGKILL)


def read_runs(engine: Engine) -> dict[str, Any]:
    """The newest training of each agent."""
    with db.reading(engine) as connection:
        return {agent: runs.read_last(connection, agent, "train") for agent in AGENTS}


def is_training(run: Any) -> bool:
    """Whether the first attempt at a run has made a checkpoint, and has not ended."""
    return run["state"] == "running" and bool(list(Path(run["folder"]).glob("attempts/1/checkpoints/step-*")))


def read_worker(run: Any, attempt: int) -> int:
    """The process that works on an attempt, or did."""
    return int((Path(run["folder"]) / "attempts" / str(attempt) / "process.lock").read_text())


def find_workers(daemon: Daemon) -> set[int]:
    """The resident trainers of a daemon."""
    return {child for child in list_children(daemon.process.pid) if is_trainer(child)}


def test_two_agents_train_at_once_a_killed_worker_costs_one_retry_and_the_next_run_does_not_read_the_base(
    daemon: Daemon, engine: Engine
) -> None:
    daemon.wait_for(lambda: all(is_training(run) for run in read_runs(engine).values()), PATIENCE_SECONDS)
    killed = read_worker(read_runs(engine)["adjudication"], 1)
    os.killpg(killed, signal.SIGKILL)
    daemon.wait_for(lambda: all(run["state"] == "done" for run in read_runs(engine).values()), PATIENCE_SECONDS)
    ours, theirs = (read_runs(engine)[agent] for agent in AGENTS)
    assert max(ours["started_at"], theirs["started_at"]) < min(ours["finished_at"], theirs["finished_at"])
    assert (ours["attempt"], theirs["attempt"]) == (2, 1)
    assert [line["run"] for line in daemon.lines() if line["event"] == "run_requeued"] == [ours["id"]]
    assert [line["exit_status"] for line in daemon.lines() if line["event"] == "worker_died"] == [-signal.SIGKILL]

    workers = find_workers(daemon)
    assert workers == {read_worker(ours, 2), read_worker(theirs, 1)}
    assert killed not in workers
    spoil(daemon.home / "base" / "model.safetensors")
    daemon.call("train", "--agent", "scribe", "--reason", "the next version", "--set", "epochs=1")
    daemon.wait_for(lambda: read_runs(engine)["scribe"]["state"] in runs.ENDED, PATIENCE_SECONDS)
    following = read_runs(engine)["scribe"]
    assert (following["state"], following["attempt"], following["error"]) == ("done", 1, None), "nobody can read the base that lies there"
    assert read_worker(following, 1) in workers

    assert daemon.stop() == 0
    deadline = time.monotonic() + 30
    while left := [number for number in workers if is_trainer(number)]:
        assert time.monotonic() < deadline, f"{left} are left"
        time.sleep(0.05)


def spoil(path: Path) -> None:
    """Put zeros in the place of a file that who has read it before takes for the same."""
    kept = path.stat()
    other = path.with_suffix(".partial")
    other.write_bytes(bytes(kept.st_size))
    os.utime(other, ns=(kept.st_atime_ns, kept.st_mtime_ns))
    other.replace(path)
