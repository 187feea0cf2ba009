"""Identifiers: ULIDs that sort by time and are made from what they name, so that a replay makes the same ones."""

from __future__ import annotations

import hashlib
from datetime import datetime

from ulid import ULID


def make_ulid(at: datetime, *about: str) -> str:
    """A ULID of 26 characters: the milliseconds of `at`, then 80 bits of the SHA-256 of `about`.

    The same things at the same millisecond have the same identifier: that is what makes a repeated write harmless.
    """
    digest = hashlib.sha256("\0".join(about).encode()).digest()
    return str(ULID.from_bytes(int(at.timestamp() * 1000).to_bytes(6) + digest[:10]))
