"""Sets a replay up: the agent from the configuration or the history, the small base, the folder, and the report at the end."""

from __future__ import annotations

import json
import logging
import math
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import orjson
import structlog

from daemon import config, launch, report, simulate
from daemon.agents import Agent, Budget, Exam, PromptFile, Publisher, Triggers
from storage import artifacts, datasets, db
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
    options: Sequence[str]


def run(asked: Asked, on_stage: Callable[[str], None], on_progress: Callable[[int, int], None]) -> dict[str, Any]:
    """Replay, write the report and return it. Raises `simulate.SimulationError`."""
    asked = _make_absolute(asked)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    history, stream = simulate.read_cases(asked.history), simulate.read_cases(asked.stream)
    asked.out.mkdir(parents=True, exist_ok=True)
    agent = make_agent(asked, history)
    check_same(asked, agent)
    simulate.check_cases(history, stream, agent)
    settings = _make_settings(asked, agent)
    if asked.base == TINY:
        on_stage("making the small base")
        _make_tiny(asked, agent, history)
    on_stage("importing the history, training v1.0")
    engine = db.open_engine(settings.database.url)
    db.upgrade(engine)
    with (asked.out / "trainer.log").open("ab") as errors:
        trainer = launch.Resident(settings.training.python, errors)
        plan = simulate.Plan(history, stream, settings, agent, asked.seed, asked.with_baselines, asked.out, on_progress)
        try:
            found = simulate.Replay(plan, engine, trainer, on_stage).run()
        finally:
            trainer.close()
            engine.dispose()
    artifacts.write_atomically(asked.out / "report.json", json.dumps(found, indent=2, ensure_ascii=False).encode())
    report.write_page(asked.out / "report.html", found)
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
        raise simulate.SimulationError(
            f"{asked.out} holds a replay with another {', '.join(other)}: ask for the same, or name another --out"
        )


def make_agent(asked: Asked, history: Sequence[simulate.Case]) -> Agent:
    """The agent that is replayed, with the budget, the trigger and the rule that were asked for."""
    training = _parse_options(asked.options)
    base = asked.out / "base" if asked.base == TINY else Path(asked.base)
    governed = {"budget": Budget(share=asked.budget), "publisher": Publisher(kind="none"), "base_model": base}
    triggers = {"new_labels": asked.retrain_every}
    if asked.config is not None:
        settings = config.load(asked.config)
        if asked.agent is None and len(settings.agents) != 1:
            raise simulate.SimulationError(f"--agent is missing: {asked.config} has {', '.join(settings.agents)}")
        agent = settings.agent(asked.agent or next(iter(settings.agents)))
        changed = {
            "training": agent.training.model_copy(update=training),
            "exam": agent.exam.model_copy(update={"rule": asked.rule}),
            "triggers": agent.triggers.model_copy(update=triggers),
        }
        return agent.model_copy(update={**governed, **changed})
    labels = tuple(sorted({case.answer for case in history}))
    are_decisions = {"APPROVED", "DENIED"} <= set(labels)
    return Agent(
        name=asked.agent or "replay",
        labels=labels,
        approved="APPROVED" if are_decisions else None,
        denied="DENIED" if are_decisions else None,
        prompt=PromptFile(text=PROMPT),
        training=spec.Options(**{**(TINY_OPTIONS if asked.base == TINY else {}), **training}),
        exam=Exam.model_validate({"rule": asked.rule}),
        triggers=Triggers(**triggers),
        **governed,
    )


def _parse_options(options: Sequence[str]) -> dict[str, Any]:
    """`KEY=VALUE` training options, checked. Raises `simulate.SimulationError`."""
    given: dict[str, Any] = {}
    for option in options:
        key, _, value = option.partition("=")
        if key not in spec.Options.model_fields:
            raise simulate.SimulationError(
                f"--set {option}: {key!r} is no training option: use one of {', '.join(spec.Options.model_fields)}"
            )
        given[key] = orjson.loads(value)
    checked = spec.Options(**given)
    return {key: getattr(checked, key) for key in given}


def _make_settings(asked: Asked, agent: Agent) -> config.Settings:
    """Settings whose database and files lie in the replay's own folder."""
    home = asked.out
    return config.Settings(
        home=home,
        database=config.Database(url=f"sqlite:///{home / 'ratchet.db'}"),
        storage=config.Storage(snapshots=home / "snapshots", adapters=home / "adapters", runs=home / "runs"),
        training=config.Training(devices=("cpu",), seed=asked.seed, backoff_seconds=0),
        agents={agent.name: agent},
    )


def _make_tiny(asked: Asked, agent: Agent, history: Sequence[simulate.Case]) -> None:
    """Make the small base from the history's prompts, without answers and without the groups that are gold."""
    if agent.base_model.exists():
        return
    texts = asked.out / "texts.jsonl"
    write_texts(texts, agent, history)
    command = [sys.executable, "-m", "trainers.tiny", "--texts", str(texts), "--out", str(agent.base_model), "--seed", str(asked.seed)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603  our own interpreter and module
    if done.returncode:
        raise simulate.SimulationError(f"the small base can't be made: {done.stderr.strip()}")


def write_texts(path: Path, agent: Agent, history: Iterable[simulate.Case]) -> None:
    """Write what a small base is made from: the prompts without answers and without the groups that are gold, and the labels' names."""
    texts = [
        agent.prompt.render(case.input)
        for case in history
        if datasets.choose_split(agent.name, case.group, began_as_history=True) != "gold"
    ]
    texts += [f"{label}\n" for label in agent.labels for _ in range(math.ceil(LABEL_LINES * len(texts)))]
    path.write_bytes(b"".join(orjson.dumps({"text": text}) + b"\n" for text in texts))
