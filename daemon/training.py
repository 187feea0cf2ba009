"""Training, from the trigger to what is asked of the trainer: when, with which options, on which rows, and where it begins."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import structlog
from apscheduler.triggers.cron import CronTrigger
from pydantic import ValidationError
from sqlalchemy import Connection, RowMapping

from consumers import schemas
from daemon import makeup, policies, run_folders, triggers
from daemon.agents import Agent
from daemon.machinery import Machinery, Makeup
from storage import alarms, artifacts, datasets, db, labels, predictions, registry, runs
from trainers import spec

ACTOR = "ratchet"
DRIFT_ALARM = "drift"
SEED, WARM_START = "seed", "warm_start"
SERVED, IN_BACKWARD = "serve_in_4bit", "optimizer_in_backward"

log = structlog.get_logger()


class OptionsRefusedError(ValueError):
    """A run was asked for with an option that there is not, or a value that it can't have."""


def queue_due(machinery: Machinery, agent: Agent, now: datetime) -> None:
    """Queue a training run when a trigger says so."""
    with db.reading(machinery.engine) as connection:
        trigger = triggers.should_retrain(read_facts(connection, agent, now), agent.trigger_policy)
    if trigger is None:
        return
    with db.writing(machinery.engine) as connection:
        if runs.read_live(connection, agent.name, "train") is None:
            queue(connection, agent, trigger.kind, trigger.reason, ACTOR, {}, now)


def queue(connection: Connection, agent: Agent, trigger: str, reason: str, actor: str, overrides: Mapping[str, Any], now: datetime) -> str:
    """Queue a training run; returns its id. Raises `OptionsRefusedError`, and `storage.runs.RunUnderWayError` while one is under way."""
    read_options(agent, overrides)
    policy = policies.read_version(connection, agent.name)
    options = {"overrides": dict(overrides), "asks": digest_question(agent), "policy": policy}
    run = runs.queue(connection, agent.name, "train", trigger, reason, actor, options, now)
    log.info("run_queued", run=run, agent=agent.name, kind="train", trigger=trigger)
    return run


def read_options(agent: Agent, overrides: Mapping[str, Any]) -> tuple[spec.Options, str]:
    """What `apply_overrides` says for a run: its exam asks the models as the agent's servers hold them, whatever the method."""
    if SERVED in overrides:
        raise OptionsRefusedError(f"{SERVED} is what the agent's servers are told: set agents.{agent.name}.training.{SERVED}")
    options, warm_start = apply_overrides(agent, overrides)
    return options.model_copy(update={SERVED: agent.training.serve_in_4bit}), warm_start


def apply_overrides(agent: Agent, overrides: Mapping[str, Any]) -> tuple[spec.Options, str]:
    """The training options and the warm start of a run with these overrides, such as `method`, `epochs` or `lora.rank`.

    With another method only what the agent's configuration chose against its own method's defaults is kept.
    """
    known, options = agent.training.model_dump(), agent.training.choices()
    for key, value in overrides.items():
        if key not in (SEED, WARM_START):
            _check_option(agent, known, key, value)
            *sections, name = key.split(".")
            place = options
            for section in sections:
                place = place.setdefault(section, {})
            place[name] = value
    if IN_BACKWARD not in overrides and not _trains_as_usual(agent, options):
        del options[IN_BACKWARD]  # where it is needed the plan chooses it
    warm_start = str(overrides.get(WARM_START, agent.warm_start))
    if warm_start not in ("candidate", "champion", "never"):
        raise OptionsRefusedError(f"warm_start is {warm_start!r}: use candidate, champion or never")
    seed = overrides.get(SEED, 0)
    if type(seed) is not int or seed not in spec.SEEDS:
        raise OptionsRefusedError(f"seed is {seed!r}: use a whole number from 0 to {spec.SEEDS[-1]}")
    try:
        chosen = spec.Options.model_validate(options)
    except ValidationError as error:
        raise OptionsRefusedError(schemas.explain(error)) from error
    _check_effect(chosen, overrides)
    if chosen.method == "pretrain" and agent.texts is None:
        raise OptionsRefusedError(f"agents.{agent.name}.texts is missing: method pretrain reads text files, say where they are")
    return chosen, warm_start


def _trains_as_usual(agent: Agent, options: Mapping[str, Any]) -> bool:
    """Whether these options train what the agent's own do, in the same way."""
    same: tuple[Any, Any] = agent.training.method, agent.training.pretrain.weights
    return (options["method"], options["pretrain"]["weights"]) == same


def _check_effect(chosen: spec.Options, overrides: Mapping[str, Any]) -> None:
    """Raise `OptionsRefusedError` when the run's method does not look at an option that was asked for."""
    for key in overrides:
        section = key.partition(".")[0]
        if section == "pretrain" and chosen.method != "pretrain":
            raise OptionsRefusedError(f"{key} means nothing to method {chosen.method}: leave it out, or add --method pretrain")
        if section == "lora" and chosen.trains_all_weights:
            raise OptionsRefusedError(f"{key} means nothing to method {chosen.method}, which trains all weights here: leave it out")


def _check_option(agent: Agent, known: Mapping[str, Any], key: str, value: Any) -> None:
    """Raise `OptionsRefusedError` unless there is such an option and it takes a value."""
    *sections, name = key.split(".")
    place: Any = known
    for section in sections:
        place = place.get(section) if isinstance(place, dict) else None
    if not isinstance(place, dict) or name not in place:
        raise OptionsRefusedError(f"there is no training option {key!r}: use one of {', '.join(_name_options(agent))}")
    if isinstance(place[name], dict):
        raise OptionsRefusedError(f"{key} is {value!r}: name one of {', '.join(f'{key}.{inner}' for inner in place[name])}")


def _name_options(agent: Agent) -> list[str]:
    """The keys that `--set` takes; one that has keys of its own is named by those."""
    options = agent.training.model_dump()
    names = [[f"{name}.{inner}" for inner in value] if isinstance(value, dict) else [name] for name, value in options.items()]
    return [*itertools.chain.from_iterable(names), SEED, WARM_START]


def digest_question(agent: Agent) -> str:
    """The digest of what is asked of an agent's models, in what words, and of which base; another one calls for a training."""
    form = [] if agent.prompt_form == "auto" else [agent.prompt_form]
    return spec.digest_text(json.dumps([agent.prompt.digest, agent.labels, str(agent.base_model), *form]))


def read_facts(connection: Connection, agent: Agent, now: datetime) -> triggers.TriggerFacts:
    """What the trigger's decision rests on."""
    last = runs.read_last(connection, agent.name, "train", with_cancelled=True)
    alarm = next((one for one in alarms.list_open(connection, agent.name) if one["kind"] == DRIFT_ALARM), None)
    began = last["created_at"] if last else None
    return triggers.TriggerFacts(
        new_labels=_count_new(connection, agent.name, last),
        is_training=last is not None and last["state"] in runs.LIVE,
        last_trained_at=began,
        last_cron_due_at=_last_due(agent.triggers.cron, began, now),
        drift_alarm_at=alarm["raised_at"] if alarm else None,
        drift_reason=alarm["message"] if alarm else "",
        question_digest=digest_question(agent),
        trained_question_digest=last["options"].get("asks") if last else None,
        policy_changes=policies.list_changes(connection, agent.name, last["options"].get("policy")) if last else (),
    )


def _count_new(connection: Connection, agent: str, last: RowMapping | None) -> int:
    # A run that ended before it had a dataset leaves its labels as new as they were: only later ones may start the next.
    since = last["created_at"] if last and last["dataset"] is None and last["state"] in runs.ENDED else None
    return labels.count_fresh(connection, agent, since)


def _last_due(cron: str | None, since: datetime | None, now: datetime) -> datetime | None:
    """When the schedule first fell due after the last training; None when it did not, or before the first one."""
    if cron is None or since is None:
        return None
    due = CronTrigger.from_crontab(cron, timezone=UTC).get_next_fire_time(None, since + timedelta(microseconds=1))
    return due if due is not None and due <= now else None


def plan_training(machinery: Machinery, run: RowMapping, agent: Agent, made: Makeup, now: datetime) -> spec.Spec:
    """Build the dataset version, write the score sets, and say where training begins."""
    options, warm_start = read_options(agent, run["options"]["overrides"])
    number = run["dataset"] or _build_dataset(machinery, agent, made, options, now)
    with db.writing(machinery.engine) as connection:
        runs.set_dataset(connection, run["id"], number)
        dataset = datasets.read(connection, agent.name, number) if number else None
        recent = predictions.read_recent(connection, agent.name, agent.exam.claims, unlabelled_only=True)
        begin = _find_beginning(connection, agent, made, options, warm_start)
        known = datasets.read(connection, agent.name, begin["dataset"]) if begin and begin["dataset"] else None
        champion = registry.read(connection, agent.name, registry.champion(connection, agent.name) or registry.BARE)
    folder = Path(run["folder"])
    base = spec.Base(path=made.base_path.resolve(), digest=made.base_digest)
    if begin is not None and options.makes_base:
        base = spec.Base(path=Path(begin["base_path"]).resolve(), digest=begin["base_digest"])
    adapter = begin if not options.makes_base else None
    snapshot = Path(dataset["folder"]).resolve() if dataset else None
    score_sets = [
        *run_folders.write_gold(folder, snapshot, made.labels, agent.slices),
        *run_folders.write_recent(folder, recent),
    ]
    return spec.Spec(
        run_id=run["id"],
        kind="train",
        agent=agent.name,
        base=base,
        dataset=snapshot,
        dataset_digest=dataset["root"] if dataset else None,
        texts=agent.texts and agent.texts.resolve(),
        general_texts=agent.general_texts and agent.general_texts.resolve(),
        init_adapter=Path(adapter["adapter_path"]).resolve() if adapter else None,
        init_adapter_digest=adapter["adapter_digest"] if adapter else None,
        learned=Path(known["folder"]).resolve() if known else None,
        candidate=spec.Model(name=run_folders.CANDIDATE, prompt=made.prompt, labels=made.labels),
        others=(run_folders.describe_model(champion, place),) if (place := makeup.find_base(machinery, agent, champion)) else (),
        score_sets=tuple(score_sets),
        options=options,
        seed=run["options"]["overrides"].get(SEED, _draw_seed(run["id"], machinery.settings.training.seed)),
        threads=machinery.settings.training.threads,
    )


def _build_dataset(machinery: Machinery, agent: Agent, made: Makeup, options: spec.Options, now: datetime) -> int | None:
    """A dataset version of the labels of now; None without any, which only `pretrain` can do without."""
    about = {"template": made.prompt.digest, "labels": list(made.labels)}
    try:
        return datasets.build(machinery.engine, agent.name, machinery.settings.storage.snapshots, about, now)
    except datasets.EmptyDatasetError:
        if options.method == "pretrain":
            return None
        raise


def _draw_seed(run: str, seed: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{run}".encode()).digest()[:4]) >> 1


def _find_beginning(connection: Connection, agent: Agent, made: Makeup, options: spec.Options, warm_start: str) -> RowMapping | None:
    """The version that is trained on: its adapter, or its base where the method makes one.

    None begins from the agent's base: for another base, prompt, label set or shape of the adapter, or for a version of the other kind.
    """
    if warm_start == "never" or options.policy == "cumulative":
        return None
    champion = registry.champion(connection, agent.name)
    begin = registry.latest_candidate(connection, agent.name) if warm_start == "candidate" else None
    if warm_start == "champion" and champion is not None:
        begin = registry.read(connection, agent.name, champion)
    if begin is None or (begin["prompt_digest"], begin["labels_digest"]) != (made.prompt.digest, made.labels_digest):
        return None
    if options.makes_base:
        # Such a version's base is its own: what it came from is told by what its run was asked.
        is_ours = begin["adapter_path"] is None and begin["run"] is not None
        return begin if is_ours and runs.read(connection, begin["run"])["options"].get("asks") == digest_question(agent) else None
    if begin["adapter_path"] is None or begin["base_digest"] != made.base_digest:
        return None
    return begin if _has_shape(Path(begin["adapter_path"]), options.lora) else None


def _has_shape(adapter: Path, shape: spec.LoraOptions) -> bool:
    """Whether training on this adapter makes one of the rank and alpha that are asked for; of one that can't be read the trainer tells."""
    try:
        config = json.loads((adapter / artifacts.ADAPTER_CONFIG).read_bytes())
    except (OSError, ValueError):
        return True
    return bool((config.get("r"), config.get("lora_alpha")) == (shape.rank, shape.alpha))
