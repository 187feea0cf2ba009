"""CUDA cards as the driver tells of them: names, memory, and what others have taken of it."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pynvml

from daemon.cards import Card

TRAINERS = ("trainers.train", "trainers.worker")


def read_cards(runs: Path, environ: Mapping[str, str] = os.environ, library: Any = pynvml) -> dict[str, Card]:
    """Each card under the name that torch gives it, `cuda:N`, in the order of the bus; none where there is no driver.

    What trainers of the run folders in `runs` (absolute) hold is not taken: leases govern it, and a resident base serves the next run.
    """
    try:
        library.nvmlInit()
    except library.NVMLError:
        return {}
    try:
        return {f"cuda:{place}": _read_card(handle, library, runs) for place, handle in enumerate(_find_visible(environ, library))}
    finally:
        library.nvmlShutdown()


def make_reader(runs: Path) -> Callable[[], dict[str, Card]]:
    """`read_cards` for an installation, by where its run folders lie."""
    return functools.partial(read_cards, runs.resolve())


def _find_visible(environ: Mapping[str, str], library: Any) -> Iterator[Any]:
    """The cards that `CUDA_VISIBLE_DEVICES` leaves, by number or UUID; as in CUDA, the list ends at the first that is not there."""
    count, visible = library.nvmlDeviceGetCount(), environ.get("CUDA_VISIBLE_DEVICES")
    for name in map(str, range(count)) if visible is None else filter(None, visible.split(",")):
        try:
            is_number = name.strip().isdecimal()
            yield library.nvmlDeviceGetHandleByIndex(int(name)) if is_number else library.nvmlDeviceGetHandleByUUID(name.strip())
        except library.NVMLError:
            return


def _read_card(handle: Any, library: Any, runs: Path) -> Card:
    memory = library.nvmlDeviceGetMemoryInfo(handle)
    ours = sum(one.usedGpuMemory or 0 for one in library.nvmlDeviceGetComputeRunningProcesses(handle) if is_ours(one.pid, runs))
    name = library.nvmlDeviceGetName(handle)
    return Card(name.decode() if isinstance(name, bytes) else name, "cuda", memory.total, max(0, memory.used - ours))


def is_ours(pid: int, runs: Path) -> bool:
    """Whether a process is a trainer of these run folders."""
    try:
        words = os.fsdecode(Path(f"/proc/{pid}/cmdline").read_bytes()).split("\0")
    except OSError:
        return False
    return any(word in TRAINERS for word in words) and any(Path(word).is_relative_to(runs) for word in words)
