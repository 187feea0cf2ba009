"""Runs as Ray Jobs on a cluster: the run folder travels through a store, the cluster decides where and when the job runs.

Ray's client is imported where it is needed: it is an extra, and slow to import.
"""

from __future__ import annotations

import contextlib
import json
import shlex
from pathlib import Path
from typing import Any

import structlog

from daemon import launch
from storage import mirror
from trainers import spec
from trainers.spec import CHECKPOINTS, PROGRESS, RESULT, STATE

INPUTS = "inputs"
STOP_SECONDS = 60
"""So long a job has for its checkpoint after it was asked to end; Ray's own default is 3 s."""
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1", "OMP_WAIT_POLICY": "PASSIVE"}

log = structlog.get_logger()


class RayAbsentError(ImportError):
    """The extra that talks to Ray is not installed."""


class RayJobs:
    """Submits a job for each attempt; its id is made of run and attempt, so that another daemon finds it again."""

    def __init__(self, address: str, store: str, python: str) -> None:
        self._address, self._store, self._python = address, store, python
        self._known: Any = None

    def submit(self, run_dir: Path, attempt: int) -> None:
        """Copy the run folder with all that it reads to the store, and hand the job to the cluster."""
        store = self._open_store(run_dir)
        asked = push_inputs(store, run_dir)
        store.push(launch.find_attempt(run_dir, attempt) / "attempt.json", f"attempts/{attempt}/attempt.json")
        self._client().submit_job(
            entrypoint=shlex.join([self._python, "-m", "trainers.remote", store.url, "--attempt", str(attempt)]),
            submission_id=name_job(run_dir, attempt),
            entrypoint_num_gpus=sum(part.startswith("cuda") for part in asked.device.split("+")),
            runtime_env={"env_vars": {**ENVIRONMENT, "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS)}},
        )

    def status(self, run_dir: Path, attempt: int) -> int | None:
        """See `Launcher.status`. A cluster that does not answer is asked again later: the silence is noticed by the missing progress."""
        try:
            job = self._find(run_dir, attempt)
        except (ConnectionError, OSError, RuntimeError) as error:
            log.warning("ray_does_not_answer", address=self._address, error=type(error).__name__)
            return None
        try:
            return self._read_status(job, run_dir, attempt)
        except Exception as error:  # noqa: BLE001  each kind of store has its own
            log.warning("store_does_not_answer", run=run_dir.name, store=self._store, error=type(error).__name__)
            return None

    def _read_status(self, job: Any, run_dir: Path, attempt: int) -> int | None:
        """What the store says of a job that the cluster knows; of one that it has forgotten too, which may have ended well."""
        folder, store = launch.find_attempt(run_dir, attempt), self._open_store(run_dir)
        state = str(job.status.value) if job else "UNSEEN"
        if state == "PENDING":
            spec.note_phase(folder, "waiting for the cluster")
            return None
        store.pull(f"attempts/{attempt}/{PROGRESS}", folder / PROGRESS)
        if state == "RUNNING":
            return None
        fetch_attempt(store, folder, attempt)
        if (folder / RESULT).exists():
            return int(json.loads((folder / RESULT).read_bytes())["status"] != "done")
        if job is None:
            return launch.UNSEEN
        return spec.EXIT_RESUMABLE if state == "STOPPED" else int(job.driver_exit_code or launch.FAILED)

    def cancel(self, run_dir: Path, attempt: int, *, at_once: bool = False) -> None:
        """See `Launcher.cancel`; the job has a minute for its checkpoint. What it publishes later, nobody reads: its fence is old."""
        if self._find(run_dir, attempt) is not None:
            self._client().stop_job(name_job(run_dir, attempt))
        if at_once:  # a cluster knows one way, but nobody waits for it: how far the job came is told by the checkpoints that are there now
            with contextlib.suppress(Exception):  # a store that does not answer has no news
                note_checkpoints(self._open_store(run_dir), launch.find_attempt(run_dir, attempt), attempt)

    def logs(self, run_dir: Path, attempt: int) -> str:
        """What the cluster kept of the job's output."""
        return str(self._client().get_job_logs(name_job(run_dir, attempt))) if self._find(run_dir, attempt) else ""

    def end_idle(self, device: str) -> None:
        """Nothing: each job ends with its run."""

    def clean_up(self, run_dir: Path) -> bool:
        """Delete the run's folder in the store."""
        try:
            self._open_store(run_dir).remove("")
        except Exception as error:  # noqa: BLE001  each kind of store has its own; the run is done whatever becomes of the copy
            log.warning("store_not_cleaned", run=run_dir.name, store=self._store, error=type(error).__name__)
            return False
        return True

    def list_kept(self) -> set[str]:
        """The folders in the store, also those of other installations that use it."""
        try:
            return mirror.Mirror(self._store).names("")
        except Exception as error:  # noqa: BLE001  each kind of store has its own
            log.warning("store_does_not_answer", store=self._store, error=type(error).__name__)
            return set()

    def _find(self, run_dir: Path, attempt: int) -> Any:
        """What the cluster knows of the job; None when it knows none."""
        try:
            return self._client().get_job_info(name_job(run_dir, attempt))
        except RuntimeError as error:
            if "404" in str(error):
                return None
            raise

    def _client(self) -> Any:
        if self._known is None:
            try:
                from ray.job_submission import JobSubmissionClient  # noqa: PLC0415
            except ImportError as error:
                raise RayAbsentError('training.launcher = "ray" needs Ray: install `ratchet-daemon[ray]`') from error
            self._known = JobSubmissionClient(self._address)
        return self._known

    def _open_store(self, run_dir: Path) -> mirror.Mirror:
        return mirror.Mirror(f"{self._store.rstrip('/')}/{run_dir.name}")


def name_job(run_dir: Path, attempt: int) -> str:
    """The job's id on the cluster."""
    return f"ratchet-{run_dir.name}-{attempt}"


def push_inputs(store: mirror.Mirror, run_dir: Path) -> spec.Spec:
    """Copy the spec and everything that it names but the bases, once for all attempts; returns the spec for the cluster.

    There a job sees only its own cards, so they are numbered anew.
    """
    asked = spec.read_spec(run_dir)
    known: dict[Path, Path] = {}
    folder = run_dir / "remote"
    folder.mkdir(parents=True, exist_ok=True)
    mark = folder / "whole"
    mark.touch()

    def carry(path: Path) -> Path:
        if path not in known:
            known[path] = Path(INPUTS) / f"{len(known)}-{path.name}"
            whole = f"{known[path].as_posix()}.whole"
            if not store.has(whole):
                store.push(path, known[path].as_posix())
                store.push(mark, whole)
        return known[path]

    parts = asked.device.split("+")
    device = "+".join(f"cuda:{place}" if part.startswith("cuda") else part for place, part in enumerate(parts))
    moved = spec.map_inputs(asked, carry).model_copy(update={"device": device})
    spec.write_spec(folder, moved)
    store.push(folder / "spec.json", "spec.json")
    return moved


def fetch_attempt(store: mirror.Mirror, folder: Path, attempt: int) -> None:
    """Copy what a job left, the result last; of checkpoints only the names, which say how far it came."""
    name = f"attempts/{attempt}"
    store.pull(name, folder, without=(RESULT, CHECKPOINTS))
    note_checkpoints(store, folder, attempt)
    store.pull(f"{name}/{RESULT}", folder / RESULT)


def note_checkpoints(store: mirror.Mirror, folder: Path, attempt: int) -> None:
    """Make a folder for each whole checkpoint that the store has."""
    name = f"attempts/{attempt}/{CHECKPOINTS}"
    for step in store.names(name):
        if store.has(f"{name}/{step}/{STATE}"):
            (folder / CHECKPOINTS / step).mkdir(parents=True, exist_ok=True)
