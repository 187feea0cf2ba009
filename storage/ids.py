"""Identifiers: ULIDs that sort by time and are made from what they name, so that a replay makes the same ones."""

from __future__ import annotations

import functools
import hashlib
from datetime import datetime

CROCKFORD = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
_PAIRS = [first + second for first in CROCKFORD for second in CROCKFORD]


def make_ulid(at: datetime, *about: str) -> str:
    """A ULID of 26 characters: the milliseconds of `at`, then 80 bits of the SHA-256 of `about`.

    The same things at the same millisecond have the same identifier: that is what makes a repeated write harmless.
    Source of the format: github.com/ulid/spec.
    """
    bits = int.from_bytes(hashlib.sha256("\0".join(about).encode()).digest()[:10])
    return _encode_time(int(at.timestamp() * 1000)) + _encode(bits, 80)


def _encode(bits: int, width: int) -> str:
    return "".join([_PAIRS[bits >> shift & 1023] for shift in range(width - 10, -1, -10)])


def after(at: datetime) -> str:
    """The smallest identifier of anything that came after the millisecond of `at`."""
    return _encode_time(int(at.timestamp() * 1000) + 1) + CROCKFORD[0] * 16


@functools.lru_cache(maxsize=1024)
def _encode_time(milliseconds: int) -> str:
    return _encode(milliseconds, 50)
