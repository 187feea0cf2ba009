"""How attempts at runs are carried out: the protocol that every launcher follows, and what all of them share.

Beside an attempt's other files lies `process.lock`: its process id, in a file that is locked for as long as the attempt is worked on.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from trainers import spec

UNSEEN = -1000
"""The exit status of a process that ended, or never began, while nobody looked."""
FAILED = 1
HOME = Path(spec.__file__).parents[1]
"""Where trainers are started, so that they find their modules."""
PASSED_ON = ("PATH", "HOME", "LANG", "LANGUAGE", "TZ", "TMPDIR", "USER", "LOGNAME", "VIRTUAL_ENV", "PYTHONPATH", "LD_LIBRARY_PATH")
PASSED_ON_PREFIXES = ("LC_", "CUDA_", "NVIDIA_", "OMP_", "MKL_", "OPENBLAS_", "TORCH_", "PYTORCH_", "NCCL_", "COVERAGE_", "TRITON_")
SECRET_WORDS = ("TOKEN", "SECRET", "PASSWORD", "KEY", "CREDENTIAL")


# The shell writes its process id, which the trainer takes over with the lock, so that no trainer is ever without one.
SHELL = ("/bin/sh", "-c", 'echo $$ >"$0"; exec "$@"')


class Launcher(Protocol):
    """How attempts at runs are carried out. An attempt's folder is prepared before, and `spec.json` names its device."""

    def submit(self, run_dir: Path, attempt: int) -> None:
        """Begin an attempt."""

    def status(self, run_dir: Path, attempt: int) -> int | None:
        """The exit status, None while it works, `UNSEEN` when it does not and nobody saw how it ended."""

    def cancel(self, run_dir: Path, attempt: int, *, at_once: bool = False) -> None:
        """Ask it to write a checkpoint and end with status 75; `at_once` kills it."""

    def logs(self, run_dir: Path, attempt: int) -> str:
        """What it printed so far."""

    def end_idle(self, device: str) -> None:
        """End what waits on a device for work, with a base in memory."""

    def clean_up(self, run_dir: Path) -> bool:
        """Delete what it keeps of a run that has ended, outside of the run's folder. False when that failed, which is logged."""

    def list_kept(self) -> set[str]:
        """The ids of runs of which it keeps something outside of their folders."""


def find_attempt(run_dir: Path, attempt: int) -> Path:
    """The folder of an attempt."""
    return run_dir / "attempts" / str(attempt)


def make_command(python: str, run_dir: Path, attempt: int) -> list[str]:
    """What performs an attempt: one process, or through torchrun one for each part of its device."""
    parts = spec.read_device(run_dir).split("+")
    module = "trainers.train" if len(parts) == 1 else "trainers.torchrun"
    return [python, "-m", module, str(run_dir.resolve()), "--attempt", str(attempt)]


def clean_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """What a trainer needs of the daemon's environment: no setting of ours, no secret; and it downloads nothing."""
    kept = {
        name: value
        for name, value in environ.items()
        if (name in PASSED_ON or name.startswith(PASSED_ON_PREFIXES)) and not any(word in name for word in SECRET_WORDS)
    }
    # Threads that spin while they wait make a busy machine slower by an order of magnitude: let them sleep.
    ours = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    if not any("ALLOC_CONF" in name for name in kept):  # Segments that grow: memory that was freed in one size serves another.
        ours["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    # Otherwise torch numbers the fastest card first, and the driver the one in the first slot.
    return {**kept, **ours, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}


def start(
    command: Sequence[str], folder: Path, lock: int, *, stdin: int = subprocess.DEVNULL, stdout: int | None = None
) -> subprocess.Popen[bytes]:
    """Start a trainer in a group of its own, with the attempt's lock until it ends; what it prints goes into the attempt's log."""
    with (folder / spec.LOG).open("ab") as output:
        return subprocess.Popen(  # noqa: S603  our own interpreter and module
            [*SHELL, str(folder / spec.LOCK), *command],
            stdin=stdin,
            stdout=output if stdout is None else stdout,
            stderr=output,
            bufsize=0,
            cwd=HOME,
            env=clean_environment(os.environ),
            pass_fds=(lock,),
            start_new_session=True,
        )


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[int]:
    """The lock of an attempt that nobody works on, as a file descriptor to hand to who will. Raises `BlockingIOError`."""
    with (folder / spec.LOCK).open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        lock.truncate(0)
        yield lock.fileno()


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


def kill_holder(path: Path, *, at_once: bool) -> None:
    """End the group of the process that holds the lock, if one does."""
    if is_locked(path):
        with contextlib.suppress(ValueError, ProcessLookupError):
            os.killpg(int(path.read_text()), signal.SIGKILL if at_once else signal.SIGTERM)


def read_log(run_dir: Path, attempt: int) -> str:
    """The `log.txt` of an attempt; nothing where there is none."""
    try:
        text = (find_attempt(run_dir, attempt) / spec.LOG).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""
    return text.replace("\0", "")  # a power cut leaves them at a file's end, and PostgreSQL takes none
