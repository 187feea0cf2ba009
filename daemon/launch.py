"""Trainer processes: started in a group of their own, found again after a restart of the daemon, stopped and asked how they ended.

Beside an attempt's other files lies `process.lock`: the trainer's process id, in a file that is locked for as long as it lives.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Protocol

import structlog

from trainers import spec

LOCK, LOG = "process.lock", "log.txt"
UNSEEN = -1000
"""The exit status of a process that ended, or never began, while nobody looked."""
FAILED = 1
PASSED_ON = ("PATH", "HOME", "LANG", "LANGUAGE", "TZ", "TMPDIR", "USER", "LOGNAME", "VIRTUAL_ENV", "PYTHONPATH", "LD_LIBRARY_PATH")
PASSED_ON_PREFIXES = ("LC_", "CUDA_", "NVIDIA_", "OMP_", "MKL_", "OPENBLAS_", "TORCH_", "PYTORCH_", "NCCL_", "COVERAGE_", "TRITON_")
SECRET_WORDS = ("TOKEN", "SECRET", "PASSWORD", "KEY", "CREDENTIAL")
# The shell writes its process id, which the trainer takes over with the lock, so that no trainer is ever without one.
SHELL = ("/bin/sh", "-c", 'echo $$ >"$0"; exec "$@"')

log = structlog.get_logger()


class Launcher(Protocol):
    """How attempts at runs are carried out."""

    def start(self, run_dir: Path, attempt: int) -> None:
        """Begin an attempt whose folder is prepared."""

    def poll(self, run_dir: Path, attempt: int) -> int | None:
        """The exit status, None while it works, `UNSEEN` when it does not and nobody saw how it ended."""

    def stop(self, run_dir: Path, attempt: int, *, at_once: bool = False) -> None:
        """Ask it to write a checkpoint and end with status 75; `at_once` kills it."""


def find_attempt(run_dir: Path, attempt: int) -> Path:
    """The folder of an attempt."""
    return run_dir / "attempts" / str(attempt)


def clean_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """What a trainer needs of the daemon's environment: no setting of ours, no secret; and it downloads nothing."""
    kept = {
        name: value
        for name, value in environ.items()
        if (name in PASSED_ON or name.startswith(PASSED_ON_PREFIXES)) and not any(word in name for word in SECRET_WORDS)
    }
    # Threads that spin while they wait make a busy machine slower by an order of magnitude: let them sleep.
    ours = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    return {**kept, **ours}


class Processes:
    """One process for each attempt; they outlive this object and are found again by another."""

    def __init__(self, python: str) -> None:
        self._python = python
        self._children: dict[Path, subprocess.Popen[bytes]] = {}

    def start(self, run_dir: Path, attempt: int) -> None:
        """Start `python -m trainers.train`, its output in the attempt's `log.txt`."""
        folder = find_attempt(run_dir, attempt)
        command = [self._python, "-m", "trainers.train", str(run_dir.resolve()), "--attempt", str(attempt)]
        with (folder / LOCK).open("ab") as lock, (folder / LOG).open("ab") as output:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            lock.truncate(0)
            self._children[folder] = subprocess.Popen(  # noqa: S603  our own interpreter and module
                [*SHELL, str(folder / LOCK), *command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=Path(spec.__file__).parents[1],
                env=clean_environment(os.environ),
                pass_fds=(lock.fileno(),),
                start_new_session=True,
            )

    def poll(self, run_dir: Path, attempt: int) -> int | None:
        """See `Launcher.poll`; a process that another daemon started is known by its lock."""
        folder = find_attempt(run_dir, attempt)
        child = self._children.get(folder)
        if child is None:
            return None if is_locked(folder / LOCK) else UNSEEN
        return child.poll()

    def stop(self, run_dir: Path, attempt: int, *, at_once: bool = False) -> None:
        """See `Launcher.stop`; one that has ended is left alone."""
        folder = find_attempt(run_dir, attempt)
        if not is_locked(folder / LOCK):
            return
        with contextlib.suppress(ValueError, ProcessLookupError):
            group = int((folder / LOCK).read_text())
            os.killpg(group, signal.SIGKILL if at_once else signal.SIGTERM)
            if at_once and folder in self._children:
                self._children[folder].wait()


def is_locked(path: Path) -> bool:
    """Whether a living process holds the lock on this file."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


class Resident:
    """One trainer process that does one run after the other and keeps the base in memory: `start` returns when the run has ended."""

    def __init__(self, python: str, errors: IO[bytes] | None = None) -> None:
        self._python = python
        self._errors = errors
        self._worker: subprocess.Popen[str] | None = None
        self._ended: dict[Path, int] = {}

    def start(self, run_dir: Path, attempt: int) -> None:
        """Hand the folder to the worker and wait for its line."""
        worker = self._awake()
        folder = find_attempt(run_dir, attempt)
        try:
            assert worker.stdin is not None  # noqa: S101  both are pipes
            assert worker.stdout is not None  # noqa: S101
            worker.stdin.write(f"{run_dir.resolve()}\n")
            worker.stdin.flush()
            answer = worker.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            self.close()
            log.warning("worker_died", exit_status=worker.returncode)
        self._ended[folder] = int(json.loads(answer)["exit"]) if answer else FAILED

    def poll(self, run_dir: Path, attempt: int) -> int | None:
        """How the run ended."""
        return self._ended.get(find_attempt(run_dir, attempt), UNSEEN)

    def stop(self, run_dir: Path, attempt: int, *, at_once: bool = False) -> None:
        """Nothing works between two calls of `start`."""

    def close(self) -> None:
        """End the worker."""
        if self._worker is not None:
            self._worker.communicate()
            self._worker = None

    def _awake(self) -> subprocess.Popen[str]:
        if self._worker is None:
            self._worker = subprocess.Popen(  # noqa: S603  our own interpreter and module
                [self._python, "-m", "trainers.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                text=True,
                cwd=Path(spec.__file__).parents[1],
                env=clean_environment(os.environ),
            )
        return self._worker
