"""Sets a replay up: the agent from the configuration or the history, the small base, the folder, and the report at the end."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import orjson
import structlog
from pydantic import ValidationError

from consumers import schemas
from daemon import cases, config, plots, simulate, training
from daemon.agents import Agent, Budget, Publisher
from daemon.launchers import workers
from daemon.prompts import PromptFile
from daemon.settings import Database, Devices, Settings, Storage, Training
from storage import artifacts, datasets, db, schema
from trainers import spec

PROMPT = "{% for name, value in input.items() %}{{ name }}: {{ value }}\n{% endfor %}decision:\n"
LABEL_LINES = 0.02
"""So many lines with nothing but a label stand among the texts, as a share of them: that makes each label one token of the vocabulary."""
TINY = "tiny"
TINY_OPTIONS = {"learning_rate": 2e-3, "epochs": 3, "batch_rows": 32}


@dataclass(frozen=True, slots=True)
class Asked:
    """What the command line asks for."""

    history: Path
    stream: Path
    out: Path
    base: str
    budget: float
    retrain_every: int
    rule: str
    seed: int
    with_baselines: bool
    config: Path | None
    agent: str | None
    overrides: Mapping[str, Any]


def run(asked: Asked, on_stage: Callable[[str], None], on_progress: Callable[[int, int], None]) -> dict[str, Any]:
    """Replay, write the report and return it. Raises `cases.CasesRefusedError` and `simulate.SimulationError`."""
    asked = _make_absolute(asked)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    history, stream = cases.read(asked.history), cases.read(asked.stream)
    asked.out.mkdir(parents=True, exist_ok=True)
    agent = make_agent(asked, history)
    check_same(asked, agent)
    cases.check(history, stream, agent)
    settings = _make_settings(asked, agent)
    if asked.base == TINY:
        on_stage("making the small base")
        _make_tiny(asked, agent, history)
    on_stage("importing the history, training v1.0")
    engine = db.open_engine(settings.database.url)
    schema.upgrade(engine)
    trainer = workers.Workers(settings.training.python, waits=True)
    plan = simulate.Plan(history, stream, settings, agent, asked.seed, asked.with_baselines, asked.out, on_progress)
    try:
        found = simulate.Replay(plan, engine, trainer, on_stage).run()
    finally:
        trainer.close()
        engine.dispose()
    artifacts.write_atomically(asked.out / "report.json", json.dumps(found, indent=2, ensure_ascii=False).encode())
    plots.write_page(asked.out / "report.html", found)
    return found


def _make_absolute(asked: Asked) -> Asked:
    """The same with absolute paths: trainers work in another folder than the one that the command was given in."""
    base = asked.base if asked.base == TINY else str(Path(asked.base).absolute())
    files = {name: getattr(asked, name).absolute() for name in ("history", "stream", "out")}
    return replace(asked, **files, base=base, config=asked.config and asked.config.absolute())


def check_same(asked: Asked, agent: Agent) -> None:
    """A folder holds one replay: the same files, settings and agent may go on in it, others may not. Raises `simulate.SimulationError`."""
    files = {name: artifacts.digest_file(getattr(asked, name)) for name in ("history", "stream")}
    names = ("base", "budget", "retrain_every", "rule", "seed", "with_baselines")
    # Of paths only --base counts: a folder that was moved still holds the same replay.
    described = {**agent.model_dump(mode="json", exclude={"base_model"}), "prompt": agent.prompt.digest}
    settings = {f"agent.{name}": value for name, value in described.items()}
    identity = {**files, **{name: getattr(asked, name) for name in names}, **settings}
    path = asked.out / "replay.json"
    if not path.exists():
        artifacts.write_atomically(path, json.dumps(identity, indent=2).encode())
        return
    kept = json.loads(path.read_text())
    other = sorted(name for name in kept.keys() | identity.keys() if kept.get(name) != identity.get(name))
    if other:
        differing = ", ".join(other)
        raise simulate.SimulationError(f"{asked.out} holds a replay with another {differing}: ask for the same, or name another --out")


def make_agent(asked: Asked, history: Sequence[cases.Case]) -> Agent:
    """The agent that is replayed, with the budget, the trigger, the rule and the options that were asked for.

    Raises `simulate.SimulationError`, `config.ConfigRefusedError`, `settings.UnknownAgentError` and `training.OptionsRefusedError`.
    """
    found = _take_configured(asked, asked.config) if asked.config is not None else _make_up(asked, history)
    if training.SEED in asked.overrides:
        raise training.OptionsRefusedError(f"seed is {asked.overrides[training.SEED]!r}: a replay's is --seed")
    options, warm_start = training.apply_overrides(found, asked.overrides)
    changes = {
        "base_model": asked.out / "base" if asked.base == TINY else Path(asked.base),
        "budget": Budget(share=asked.budget),
        "exam": found.exam.model_copy(update={"rule": asked.rule}),
        "publisher": Publisher(kind="none"),
        "training": options,
        "triggers": found.triggers.model_copy(update={"new_labels": asked.retrain_every}),
        "warm_start": warm_start,
    }
    return found.model_copy(update=changes)


def _take_configured(asked: Asked, path: Path) -> Agent:
    settings = config.load(path)
    if asked.agent is None and len(settings.agents) != 1:
        raise simulate.SimulationError(f"--agent is missing: {path} has {', '.join(settings.agents)}")
    return settings.agent(asked.agent or next(iter(settings.agents)))


def _make_up(asked: Asked, history: Sequence[cases.Case]) -> Agent:
    """An agent for the labels that occur, with a prompt of all input fields."""
    labels = tuple(sorted({case.answer for case in history}))
    are_decisions = {"APPROVED", "DENIED"} <= set(labels)
    try:
        return Agent(
            name=asked.agent or "replay",
            labels=labels,
            approved="APPROVED" if are_decisions else None,
            denied="DENIED" if are_decisions else None,
            prompt=PromptFile(text=PROMPT),
            training=spec.Options(**(TINY_OPTIONS if asked.base == TINY else {})),
        )
    except ValidationError as error:
        raise simulate.SimulationError(f"no agent can be made from the history: {schemas.explain(error)}") from error


def _make_settings(asked: Asked, agent: Agent) -> Settings:
    """Settings whose database and files lie in the replay's own folder."""
    home = asked.out
    return Settings(
        home=home,
        database=Database(url=f"sqlite:///{home / 'ratchet.db'}"),
        storage=Storage(snapshots=home / "snapshots", adapters=home / "adapters", bases=home / "bases", runs=home / "runs"),
        devices=Devices(slots=("cpu",)),
        training=Training(seed=asked.seed, backoff_seconds=0),
        agents={agent.name: agent},
    )


def _make_tiny(asked: Asked, agent: Agent, history: Sequence[cases.Case]) -> None:
    """Make the small base from the history's prompts, without answers and without the groups that are gold."""
    if agent.base_model.exists():
        return
    texts = asked.out / "texts.jsonl"
    write_texts(texts, agent, history)
    command = [sys.executable, "-m", "trainers.tiny", "--texts", str(texts), "--out", str(agent.base_model), "--seed", str(asked.seed)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603  our own interpreter and module
    if done.returncode:
        raise simulate.SimulationError(f"the small base can't be made: {done.stderr.strip()}")


def write_texts(path: Path, agent: Agent, history: Iterable[cases.Case]) -> None:
    """Write what a small base is made from: the prompts without answers and without the groups that are gold, and the labels' names.

    A case that can't be rendered is left out here as in training, which counts them.
    """
    texts = []
    for case in history:
        if datasets.choose_split(agent.name, case.group, began_as_history=True) != "gold":
            with contextlib.suppress(spec.SpecRefusedError):
                texts.append(agent.prompt.render(case.input))
    texts += [f"{label}\n" for label in agent.labels for _ in range(math.ceil(LABEL_LINES * len(texts)))]
    path.write_bytes(b"".join(orjson.dumps({"text": text}) + b"\n" for text in texts))
