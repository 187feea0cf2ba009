"""An agent with its folders, a launcher that plays the trainer, and the events that drive the loop in tests."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
from sqlalchemy import Engine

from consumers import rules
from daemon import launch, policies, training
from daemon.agents import Agent, Budget, Publisher, Triggers
from daemon.pipeline import Pipeline
from daemon.prompts import PromptFile
from daemon.settings import Devices, Settings, Storage, Training
from storage import artifacts, db, reviews
from tests.event_fixtures import ANN, envelope, handle, make_history, make_prediction, send
from trainers import spec

LABELS = ("APPROVED", "DENIED", "PENDING")


def make_base(folder: Path) -> Path:
    """Files that pass for a checkpoint where nobody loads them."""
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"):
        (folder / name).write_text("{}")
    return folder


def make_settings(home: Path, base: Path, **agent: Any) -> Settings:
    """Settings with one adjudication agent whose deployments nobody confirms; keywords change the agent."""
    wanted = {
        "labels": LABELS,
        "approved": "APPROVED",
        "denied": "DENIED",
        "prompt": PromptFile(text="Claim for {{ input.treatment }}.\nDecision: "),
        "base_model": base,
        "budget": Budget(share=0.5),
        "publisher": Publisher(kind="none"),
        "triggers": Triggers(new_labels=10_000),
        **agent,
    }
    return Settings(
        home=home,
        storage=Storage(snapshots=home / "snapshots", adapters=home / "adapters", runs=home / "runs", bases=home / "bases"),
        devices=Devices(slots=("cpu",)),
        training=Training(backoff_seconds=60, threads=1),
        agents={"adjudication": Agent(name="adjudication", **wanted)},
    )


Answer = Callable[[str, dict[str, Any]], str]


def always(label: str) -> Answer:
    """A model that knows one answer; sure of it to a degree that depends on the claim."""
    return lambda row_id, fields: label


@dataclass
class ScriptedLauncher:
    """Plays the trainer: an attempt ends at once, unless `script` says otherwise, with the files that a trainer leaves.

    `script` holds what the next attempts do: done, refused, failed, stopped, hangs, dies; then they are all done. `models` are the answers
    of each model by its name in the run, everybody else says APPROVED.
    """

    models: dict[str, Answer] = field(default_factory=dict)
    text_loss: dict[str, float] | None = None
    script: list[str] = field(default_factory=list)
    ended: dict[tuple[Path, int], int] = field(default_factory=dict)
    working: set[tuple[Path, int]] = field(default_factory=set)
    stopped: list[tuple[Path, int, bool]] = field(default_factory=list)
    started: list[spec.Spec] = field(default_factory=list)
    idle_ended: list[str] = field(default_factory=list)
    cleaned: list[Path] = field(default_factory=list)
    kept: set[str] = field(default_factory=set)
    forbids: bool = False

    def submit(self, run_dir: Path, attempt: int) -> None:
        asked = spec.read_spec(run_dir)
        self.started.append(asked)
        act = self.script.pop(0) if self.script else "done"
        if act == "hangs":
            self.working.add((run_dir, attempt))
            return
        if act in ("done", "refused", "failed"):
            self.finish(run_dir, attempt, act)
        self.ended[run_dir, attempt] = {"done": 0, "refused": 2, "failed": 1, "stopped": 75, "dies": -9}[act]

    def finish(self, run_dir: Path, attempt: int, status: str = "done") -> None:
        """Leave what a trainer leaves at its end."""
        asked, folder = spec.read_spec(run_dir), launch.find_attempt(run_dir, attempt)
        fence = json.loads((folder / "attempt.json").read_text())["fence"]
        result = {"schema": 1, "run_id": asked.run_id, "attempt": attempt, "fence": fence, "status": status}
        if status == "done":
            result |= {"scores": "scores.parquet", "seconds": 1.0, **(write_trained(asked, folder) if asked.kind == "train" else {})}
            if self.text_loss is not None and asked.kind == "train":
                result["text_loss"] = self.text_loss
            write_scores(asked, folder, self.models)
        else:
            result["reason"] = f"it was {status}"
        (folder / "result.json").write_text(json.dumps(result))
        self.working.discard((run_dir, attempt))
        self.ended[run_dir, attempt] = 0

    def status(self, run_dir: Path, attempt: int) -> int | None:
        return None if (run_dir, attempt) in self.working else self.ended.get((run_dir, attempt), launch.UNSEEN)

    def cancel(self, run_dir: Path, attempt: int, *, at_once: bool = False) -> None:
        self.stopped.append((run_dir, attempt, at_once))
        if (run_dir, attempt) in self.working:
            self.working.discard((run_dir, attempt))
            self.ended[run_dir, attempt] = -9 if at_once else 75

    def logs(self, run_dir: Path, attempt: int) -> str:
        return ""

    def end_idle(self, device: str) -> None:
        self.idle_ended.append(device)

    def clean_up(self, run_dir: Path) -> bool:
        self.cleaned.append(run_dir)
        if not self.forbids:
            self.kept.discard(run_dir.name)
        return not self.forbids

    def list_kept(self) -> set[str]:
        return set(self.kept)


def write_trained(asked: spec.Spec, folder: Path) -> dict[str, Any]:
    if asked.options.makes_base:
        place = make_base(folder / "model")
        (place / "model.safetensors").write_text(asked.run_id)
        return {"model": {"path": "model", "digest": artifacts.digest_folder(place)}, "temperature": 1.5, "training": {"rows": 1}}
    place = folder / "adapters" / "candidate"
    place.mkdir(parents=True)
    (place / "adapter_model.safetensors").write_text(asked.run_id)
    shape = {"r": asked.options.lora.rank, "lora_alpha": asked.options.lora.alpha}
    (place / artifacts.ADAPTER_CONFIG).write_text(json.dumps(shape))
    return {
        "adapter": {"path": "adapters/candidate", "digest": artifacts.digest_folder(place)},
        "temperature": 1.5,
        "training": {"rows": 1},
    }


def write_scores(asked: spec.Spec, folder: Path, models: dict[str, Answer]) -> None:
    models_asked = [*([asked.candidate] if asked.candidate else []), *asked.others]
    rows = [
        make_score(
            one.name, model.name, row["row_id"], models.get(model.name, always("APPROVED"))(row["row_id"], orjson.loads(row["input"]))
        )
        for model in models_asked
        for one in asked.score_sets
        for row in pq.read_table(one.path).to_pylist()
        if can_render(model.prompt, row["input"])
    ]
    columns = {name: [row[name] for row in rows] for name in ("set", "row_id", "model", "decision", "confidence", "probabilities")}
    types = {"confidence": pa.float64(), "probabilities": pa.list_(pa.float64())}
    pq.write_table(
        pa.table({name: pa.array(column, types.get(name, pa.string())) for name, column in columns.items()}), folder / "scores.parquet"
    )


def can_render(prompt: spec.Prompt, fields: str) -> bool:
    try:
        prompt.render(orjson.loads(fields))
    except spec.SpecRefusedError:
        return False
    return True


def make_score(score_set: str, model: str, row_id: str, decision: str) -> dict[str, Any]:
    sure = 0.6 + (sum(map(ord, row_id)) % 100) / 300
    probabilities = [sure if label == decision else (1 - sure) / 2 for label in LABELS]
    row = {"set": score_set, "row_id": row_id, "model": model, "decision": decision, "confidence": sure}
    return {**row, "probabilities": probabilities}


def describe_claim(number: int) -> dict[str, Any]:
    """Input and confidence of one claim."""
    return {"input": {"treatment": f"t{number % 4}", "age": str(number)}, "confidence": 0.9 + number % 97 / 1000}


@dataclass
class World:
    """A loop with what drives it: history, predictions, experts who know the truth, and a clock."""

    engine: Engine
    settings: Settings
    launcher: Any
    now: datetime
    truth: Answer = field(default_factory=lambda: always("APPROVED"))
    claims: int = 0

    def __post_init__(self) -> None:
        self.pipeline = Pipeline(self.engine, self.settings, self.launcher)

    @property
    def agent(self) -> Agent:
        return self.settings.agents["adjudication"]

    @property
    def handler(self) -> rules.Agent:
        with db.writing(self.engine) as connection:
            return policies.record(connection, self.settings.agents, self.now)["adjudication"]

    def restart(self) -> None:
        """Another daemon process: nothing is kept but the database and the files."""
        self.pipeline = Pipeline(self.engine, self.settings, self.launcher)

    def tick(self, **later: float) -> bool:
        self.now += timedelta(**later) if later else timedelta(seconds=1)
        return self.pipeline.tick(self.now)

    def settle(self, rounds: int = 20) -> None:
        for _ in range(rounds):
            if not self.tick():
                return
        raise AssertionError("the loop does not come to rest")

    def import_history(self, count: int, **changes: Any) -> None:
        send(self.engine, [make_history(number, self.now, **changes) for number in range(count)], self.now)
        handle(self.engine, self.handler, self.now)

    def predict(self, count: int, **changes: Any) -> None:
        """New claims, half of them of each treatment, answered APPROVED."""
        self.now += timedelta(minutes=1)
        numbers = range(self.claims, self.claims + count)
        self.claims += count
        sent = [make_prediction(number, self.now, **{**describe_claim(number), **changes}) for number in numbers]
        send(self.engine, sent, self.now)
        handle(self.engine, self.handler, self.now)

    def answer_all(self, exam: str | None = None, limit: int = 1000) -> int:
        """The expert answers every open review truly, or some of those of an exam."""
        with db.reading(self.engine) as connection:
            live = [reviews.read(connection, row["id"]) for row in reviews.list_live(connection, "adjudication", limit=1000)]
        waiting = [row for row in live if row is not None and exam in (None, row["exam"])][:limit]
        labels = []
        for row in waiting:
            data = {"agent": "adjudication", "review_id": row["id"], "answered_at": self.now.isoformat()}
            answer = self.truth(row["claim_id"], row["input"])
            labels.append(envelope("ratchet.label.submitted.v1", f"l-{row['id']}", {**data, "answer": answer}, "test"))
        if labels:
            send(self.engine, labels, self.now, ANN)
            handle(self.engine, self.handler, self.now)
        return len(labels)

    def ask_for_run(self, **overrides: Any) -> str:
        with db.writing(self.engine) as connection:
            return training.queue(connection, self.agent, "manual", "a test", "ops", overrides, self.now)
