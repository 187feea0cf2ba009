"""The demo on a stream: predictions and labels go in over Kafka, reviews and verdicts are heard there; no client of it speaks HTTP."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Engine

from consumers import counterpart, schemas
from daemon.demo.clients import HANDLED_SECONDS, POLL_SECONDS, Answered, NotHandledError
from daemon.demo.home import AGENT
from storage import db, predictions

OPENED, ENDED = "ratchet.review.opened.v1", frozenset({"ratchet.review.closed.v1", "ratchet.review.expired.v1"})
JUDGED, CHANGED = "ratchet.version.judged.v1", "ratchet.champion."


@dataclass(frozen=True, slots=True)
class Producer:
    """Sends predictions to their topic."""

    sender: counterpart.Sender
    topic: str
    engine: Engine

    def send(self, events: Sequence[Mapping[str, Any]]) -> None:
        """Send predictions and wait until the daemon has stored them. Raises `NotHandledError`."""
        self.sender.send(self.topic, events)
        wanted, deadline = [one["data"]["prediction_id"] for one in events], time.monotonic() + HANDLED_SECONDS
        while (known := self._count_known(wanted)) < len(wanted):
            if time.monotonic() > deadline:
                raise NotHandledError(f"{len(wanted) - known} of {len(wanted)} predictions are not stored after {HANDLED_SECONDS} s")
            time.sleep(POLL_SECONDS)

    def _count_known(self, wanted: Sequence[str]) -> int:
        with db.reading(self.engine) as connection:
            return len(predictions.find_known(connection, AGENT, wanted))


@dataclass(slots=True)
class Desk:
    """A review page of somebody else: hears of each case that was opened, and answers by an event."""

    sender: counterpart.Sender
    reviews: counterpart.Listener
    topic: str
    expert: str
    waiting: dict[str, str] = field(default_factory=dict)
    ended: set[str] = field(default_factory=set)

    def answer_all(self, truth: Mapping[str, str]) -> Iterator[Answered]:
        """Answer all that waits at once; each comes back when the daemon has told that its case is closed. Raises `NotHandledError`."""
        self._hear()
        asked, began = dict(self.waiting), time.monotonic()
        self.sender.send(self.topic, [self._answer(review, claim_id, truth[claim_id]) for review, claim_id in asked.items()])
        while asked:
            if time.monotonic() > began + HANDLED_SECONDS:
                raise NotHandledError(f"{len(asked)} answers have closed no review after {HANDLED_SECONDS} s")
            self._hear()
            for review in asked.keys() - self.waiting.keys():
                yield Answered(asked.pop(review), time.monotonic() - began)

    def _answer(self, review: str, claim_id: str, answer: str) -> dict[str, Any]:
        data = {"agent": AGENT, "claim_id": claim_id, "review_id": review, "expert": self.expert, "answer": answer}
        data["answered_at"] = datetime.now(UTC).isoformat()
        return {"specversion": "1.0", "type": schemas.LABEL, "source": "demo-desk", "id": review, "data": data}

    def _hear(self) -> None:
        """Keep up with the queue. What is told twice, which may be, changes nothing: a case is opened once and ends once."""
        for told in self.reviews.hear(POLL_SECONDS):
            review = told["data"]["review"]
            if told["type"] in ENDED:
                self.ended.add(review)
                self.waiting.pop(review, None)
            elif told["type"] == OPENED and review not in self.ended:
                self.waiting[review] = told["data"]["claim_id"]


@dataclass(slots=True)
class News:
    """What is announced."""

    announcements: counterpart.Listener
    verdicts: dict[str, str] = field(default_factory=dict)
    changes: dict[str, Mapping[str, Any]] = field(default_factory=dict)

    def read_verdict(self, version: str) -> str | None:
        """A version's verdict, None while none was announced."""
        self._hear()
        return self.verdicts.get(version)

    def read_change(self) -> Mapping[str, Any] | None:
        """The newest change of the champion that was announced; by its time, for the partitions have no order among them."""
        self._hear()
        newest = max(self.changes, default=None)
        return None if newest is None else self.changes[newest]

    def _hear(self) -> None:
        for told in self.announcements.hear(POLL_SECONDS):
            if told["type"] == JUDGED:
                self.verdicts[told["data"]["version"]] = told["data"]["verdict"]
            elif told["type"].startswith(CHANGED):
                self.changes[told["time"]] = told["data"]
