"""What stands around the daemon: the inference node that predicts, the expert who is asked, and the ways that they and the daemon speak."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, NamedTuple, Protocol

import httpx

from consumers import schemas
from daemon.cases import Case
from daemon.demo.home import AGENT, LABELS

HANDLED_SECONDS, POLL_SECONDS = 60, 0.02


class NotHandledError(RuntimeError):
    """What was accepted was not handled."""


@dataclass(frozen=True, slots=True)
class Node:
    """The reference node."""

    http: httpx.Client

    def load(self, name: str, version: Mapping[str, Any]) -> None:
        """Serve a version for another agent beside the daemon's."""
        names = ("adapter_digest", "prompt", "labels", "temperature")
        body = {"agent": name, "version": version["name"], "serving_name": name, "adapter": version["adapter_path"]}
        self.http.post("/load", json={**body, **{key: version[key] for key in names}}).raise_for_status()

    def score(self, name: str, cases: Sequence[Case]) -> list[dict[str, Any]]:
        """What the version that serves `name` says of each case."""
        response = self.http.post("/score", json={"agent": name, "claims": [{"input": case.input} for case in cases]})
        answers: list[dict[str, Any]] = response.raise_for_status().json()
        return answers

    def served_digest(self) -> str:
        """The digest of the adapter that serves the daemon's agent."""
        return str(self.http.get(f"/served/{AGENT}").raise_for_status().json()["adapter_digest"])


class Producer(Protocol):
    """Takes the node's answers to the daemon."""

    def send(self, events: Sequence[Mapping[str, Any]]) -> None:
        """Send predictions and wait until the daemon has handled them. Raises `NotHandledError`."""


class Answered(NamedTuple):
    """One claim that an expert answered, and how long it took until the daemon had the answer."""

    claim_id: str
    seconds: float


class Desk(Protocol):
    """Where cases wait for the expert."""

    def answer_all(self, truth: Mapping[str, str]) -> Iterator[Answered]:
        """Answer every case that waits, as `truth` says of its claim; each comes back once the daemon has the answer."""


class News(Protocol):
    """What the daemon tells of its versions."""

    def read_verdict(self, version: str) -> str | None:
        """A version's verdict, None while it has none."""

    def read_change(self) -> Mapping[str, Any] | None:
        """The newest change of the champion: kind, version, actor, reason."""


@dataclass(frozen=True, slots=True)
class Expert:
    """Answers whatever the daemon asks, as the physician did; `answered_at` says when the daemon had each answer."""

    desk: Desk
    truth: Mapping[str, str]
    answered_at: list[datetime] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    claims: list[str] = field(default_factory=list)

    def answer_all(self) -> int:
        """Answer every case that waits; returns how many."""
        before = len(self.answered_at)
        for claim_id, seconds in self.desk.answer_all(self.truth):
            self.seconds.append(seconds)
            self.answered_at.append(datetime.now(UTC))
            self.claims.append(claim_id)
        return len(self.answered_at) - before


def to_event(case: Case, answer: Mapping[str, Any]) -> dict[str, Any]:
    """The CloudEvent of one prediction; the physician's decision is not in it."""
    data = {
        "prediction_id": case.claim_id,
        "agent": AGENT,
        "claim_id": case.claim_id,
        "group": case.group,
        "input": case.input,
        "attributes": case.attributes,
        "occurred_at": case.occurred_at.isoformat(),
        "decision": answer["decision"],
        "confidence": answer["confidence"],
        "probabilities": dict(zip(LABELS, answer["probabilities"], strict=True)),
        "model_version": answer["serving_name"],
    }
    return {"specversion": "1.0", "type": schemas.PREDICTION, "source": "demo-node", "id": case.claim_id, "data": data}
