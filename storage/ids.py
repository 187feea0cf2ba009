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
    first, second = bits >> 40, bits & 0xFFFFFFFFFF
    pairs = _PAIRS  # written out, for this runs for every event
    return (
        f"{_encode_time(int(at.timestamp() * 1000))}"
        f"{pairs[first >> 30]}{pairs[first >> 20 & 1023]}{pairs[first >> 10 & 1023]}{pairs[first & 1023]}"
        f"{pairs[second >> 30]}{pairs[second >> 20 & 1023]}{pairs[second >> 10 & 1023]}{pairs[second & 1023]}"
    )


def after(at: datetime) -> str:
    """The smallest identifier of anything that came after the millisecond of `at`."""
    return _encode_time(int(at.timestamp() * 1000) + 1) + CROCKFORD[0] * 16


@functools.lru_cache(maxsize=1024)
def _encode_time(milliseconds: int) -> str:
    return "".join([_PAIRS[milliseconds >> shift & 1023] for shift in range(40, -1, -10)])
