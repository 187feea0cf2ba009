"""A replay sees an answer only when the loop asked for it, and goes on where it was interrupted."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
import pytest
import torch
from sqlalchemy import Engine, select

from daemon import cases, plots, report, simulate
from daemon.agents import Agent, Budget, Publisher, Triggers
from daemon.prompts import PromptFile
from daemon.settings import Database, Devices, Settings, Storage, Training
from storage import db, schema
from storage.tables import DatasetVersion, Prediction, Version
from tests.model_fixtures import tiny_base
from tests.replay_fixtures import InProcess, make_cases
from trainers import spec

WINDOW = 40


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_base(tmp_path_factory.mktemp("base") / "base")


def make_plan(
    out: Path,
    base: Path,
    stream: list[cases.Case],
    on_progress: Callable[[int, int], None] = lambda _n, _of: None,
    engine: Engine | None = None,
) -> simulate.Plan:
    agent = Agent(
        name="replay",
        labels=("APPROVED", "DENIED"),
        approved="APPROVED",
        denied="DENIED",
        prompt=PromptFile(text="{{ input.diagnosis }} {{ input.treatment }}: "),
        base_model=base,
        budget=Budget(share=0.3),
        triggers=Triggers(new_labels=12, new_labels_min=1),
        training=spec.Options(learning_rate=5e-3, epochs=1, batch_rows=16, max_tokens=512, max_row_tokens=128),
        publisher=Publisher(kind="none"),
    )
    out.mkdir(parents=True, exist_ok=True)
    settings = Settings(
        home=out,
        database=Database(url=engine.url.render_as_string(hide_password=False) if engine else f"sqlite:///{out}/ratchet.db"),
        storage=Storage(snapshots=out / "snapshots", adapters=out / "adapters", runs=out / "runs"),
        devices=Devices(slots=("cpu",)),
        training=Training(threads=1, backoff_seconds=0),
        agents={"replay": agent},
    )
    return simulate.Plan(make_cases(80, 0), stream, settings, agent, 1, True, out, on_progress)


def replay(plan: simulate.Plan) -> dict[str, Any]:
    engine = db.open_engine(plan.settings.database.url)
    schema.upgrade(engine)
    try:
        return simulate.Replay(plan, engine, InProcess(), lambda _stage: None).run()
    finally:
        engine.dispose()


def look(plan: simulate.Plan) -> dict[str, list[Any]]:
    """Every decision, dataset and version of a replay."""
    engine = db.open_engine(plan.settings.database.url)
    with db.reading(engine) as connection:
        found = {
            "decisions": connection.execute(
                select(Prediction.claim_id, Prediction.decision, Prediction.reasons, Prediction.inclusion_probability).order_by(
                    Prediction.id
                )
            ).all(),
            "datasets": connection.execute(select(DatasetVersion.number, DatasetVersion.root).order_by(DatasetVersion.number)).all(),
            "versions": connection.execute(select(Version.name, Version.adapter_digest, Version.verdict).order_by(Version.name)).all(),
        }
    engine.dispose()
    return {name: [tuple(row) for row in rows] for name, rows in found.items()}


def test_an_answer_that_was_never_asked_for_changes_nothing(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "WINDOW", WINDOW)
    stream = make_cases(4 * WINDOW, 80)
    first = make_plan(tmp_path / "first", base, stream)
    told = replay(first)
    engine = db.open_engine(first.settings.database.url)
    with db.reading(engine) as connection:
        asked = set(simulate.labels.list_labelled(connection, "replay"))
    engine.dispose()
    hidden = [case.claim_id for case in stream if case.claim_id not in asked]
    answers = {case.claim_id: case.answer for case in stream}
    flipped = {claim: "DENIED" if answers[claim] == "APPROVED" else "APPROVED" for claim in hidden}
    second = make_plan(tmp_path / "second", base, [replace(case, answer=flipped.get(case.claim_id, case.answer)) for case in stream])
    replay(second)
    assert hidden
    assert told["labels_used"] == len(asked)
    assert len(look(first)["versions"]) > 2, "the replay is to train at least once beside v1.0"
    assert look(first) == look(second)
    assert {"accuracy", "frozen_accuracy", "ungated_accuracy", "random_accuracy", "gain_over_frozen", "alarms", "verdicts"} <= told.keys()


@pytest.mark.databases("sqlite", "postgresql")
def test_a_replay_that_was_interrupted_goes_on_to_the_same_end(
    tmp_path: Path, base: Path, new_engine: Callable[[], Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "WINDOW", WINDOW)
    stream = make_cases(3 * WINDOW, 80)
    first, second = new_engine(), new_engine()
    whole = make_plan(tmp_path / "whole", base, stream, engine=first)
    expected = replay(whole)

    def pull_the_plug(number: int, _of: int) -> None:
        if number == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        replay(make_plan(tmp_path / "cut", base, stream, pull_the_plug, second))
    cut = make_plan(tmp_path / "cut", base, stream, engine=second)
    resumed = replay(cut)
    assert look(cut) == look(whole)
    assert {**resumed, "seconds": 0} == {**expected, "seconds": 0}
    plots.write_page(tmp_path / "report.html", resumed)
    assert "<polyline" in (tmp_path / "report.html").read_text()


def test_a_line_that_is_wrong_is_named(tmp_path: Path) -> None:
    good = {"claim_id": "c1", "occurred_at": "2020-01-01T00:00:00+00:00", "input": {"a": 1}, "answer": "APPROVED"}
    path = tmp_path / "history.jsonl"
    path.write_bytes(b"\n".join(orjson.dumps(row) for row in (good, {**good, "occurred_at": "2020-01-01"})))
    with pytest.raises(cases.CasesRefusedError, match=r"line 2: occurred_at has no time zone\. A line is"):
        cases.read(path)
    path.write_bytes(orjson.dumps({name: value for name, value in good.items() if name != "claim_id"}))
    with pytest.raises(cases.CasesRefusedError, match=r"line 1: claim_id is missing\. A line is"):
        cases.read(path)


def test_a_stream_must_follow_on_its_history_with_known_answers_and_new_claims(tmp_path: Path, base: Path) -> None:
    history, stream = make_cases(5, 0), make_cases(5, 5)
    agent = make_plan(tmp_path, base, stream).agent
    cases.check(history, stream, agent)
    with pytest.raises(cases.CasesRefusedError, match="before the history ends"):
        cases.check(stream, history, agent)
    with pytest.raises(cases.CasesRefusedError, match="'c4' is there 2 times"):
        cases.check(history, [replace(stream[0], claim_id="c4")], agent)
    with pytest.raises(cases.CasesRefusedError, match="'MAYBE' is not one of"):
        cases.check(history, [replace(stream[0], answer="MAYBE")], agent)


def test_the_gain_is_paired_and_its_interval_holds_the_estimate() -> None:
    generator = random.Random(3)
    theirs = [[generator.random() < 0.6 for _ in range(250)] for _ in range(12)]
    ours = [[right or generator.random() < 0.1 for right in window] for window in theirs]
    gain = report.bootstrap_gain(ours, theirs, 1)
    assert gain.low < gain.estimate < gain.high
    assert gain.estimate == pytest.approx(report.mean_of(ours) - report.mean_of(theirs))
    same = report.bootstrap_gain(theirs, theirs, 1)
    assert json.loads(json.dumps(same.to_json())) == {"estimate": 0.0, "low": 0.0, "high": 0.0}
