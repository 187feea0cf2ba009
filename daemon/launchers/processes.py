"""One process for each attempt, in a group of its own; it outlives the daemon and is found again by the next one."""

from __future__ import annotations

import subprocess
from pathlib import Path

from daemon import launch
from trainers.spec import LOCK


class Processes:
    """Starts trainers on this machine."""

    def __init__(self, python: str) -> None:
        self._python = python
        self._children: dict[Path, subprocess.Popen[bytes]] = {}

    def submit(self, run_dir: Path, attempt: int) -> None:
        """Start the trainer, its output in the attempt's `log.txt`."""
        folder = launch.find_attempt(run_dir, attempt)
        command = launch.make_command(self._python, run_dir, attempt)
        with launch.locked(folder) as lock:
            self._children[folder] = launch.start(command, folder, lock)

    def status(self, run_dir: Path, attempt: int) -> int | None:
        """See `Launcher.status`; a process that another daemon started is known by its lock."""
        folder = launch.find_attempt(run_dir, attempt)
        child = self._children.get(folder)
        if child is None:
            return None if launch.is_locked(folder / LOCK) else launch.UNSEEN
        return child.poll()

    def cancel(self, run_dir: Path, attempt: int, *, at_once: bool = False) -> None:
        """See `Launcher.cancel`; one that has ended is left alone."""
        folder = launch.find_attempt(run_dir, attempt)
        launch.kill_holder(folder / LOCK, at_once=at_once)
        if at_once and folder in self._children:
            self._children[folder].wait()

    def logs(self, run_dir: Path, attempt: int) -> str:
        """What is in the attempt's `log.txt`."""
        return launch.read_log(run_dir, attempt)

    def end_idle(self, device: str) -> None:
        """Nothing: each process ends with its run."""

    def clean_up(self, run_dir: Path) -> bool:  # noqa: ARG002  the protocol's
        """Nothing: all that there is lies in the run's folder."""
        return True

    def list_kept(self) -> set[str]:
        """None: all that there is lies in the runs' folders."""
        return set()
