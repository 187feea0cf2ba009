"""A Kafka broker and a PostgreSQL server for one demo alone: started by the scripts in `deploy/`, and stopped whatever happens."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from daemon.demo import servers
from daemon.demo.home import DATABASE_LINK, DATABASE_PREFIX

DEPLOY = Path(__file__).parents[2] / "deploy"
BROKER, DATABASE = DEPLOY / "kafka" / "start_kafka.sh", DEPLOY / "postgres.sh"
NOT_INSTALLED = 3
FIRST_PORT, LAST_PORT, CONTROLLER_STEP = 11000, 21000, 10000
"""The broker's controller listens that much higher; both stay below the ports that systems give away."""
SECTIONS = """
[database]
url = "{url}"

[kafka]
bootstrap = "{bootstrap}"
"""


class BackendMissingError(RuntimeError):
    """This machine lacks what a broker or a database server needs."""


def check() -> None:
    """Raise `BackendMissingError` with one sentence unless a broker and a database server can be started here."""
    if not DEPLOY.is_dir():
        raise BackendMissingError(f"{DEPLOY} is missing: run this in a checkout of the project, the package alone does not have it")
    missing = {"java": "openjdk-17-jre-headless", "mvn": "maven"}
    absent = {program: package for program, package in missing.items() if shutil.which(program) is None}
    with tempfile.TemporaryDirectory() as nothing:
        if subprocess.run([DATABASE, "stop", nothing], capture_output=True, check=False).returncode == NOT_INSTALLED:  # noqa: S603
            absent["initdb"] = "postgresql"
    if absent:
        raise BackendMissingError(
            f"{', '.join(absent)} not found: run `apt-get install {' '.join(absent.values())}`, or what your system has"
        )


@contextlib.contextmanager
def started(folder: Path) -> Iterator[str]:
    """Both servers, with their data in the folder; yields the sections of `ratchet.toml` that name them. Raises `CommandFailedError`."""
    broker, database = folder.absolute() / "kafka", make_place(folder / DATABASE_LINK)
    with contextlib.ExitStack() as stack:
        stack.callback(_call, DATABASE, "stop", str(database))
        _call(DATABASE, "start", str(database))
        stack.callback(_call, BROKER, "stop", str(broker))
        bootstrap = _call(BROKER, "start", str(broker), str(find_port()))
        yield SECTIONS.format(url=f"postgresql://ratchet@/postgres?host={database}", bootstrap=bootstrap)


def make_place(link: Path) -> Path:
    """Make a folder that PostgreSQL's own user may enter, with a short path for its socket, and link it: the demo's own need be neither."""
    parent = Path(tempfile.mkdtemp(prefix=DATABASE_PREFIX))
    parent.chmod(0o711)
    link.symlink_to(parent / "data")
    return parent / "data"


def find_port() -> int:
    """A port for the broker whose controller's port is free as well. Raises `BackendMissingError`."""
    for port in range(FIRST_PORT, LAST_PORT):
        if _is_free(port) and _is_free(port + CONTROLLER_STEP):
            return port
    raise BackendMissingError(f"no port from {FIRST_PORT} to {LAST_PORT} is free: stop what listens there")


def describe_start(folder: Path) -> list[str]:
    """The commands that start both again, to look around."""
    properties = dict(line.split("=", 1) for line in (folder / "kafka" / "server.properties").read_text().splitlines() if "=" in line)
    port = properties["advertised.listeners"].rpartition(":")[2]
    return [f"{DATABASE} start {(folder / DATABASE_LINK).resolve()}", f"{BROKER} start {folder / 'kafka'} {port}"]


def _call(script: Path, *arguments: str) -> str:
    """Run a script to its end whoever interrupts, for what it starts outlives it; returns its last line."""
    with servers.uninterrupted():
        done = subprocess.run([script, *arguments], capture_output=True, text=True, start_new_session=True, check=False)  # noqa: S603
    if done.returncode:
        raise servers.CommandFailedError(f"{script.name} {arguments[0]} ended with status {done.returncode}: {done.stderr.strip()}")
    return done.stdout.strip().rpartition("\n")[2]


def _is_free(port: int) -> bool:
    with socket.socket() as probe, contextlib.suppress(OSError):
        probe.bind(("127.0.0.1", port))
        return True
    return False
