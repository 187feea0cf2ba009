"""Cards: what a device has of memory, how much of it others have taken, and by which size it is sold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

GB = 10**9
SIZES = (12, 24, 48, 80, 141)
"""Sizes of cards in GB that remedies may name."""
SOLD_AS = 1.1
"""A card has up to so many times the memory that it is sold with."""


@dataclass(frozen=True, slots=True)
class Card:
    """A device: its memory and how much of that others have taken, in bytes; `count` such cards share a run's rows."""

    name: str
    kind: Literal["cuda", "cpu"]
    memory: int
    taken: int = 0
    count: int = 1

    @property
    def free(self) -> int:
        """What a run may take."""
        return max(0, self.memory - self.taken)


def matches(asked: Card, recorded: Card) -> bool:
    """Whether a recorded card is the one that is asked for; one that is only a size is every card sold as such, of 24 GB or 24 GiB."""
    if (asked.kind, asked.count) != (recorded.kind, recorded.count):
        return False
    return asked.name == recorded.name or (asked.name == name_size(asked.memory) and 1 <= recorded.memory / asked.memory < SOLD_AS)


def name_size(memory: int) -> str:
    """What a card is called of which only the size is known."""
    return f"{memory / GB:g} GB"
