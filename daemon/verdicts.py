"""From answers to verdicts: experts are asked where two versions differ, and what they say promotes, rejects or rolls back."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import structlog
from sqlalchemy import Connection, RowMapping

from consumers import budget, routing, windows
from daemon import exam_sample, examination, gate, run_folders, watch
from daemon.agents import Agent
from daemon.machinery import Machinery
from storage import alarms, db, exams, ids, labels, registry, reviews, scores

ACTOR = "ratchet"
DRIFT_ALARM = "drift"
DAY_SECONDS = 86_400

log = structlog.get_logger()


def ask(machinery: Machinery, agent: Agent, now: datetime) -> None:
    """Open blind reviews on a random sample of the differing claims, far apart ones in preference, as many as the budget has places for."""
    for kind in examination.KINDS:
        with db.writing(machinery.engine) as connection:
            exam = exams.read_open(connection, agent.name, kind)
            if exam is not None and not _is_first(connection, exam):
                _ask_about(connection, exam, agent, now)


def _ask_about(connection: Connection, exam: RowMapping, agent: Agent, now: datetime) -> None:
    asked = len(reviews.of_exam(connection, exam["id"]))
    pool = _read_pool(connection, exam)
    room = max(0, (agent.exam if exam["kind"] == "exam" else agent.watch).max_asked - asked)
    count = round(min(_count_places(connection, exam["kind"], agent, now), room, len(pool)))
    for prediction in exam_sample.choose_items(_measure(pool), agent.name, exam["id"], count):
        claim = {"id": prediction, "claim_id": pool[prediction].claim_id}
        reviews.ask_for_exam(connection, claim, agent.name, exam["id"], exam["kind"], now)
    left = len(pool) - count
    asking = {"left": left, "is_open": left > 0 and room > count}
    if asking != exam["report"].get("asking"):
        exams.update_report(connection, exam["id"], {**exam["report"], "asking": asking})
    if count:
        log.info("exam_asked", agent=agent.name, exam=exam["id"], kind=exam["kind"], reviews=count, left=left)


def _measure(differing: Mapping[str, scores.Differing]) -> dict[str, float]:
    """How far apart the two versions are on each of these claims."""
    return {key: exam_sample.measure_distance(one.candidate_probabilities, one.champion_probabilities) for key, one in differing.items()}


def _count_places(connection: Connection, kind: str, agent: Agent, now: datetime) -> float:
    policy = agent.routing_policy
    window = windows.read_window(connection, agent.name, policy, {})
    places = budget.count_places(policy, window.state(windows.read_spent(connection, agent.name, policy, now)))
    return places.exam if kind == "exam" else places.watch


def _read_pool(connection: Connection, exam: RowMapping) -> dict[str, scores.Differing]:
    """The differing claims that nobody has answered and neither exam nor watch has asked about, by prediction."""
    differing = {one.prediction: one for one in read_differing(connection, exam)}
    known = set(labels.of_predictions(connection, differing))
    for other in exams.list_open(connection, exam["agent"]):
        known |= {review["prediction"] for review in reviews.of_exam(connection, other["id"])}
    return {prediction: one for prediction, one in differing.items() if prediction not in known}


def read_differing(connection: Connection, exam: RowMapping) -> list[scores.Differing]:
    """The claims of a comparison on which its two versions differ."""
    names = exam["candidate"], exam["champion"]
    return scores.read_differing(connection, exam["agent"], *names, since=examination.find_since(exam))


def judge_exam(machinery: Machinery, agent: Agent, now: datetime, *, is_last: bool = False) -> None:
    """Decide the open exam, and act on it: promote, reject, or keep the new numbers. `is_last`: the next candidate is there."""
    with db.reading(machinery.engine) as connection:
        exam = exams.read_open(connection, agent.name, "exam")
        if exam is None:
            return
        folder = examination.find_folder(connection, agent.name, exam["candidate"])
        evidence = gather(connection, exam, agent, folder)
    if evidence is None or folder is None:
        return
    verdict = machinery.decide(replace(evidence, is_last=is_last), agent.exam_policy)
    forgetting = {"text_loss": run_folders.read_text_losses(folder, exam["champion"])}
    report = describe(exam, verdict.outcome, verdict.reasons, {**verdict.numbers, **forgetting})
    if verdict.outcome == "inconclusive":
        _keep_report(machinery, exam, folder, report)
        return
    run_folders.write_exam(folder, report)
    try:
        with db.writing(machinery.engine) as connection:
            is_done = _conclude(connection, exam, verdict, report, now)
    except registry.ChampionChangedError as error:
        log.warning("verdict_too_late", agent=agent.name, exam=exam["id"], why=str(error))
        return
    if is_done:
        log.info("verdict", agent=agent.name, version=exam["candidate"], outcome=verdict.outcome, reason=verdict.reasons[0])


def describe(exam: RowMapping, outcome: str, reasons: Sequence[str], numbers: Mapping[str, Any]) -> dict[str, Any]:
    """The report of an exam or a watch, ready for JSON."""
    names = {name: exam[name] for name in ("agent", "kind", "candidate", "champion")}
    kept = {name: exam["report"][name] for name in ("asking", "defect") if name in exam["report"]}
    return {"exam": exam["id"], **names, "outcome": outcome, "reasons": list(reasons), **numbers, **kept}


def _keep_report(machinery: Machinery, exam: RowMapping, folder: Path | None, report: Mapping[str, Any]) -> None:
    """Keep the numbers of a comparison that goes on, when more than the time changed."""
    if {**json.loads(json.dumps(report)), "days": 0} == {**exam["report"], "days": 0}:
        return
    if folder is not None:
        run_folders.write_exam(folder, report)
    with db.writing(machinery.engine) as connection:
        exams.update_report(connection, exam["id"], report)


def _conclude(connection: Connection, exam: RowMapping, verdict: gate.Verdict, report: Mapping[str, Any], now: datetime) -> bool:
    """Close the exam, write the verdict and move the alias, all or nothing. Raises `ChampionChangedError`."""
    agent, candidate, outcome = exam["agent"], exam["candidate"], verdict.outcome
    if outcome == "inconclusive" or not exams.close(connection, exam["id"], outcome, report, now):
        return False
    registry.give_verdict(connection, agent, candidate, outcome, list(verdict.reasons), now)
    if outcome == "promote":
        registry.change_champion(connection, agent, candidate, exam["champion"], "promote", ACTOR, " ".join(verdict.reasons), now)
        examination.close_watch(connection, agent, candidate, now)
        examination.open_watch(connection, agent, now)
    return True


def gather(connection: Connection, exam: RowMapping, agent: Agent, folder: Path | None) -> gate.ExamEvidence | None:
    """All that the exam's verdict rests on; None while a version still has to answer."""
    gold = _pair_gold(folder, exam["champion"]) if folder is not None else ()
    if gold is None:
        return None
    differing = read_differing(connection, exam)
    pool = scores.count_common(connection, agent.name, exam["candidate"], exam["champion"])
    has_answered = bool(scores.read_scored(connection, agent.name, exam["candidate"], 1))
    if has_answered and not pool:
        return None
    asked = reviews.of_exam(connection, exam["id"])
    return gate.ExamEvidence(
        pairs=pair_answers(connection, exam, agent, differing),
        pool=pool,
        differing=len(differing),
        asked=len(asked),
        waiting=sum(review["state"] in reviews.LIVE for review in asked),
        gold=gold,
        is_degenerate=exam["report"].get("defect"),
        compared_with_base=_is_first(connection, exam),
    )


def _is_first(connection: Connection, exam: RowMapping) -> bool:
    """Whether a first version is compared with the bare base: it is promoted unless gold shows harm, and nobody is asked.

    Once a version has served, a candidate sits a real exam also when the base serves again after a rollback, and so does one that learned
    from texts alone.
    """
    if exam["kind"] != "exam" or exam["champion"] != registry.BARE:
        return False
    if registry.read(connection, exam["agent"], exam["candidate"])["dataset"] is None:
        return False
    return all(change["version"] == registry.BARE for change in registry.history(connection, exam["agent"]))


def pair_answers(connection: Connection, exam: RowMapping, agent: Agent, differing: Iterable[scores.Differing]) -> tuple[gate.Pair, ...]:
    """The differing claims with a settled truth that is no lesson of the candidate's: all in the exam's order, and random audits."""
    by_key = {one.prediction: one for one in differing}
    distances = _measure(by_key)
    asked = {review["prediction"] for review in reviews.of_exam(connection, exam["id"])}
    cut = registry.read(connection, agent.name, exam["candidate"])["dataset"]
    fresh = scores.labelled_after(connection, list(by_key), cut)
    answered, known = ({key: distances[key] for key in distances.keys() & keys} for keys in (fresh, asked))
    reached = set(exam_sample.count_in(answered, known, agent.name, exam["id"]))
    judged = [key for key, one in by_key.items() if key in reached or (key in fresh and routing.AUDIT in one.reasons)]
    answers = labels.of_predictions(connection, judged)
    truths = {key: truth.answer for key in judged if (truth := labels.settle(answers.get(key, [])))}
    return tuple(
        gate.Pair(one.candidate, one.champion, truths[key], run_folders.pick_slices(one.attributes, agent.slices), distances[key])
        for key, one in by_key.items()
        if key in truths
    )


def _pair_gold(folder: Path, champion: str) -> tuple[gate.Pair, ...] | None:
    """Both versions' answers on gold; None while one of them has not been asked."""
    ours, theirs = run_folders.read_answers(folder, run_folders.CANDIDATE), run_folders.read_answers(folder, champion)
    if ours is None or theirs is None:
        return None
    truth = run_folders.read_truth(folder)
    return tuple(
        gate.Pair(ours[row], theirs[row], truth[row]["answer"], truth[row]["slices"]) for row in truth if row in ours and row in theirs
    )


def judge_watch(machinery: Machinery, agent: Agent, now: datetime) -> None:
    """Look whether the new champion does harm: roll back, alarm, end the watch, or go on."""
    with db.reading(machinery.engine) as connection:
        exam = exams.read_open(connection, agent.name, "watch")
        if exam is None:
            return
        evidence = gather_watch(connection, exam, agent, now)
    policy = agent.watch_policy
    action = watch.watch(evidence, policy)
    report = describe(exam, action.move, action.reasons, action.numbers)
    is_over = action.numbers["answered"] >= policy.max_asked or evidence.days >= policy.max_days
    if action.numbers["is_world_changed"]:
        raise_drift(machinery, agent, " ".join(action.reasons), {"source": "watch", "exam": exam["id"]}, exam["opened_at"], now)
    if action.move == "rollback":
        _roll_back(machinery, exam, action, report, now)
    elif action.move == "end" or is_over:
        with db.writing(machinery.engine) as connection:
            if exams.close(connection, exam["id"], "end", report, now):
                log.info("watch_ended", agent=agent.name, exam=exam["id"], outcome="end")
    else:
        _keep_report(machinery, exam, None, report)


def _roll_back(machinery: Machinery, exam: RowMapping, action: watch.Action, report: Mapping[str, Any], now: datetime) -> None:
    """Go back to the predecessor, and say why."""
    agent, harmful, predecessor = exam["agent"], exam["candidate"], exam["champion"]
    try:
        with db.writing(machinery.engine) as connection:
            if not exams.close(connection, exam["id"], "rollback", report, now):
                return
            registry.change_champion(connection, agent, predecessor, harmful, "rollback", ACTOR, " ".join(action.reasons), now)
    except registry.ChampionChangedError as error:
        log.warning("rollback_too_late", agent=agent, exam=exam["id"], why=str(error))
        return
    log.warning("rolled_back", agent=agent, version=harmful, to=predecessor, reason=action.reasons[0])


def raise_drift(machinery: Machinery, agent: Agent, message: str, detail: Mapping[str, Any], since: datetime, now: datetime) -> None:
    """Raise a drift alarm, once for each cause that began at `since`; it starts a training by the triggers."""
    with db.writing(machinery.engine) as connection:
        known = alarms.list_since(connection, agent.name, since)
        if any(one["kind"] == DRIFT_ALARM and one["detail"].get("source") == detail["source"] for one in known):
            return
        # An open one stays as it is: its detail is what later observations of its source are compared with.
        if alarms.raise_alarm(connection, agent.name, DRIFT_ALARM, message, detail, now, restate=False):
            log.warning("alarm_raised", agent=agent.name, kind=DRIFT_ALARM, source=detail["source"])


def gather_watch(connection: Connection, exam: RowMapping, agent: Agent, now: datetime) -> watch.WatchEvidence:
    """What the watch knows of the new champion and its predecessor."""
    return watch.WatchEvidence(
        pairs=pair_answers(connection, exam, agent, read_differing(connection, exam)),
        asked=len(reviews.of_exam(connection, exam["id"])),
        days=(now - exam["opened_at"]).total_seconds() / DAY_SECONDS,
        champion=_audit(connection, exam, exam["candidate"]),
        predecessor=_audit(connection, exam, exam["champion"]),
    )


def _audit(connection: Connection, exam: RowMapping, version: str) -> watch.Audited:
    """How often a version was right on randomly audited claims that it did not learn from, before the promotion and since."""
    decisions = dict(scores.read_audited(connection, exam["agent"], version))
    cut = registry.read(connection, exam["agent"], version)["dataset"]
    fresh = scores.labelled_after(connection, list(decisions), cut)
    answers = labels.of_predictions(connection, fresh)
    truths = {key: truth.answer for key, given in answers.items() if (truth := labels.settle(given))}
    promoted = ids.after(exam["opened_at"])

    def count(keys: list[str]) -> watch.Accuracy:
        return watch.Accuracy(sum(decisions[key] == truths[key] for key in keys), len(keys))

    return watch.Audited(before=count([key for key in truths if key < promoted]), now=count([key for key in truths if key >= promoted]))
