"""A folder as `ratchet init` makes it, and the real `ratchet up` in it, as a process of its own."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from sqlalchemy import Engine

from daemon import cli
from storage import db, schema, tokens

RATCHET = Path(sys.executable).with_name("ratchet")
ROLES: Mapping[str, tokens.Role] = {"node": "producer", "ann": "reviewer", "ben": "reviewer", "ops": "operator"}
START_SECONDS = 60
"""A busy machine imports slowly."""


def make_home(folder: Path, url: str | None = None) -> dict[str, str]:
    """A fresh installation in `folder`, its database there or at `url`; returns the secrets of the tokens of `ROLES` by name."""
    with contextlib.redirect_stdout(io.StringIO()) as told:
        if cli.main(["init", str(folder)]):
            raise RuntimeError(f"`ratchet init {folder}` failed: {told.getvalue()}")
    engine = db.open_engine(url or f"sqlite:///{folder}/ratchet.db")
    secrets = prepare(engine)
    engine.dispose()
    return secrets


def prepare(engine: Engine) -> dict[str, str]:
    """Bring the schema up to date and make the tokens of `ROLES`; returns their secrets by name."""
    schema.upgrade(engine)
    with db.writing(engine) as connection:
        return {name: tokens.add(connection, name, role, datetime.now(UTC)) for name, role in ROLES.items()}


class Daemon:
    """`ratchet up` in a home; its log is the file `log` there. `settings` are `RATCHET_…` variables without that prefix."""

    def __init__(self, home: Path, log: str = "daemon.log", **settings: str) -> None:
        self.home, self.log = home, home / log
        ours = {"SERVER__PORT": "0", "SERVER__OPS_PORT": "0", **settings}
        kept = {name: value for name, value in os.environ.items() if not name.startswith("RATCHET_")}
        self.environment = {**kept, "OMP_NUM_THREADS": "1", **{f"RATCHET_{name}": value for name, value in ours.items()}}
        self._began_at = 0
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def process(self) -> subprocess.Popen[bytes]:
        assert self._process is not None, "it was not started"
        return self._process

    def begin(self, *arguments: str, patch: str = "", **environment: str) -> Self:
        """Start it and come back at once; `patch` is Python that is run before it."""
        command = [sys.executable, "-c", f"{patch}\nfrom daemon import cli; raise SystemExit(cli.main())"] if patch else [RATCHET]
        with self.log.open("ab") as log:
            self._began_at = log.tell()
            self._process = subprocess.Popen(
                [*command, "up", *arguments], cwd=self.home, env={**self.environment, **environment}, stdout=log, stderr=log
            )
        return self

    def call(self, *arguments: str) -> None:
        """Call another `ratchet` command in the same home."""
        subprocess.run([RATCHET, *arguments], cwd=self.home, env=self.environment, check=True, capture_output=True)

    def start(self, *arguments: str, patch: str = "", **environment: str) -> Self:
        """Start it and wait until it answers."""
        self.begin(*arguments, patch=patch, **environment)
        self.wait_for(lambda: self.ops_url)
        return self

    @property
    def url(self) -> str | None:
        """Where the API is; None while it is not served yet."""
        return self._find_url("web")

    @property
    def ops_url(self) -> str | None:
        """Where health and metrics are."""
        return self._find_url("operate")

    def lines(self) -> list[dict[str, Any]]:
        """What this start has logged."""
        with self.log.open("rb") as log:
            log.seek(self._began_at)
            return [json.loads(line) for line in log.read().splitlines(keepends=True) if line.startswith(b"{") and line.endswith(b"\n")]

    def events(self) -> list[str]:
        """The names of what this start has logged."""
        return [line["event"] for line in self.lines()]

    def wait_for(self, holds: Any, seconds: float = START_SECONDS) -> Any:
        """Wait until something holds, while it lives; returns it."""
        deadline = time.monotonic() + seconds
        while not (found := holds()):
            assert self.process.poll() is None, f"the daemon ended with status {self.process.returncode}: {self.log.read_text()[-2000:]}"
            assert time.monotonic() < deadline, f"it did not happen within {seconds} s: {self.log.read_text()[-2000:]}"
            time.sleep(0.05)
        return found

    def stop(self, number: int = signal.SIGTERM, seconds: float = 60) -> int:
        """Ask it to end; returns the exit status."""
        self.process.send_signal(number)
        return self.process.wait(seconds)

    def kill(self) -> None:
        """End it as a power cut does; trainers live on."""
        self.process.kill()
        self.process.wait()

    def _find_url(self, role: str) -> str | None:
        told = (line for line in self.lines() if line["event"] == "listening" and line["role"] == role)
        return next((str(line["url"]) for line in told), None)


def find_trainers(home: Path) -> dict[int, Path]:
    """The process groups of the trainers that work in this home, with the folder of each attempt; the daemon may not know of them yet."""
    files = (home / "runs").glob("*/attempts/*/process.lock")
    return {number: path.parent for path in files if (number := _read_number(path)) and is_trainer(number)}


def _read_number(path: Path) -> int:
    with contextlib.suppress(OSError, ValueError):
        return int(path.read_text())
    return 0


def is_trainer(number: int) -> bool:
    """Whether this process is a trainer that lives."""
    with contextlib.suppress(OSError):
        return b"trainers." in Path(f"/proc/{number}/cmdline").read_bytes()
    return False
