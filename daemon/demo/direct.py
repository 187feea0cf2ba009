"""The demo without a stream: predictions and answers go in over HTTP, and the database's rows tell what came of them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
from sqlalchemy import Engine

from daemon.demo.clients import HANDLED_SECONDS, POLL_SECONDS, Answered, NotHandledError
from daemon.demo.home import AGENT
from storage import db, registry


@dataclass(frozen=True, slots=True)
class Producer:
    """Posts predictions, with a producer's token."""

    http: httpx.Client

    def send(self, events: Sequence[Mapping[str, Any]]) -> None:
        """Send predictions as one batch and wait until the daemon has handled them. Raises `NotHandledError`."""
        headers = {"Content-Type": "application/cloudevents-batch+json"}
        receipt = self.http.post("/v1/predictions", json=list(events), headers=headers).raise_for_status().json()
        if receipt["refused"]:
            raise NotHandledError(f"{receipt['refused']} of {len(events)} predictions were refused")
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
class Desk:
    """The review API, with a reviewer's token."""

    http: httpx.Client

    def answer_all(self, truth: Mapping[str, str]) -> Iterator[Answered]:
        """Take one case after the other; each comes back once its answer is stored."""
        while (response := self.http.get("/v1/reviews/next").raise_for_status()).status_code != httpx.codes.NO_CONTENT:
            case = response.json()
            began = time.monotonic()
            self.http.post(f"/v1/reviews/{case['id']}/answer", json={"answer": truth[case["claim_id"]]}).raise_for_status()
            yield Answered(case["claim_id"], time.monotonic() - began)


@dataclass(frozen=True, slots=True)
class News:
    """The rows themselves."""

    engine: Engine

    def read_verdict(self, version: str) -> str | None:
        """A version's verdict, None while it has none."""
        with db.reading(self.engine) as connection:
            verdict: str | None = registry.read(connection, AGENT, version)["verdict"]
        return verdict

    def read_change(self) -> Mapping[str, Any] | None:
        """The newest change of the champion."""
        with db.reading(self.engine) as connection:
            change = registry.in_force(connection, AGENT)
        return None if change is None else dict(change)
