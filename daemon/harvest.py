"""What a finished run has made, brought in: a version and its exam, or scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import structlog
from sqlalchemy import Connection, RowMapping

from daemon import devices, examination, launch, leftovers, makeup, run_folders, verdicts
from daemon.machinery import Machinery
from storage import alarms, artifacts, db, registry, runs
from trainers import spec

ALARM, DRIFT_ALARM = "run", "drift"
"""A failed run is told of by the first; a new version ends both."""

log = structlog.get_logger()


class ResultDamagedError(RuntimeError):
    """The files that an attempt left are not the ones that its result names."""


def bring_in(machinery: Machinery, run: RowMapping, result: run_folders.Result, now: datetime) -> None:
    """Take over what an attempt that is done has made: a candidate and its exam, or scores. Raises `ResultDamagedError`."""
    folder = Path(run["folder"])
    answers = run_folders.read_scores(folder, run["attempt"], result)
    summary = {
        name: result.content.get(name) for name in ("training", "memory", "seconds", "scored_rows", "scored_prompts_cut", "left_out")
    }
    if run["kind"] == "score":
        sets = {one.name: one.path for one in spec.read_spec(folder).score_sets}
        if run_folders.GOLD in sets:
            examination.keep_gold(sets[run_folders.GOLD].parent, answers)
        with db.writing(machinery.engine) as connection:
            if not runs.finish(connection, run, summary, now):
                return
            examination.store_scores(connection, run["agent"], answers, {}, now)
            devices.free(connection, run)
    elif not _bring_in_candidate(machinery, run, answers, result, summary, now):
        return
    log.info("run_finished", run=run["id"], agent=run["agent"], kind=run["kind"], attempt=run["attempt"])
    leftovers.clear(machinery, folder)


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
        raise ResultDamagedError(f"the {kind} has digest {digest}, its result says {trained['digest']}")
    asked = spec.read_spec(folder)
    defect = next((one.defect for (_, model), one in answers.items() if model == run_folders.CANDIDATE and one.defect), None)
    examination.keep_gold(folder, answers)
    run_folders.keep_text_losses(folder, result)
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
