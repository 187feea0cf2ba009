"""What stands around the daemon: the inference node that predicts and reports its answers, and the expert who is asked."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import httpx

from consumers import schemas
from daemon.cases import Case
from daemon.demo.home import AGENT, LABELS

HANDLED_SECONDS, POLL_SECONDS = 30, 0.02


class NotHandledError(RuntimeError):
    """An accepted event was not handled."""


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


@dataclass(frozen=True, slots=True)
class Producer:
    """Sends the node's answers to the daemon."""

    http: httpx.Client

    def send(self, cases: Sequence[Case], answers: Sequence[Mapping[str, Any]]) -> None:
        """Send predictions as one batch and wait until the daemon has handled them. Raises `NotHandledError`."""
        batch = [to_event(case, answer) for case, answer in zip(cases, answers, strict=True)]
        headers = {"Content-Type": "application/cloudevents-batch+json"}
        receipt = self.http.post("/v1/predictions", json=batch, headers=headers).raise_for_status().json()
        if receipt["refused"]:
            raise NotHandledError(f"{receipt['refused']} of {len(batch)} predictions were refused")
        self._await_handled(receipt["results"][-1]["ulid"])

    def _await_handled(self, ulid: str) -> None:
        deadline = time.monotonic() + HANDLED_SECONDS
        while time.monotonic() < deadline:
            status = self.http.get(f"/v1/events/{ulid}").raise_for_status().json()
            if status["state"] == "handled":
                return
            time.sleep(POLL_SECONDS)
        raise NotHandledError(f"event {ulid} is {status['state']} after {HANDLED_SECONDS} s: {status['reason']}")


@dataclass(frozen=True, slots=True)
class Expert:
    """Answers whatever the daemon asks, as the physician did; `answered_at` says when the daemon had stored each answer."""

    http: httpx.Client
    truth: Mapping[str, str]
    answered_at: list[datetime] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    claims: list[str] = field(default_factory=list)

    def answer_all(self) -> int:
        """Answer every case that waits; returns how many."""
        before = len(self.answered_at)
        while (response := self.http.get("/v1/reviews/next").raise_for_status()).status_code != httpx.codes.NO_CONTENT:
            case = response.json()
            began = time.monotonic()
            self.http.post(f"/v1/reviews/{case['id']}/answer", json={"answer": self.truth[case["claim_id"]]}).raise_for_status()
            self.seconds.append(time.monotonic() - began)
            self.answered_at.append(datetime.now(UTC))
            self.claims.append(case["claim_id"])
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
