"""Runs on devices: claimed, prepared, launched, followed, tried again, given up.

A stage claims a row, commits, and then works. What a killed daemon left half done, the next tick finds by the row's state.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import structlog
from sqlalchemy import RowMapping

from daemon import devices, examination, harvest, launch, placement, run_folders, training
from daemon.agents import Agent
from daemon.machinery import Machinery, Makeup
from storage import alarms, datasets, db, runs
from trainers import spec

POLL_SECONDS = 0.1

log = structlog.get_logger()


def start_queued(machinery: Machinery, now: datetime) -> None:
    """Start queued runs, oldest first, while there is a free device. What fails for one is raised when the others had their turn."""
    makeups = machinery.memory.makeups
    with db.reading(machinery.engine) as connection:
        queued = runs.read_in_state(connection, "queued")

    def start(run: RowMapping) -> None:
        leased = _lease(machinery, makeups[run["agent"]], run, now)
        if leased is not None:
            _guard(machinery, leased, functools.partial(_start, machinery, makeups[run["agent"]]), now)

    _try_each([run for run in queued if run["agent"] in makeups and (run["not_before"] is None or run["not_before"] <= now)], start)


def _try_each(found: Sequence[RowMapping], work: Callable[[RowMapping], None]) -> None:
    """Do something with each run; what fails for one is raised when the others had their turn."""
    failed: list[Exception] = []
    for run in found:
        try:
            work(run)
        except db.UNAVAILABLE:
            raise
        except Exception as error:  # noqa: BLE001  raised below
            failed.append(error)
    if failed:
        raise failed[0]


def _lease(machinery: Machinery, made: Makeup, run: RowMapping, now: datetime) -> RowMapping | None:
    """Claim a run and the smallest device that it fits; None when none is free or somebody else was first."""
    folder = machinery.settings.storage.runs / run["id"]
    places = placement.find_places(machinery, made, run, _read_options(machinery, run, folder))
    with db.writing(machinery.engine) as connection:
        claim = devices.claim(connection, places, run["id"], run["attempt"] + 1, now, find_term(machinery))
        if claim is None or not runs.lease(connection, run, claim.device, claim.fence, str(folder)):
            return None
        return runs.read(connection, run["id"])


def _read_options(machinery: Machinery, run: RowMapping, folder: Path) -> spec.Options:
    """The options of a run: those that an earlier attempt was given; of a run that is refused when it starts, the agent's own."""
    agent = machinery.settings.agents[run["agent"]]
    try:
        if (folder / "spec.json").exists():
            return spec.read_spec(folder).options
        return training.read_options(agent, run["options"].get("overrides", {}))[0]
    except (training.OptionsRefusedError, spec.SpecRefusedError):
        return agent.training


def find_term(machinery: Machinery) -> timedelta:
    """How long a device is a run's without a renewal."""
    return timedelta(seconds=2 * machinery.settings.training.heartbeat_seconds)


def _start(machinery: Machinery, made: Makeup, run: RowMapping, now: datetime) -> None:
    """Prepare a leased run's folder and launch its attempt."""
    folder, agent = Path(run["folder"]), machinery.settings.agents[run["agent"]]
    try:
        prepare(machinery, run, agent, made, now)
    except (datasets.EmptyDatasetError, training.OptionsRefusedError, placement.NothingFitsError) as error:
        end(machinery, run, "failed", str(error), now)
        return
    except examination.NothingToScoreError as error:
        with db.writing(machinery.engine) as connection:
            runs.cancel(connection, run, str(error), now)
        return
    run_folders.begin_attempt(folder, run["attempt"], run["fence"])
    machinery.launcher.submit(folder, run["attempt"])
    with db.writing(machinery.engine) as connection:
        if runs.begin(connection, run, now):
            log.info("run_started", run=run["id"], agent=run["agent"], kind=run["kind"], attempt=run["attempt"], device=run["device"])
            return
    machinery.launcher.cancel(folder, run["attempt"], at_once=True)


def prepare(machinery: Machinery, run: RowMapping, agent: Agent, made: Makeup, now: datetime) -> None:
    """Write what the run needs; a later attempt at it is asked the same, though perhaps on another device."""
    folder = Path(run["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "spec.json").exists():
        asked = spec.read_spec(folder)
    elif run["kind"] == "train":
        asked = training.plan_training(machinery, run, agent, made, now)
    else:
        asked = examination.plan_scoring(machinery, run, agent)
    spec.write_spec(folder, placement.suit(machinery, asked, run["device"]))


def follow_all(machinery: Machinery, now: datetime) -> None:
    """Look after every run that is on a device: take over, keep alive, bring in, put back into the queue, or let go.

    What fails for one that was cancelled is raised when the others had their turn.
    """
    with db.reading(machinery.engine) as connection:
        found = runs.read_on_device(connection)
    for run in found:
        if run["state"] != "cancelled":
            _guard(machinery, run, functools.partial(take_over if run["state"] == "leased" else follow, machinery), now)
    _try_each([run for run in found if run["state"] == "cancelled"], lambda run: _let_go(machinery, run))


def _guard(machinery: Machinery, run: RowMapping, work: Callable[[RowMapping, datetime], None], now: datetime) -> None:
    """Do something with a run; whatever fails is this run's failure alone, and is tried again like any other."""
    try:
        work(run, now)
    except db.UNAVAILABLE:
        raise
    except Exception as error:
        log.exception("run_failed", run=run["id"], agent=run["agent"])
        retry(machinery, run, f"{type(error).__name__}: {error}", now)


def take_over(machinery: Machinery, run: RowMapping, now: datetime) -> None:
    """Find out what became of a run whose daemon ended while it was being started."""
    folder, attempt = Path(run["folder"]), run["attempt"]
    if machinery.launcher.status(folder, attempt) == launch.UNSEEN and run_folders.read_result(folder, attempt) is None:
        retry(machinery, run, "it was not started: preparing it failed, or the daemon ended meanwhile", now)
        return
    with db.writing(machinery.engine) as connection:
        runs.begin(connection, run, now)
    log.info("run_taken_over", run=run["id"], agent=run["agent"], attempt=attempt)


def follow(machinery: Machinery, run: RowMapping, now: datetime) -> None:
    """Look after one running attempt."""
    folder, attempt = Path(run["folder"]), run["attempt"]
    with db.writing(machinery.engine) as connection:
        is_ours = devices.keep(connection, run, now, find_term(machinery))
    if not is_ours:
        machinery.launcher.cancel(folder, attempt, at_once=True)
        requeue(machinery, run, "its device was taken by another run")
        return
    status = machinery.launcher.status(folder, attempt)
    if status is None:
        _watch_progress(machinery, run, now)
        return
    result = run_folders.read_result(folder, attempt)
    if result is not None and result.fence == run["fence"] and result.status == "done":
        try:
            harvest.bring_in(machinery, run, result, now)
        except harvest.ResultDamagedError as error:
            retry(machinery, run, str(error), now)
    elif status == spec.EXIT_REFUSED or (result is not None and result.status == "refused"):
        end(machinery, run, "failed", f"refused: {result.reason if result else 'see its log'}", now)
    elif status == spec.EXIT_RESUMABLE:
        requeue(machinery, run, "stopped as asked")
    else:
        why = "its process is gone" if status == launch.UNSEEN else f"exit status {status}"
        retry(machinery, run, result.reason if result and result.reason else f"{why}: `ratchet runs logs {run['id']}` shows more", now)


def _watch_progress(machinery: Machinery, run: RowMapping, now: datetime) -> None:
    """Note a sign of life; a process that gives none for too long is taken for dead."""
    progress = run_folders.read_progress(Path(run["folder"]), run["attempt"])
    if progress is not None and progress != run["progress"]:
        with db.writing(machinery.engine) as connection:
            runs.beat(connection, run, progress, now)
    elif now - run["heartbeat_at"] > timedelta(seconds=machinery.settings.training.heartbeat_seconds):
        machinery.launcher.cancel(Path(run["folder"]), run["attempt"], at_once=True)
        retry(machinery, run, f"no sign of life since {run['heartbeat_at'].isoformat(timespec='seconds')}", now)


def retry(machinery: Machinery, run: RowMapping, why: str, now: datetime) -> None:
    """Queue a run that failed again, later each time; parked after too many attempts without a newer checkpoint."""
    settings = machinery.settings.training
    checkpoint = run_folders.newest_checkpoint(Path(run["folder"]))
    failures = 1 if checkpoint > run["checkpoint"] else run["failures"] + 1
    if failures >= settings.attempts:
        end(machinery, run, "parked", f"{failures} attempts without a newer checkpoint, the last one: {why}", now)
        return
    wait = timedelta(seconds=settings.backoff_seconds * 2 ** (failures - 1))
    is_further = checkpoint > run["checkpoint"]
    requeue(machinery, run, why, failures=failures, checkpoint=checkpoint, not_before=None if is_further else now + wait)


def requeue(
    machinery: Machinery,
    run: RowMapping,
    why: str,
    *,
    failures: int | None = None,
    checkpoint: int | None = None,
    not_before: datetime | None = None,
) -> None:
    """Put a run back into the queue and free its device."""
    with db.writing(machinery.engine) as connection:
        failed = run["failures"] if failures is None else failures
        step = run["checkpoint"] if checkpoint is None else checkpoint
        if runs.requeue(connection, run, why, failed, step, not_before):
            devices.free(connection, run)
            log.warning("run_requeued", run=run["id"], agent=run["agent"], attempt=run["attempt"], failures=failed, why=why)


def end(machinery: Machinery, run: RowMapping, state: Any, why: str, now: datetime) -> None:
    """Give a run up, free its device and say so; the champion goes on serving."""
    with db.writing(machinery.engine) as connection:
        if runs.give_up(connection, run, state, why, now):
            devices.free(connection, run)
            message = f"{run['kind']} run {run['id']} is {state}: {why}"
            alarms.raise_alarm(connection, run["agent"], harvest.ALARM, message, {"run": run["id"]}, now)
            log.error("run_given_up", state=state, run=run["id"], agent=run["agent"], attempt=run["attempt"], why=why)


def _let_go(machinery: Machinery, run: RowMapping) -> None:
    """Stop a cancelled run's process, and free its device once it has ended."""
    machinery.launcher.cancel(Path(run["folder"]), run["attempt"], at_once=True)
    with db.writing(machinery.engine) as connection:
        devices.free(connection, run)
        runs.let_go(connection, run)
    log.info("run_cancelled", run=run["id"], agent=run["agent"])


def stop_all(machinery: Machinery, clock: Callable[[], datetime], seconds: float) -> None:
    """Ask every trainer for a checkpoint and its end, wait so long for it, and queue the runs again; what is late is killed."""
    with db.reading(machinery.engine) as connection:
        running = runs.read_in_state(connection, "running")
    for run in running:
        machinery.launcher.cancel(Path(run["folder"]), run["attempt"])
    patience = time.monotonic() + seconds
    for run in running:
        folder, attempt = Path(run["folder"]), run["attempt"]
        while time.monotonic() < patience and machinery.launcher.status(folder, attempt) is None:
            time.sleep(POLL_SECONDS)
        machinery.launcher.cancel(folder, attempt, at_once=True)
        # One that had not come to listening for signals, or whose end only an earlier daemon would have seen, did not fail either.
        if run_folders.read_result(folder, attempt) is None:
            requeue(machinery, run, "stopped as asked")
    follow_all(machinery, clock())
