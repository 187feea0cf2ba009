"""Which launcher carries runs out: the one that the settings name."""

from __future__ import annotations

from daemon.launch import Launcher
from daemon.launchers.processes import Processes
from daemon.launchers.ray_jobs import RayJobs
from daemon.launchers.workers import Workers
from daemon.settings import Settings


def make_launcher(settings: Settings) -> Launcher:
    """Jobs on a cluster, or processes of this machine, kept warm between runs where the settings say so."""
    training = settings.training
    if training.launcher == "ray" and training.store is not None:
        return RayJobs(training.ray_address, training.store, training.python)
    python, minutes = settings.training.python, settings.devices.keep_warm_minutes
    return Workers(python, 60 * minutes) if minutes else Processes(python)
