"""What this process has read from Kafka and sent to it since it began; the daemon shows it."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class Incoming:
    """Batches that were committed, and how the last one went; times by the monotonic clock. `began_at` is None while nobody reads."""

    batches: int = 0
    records: int = 0
    seconds: float = 0.0
    last_records: int = 0
    last_seconds: float = 0.0
    began_at: float | None = None
    acknowledged_at: float | None = None
    acknowledged: dict[tuple[str, int], int] = field(default_factory=dict)
    """The last offset of each partition that we told Faust we have; what it commits is its own affair."""
    is_waiting_for_database: bool = False

    def add(self, records: int, seconds: float) -> None:
        """Count a batch that is committed."""
        self.batches += 1
        self.records += records
        self.seconds += seconds
        self.last_records, self.last_seconds = records, seconds


@dataclass(slots=True)
class Outgoing:
    """Messages that the broker has acknowledged and that are marked so, and whether this process is the one that sends."""

    messages: int = 0
    is_leading: bool = False
