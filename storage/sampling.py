"""Deterministic sampling: which bucket of [0, 1) a key falls into, for each purpose on its own; and what a slice is called."""

from __future__ import annotations

import hashlib
from typing import Literal

Purpose = Literal["audit", "explore", "split", "exam", "ab", "second_read", "tie"]


def bucket(purpose: Purpose, agent: str, key: str) -> float:
    """A number in [0, 1) that is the same for ever; the buckets of different purposes are independent.

    The key is the group for `split` and the claim otherwise, so that a redelivered claim is drawn as before.
    """
    digest = hashlib.sha256(f"{purpose}\0{agent}\0{key}".encode()).digest()
    return (int.from_bytes(digest[:8]) >> 11) / (1 << 53)


def slice_key(name: str, value: object) -> str:
    """How a slice is called wherever claims are counted by slice; a claim without the attribute is in the slice `name=None`."""
    return f"{name}={value}"
