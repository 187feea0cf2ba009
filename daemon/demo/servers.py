"""The processes of the demo: the daemon and the node as anybody would start them, commands, and an end that leaves none behind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx

RATCHET = str(Path(sys.executable).with_name("ratchet"))
START_SECONDS, STOP_SECONDS, POLL_SECONDS = 60, 35, 0.1


class CommandFailedError(RuntimeError):
    """A command or a server ended otherwise than it should."""


@contextlib.contextmanager
def started(command: Sequence[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process in a session of its own, so that Ctrl-C reaches only the demo, which ends it in order."""
    process = None
    try:
        with uninterrupted(), log.open("ab") as output:
            process = subprocess.Popen(command, stdout=output, stderr=output, env=_environment(), start_new_session=True)  # noqa: S603
        yield process
    finally:
        if process is not None:
            stop(process)


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold an interrupt back until the block is done: a process whose start is interrupted would be left behind."""
    held: list[int] = []
    before = {number: signal.signal(number, lambda number, _: held.append(number)) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if held:
        raise KeyboardInterrupt


def stop(process: subprocess.Popen[bytes]) -> int:
    """End a process in order, or kill it when it takes too long; returns its exit status."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
    return process.wait()


def await_answer(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until the server answers well. Raises `CommandFailedError` when it ended instead."""
    deadline = time.monotonic() + START_SECONDS
    with httpx.Client(trust_env=False, timeout=5) as client:
        while time.monotonic() < deadline:
            if process.poll() is not None:
                raise CommandFailedError(f"the server of {url} ended with status {process.returncode}: {log} says why")
            with contextlib.suppress(httpx.HTTPError):
                if client.get(url).is_success:
                    return
            time.sleep(POLL_SECONDS)
    raise CommandFailedError(f"{url} did not answer within {START_SECONDS} s: {log} may say why")


def run(*arguments: str | Path) -> str:
    """Run a `ratchet` command; returns what it printed. Raises `CommandFailedError` with what it said."""
    done = subprocess.run([RATCHET, *map(str, arguments)], capture_output=True, text=True, env=_environment(), check=False)  # noqa: S603
    if done.returncode:
        raise CommandFailedError(f"ratchet {arguments[0]} ended with status {done.returncode}: {(done.stderr or done.stdout).strip()}")
    return done.stdout


def run_json(*arguments: str | Path) -> Any:
    """As `run`, with `--json`."""
    return json.loads(run(*arguments, "--json"))


def _environment() -> Mapping[str, str]:
    """Without settings of the person's own daemon."""
    return {name: value for name, value in os.environ.items() if not name.startswith("RATCHET_")}
