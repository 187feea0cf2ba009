"""Resident trainers: a process for each device that does one run after the other and keeps the base in memory for the next one."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path

import structlog

from daemon import launch
from daemon.launchers.processes import Processes
from trainers import spec

log = structlog.get_logger()


@dataclass(slots=True)
class Worker:
    """A resident trainer, its device, and the attempt that it works on; None while it waits."""

    device: str
    process: subprocess.Popen[bytes]
    busy: Path | None = None


class Workers:
    """Hands attempts to resident trainers, and those that take several cards to processes of their own.

    A worker that waits longer than `keep_seconds` ends by itself. One that breaks costs the attempt that it worked on, and is replaced.
    With `waits`, `status` returns when the attempt has ended.
    """

    def __init__(self, python: str, keep_seconds: float = 0, *, waits: bool = False) -> None:
        self._python, self._keep_seconds, self._waits = python, keep_seconds, waits
        self._processes = Processes(python)
        self._workers: list[Worker] = []
        self._ended: dict[Path, int] = {}

    def submit(self, run_dir: Path, attempt: int) -> None:
        """Hand the folder to a worker of its device that waits, or to a new one."""
        device, folder = spec.read_device(run_dir), launch.find_attempt(run_dir, attempt)
        if "+" in device:
            self._processes.submit(run_dir, attempt)
            return
        worker = self._find_idle(device) or self._start(device, folder)
        worker.busy = folder
        line = json.dumps({"run_dir": str(run_dir.resolve()), "attempt": attempt}) + "\n"
        with contextlib.suppress(BrokenPipeError):  # It ended this very moment: `status` says so.
            os.write(worker.process.stdin.fileno(), line.encode())  # type: ignore[union-attr]  # a pipe

    def status(self, run_dir: Path, attempt: int) -> int | None:
        """See `Launcher.status`."""
        folder = launch.find_attempt(run_dir, attempt)
        worker = next((one for one in self._workers if one.busy == folder), None)
        if worker is not None:
            self._listen(worker, folder)
            return self._ended.get(folder)
        return self._ended[folder] if folder in self._ended else self._processes.status(run_dir, attempt)

    def cancel(self, run_dir: Path, attempt: int, *, at_once: bool = False) -> None:
        """See `Launcher.cancel`; the worker ends with the attempt."""
        folder = launch.find_attempt(run_dir, attempt)
        worker = next((one for one in self._workers if one.busy == folder), None)
        if worker is None:
            self._processes.cancel(run_dir, attempt, at_once=at_once)
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(worker.process.pid, signal.SIGKILL if at_once else signal.SIGTERM)
        if at_once:
            self._bury(worker, folder)

    def logs(self, run_dir: Path, attempt: int) -> str:
        """What is in the attempt's `log.txt`."""
        return launch.read_log(run_dir, attempt)

    def end_idle(self, device: str) -> None:
        """See `Launcher.end_idle`."""
        for worker in [one for one in self._workers if one.busy is None and one.device == device]:
            self._end(worker)

    def clean_up(self, run_dir: Path) -> bool:  # noqa: ARG002  the protocol's
        """Nothing: all that there is lies in the run's folder."""
        return True

    def list_kept(self) -> set[str]:
        """None: all that there is lies in the runs' folders."""
        return set()

    def close(self) -> None:
        """End the workers; one that works writes a checkpoint first."""
        for worker in list(self._workers):
            if worker.busy is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(worker.process.pid, signal.SIGTERM)
            self._end(worker)

    def _listen(self, worker: Worker, folder: Path) -> None:
        """Take the worker's answer if it is there."""
        answers = worker.process.stdout
        assert answers is not None  # noqa: S101  a pipe
        if not self._waits and not select.select([answers], [], [], 0)[0]:
            return
        line = answers.readline()
        if line:
            self._ended[folder], worker.busy = int(json.loads(line)["exit"]), None
        else:
            self._bury(worker, folder)

    def _bury(self, worker: Worker, folder: Path) -> None:
        """Note how a worker ended in the middle of an attempt."""
        self._end(worker)
        self._ended[folder] = worker.process.returncode or launch.FAILED
        log.warning("worker_died", device=worker.device, exit_status=worker.process.returncode)

    def _end(self, worker: Worker) -> None:
        """Close its input, which ends one that waits, and wait for its end."""
        worker.process.communicate()
        self._workers.remove(worker)

    def _find_idle(self, device: str) -> Worker | None:
        for worker in [one for one in self._workers if one.busy is None and one.process.poll() is not None]:
            self._end(worker)
        return next((one for one in self._workers if one.busy is None and one.device == device), None)

    def _start(self, device: str, folder: Path) -> Worker:
        """A new worker, which holds its first attempt's lock while it imports, and speaks into that one's log until its run begins."""
        command = [self._python, "-m", "trainers.worker", "--runs", str(folder.parents[2].resolve())]
        with launch.locked(folder) as lock:
            command += ["--lock", str(lock), "--idle-seconds", str(self._keep_seconds)]
            process = launch.start(command, folder, lock, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._workers.append(Worker(device, process))
        return self._workers[-1]
