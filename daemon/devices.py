"""Devices: which ones runs may use, and whose each one is now."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import NamedTuple

from sqlalchemy import Connection, RowMapping

from daemon.config import Training
from storage import leases

DRIVER = Path("/dev/nvidiactl")
COUNT_CARDS = "import torch; print(torch.cuda.device_count())"
PATIENCE_SECONDS = 120


class Claim(NamedTuple):
    """A device and the fence under which it is held."""

    device: str
    fence: int


def find(training: Training) -> tuple[str, ...]:
    """The devices that the settings name; `auto` is every CUDA card that the trainers' torch sees, else the CPU."""
    found: list[str] = []
    for device in training.devices:
        found += _find_all(training.python) if device == "auto" else [device]
    return tuple(dict.fromkeys(found))


def _find_all(python: str) -> list[str]:
    # Importing torch takes seconds: ask it only where there is a driver.
    if not DRIVER.exists():
        return ["cpu"]
    try:
        done = subprocess.run([python, "-c", COUNT_CARDS], capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=True)  # noqa: S603
        return [f"cuda:{card}" for card in range(int(done.stdout))] or ["cpu"]
    except (OSError, ValueError, subprocess.SubprocessError):
        return ["cpu"]


def claim(connection: Connection, devices: Sequence[str], run: str, attempt: int, now: datetime, term: timedelta) -> Claim | None:
    """Take the first free device for an attempt; None when all are in use."""
    for device in devices:
        if leases.holder_of(connection, _name(device), now) is None:
            fence = leases.acquire(connection, _name(device), _holder(run, attempt), now, term)
            if fence is not None:
                return Claim(device, fence)
    return None


def keep(connection: Connection, run: RowMapping, now: datetime, term: timedelta) -> bool:
    """Hold a run's device for longer. False when another run has taken it: this attempt may not publish any more."""
    return leases.renew(connection, _name(run["device"]), _holder(run["id"], run["attempt"]), run["fence"], now, term)


def free(connection: Connection, run: RowMapping) -> None:
    """Give a run's device back."""
    if run["device"] is not None:
        leases.release(connection, _name(run["device"]), _holder(run["id"], run["attempt"]))


def _name(device: str) -> str:
    return f"device:{device}"


def _holder(run: str, attempt: int) -> str:
    return f"{run}/{attempt}"
