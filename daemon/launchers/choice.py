"""Which launcher carries runs out: the one that the settings name."""

from __future__ import annotations

from daemon.config import Settings
from daemon.launch import Launcher
from daemon.launchers.processes import Processes
from daemon.launchers.workers import Workers


def make_launcher(settings: Settings) -> Launcher:
    """Processes of this machine, kept warm between runs where the settings say so."""
    python, minutes = settings.training.python, settings.devices.keep_warm_minutes
    return Workers(python, 60 * minutes) if minutes else Processes(python)
