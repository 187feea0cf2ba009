"""What is of no more use on disk and in the trainers' store: what ended runs left to go on from, tokens, copies that were cut short."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path

import structlog

from daemon.machinery import Machinery
from storage import db, runs

SPENT = ("attempts/*/checkpoints", "attempts/*/adapters", "attempts/*/model", "tokens")
"""Parts of a run folder that only a further attempt would read; a version has its own copy of what was trained."""
CUT_SHORT_AFTER = timedelta(days=1)
"""No copy takes so long: one that is as old was begun by a process that is gone."""
TOKENS_KEPT = timedelta(days=7)
"""A dataset's tokens serve the runs of a few days; a later one makes them again."""

log = structlog.get_logger()


def clear(machinery: Machinery, run_dir: Path) -> None:
    """Remove what only a further attempt at a run would need."""
    for spent in find_spent(run_dir):
        shutil.rmtree(spent, ignore_errors=True)
    machinery.launcher.clean_up(run_dir)


def sweep(machinery: Machinery, now: datetime) -> None:
    """Remove old tokens, unfinished copies, and what is left of runs that have ended.

    These failed, were parked or cancelled, or their daemon was killed before it cleared them.
    """
    storage = machinery.settings.storage
    found = {folder.name for folder in storage.runs.glob("*") if any(find_spent(folder))} | machinery.launcher.list_kept()
    with db.reading(machinery.engine) as connection:
        ending = {run["id"] for run in runs.read_on_device(connection)}
        ended = [run for run in runs.read_in_state(connection, *runs.ENDED) if run["id"] in found - ending]
    for run in ended:
        clear(machinery, Path(run["folder"]))
    old = list(find_older(storage.snapshots, "*/.*.tokens/*", now - TOKENS_KEPT))
    for folder, pattern in ((storage.snapshots, "*/.*.partial"), (storage.adapters, ".*.partial"), (storage.bases, ".*.partial")):
        old += find_older(folder, pattern, now - CUT_SHORT_AFTER)
    for path in old:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    if ended or old:
        log.info("leftovers_removed", runs=[run["id"] for run in ended], files=[path.name for path in old])


def find_spent(run_dir: Path) -> Iterator[Path]:
    """What is there of the spent parts of a run folder."""
    return (path for name in SPENT for path in run_dir.glob(name))


def find_older(folder: Path, pattern: str, limit: datetime) -> Iterator[Path]:
    """What was last changed before `limit`."""
    return (path for path in folder.glob(pattern) if path.stat().st_mtime < limit.timestamp())
