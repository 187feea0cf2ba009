"""Replays labelled history through the same handlers, router, datasets, trainer, exam and registry, on a simulated clock.

An answer is seen only when it was asked for. The replay lives in a folder of its own and goes on where it was interrupted: events, runs
and versions are the same rows when they are made again, and what a window's claims were answered is kept in its run folder.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
from sqlalchemy import Engine, RowMapping

from consumers import delivery, handlers, rules, schemas
from daemon import baselines, launch, pipeline, policies, report, run_folders, training
from daemon.agents import Agent
from daemon.cases import Case
from daemon.settings import Settings
from storage import artifacts, datasets, db, events, labels, registry, reviews, runs, snapshots, tokens
from trainers import spec

BATCH = 500
MAX_ROUNDS = 200
NOTHING = {"decision": None}
EXPERT, NODE, ARCHIVE = (
    tokens.Principal("expert", "reviewer"),
    tokens.Principal("simulated-node", "producer"),
    tokens.Principal("archive", "operator"),
)


class SimulationError(ValueError):
    """The replay can't be done as asked."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What to replay, with which settings, and where; the agent's base model is there."""

    history: Sequence[Case]
    stream: Sequence[Case]
    settings: Settings
    agent: Agent
    seed: int
    with_baselines: bool
    out: Path
    on_progress: Callable[[int, int], None]


class Replay:
    """One replay: the loop's own parts around a simulated clock, and an expert who answers at once."""

    def __init__(self, plan: Plan, engine: Engine, trainer: launch.Launcher, on_stage: Callable[[str], None]) -> None:
        self.plan = plan
        self.on_stage = on_stage
        self.engine = engine
        self.trainer = trainer
        self.loop = pipeline.Pipeline(engine, plan.settings, trainer)
        self.truth = {case.claim_id: case.answer for case in plan.stream}
        self.agents: dict[str, rules.Agent] = {}
        self.random = baselines.RandomLabels(plan.out / "random", plan.seed, self._perform)
        self.matched: set[str] = {"v1.0"}

    def run(self) -> dict[str, Any]:
        """Replay everything, going on where an earlier replay in this folder was interrupted; returns the report."""
        began = time.monotonic()
        self._begin()
        parts = [self.plan.stream[start : start + report.WINDOW] for start in range(0, len(self.plan.stream), report.WINDOW)]
        windows = []
        self.on_stage(f"replaying {len(parts)} windows")
        for number, cases in enumerate(parts):
            windows.append(self._replay_window(number, cases))
            self.plan.on_progress(number + 1, len(parts))
        seconds = round(time.monotonic() - began, 1)
        with db.reading(self.engine) as connection:
            return report.compose(connection, self.plan.agent, self.plan.stream, windows, self.plan.seed, seconds)

    def _begin(self) -> None:
        """Import the history and train the first version."""
        now = self.plan.history[-1].occurred_at
        with db.writing(self.engine) as connection:
            self.agents = policies.record(connection, {self.plan.agent.name: self.plan.agent}, now)
        for start in range(0, len(self.plan.history), BATCH):
            self._tell(schemas.HISTORY, [self._to_history(case) for case in self.plan.history[start : start + BATCH]], ARCHIVE, now)
        with db.writing(self.engine) as connection:
            if runs.read_last(connection, self.plan.agent.name, "train") is None:
                training.queue(connection, self.plan.agent, "manual", "the first version", "simulate", {}, now)
        self._settle(now)

    def _replay_window(self, number: int, cases: Sequence[Case]) -> report.Window:
        """Let the champion answer a window's claims, the expert what is asked, and the loop do what follows."""
        folder = self.plan.out / "windows" / f"{number:04d}"
        done = folder / "window.json"
        if done.exists():
            kept = json.loads(done.read_text())
            self._learn_at_random(number, cases, kept["labels"], kept["trained"])
            return report.Window(kept["right"], kept["labels"])
        now = cases[-1].occurred_at
        answers = self._answer(folder, cases)
        served, version = answers["champion"], json.loads((folder / "served.json").read_text())
        before = self._count_labels()
        self._tell(
            schemas.PREDICTION,
            [self._to_prediction(case, served[case.claim_id], version) for case in cases if case.claim_id in served],
            NODE,
            now,
        )
        self._settle(now)
        # A claim that a model's prompt can't be rendered for is one that it got wrong.
        right = {name: [given.get(case.claim_id, NOTHING)["decision"] == case.answer for case in cases] for name, given in answers.items()}
        window = report.Window(right, self._count_labels() - before)
        trained = self._find_trained()
        self._learn_at_random(number, cases, window.labels, trained)
        artifacts.write_atomically(done, json.dumps({"right": right, "labels": window.labels, "trained": trained}).encode())
        return window

    def _answer(self, folder: Path, cases: Sequence[Case]) -> dict[str, dict[str, Any]]:
        """What the champion and the models beside it answer: by model, by claim. Asked once, kept in the window's folder."""
        if not (folder / "spec.json").exists():
            folder.mkdir(parents=True, exist_ok=True)
            rows = {"row_id": [case.claim_id for case in cases], "input": [orjson.dumps(case.input).decode() for case in cases]}
            pq.write_table(pa.table(rows), folder / "claims.parquet")
            spec.write_spec(folder, self._to_spec(folder))
        scores = self._perform(folder) / "scores.parquet"
        answers: dict[str, dict[str, Any]] = {}
        for row in pq.read_table(scores).to_pylist():
            answers.setdefault(row["model"], {})[row["row_id"]] = row
        return answers

    def _perform(self, run_dir: Path) -> Path:
        """Do a run folder that is not of the loop, unless it is done; returns its attempt's folder."""
        attempt = launch.find_attempt(run_dir, 1)
        if not (attempt / spec.RESULT).exists():
            attempt.mkdir(parents=True, exist_ok=True)
            artifacts.write_atomically(attempt / "attempt.json", b'{"fence": 0}')
            self.trainer.submit(run_dir, 1)
            self.trainer.status(run_dir, 1)  # which waits for its end
        result = json.loads((attempt / spec.RESULT).read_text()) if (attempt / spec.RESULT).exists() else {}
        if result.get("status") != "done":
            raise SimulationError(f"{run_dir} did not end well: {result.get('reason', 'the trainer died')}")
        return attempt

    def _to_spec(self, folder: Path) -> spec.Spec:
        with db.reading(self.engine) as connection:
            agent = self.plan.agent.name
            champion = registry.read(connection, agent, registry.champion(connection, agent) or registry.BARE)
            models = [_name_model(champion, "champion")]
            if self.plan.with_baselines:
                models.append(_name_model(registry.read(connection, agent, "v1.0"), "frozen"))
                models.append(_name_model(registry.list_all(connection, agent)[-1], "ungated"))
                models.append((self.random.newest or models[1]).model_copy(update={"name": "random"}))
        artifacts.write_atomically(folder / "served.json", json.dumps(champion["name"]).encode())
        return spec.Spec(
            run_id=f"window-{folder.name}",
            kind="score",
            agent=self.plan.agent.name,
            base=spec.Base(path=Path(champion["base_path"]), digest=champion["base_digest"]),
            others=tuple(models),
            score_sets=(spec.ScoreSet(name="window", path=folder / "claims.parquet"),),
            options=self.plan.agent.training,
            threads=self.plan.settings.training.threads,
        )

    def _settle(self, now: datetime) -> None:
        """Let the loop work and the expert answer until neither has anything left to do at this moment."""
        for _ in range(MAX_ROUNDS):
            is_changed = self.loop.tick(now)
            if not self._answer_reviews(now) and not is_changed:
                return
        raise SimulationError(f"the loop did not come to rest at {now:%Y-%m-%d}: see the logs in {self.plan.settings.storage.runs}")

    def _answer_reviews(self, now: datetime) -> int:
        """The expert answers every review that is open; returns how many."""
        with db.reading(self.engine) as connection:
            waiting = reviews.list_live(connection, self.plan.agent.name, limit=BATCH)
        if waiting:
            self._tell(schemas.LABEL, [self._to_label(row, now) for row in waiting], EXPERT, now)
        return len(waiting)

    def _tell(self, kind: str, sent: list[dict[str, Any]], principal: tokens.Principal, now: datetime) -> None:
        """Deliver events through the one door and handle them."""
        items = schemas.parse(orjson.dumps(sent), kind)
        with db.writing(self.engine) as connection:
            for item in delivery.deliver(connection, items, {self.plan.agent.name: self.plan.agent.labels}, principal, now):
                if item.refusal is not None:
                    raise SimulationError(f"a case can't be taken: {item.refusal}")
            handlers.handle_batch(connection, events.read_received(connection, len(sent)), self.agents, now)

    def _to_history(self, case: Case) -> dict[str, Any]:
        data = {"agent": self.plan.agent.name, **_describe(case), "answer": case.answer}
        return _envelope(schemas.HISTORY, case.claim_id, data)

    def _to_prediction(self, case: Case, given: Mapping[str, Any], version: str) -> dict[str, Any]:
        data = {
            "prediction_id": case.claim_id,
            "agent": self.plan.agent.name,
            **_describe(case),
            "decision": given["decision"],
            "confidence": given["confidence"],
            "probabilities": dict(zip(self.plan.agent.labels, given["probabilities"], strict=True)),
            "model_version": version,
        }
        return _envelope(schemas.PREDICTION, case.claim_id, data)

    def _to_label(self, review: RowMapping, now: datetime) -> dict[str, Any]:
        answer = self.truth[review["claim_id"]]
        data = {"agent": self.plan.agent.name, "review_id": review["id"], "answer": answer, "answered_at": now.isoformat()}
        return _envelope(schemas.LABEL, f"label-{review['id']}", data)

    def _count_labels(self) -> int:
        with db.reading(self.engine) as connection:
            return labels.count_given(connection, self.plan.agent.name)

    def _find_trained(self) -> dict[str, str]:
        """The versions that were trained since the last window, with their runs."""
        with db.reading(self.engine) as connection:
            versions = registry.list_all(connection, self.plan.agent.name)
        return {row["name"]: row["run"] for row in versions if row["run"] is not None and row["name"] not in self.matched}

    def _learn_at_random(self, number: int, cases: Sequence[Case], count: int, trained: Mapping[str, str]) -> None:
        """Let the random baseline draw as many labels, and train whenever the loop trained."""
        self.matched |= trained.keys()
        if self.plan.with_baselines:
            self.random.draw(number, [self._to_row(case) for case in cases], count)
            for name, run in trained.items():
                self.random.learn(name, self.plan.settings.storage.runs / run)

    def _to_row(self, case: Case) -> snapshots.Row:
        name = self.plan.agent.name
        return snapshots.Row(
            row_id=f"random-{case.claim_id}",
            group_digest=case.group,
            split=datasets.choose_split(name, case.group, began_as_history=False),
            origin="review",
            label_id=f"random-{case.claim_id}",
            input=orjson.dumps(case.input).decode(),
            attributes=orjson.dumps(case.attributes).decode(),
            answer=case.answer,
            rationale=None,
            answered_at=case.occurred_at.isoformat(),
        )


def _name_model(row: RowMapping, role: str) -> spec.Model:
    return run_folders.describe_model(row, Path(row["base_path"])).model_copy(update={"name": role})


def _describe(case: Case) -> dict[str, Any]:
    return {
        "claim_id": case.claim_id,
        "group": case.group,
        "input": case.input,
        "attributes": case.attributes,
        "occurred_at": case.occurred_at.isoformat(),
    }


def _envelope(kind: str, key: str, data: dict[str, Any]) -> dict[str, Any]:
    return {"specversion": "1.0", "type": kind, "source": "simulate", "id": key, "data": data}
