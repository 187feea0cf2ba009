"""What is of no more use on disk and in the trainers' store: what ended runs left to go on from, tokens, copies that were cut short."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from pathlib import Path

import structlog

from daemon.machinery import Machinery
from storage import artifacts, db, runs
from trainers.spec import CHECKPOINTS

SPENT = (f"attempts/*/{CHECKPOINTS}", "attempts/*/adapters", "attempts/*/model", "tokens")
"""Parts of a run folder that only a further attempt would read; a version has its own copy of what was trained."""
CUT_SHORT_AFTER = timedelta(days=1)
"""No copy takes so long: one that is as old was begun by a process that is gone."""
TOKENS_KEPT = timedelta(days=7)
"""A dataset's tokens serve the runs of a few days; a later one makes them again."""

log = structlog.get_logger()


def clear(machinery: Machinery, run_dir: Path) -> bool:
    """Remove what only a further attempt at a run would need. False when some of it stays, which is logged."""
    is_gone = [machinery.launcher.clean_up(run_dir), *map(remove, find_spent(run_dir))]
    return all(is_gone)


def sweep(machinery: Machinery, now: datetime, is_stopping: Callable[[], bool]) -> None:
    """Remove old tokens, unfinished copies, and what is left of runs that have ended, until the daemon is to stop.

    These failed, were parked or cancelled, or their daemon was killed before it cleared them. What stays is tried again by the next daemon.
    """
    memory, removed = machinery.memory, []
    for path, act in [*find_ended(machinery), *find_old(machinery, now)]:
        if is_stopping():
            break
        if path not in memory.stuck:
            if act(path):
                removed.append(path.name)
            else:
                memory.stuck.add(path)
    if removed:
        log.info("leftovers_removed", names=removed)


def find_ended(machinery: Machinery) -> Iterator[tuple[Path, Callable[[Path], bool]]]:
    """The folders of runs that have ended, of which something is left here or in the trainers' store."""
    home = machinery.settings.storage.runs
    found = {folder.name for folder in home.glob("*") if any(find_spent(folder))} | machinery.launcher.list_kept()
    with db.reading(machinery.engine) as connection:
        ending = {run["id"] for run in runs.read_on_device(connection)}
        ended = [run["id"] for run in runs.read_in_state(connection, *runs.ENDED)]
    return ((home / run, functools.partial(clear, machinery)) for run in ended if run in found - ending)


def find_spent(run_dir: Path) -> Iterator[Path]:
    """What is there of the spent parts of a run folder."""
    return (path for name in SPENT for path in run_dir.glob(name))


def find_old(machinery: Machinery, now: datetime) -> Iterator[tuple[Path, Callable[[Path], bool]]]:
    """Tokens that no run is likely to read any more, and copies that were cut short."""
    storage, cut_short = machinery.settings.storage, now - CUT_SHORT_AFTER
    for folder, pattern, limit in (
        (storage.snapshots, "*/.*.tokens/*", now - TOKENS_KEPT),
        (storage.snapshots, f"*/{artifacts.PARTIAL}", cut_short),
        (storage.adapters, artifacts.PARTIAL, cut_short),
        (storage.bases, artifacts.PARTIAL, cut_short),
    ):
        yield from ((path, remove) for path in folder.glob(pattern) if is_older(path, limit))


def is_older(path: Path, limit: datetime) -> bool:
    """Whether a path was last changed before `limit`; one that has just got another name was not."""
    try:
        return path.stat().st_mtime < limit.timestamp()
    except FileNotFoundError:
        return False


def remove(path: Path) -> bool:
    """Delete a file or a folder. False when it stays, which is logged."""
    try:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    except OSError as error:
        log.warning("leftovers_stay", path=str(path), error=type(error).__name__)
        return not path.exists()  # another thread may have removed it meanwhile
    return True
