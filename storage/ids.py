"""Identifiers: ULIDs that sort by time and are made from what they name, so that a replay makes the same ones."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable
from datetime import datetime

CROCKFORD = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"


def make_ulid(at: datetime, *about: str) -> str:
    """A ULID of 26 characters: the milliseconds of `at`, then 64 bits of the SHA-256 of `about`.

    The same things at the same millisecond have the same identifier: that is what makes a repeated write harmless.
    Source of the format: github.com/ulid/spec.
    """
    return make_ulids(at, ["\0".join(about)])[0]


def make_ulids(at: datetime, abouts: Iterable[str]) -> list[str]:
    """`make_ulid` for many things at once."""
    time = _encode_time(int(at.timestamp() * 1000))
    # Hexadecimal digits are Crockford digits too, and what writes them is quick: this runs for every event.
    return [time + hashlib.sha256(about.encode()).hexdigest()[:16].upper() for about in abouts]


def after(at: datetime) -> str:
    """The smallest identifier of anything that came after the millisecond of `at`."""
    return _encode_time(int(at.timestamp() * 1000) + 1) + CROCKFORD[0] * 16


@functools.lru_cache(maxsize=1024)
def _encode_time(milliseconds: int) -> str:
    return "".join([CROCKFORD[milliseconds >> shift & 31] for shift in range(45, -1, -5)])
