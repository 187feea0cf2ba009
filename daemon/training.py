"""Runs, from the trigger to the registered candidate: claimed for a device, prepared, launched, followed and brought in.

A stage claims a row, commits, and then works. What a killed daemon left half done, the next tick finds by the row's state.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import structlog
from apscheduler.triggers.cron import CronTrigger
from pydantic import ValidationError
from sqlalchemy import Connection, RowMapping

from daemon import devices, examination, launch, makeup, placement, run_folders, triggers, verdicts
from daemon.agents import Agent
from daemon.machinery import Machinery, Makeup
from storage import alarms, artifacts, datasets, db, labels, predictions, registry, runs
from trainers import spec

ACTOR = "ratchet"
ALARM, DRIFT_ALARM = "run", "drift"
POLL_SECONDS = 0.1
SEED, WARM_START = "seed", "warm_start"

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
    apply_overrides(agent, overrides)
    options = {"overrides": dict(overrides), "asks": digest_question(agent)}
    run = runs.queue(connection, agent.name, "train", trigger, reason, actor, options, now)
    log.info("run_queued", run=run, agent=agent.name, kind="train", trigger=trigger)
    return run


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
    warm_start = str(overrides.get(WARM_START, agent.warm_start))
    if warm_start not in ("candidate", "champion", "never"):
        raise OptionsRefusedError(f"warm_start is {warm_start!r}: use candidate, champion or never")
    if not isinstance(overrides.get(SEED, 0), int):
        raise OptionsRefusedError(f"seed is {overrides[SEED]!r}: use a whole number")
    try:
        chosen = spec.Options.model_validate(options)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        got = f" (got {first['input']!r})" if first["loc"] else ""
        message = f"{'.'.join(map(str, first['loc'])) or 'options'}: {first['msg'].removeprefix('Value error, ')}{got}"
        raise OptionsRefusedError(message) from error
    if chosen.method == "pretrain" and agent.texts is None:
        raise OptionsRefusedError(f"agents.{agent.name}.texts is missing: method pretrain reads text files, say where they are")
    return chosen, warm_start


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
        policy_digest=digest_question(agent),
        trained_policy_digest=last["options"].get("asks") if last else None,
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


def start_queued(machinery: Machinery, now: datetime) -> None:
    """Start queued runs, oldest first, while there is a free device."""
    makeups = machinery.memory.makeups
    with db.reading(machinery.engine) as connection:
        queued = runs.read_in_state(connection, "queued")
    for run in queued:
        is_due = run["not_before"] is None or run["not_before"] <= now
        if run["agent"] in makeups and is_due:
            leased = _lease(machinery, makeups[run["agent"]], run, now)
            if leased is None:
                continue
            _guard(machinery, leased, functools.partial(_start, machinery, makeups[run["agent"]]), now)


def _lease(machinery: Machinery, made: Makeup, run: RowMapping, now: datetime) -> RowMapping | None:
    """Claim a run and the smallest device that it fits; None when none is free or somebody else was first."""
    folder = machinery.settings.storage.runs / run["id"]
    places = placement.find_places(machinery, made, run, _read_options(machinery, run))
    with db.writing(machinery.engine) as connection:
        claim = devices.claim(connection, places, run["id"], run["attempt"] + 1, now, find_term(machinery))
        if claim is None or not runs.lease(connection, run, claim.device, claim.fence, str(folder)):
            return None
        return runs.read(connection, run["id"])


def _read_options(machinery: Machinery, run: RowMapping) -> spec.Options:
    """The options of a run; of one whose options are refused when it starts, the agent's own."""
    agent = machinery.settings.agents[run["agent"]]
    try:
        return apply_overrides(agent, run["options"].get("overrides", {}))[0]
    except OptionsRefusedError:
        return agent.training


def find_term(machinery: Machinery) -> timedelta:
    """How long a device is a run's without a renewal."""
    return timedelta(seconds=2 * machinery.settings.training.heartbeat_seconds)


def _start(machinery: Machinery, made: Makeup, run: RowMapping, now: datetime) -> None:
    """Prepare a leased run's folder and launch its attempt."""
    folder, agent = Path(run["folder"]), machinery.settings.agents[run["agent"]]
    try:
        prepare(machinery, run, agent, made, now)
    except (datasets.EmptyDatasetError, OptionsRefusedError, placement.NothingFitsError) as error:
        end(machinery, run, "failed", str(error), now)
        return
    except examination.NothingToScoreError as error:
        with db.writing(machinery.engine) as connection:
            runs.cancel(connection, run, str(error), now)
        return
    run_folders.begin_attempt(folder, run["attempt"], run["fence"])
    machinery.launcher.submit(folder, run["attempt"])
    with db.writing(machinery.engine) as connection:
        if runs.begin(connection, run, now):
            log.info("run_started", run=run["id"], agent=run["agent"], kind=run["kind"], attempt=run["attempt"], device=run["device"])
            return
    machinery.launcher.cancel(folder, run["attempt"], at_once=True)


def prepare(machinery: Machinery, run: RowMapping, agent: Agent, made: Makeup, now: datetime) -> None:
    """Write what the run needs; a later attempt at it is asked the same, though perhaps on another device."""
    folder = Path(run["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "spec.json").exists():
        asked = spec.read_spec(folder)
    elif run["kind"] == "train":
        asked = plan_training(machinery, run, agent, made, now)
    else:
        asked = examination.plan_scoring(machinery, run, agent)
    spec.write_spec(folder, placement.suit(machinery, asked, run["device"]))


def plan_training(machinery: Machinery, run: RowMapping, agent: Agent, made: Makeup, now: datetime) -> spec.Spec:
    """Build the dataset version, write the score sets, and say where training begins."""
    options, warm_start = apply_overrides(agent, run["options"]["overrides"])
    number = run["dataset"]
    if number is None:
        about = {"template": made.prompt.digest, "labels": list(made.labels)}
        number = datasets.build(machinery.engine, agent.name, machinery.settings.storage.snapshots, about, now)
    with db.writing(machinery.engine) as connection:
        runs.set_dataset(connection, run["id"], number)
        dataset = datasets.read(connection, agent.name, number)
        recent = predictions.read_recent(connection, agent.name, agent.exam.claims, unlabelled_only=True)
        begin = _find_beginning(connection, agent, made, options, warm_start)
        champion = registry.read(connection, agent.name, registry.champion(connection, agent.name) or registry.BARE)
    folder = Path(run["folder"])
    base = spec.Base(path=made.base_path.resolve(), digest=made.base_digest)
    if begin is not None and options.makes_base:
        base = spec.Base(path=Path(begin["base_path"]).resolve(), digest=begin["base_digest"])
    adapter = begin if not options.makes_base else None
    score_sets = [
        *run_folders.write_gold(folder, Path(dataset["folder"]), made.labels, agent.slices),
        *run_folders.write_recent(folder, recent),
    ]
    return spec.Spec(
        run_id=run["id"],
        kind="train",
        agent=agent.name,
        base=base,
        dataset=Path(dataset["folder"]).resolve(),
        dataset_digest=dataset["root"],
        texts=agent.texts and agent.texts.resolve(),
        general_texts=agent.general_texts and agent.general_texts.resolve(),
        init_adapter=Path(adapter["adapter_path"]).resolve() if adapter else None,
        init_adapter_digest=adapter["adapter_digest"] if adapter else None,
        candidate=spec.Model(name=run_folders.CANDIDATE, prompt=made.prompt, labels=made.labels),
        others=(run_folders.describe_model(champion, place),) if (place := makeup.find_base(machinery, agent, champion)) else (),
        score_sets=tuple(score_sets),
        options=options,
        seed=run["options"]["overrides"].get(SEED, _draw_seed(run["id"], machinery.settings.training.seed)),
        threads=machinery.settings.training.threads,
    )


def _draw_seed(run: str, seed: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{run}".encode()).digest()[:4]) >> 1


def _find_beginning(connection: Connection, agent: Agent, made: Makeup, options: spec.Options, warm_start: str) -> RowMapping | None:
    """The version that is trained on: its adapter, or its base where the method makes one.

    None begins from the agent's base: for another base, prompt, label set or shape of the adapter, or for a version of the other kind.
    """
    if warm_start == "never":
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


def follow_all(machinery: Machinery, now: datetime) -> None:
    """Look after every run that is on a device: take over, keep alive, bring in, or put back into the queue."""
    with db.reading(machinery.engine) as connection:
        leased, running, cancelled = (runs.read_in_state(connection, state) for state in ("leased", "running", "cancelled"))
    for run in leased:
        _guard(machinery, run, functools.partial(take_over, machinery), now)
    for run in running:
        _guard(machinery, run, functools.partial(follow, machinery), now)
    for run in cancelled:
        if run["device"] is not None:
            _let_go(machinery, run)


def _guard(machinery: Machinery, run: RowMapping, work: Callable[[RowMapping, datetime], None], now: datetime) -> None:
    """Do something with a run; whatever fails is this run's failure alone, and is tried again like any other."""
    try:
        work(run, now)
    except db.UNAVAILABLE:
        raise
    except Exception as error:
        log.exception("run_failed", run=run["id"], agent=run["agent"])
        retry(machinery, run, f"{type(error).__name__}: {error}", now)


def take_over(machinery: Machinery, run: RowMapping, now: datetime) -> None:
    """Find out what became of a run whose daemon ended while it was being started."""
    folder, attempt = Path(run["folder"]), run["attempt"]
    if machinery.launcher.status(folder, attempt) == launch.UNSEEN and run_folders.read_result(folder, attempt) is None:
        retry(machinery, run, "it was not started: preparing it failed, or the daemon ended meanwhile", now)
        return
    with db.writing(machinery.engine) as connection:
        runs.begin(connection, run, now)
    log.info("run_taken_over", run=run["id"], agent=run["agent"], attempt=attempt)


def follow(machinery: Machinery, run: RowMapping, now: datetime) -> None:
    """Look after one running attempt."""
    folder, attempt = Path(run["folder"]), run["attempt"]
    with db.writing(machinery.engine) as connection:
        is_ours = devices.keep(connection, run, now, find_term(machinery))
    if not is_ours:
        machinery.launcher.cancel(folder, attempt, at_once=True)
        requeue(machinery, run, "its device was taken by another run")
        return
    status = machinery.launcher.status(folder, attempt)
    if status is None:
        _watch_progress(machinery, run, now)
        return
    result = run_folders.read_result(folder, attempt)
    if result is not None and result.fence == run["fence"] and result.status == "done":
        bring_in(machinery, run, result, now)
    elif status == spec.EXIT_REFUSED or (result is not None and result.status == "refused"):
        end(machinery, run, "failed", f"refused: {result.reason if result else 'see its log'}", now)
    elif status == spec.EXIT_RESUMABLE:
        requeue(machinery, run, "stopped as asked")
    else:
        why = "its process is gone" if status == launch.UNSEEN else f"exit status {status}"
        retry(machinery, run, result.reason if result and result.reason else f"{why}: `ratchet runs logs {run['id']}` shows more", now)


def _watch_progress(machinery: Machinery, run: RowMapping, now: datetime) -> None:
    """Note a sign of life; a process that gives none for too long is taken for dead."""
    progress = run_folders.read_progress(Path(run["folder"]), run["attempt"])
    if progress is not None and progress != run["progress"]:
        with db.writing(machinery.engine) as connection:
            runs.beat(connection, run, progress, now)
    elif now - run["heartbeat_at"] > timedelta(seconds=machinery.settings.training.heartbeat_seconds):
        machinery.launcher.cancel(Path(run["folder"]), run["attempt"], at_once=True)
        retry(machinery, run, f"no sign of life since {run['heartbeat_at'].isoformat(timespec='seconds')}", now)


def retry(machinery: Machinery, run: RowMapping, why: str, now: datetime) -> None:
    """Queue a run that failed again, later each time; parked after too many attempts without a newer checkpoint."""
    settings = machinery.settings.training
    checkpoint = run_folders.newest_checkpoint(Path(run["folder"]))
    failures = 1 if checkpoint > run["checkpoint"] else run["failures"] + 1
    if failures >= settings.attempts:
        end(machinery, run, "parked", f"{failures} attempts without a newer checkpoint, the last one: {why}", now)
        return
    wait = timedelta(seconds=settings.backoff_seconds * 2 ** (failures - 1))
    is_further = checkpoint > run["checkpoint"]
    requeue(machinery, run, why, failures=failures, checkpoint=checkpoint, not_before=None if is_further else now + wait)


def requeue(
    machinery: Machinery,
    run: RowMapping,
    why: str,
    *,
    failures: int | None = None,
    checkpoint: int | None = None,
    not_before: datetime | None = None,
) -> None:
    """Put a run back into the queue and free its device."""
    with db.writing(machinery.engine) as connection:
        failed = run["failures"] if failures is None else failures
        step = run["checkpoint"] if checkpoint is None else checkpoint
        if runs.requeue(connection, run, why, failed, step, not_before):
            devices.free(connection, run)
            log.warning("run_requeued", run=run["id"], agent=run["agent"], attempt=run["attempt"], failures=failed, why=why)


def end(machinery: Machinery, run: RowMapping, state: Any, why: str, now: datetime) -> None:
    """Give a run up, free its device and say so; the champion goes on serving."""
    with db.writing(machinery.engine) as connection:
        if runs.give_up(connection, run, state, why, now):
            devices.free(connection, run)
            message = f"{run['kind']} run {run['id']} is {state}: {why}"
            alarms.raise_alarm(connection, run["agent"], ALARM, message, {"run": run["id"]}, now)
            log.error("run_given_up", state=state, run=run["id"], agent=run["agent"], attempt=run["attempt"], why=why)


def _let_go(machinery: Machinery, run: RowMapping) -> None:
    """Stop a cancelled run's process, and free its device once it has ended."""
    machinery.launcher.cancel(Path(run["folder"]), run["attempt"], at_once=True)
    with db.writing(machinery.engine) as connection:
        devices.free(connection, run)
        runs.let_go(connection, run)
    log.info("run_cancelled", run=run["id"], agent=run["agent"])


def bring_in(machinery: Machinery, run: RowMapping, result: run_folders.Result, now: datetime) -> None:
    """Take over what an attempt that is done has made: a candidate and its exam, or scores."""
    folder = Path(run["folder"])
    answers = run_folders.read_scores(folder, run["attempt"], result)
    summary = {name: result.content.get(name) for name in ("training", "seconds", "scored_rows", "scored_prompts_cut", "left_out")}
    if run["kind"] == "score":
        sets = {one.name: one.path for one in spec.read_spec(folder).score_sets}
        if run_folders.GOLD in sets:
            examination.keep_gold(sets[run_folders.GOLD].parent, answers)
        with db.writing(machinery.engine) as connection:
            if runs.finish(connection, run, summary, now):
                examination.store_scores(connection, run["agent"], answers, {}, now)
                devices.free(connection, run)
    elif not _bring_in_candidate(machinery, run, answers, result, summary, now):
        return
    log.info("run_finished", run=run["id"], agent=run["agent"], kind=run["kind"], attempt=run["attempt"])
    for name in ("attempts/*/checkpoints", "attempts/*/model", "tokens"):  # a base lies among the bases now
        for spent in folder.glob(name):
            shutil.rmtree(spent, ignore_errors=True)


def _bring_in_candidate(
    machinery: Machinery,
    run: RowMapping,
    answers: Mapping[tuple[str, str], run_folders.Answers],
    result: run_folders.Result,
    summary: Mapping[str, Any],
    now: datetime,
) -> bool:
    """Publish what was trained, register the version, and open its exam; one that waits gets its last look, and is superseded."""
    folder, storage = Path(run["folder"]), machinery.settings.storage
    kind, store = ("model", storage.bases) if "model" in result.content else ("adapter", storage.adapters)
    trained = result.content[kind]
    place, digest = artifacts.publish(launch.find_attempt(folder, run["attempt"]) / trained["path"], store)
    if digest != trained["digest"]:
        retry(machinery, run, f"the {kind} has digest {digest}, its result says {trained['digest']}", now)
        return False
    asked = spec.read_spec(folder)
    defect = next((one.defect for (_, model), one in answers.items() if model == run_folders.CANDIDATE and one.defect), None)
    examination.keep_gold(folder, answers)
    agent = machinery.settings.agents.get(run["agent"])
    if agent is not None:
        verdicts.judge_exam(machinery, agent, now, is_last=True)
    with db.writing(machinery.engine) as connection:
        if not runs.finish(connection, run, summary, now):
            return False
        made = _describe_candidate(connection, run, asked, place, result)
        version = registry.register(connection, run["agent"], made, now)
        runs.set_version(connection, run["id"], version)
        examination.store_scores(connection, run["agent"], answers, {run_folders.CANDIDATE: version}, now)
        examination.open_exam(connection, run["agent"], version, defect, now)
        devices.free(connection, run)
        for kind in (ALARM, DRIFT_ALARM):
            alarms.clear(connection, run["agent"], kind, now)
    return True


def _describe_candidate(
    connection: Connection, run: RowMapping, asked: spec.Spec, place: Path, result: run_folders.Result
) -> registry.Made:
    """What the run asked for and made, as the registry keeps it."""
    if asked.candidate is None:
        raise spec.SpecRefusedError(f"{run['folder']}/spec.json names no candidate: restore the folder or cancel the run")
    adapter, model = result.content.get("adapter"), result.content.get("model")
    base = place.resolve() if model else asked.base.path
    return registry.Made(
        base_path=str(base),
        base_digest=model["digest"] if model else asked.base.digest,
        adapter_path=str(place.resolve()) if adapter else None,
        adapter_digest=adapter["digest"] if adapter else None,
        tokenizer_digest=makeup.digest_tokenizer(base),
        prompt=asked.candidate.prompt.text,
        prompt_form=asked.candidate.prompt.form,
        prompt_digest=asked.candidate.prompt.digest,
        labels=list(asked.candidate.labels),
        labels_digest=spec.digest_labels(asked.candidate.labels),
        temperature=result.content["temperature"],
        parent=_find_parent(registry.list_all(connection, run["agent"]), asked),
        dataset=run["dataset"],
        run=run["id"],
    )


def _find_parent(versions: Sequence[RowMapping], asked: spec.Spec) -> str | None:
    """The version that training went on from."""
    if asked.options.makes_base:
        trained = [one for one in versions if one["run"] and one["adapter_digest"] is None]
        return next((one["name"] for one in trained if one["base_digest"] == asked.base.digest), None)
    digest = asked.init_adapter_digest
    return next((one["name"] for one in versions if digest and one["adapter_digest"] == digest), None)


def stop_all(machinery: Machinery, clock: Callable[[], datetime], seconds: float) -> None:
    """Ask every trainer for a checkpoint and its end, wait so long for it, and queue the runs again; what is late is killed."""
    with db.reading(machinery.engine) as connection:
        running = runs.read_in_state(connection, "running")
    for run in running:
        machinery.launcher.cancel(Path(run["folder"]), run["attempt"])
    patience = time.monotonic() + seconds
    for run in running:
        folder, attempt = Path(run["folder"]), run["attempt"]
        while time.monotonic() < patience and machinery.launcher.status(folder, attempt) is None:
            time.sleep(POLL_SECONDS)
        machinery.launcher.cancel(folder, attempt, at_once=True)
        # One that had not come to listening for signals, or whose end only an earlier daemon would have seen, did not fail either.
        if run_folders.read_result(folder, attempt) is None:
            requeue(machinery, run, "stopped as asked")
    follow_all(machinery, clock())
