"""Who holds a lease: one process of one machine, of which can be told whether it is gone."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
from datetime import datetime, timedelta
from pathlib import Path

from sqlalchemy import Connection

from storage import leases

PROCESS = secrets.token_hex(8)
"""This process, told from an earlier one that had its number: in a container that is the rule."""


def make_name() -> str:
    """A new holder in this process."""
    return f"{socket.gethostname()} {os.getpid()} {PROCESS} {secrets.token_hex(8)}"


def acquire(connection: Connection, lease: str, holder: str, now: datetime, term: timedelta) -> int | None:
    """As `leases.acquire`, but from a process of this machine that is gone the lease is taken at once."""
    other = leases.holder_of(connection, lease, now)
    if other is not None and is_dead(other):
        leases.release(connection, lease, other)
    return leases.acquire(connection, lease, holder, now, term)


def is_dead(holder: str) -> bool:
    """Whether the holder was a process of this machine that is gone: nobody must wait for the lease of a killed daemon."""
    host, number, process, *_ = holder.split(" ")
    if host != socket.gethostname():
        return False
    if int(number) == os.getpid():
        return process != PROCESS
    try:
        os.kill(int(number), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return _is_left_over(int(number))


def _is_left_over(number: int) -> bool:
    """Whether the process has ended and its parent has not taken notice yet: it does nothing any more (proc_pid_stat(5), state Z)."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    return False
