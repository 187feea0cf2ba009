"""One process for each attempt, in a group of its own; it outlives the daemon and is found again by the next one."""

from __future__ import annotations

import fcntl
import os
import subprocess
from pathlib import Path

from daemon import launch
from trainers.spec import LOCK, LOG

# The shell writes its process id, which the trainer takes over with the lock, so that no trainer is ever without one.
SHELL = ("/bin/sh", "-c", 'echo $$ >"$0"; exec "$@"')


class Processes:
    """Starts trainers on this machine."""

    def __init__(self, python: str) -> None:
        self._python = python
        self._children: dict[Path, subprocess.Popen[bytes]] = {}

    def submit(self, run_dir: Path, attempt: int) -> None:
        """Start the trainer, its output in the attempt's `log.txt`."""
        folder = launch.find_attempt(run_dir, attempt)
        command = launch.make_command(self._python, run_dir, attempt)
        with (folder / LOCK).open("ab") as lock, (folder / LOG).open("ab") as output:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            lock.truncate(0)
            self._children[folder] = subprocess.Popen(  # noqa: S603  our own interpreter and module
                [*SHELL, str(folder / LOCK), *command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=launch.HOME,
                env=launch.clean_environment(os.environ),
                pass_fds=(lock.fileno(),),
                start_new_session=True,
            )

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
