"""Exam and watch: which two versions are compared, and which claims both of them answer for it.

Both are the same comparison. In an exam the candidate is the new version and the champion the one in service; in a watch the candidate
is the new champion and the champion its predecessor, and only claims that came after the promotion count.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import structlog
from sqlalchemy import Connection, RowMapping

from daemon import makeup, run_folders
from daemon.agents import Agent
from daemon.machinery import Machinery
from storage import alarms, db, exams, ids, predictions, registry, runs, scores
from trainers import spec

ACTOR = "ratchet"
ALARM = "exam"
KINDS: tuple[exams.Kind, ...] = ("watch", "exam")
SCORE_AT, POOL_LOW = 50, 20
"""New claims are scored when there are so many and fewer than the second number are left to ask about, else once in `SCORE_EVERY`."""
SCORE_EVERY = timedelta(hours=1)

log = structlog.get_logger()
Answers = Mapping[tuple[str, str], run_folders.Answers]


class NothingToScoreError(LookupError):
    """The versions have answered all that they are compared on, or are compared no more."""


def keep_gold(folder: Path, answers: Answers) -> None:
    """Keep what each model of a run answered on gold."""
    for (score_set, model), given in answers.items():
        if score_set == run_folders.GOLD:
            run_folders.keep_answers(folder, model, given.decisions)


def store_scores(connection: Connection, agent: str, answers: Answers, names: Mapping[str, str], now: datetime) -> None:
    """Store what each model of a run answered on stored claims; `names` are the versions of models that have another name in the run."""
    for (score_set, model), given in answers.items():
        if score_set == run_folders.RECENT:
            shared = {"agent": agent, "version": names.get(model, model), "scored_at": now}
            columns = ("decision", "confidence", "probabilities")
            rows = [{"prediction": row["row_id"], **{name: row[name] for name in columns}, **shared} for row in given.rows]
            scores.insert_new(connection, rows)


def open_exam(connection: Connection, agent: str, candidate: str, defect: str | None, now: datetime) -> None:
    """Begin a candidate's exam against the champion; a candidate that still waits for its verdict is superseded."""
    waiting = exams.read_open(connection, agent, "exam")
    if waiting is not None:
        reason = f"{candidate} came before the experts' answers decided."
        exams.close(connection, waiting["id"], "superseded", {**waiting["report"], "reasons": [reason]}, now)
        registry.give_verdict(connection, agent, waiting["candidate"], "superseded", [reason], now)
        log.info("verdict", agent=agent, version=waiting["candidate"], outcome="superseded")
    champion = registry.champion(connection, agent) or registry.BARE
    exam = exams.open_new(connection, agent, "exam", candidate, champion, now, {"defect": defect})
    log.info("exam_opened", agent=agent, exam=exam, candidate=candidate, champion=champion)


def open_watch(connection: Connection, agent: str, now: datetime) -> None:
    """Watch the champion since the promotion that brought it, unless nobody can be gone back to or it is or was watched."""
    change = registry.in_force(connection, agent)
    if change is None or change["kind"] != "promote" or change["previous"] is None:
        return
    watched = [one for one in exams.of_version(connection, agent, change["version"]) if one["kind"] == "watch"]
    if any(one["opened_at"] >= change["requested_at"] for one in watched):
        return
    predecessor = registry.read(connection, agent, change["previous"])
    # The bare base is a predecessor only where it has answered real claims.
    names = (predecessor["name"], registry.serving_name(dict(predecessor)))
    if predecessor["name"] == registry.BARE and not predictions.has_served(connection, agent, names):
        return
    exam = exams.open_new(connection, agent, "watch", change["version"], change["previous"], now)
    log.info("watch_opened", agent=agent, exam=exam, champion=change["version"], predecessor=change["previous"])


def close_watch(connection: Connection, agent: str, champion: str | None, now: datetime) -> None:
    """End the watch over a version that is not the champion any more."""
    watched = exams.read_open(connection, agent, "watch")
    if watched is not None and watched["candidate"] != champion:
        reason = f"{champion} is the champion now."
        exams.close(connection, watched["id"], "superseded", {**watched["report"], "reasons": [reason]}, now)
        log.info("watch_ended", agent=agent, exam=watched["id"], outcome="superseded")


def realign(machinery: Machinery, agent: Agent, now: datetime) -> None:
    """Follow a champion that was changed by hand, by a rollback or by a revert: what is compared is always about the one in service."""
    with db.writing(machinery.engine) as connection:
        champion = registry.champion(connection, agent.name)
        close_watch(connection, agent.name, champion, now)
        open_watch(connection, agent.name, now)
        exam = exams.read_open(connection, agent.name, "exam")
        if exam is not None and champion is not None and exam["champion"] != champion:
            _readdress(connection, exam, champion, now)


def _readdress(connection: Connection, exam: RowMapping, champion: str, now: datetime) -> None:
    """Examine a waiting candidate against the new champion; one that was promoted by hand has its verdict."""
    agent, candidate = exam["agent"], exam["candidate"]
    reason = f"{champion} is the champion now."
    exams.close(connection, exam["id"], "superseded", {**exam["report"], "reasons": [reason]}, now)
    if candidate == champion:
        registry.give_verdict(connection, agent, candidate, "superseded", ["It was promoted before its exam had ended."], now)
        return
    exams.open_new(connection, agent, "exam", candidate, champion, now, {"defect": exam["report"].get("defect")})
    log.info("exam_opened", agent=agent, candidate=candidate, champion=champion)


def find_folder(connection: Connection, agent: str, version: str) -> Path | None:
    """The folder of the run that made a version."""
    run = registry.read(connection, agent, version)["run"]
    return Path(runs.read(connection, run)["folder"]) if run else None


def find_since(exam: RowMapping) -> str:
    """The smallest identifier of a claim that counts: a watch looks at what came after the promotion."""
    return ids.after(exam["opened_at"]) if exam["kind"] == "watch" else ""


def queue_scoring(machinery: Machinery, agent: Agent, now: datetime) -> None:
    """Queue a run that lets the compared versions answer what they have not, when that is worth loading the base."""
    with db.reading(machinery.engine) as connection:
        compared = exams.list_open(connection, agent.name)
        obstacles = [_find_obstacle(machinery, connection, exam, agent) for exam in compared]
        due = [
            exam
            for exam, obstacle in zip(compared, obstacles, strict=True)
            if obstacle is None and _is_scoring_due(machinery, connection, exam, agent, now)
        ]
        live = runs.read_live(connection, agent.name, "score")
        last = runs.read_last(connection, agent.name, "score")
    _tell_obstacle(machinery, agent, next(filter(None, obstacles), None), now)
    has_failed = last is not None and last["state"] in ("failed", "parked") and now - last["finished_at"] < SCORE_EVERY
    if not due or live is not None or has_failed:
        return
    with db.writing(machinery.engine) as connection:
        reason = f"{due[0]['candidate']} and {due[0]['champion']} have not answered all claims of their {due[0]['kind']}."
        run = runs.queue(connection, agent.name, "score", due[0]["kind"], reason, ACTOR, {}, now, exam=due[0]["id"])
        log.info("run_queued", run=run, agent=agent.name, kind="score", trigger=due[0]["kind"])


def _find_obstacle(machinery: Machinery, connection: Connection, exam: RowMapping, agent: Agent) -> str | None:
    """Why two versions can't be compared, however many claims come, and what a person can do; None when nothing is in the way."""
    candidate, champion = exam["candidate"], exam["champion"]
    way_out = (
        f"or decide without an exam: `ratchet promote {candidate} --force --reason …`" if exam["kind"] == "exam" else "or wait for its end"
    )
    for version in (registry.read(connection, agent.name, name) for name in (candidate, champion)):
        if makeup.find_base(machinery, agent, version) is None:
            return (
                f"{candidate} and {champion} can't be compared: {version['base_path']} does not hold {version['name']}'s base any more. "
                f"Put its files back there, a newer base into a folder of its own (`base_model`), {way_out}"
            )
    if exam["kind"] == "watch" or scores.count_common(connection, agent.name, candidate, champion):
        return None
    unscored = find_unscored(connection, exam, agent)
    if not unscored or any(find_lacking(machinery, connection, exam, unscored).values()):
        return None
    return (
        f"{candidate} and {champion} can't be compared: of the {len(unscored)} newest claims none fits the prompts of both. "
        f"Send the input fields that both prompts read, {way_out}"
    )


def _tell_obstacle(machinery: Machinery, agent: Agent, obstacle: str | None, now: datetime) -> None:
    with db.reading(machinery.engine) as connection:
        told = next((alarm["message"] for alarm in alarms.list_open(connection, agent.name) if alarm["kind"] == ALARM), None)
    if told == obstacle:
        return
    with db.writing(machinery.engine) as connection:
        if obstacle is None:
            alarms.clear(connection, agent.name, ALARM, now)
        elif alarms.raise_alarm(connection, agent.name, ALARM, obstacle, {}, now):
            log.warning("exam_obstructed", agent=agent.name)


def _is_scoring_due(machinery: Machinery, connection: Connection, exam: RowMapping, agent: Agent, now: datetime) -> bool:
    if _lacks_gold(connection, exam):
        return True
    unscored = find_unscored(connection, exam, agent)
    if not _is_worth_a_run(connection, exam, agent, len(unscored), now):
        return False
    # What can't be rendered would be due for ever.
    lacking = find_lacking(machinery, connection, exam, unscored)
    return _is_worth_a_run(connection, exam, agent, len(set().union(*lacking.values())), now)


def _is_worth_a_run(connection: Connection, exam: RowMapping, agent: Agent, count: int, now: datetime) -> bool:
    """Whether so many claims to answer are worth loading the base."""
    if not count:
        return False
    if not scores.count_common(connection, agent.name, exam["candidate"], exam["champion"]) and exam["kind"] == "exam":
        return True
    last = runs.read_last(connection, agent.name, "score")
    scored_at = max(exam["opened_at"], last["created_at"]) if last else exam["opened_at"]
    is_low = exam["report"].get("asking", {}).get("left", 0) < POOL_LOW
    return bool((count >= SCORE_AT and is_low) or now - scored_at >= SCORE_EVERY)


def _lacks_gold(connection: Connection, exam: RowMapping) -> bool:
    """Whether the champion has not answered the gold rows of the candidate's run, because it was not the champion then."""
    folder = find_folder(connection, exam["agent"], exam["candidate"])
    return exam["kind"] == "exam" and folder is not None and run_folders.read_answers(folder, exam["champion"]) is None


def find_unscored(connection: Connection, exam: RowMapping, agent: Agent) -> list[str]:
    """The claims of a comparison that one of its versions was not asked about: those that came since, and those the other one knows."""
    limit, names = agent.exam.claims, (exam["candidate"], exam["champion"])
    wanted = set(predictions.newest_ids(connection, agent.name, ids.after(exam["opened_at"]), limit))
    if exam["kind"] == "exam":
        wanted |= set(scores.read_scored(connection, agent.name, exam["candidate"], limit))
    ordered = sorted(wanted)[-limit:]
    return sorted({one for name in names for one in scores.read_unscored(connection, agent.name, name, ordered)})


def find_lacking(machinery: Machinery, connection: Connection, exam: RowMapping, claims: list[str]) -> dict[str, set[str]]:
    """Of these claims those that each compared version was not asked about, though its prompt can be rendered for them."""
    lacking = {}
    for role in ("candidate", "champion"):
        prompt = spec.Prompt(text=registry.read(connection, exam["agent"], exam[role])["prompt"])
        unscored = scores.read_unscored(connection, exam["agent"], exam[role], claims)
        lacking[exam[role]] = _find_renderable(machinery, connection, (exam["agent"], exam["kind"], role), prompt, unscored)
    return lacking


def _find_renderable(
    machinery: Machinery, connection: Connection, place: tuple[str, str, str], prompt: spec.Prompt, claims: list[str]
) -> set[str]:
    """Those of the claims that the prompt can be rendered for; each is tried once while it is asked about, for to render takes long."""
    digest, known = machinery.memory.rendered.get(place, ("", {}))
    if digest != prompt.digest:
        known = {}
    rows = predictions.read_inputs(connection, [one for one in claims if one not in known])
    tried = {one: known[one] if one in known else _can_render(prompt, rows[one]["input"]) for one in claims}
    machinery.memory.rendered[place] = prompt.digest, tried
    return {one for one, is_renderable in tried.items() if is_renderable}


def _can_render(prompt: spec.Prompt, fields: Mapping[str, Any]) -> bool:
    try:
        prompt.render(fields)
    except spec.SpecRefusedError:
        return False
    return True


def plan_scoring(machinery: Machinery, run: RowMapping, agent: Agent) -> spec.Spec:
    """What a `score` run is asked: the versions of the open comparisons, on all claims that one of them lacks.

    Versions on other bases are answered in the same run, one base after the other.

    Raises `NothingToScoreError` when the comparisons ended while the run waited.
    """
    folder = Path(run["folder"])
    with db.reading(machinery.engine) as connection:
        compared = exams.list_open(connection, agent.name)
        names = list(dict.fromkeys(name for exam in compared for name in (exam["champion"], exam["candidate"])))
        versions = [registry.read(connection, agent.name, name) for name in names]
        unanswered = [find_lacking(machinery, connection, exam, find_unscored(connection, exam, agent)) for exam in compared]
        unscored = sorted({one for lacking in unanswered for claims in lacking.values() for one in claims})
        rows = sorted(predictions.read_inputs(connection, unscored).values(), key=lambda row: str(row["id"]))
        gold = next((exam for exam in compared if _lacks_gold(connection, exam)), None)
        made_by = find_folder(connection, agent.name, gold["candidate"]) if gold else None
        lacking = {name for some in unanswered for name, claims in some.items() if claims}
    if gold is not None:
        lacking.add(gold["champion"])
    here = [(one, place) for one in versions if (place := makeup.find_base(machinery, agent, one)) is not None]
    first = next(((one, place) for one, place in here if one["name"] in lacking), None)
    if first is None:
        raise NothingToScoreError("its exam ended, or lost a base, before it began")
    score_sets = run_folders.write_recent(folder, rows)
    if made_by is not None:
        score_sets.append(spec.ScoreSet(name=run_folders.GOLD, path=made_by.resolve() / f"{run_folders.GOLD}.parquet"))
    return spec.Spec(
        run_id=run["id"],
        kind="score",
        agent=agent.name,
        base=spec.Base(path=first[1].resolve(), digest=first[0]["base_digest"]),
        others=tuple(run_folders.describe_model(one, place) for one, place in here),
        score_sets=tuple(score_sets),
        options=agent.training,
        threads=machinery.settings.training.threads,
    )
