"""The running loop as the demo drives and sees it: claims go in, experts answer, and the database says what came of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Engine, RowMapping

from daemon.cases import Case
from daemon.demo import clients
from daemon.demo.clients import Expert, News, Node, Producer
from daemon.demo.home import AGENT
from daemon.demo.screen import Screen
from storage import db, registry, runs

BATCH = 50
FROZEN = "frozen"
POLL_SECONDS, TICK_SECONDS, WAIT_SECONDS = 0.2, 1.5, 180


class OutcomeDiffersError(RuntimeError):
    """What the demo is to show did not happen."""


@dataclass(frozen=True, slots=True)
class Served:
    """One claim that was answered: by which version, whether rightly, and whether v1.0 would have been right."""

    claim_id: str
    version: str
    is_right: bool
    is_frozen_right: bool


@dataclass(slots=True)
class Loop:
    """A daemon, a node, an expert, and the claims that are still to come."""

    engine: Engine
    screen: Screen
    node: Node
    producer: Producer
    expert: Expert
    news: News
    stream: Sequence[Case]
    served: list[Served] = field(default_factory=list)

    def stream_until(self, is_done: Callable[[], bool], title: str, limit: int) -> None:
        """Let claims come in, and the expert answer, until it is done. Raises `OutcomeDiffersError` after `limit` claims."""
        first, answered = len(self.served), len(self.expert.answered_at)
        with self.screen.bar(title) as bar:
            while not is_done():
                came = len(self.served) - first
                if came >= limit or len(self.served) >= len(self.stream):
                    raise OutcomeDiffersError(f"{title}: not within {came} claims")
                self.serve_batch()
                self.settle(is_done)
                figures = f"{len(self.served) - first} claims, {len(self.expert.answered_at) - answered} answers"
                bar.show(len(self.served) - first, limit, figures)

    def stream_some(self, claims: int, title: str) -> None:
        """Let so many claims come in."""
        until = len(self.served) + claims
        self.stream_until(lambda: len(self.served) >= until, title, claims + 1)

    def serve_batch(self) -> None:
        """The node answers the next claims, its answers go to the daemon, and the expert answers what is asked at once."""
        cases = self.stream[len(self.served) : len(self.served) + BATCH]
        answers, frozen = self.node.score(AGENT, cases), self.node.score(FROZEN, cases)
        self.producer.send([clients.to_event(case, answer) for case, answer in zip(cases, answers, strict=True)])
        for case, answer, other in zip(cases, answers, frozen, strict=True):
            is_right, is_frozen_right = answer["decision"] == case.answer, other["decision"] == case.answer
            self.served.append(Served(case.claim_id, answer["version"], is_right, is_frozen_right))
        self.expert.answer_all()

    def settle(self, is_done: Callable[[], bool]) -> None:
        """Give the daemon's next tick time to ask about these claims, so that the machine's speed does not decide what is asked."""
        quiet_since = time.monotonic()
        while not is_done() and time.monotonic() - quiet_since < TICK_SECONDS:
            time.sleep(POLL_SECONDS)
            if self.expert.answer_all() or self.read_live("score") is not None:
                quiet_since = time.monotonic()

    def follow_training(self, title: str) -> RowMapping:
        """Wait for the training under way; returns its run. Raises `OutcomeDiffersError` unless it ends well."""
        with db.reading(self.engine) as connection:
            run = runs.read_last(connection, AGENT, "train")
        if run is None:
            raise OutcomeDiffersError(f"{title}: no training was queued")
        with self.screen.bar(title) as bar:
            while (row := self.read_run(run["id"]))["state"] not in runs.ENDED:
                bar.show_training(row["progress"])
                time.sleep(POLL_SECONDS)
        if row["state"] != "done":
            raise OutcomeDiffersError(f"{title}: the run is {row['state']}: {row['error']}")
        return row

    def wait_until(self, is_done: Callable[[], bool], what: str) -> None:
        """Wait for the daemon alone. Raises `OutcomeDiffersError` when it takes too long."""
        deadline = time.monotonic() + WAIT_SECONDS
        while not is_done():
            if time.monotonic() > deadline:
                raise OutcomeDiffersError(f"{what}: not within {WAIT_SECONDS} s")
            time.sleep(POLL_SECONDS)

    def check_served(self, version: str) -> None:
        """Ask the node itself. Raises `OutcomeDiffersError` unless it reports the digest of the version's files."""
        expected, reported = self.read_version(version)["adapter_digest"], self.node.served_digest()
        if reported != expected:
            raise OutcomeDiffersError(f"the node serves {reported}, {version} is {expected}")

    def is_confirmed(self, version: str) -> bool:
        """Whether the version is the champion and its server has confirmed that."""
        with db.reading(self.engine) as connection:
            change = registry.in_force(connection, AGENT)
        return change is not None and change["version"] == version and change["state"] == "confirmed"

    def read_version(self, version: str) -> RowMapping:
        """A version's row."""
        with db.reading(self.engine) as connection:
            return registry.read(connection, AGENT, version)

    def read_run(self, run: str) -> RowMapping:
        """A run's row."""
        with db.reading(self.engine) as connection:
            return runs.read(connection, run)

    def read_live(self, kind: Any) -> RowMapping | None:
        """The run of this kind that is under way."""
        with db.reading(self.engine) as connection:
            return runs.read_live(connection, AGENT, kind)
