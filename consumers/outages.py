"""An outage of the database, as a role that outlasts it tells it: once when it begins, once when it is over."""

from __future__ import annotations

import time
from dataclasses import dataclass

import structlog

FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.2, 5.0

log = structlog.get_logger()


@dataclass(slots=True)
class Outage:
    """Whether the database is away for a role, and since when."""

    role: str
    began_at: float | None = None
    pause_seconds: float = FIRST_PAUSE_SECONDS

    def note(self, error: Exception) -> float:
        """Remember that the database failed in a way that passes; returns after how many seconds to try again."""
        if self.began_at is None:
            self.began_at = time.monotonic()
            log.warning("database_lost", role=self.role, error=type(error).__name__, action="try again")
        pause, self.pause_seconds = self.pause_seconds, min(2 * self.pause_seconds, LONGEST_PAUSE_SECONDS)
        return pause

    def end(self) -> None:
        """Remember that the database answers."""
        if self.began_at is not None:
            log.info("database_back", role=self.role, seconds=round(time.monotonic() - self.began_at, 1))
            self.began_at, self.pause_seconds = None, FIRST_PAUSE_SECONDS
