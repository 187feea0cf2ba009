"""The loop: from a trigger to a verdict, watched, and unharmed when the daemon is killed at any line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from pydantic import TypeAdapter
from sqlalchemy import Connection, Engine, select, update

from consumers import announcements
from daemon import deployments, dispatch, examination, launch, run_folders, training
from daemon.agents import Exam, Triggers
from daemon.launchers import workers
from daemon.prompts import PromptFile
from storage import alarms, artifacts, datasets, db, exams, leases, ledger, policies, registry, reviews, runs, scores
from storage.tables import Event, Policy
from tests import model_fixtures
from tests.pipeline_fixtures import ScriptedLauncher, World, always, make_base, make_settings
from trainers import spec

AGENT = "adjudication"


class KilledError(BaseException):
    """A SIGKILL, as far as a test can tell."""


def kill(*_: Any) -> None:
    raise KilledError


def knows(claim_id: str, fields: dict[str, Any]) -> str:
    """The truth of the tests: one treatment in four is denied."""
    return "DENIED" if fields["treatment"] in ("t0", "treatment 0") else "APPROVED"


def is_wrong(claim_id: str, fields: dict[str, Any]) -> str:
    return "DENIED" if knows(claim_id, fields) == "APPROVED" else "APPROVED"


def is_stricter(claim_id: str, fields: dict[str, Any]) -> str:
    return "DENIED" if fields["treatment"] in ("t0", "t1") else "APPROVED"


@pytest.fixture
def world(engine: Engine, now: Any, tmp_path: Path) -> World:
    """A loop around a launcher that plays the trainer; nothing is in it yet."""
    return World(engine, make_settings(tmp_path, make_base(tmp_path / "base")), ScriptedLauncher(), now, truth=knows)


@pytest.fixture
def served(world: World) -> World:
    """v1.0 is in service, and 60 claims have come in."""
    world.import_history(60)
    world.tick()
    world.ask_for_run()
    world.settle()
    world.predict(60, model_version="v1.0")
    return world


def read_run(world: World, run: str) -> Any:
    with db.reading(world.engine) as connection:
        return runs.read(connection, run)


def champion(world: World) -> str | None:
    with db.reading(world.engine) as connection:
        return registry.champion(connection, AGENT)


def verdict(world: World, version: str) -> str | None:
    with db.reading(world.engine) as connection:
        found: str | None = registry.read(connection, AGENT, version)["verdict"]
    return found


def open_exam(world: World, kind: Any = "exam") -> Any:
    with db.reading(world.engine) as connection:
        return exams.read_open(connection, AGENT, kind)


def open_alarms(world: World) -> dict[str, str]:
    with db.reading(world.engine) as connection:
        return {alarm["kind"]: alarm["message"] for alarm in alarms.list_open(connection)}


def sit_exam(world: World, answers: Any) -> None:
    """Train a candidate that answers so, let it be examined, and let the expert answer."""
    world.launcher.models["candidate"] = answers
    world.ask_for_run()
    world.settle()
    with db.reading(world.engine) as connection:
        name = registry.list_all(connection, AGENT)[-1]["name"]
    world.launcher.models[name] = answers
    for _ in range(4):
        world.predict(60, model_version="v1.0")
        world.settle()
        world.answer_all()
        world.settle()


def test_nothing_is_started_without_a_base_and_the_alarm_says_what_to_do(world: World) -> None:
    shutil.rmtree(world.agent.base_model)
    run = world.ask_for_run()
    world.settle()
    assert read_run(world, run)["state"] == "queued"
    assert f"ratchet model tiny --texts FILE --out {world.agent.base_model}" in open_alarms(world)["base"]
    world.agent.base_model.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (world.agent.base_model / name).write_text("{}")
    world.import_history(60)
    world.settle()
    assert read_run(world, run)["state"] == "done"
    assert "base" not in open_alarms(world)


def test_the_bare_base_is_v0_and_the_first_version_replaces_it(served: World) -> None:
    assert champion(served) == "v1.0"
    with db.reading(served.engine) as connection:
        bare, first = registry.list_all(connection, AGENT)
        assert (bare["name"], bare["adapter_digest"]) == ("v0", None)
        assert (first["temperature"], first["dataset"]) == (1.5, 1)
        assert Path(first["adapter_path"]).is_dir()
        assert ledger.verify(connection) == []
    assert open_exam(served, "watch") is None, "the bare base never answered a claim: there is nothing to go back to"


def test_after_a_rollback_to_the_base_a_candidate_sits_a_real_exam(served: World) -> None:
    with db.writing(served.engine) as connection:
        deployments.rollback(connection, AGENT, "ops", "harm was seen", served.now)
    assert champion(served) == "v0"
    served.ask_for_run()
    served.settle()
    assert (champion(served), verdict(served, "v1.1")) == ("v0", None)
    assert open_exam(served)["champion"] == "v0"


def test_whatever_is_announced_is_what_its_schema_says(served: World) -> None:
    sit_exam(served, knows)
    with db.writing(served.engine) as connection:
        deployments.rollback(connection, AGENT, "ops", "to be sure", served.now)
    served.settle()
    with db.reading(served.engine) as connection:
        sent = connection.execute(select(Event.type, Event.data).where(Event.state == "unsent")).all()
    for row in sent:
        TypeAdapter(announcements.ANNOUNCEMENTS[row.type]).validate_json(row.data or "")
    kinds = ("alarm.raised", "champion.reverted", "dead-letter.parked", "review.opened", "review.closed", "review.expired")
    others = {f"ratchet.{kind}.v1" for kind in kinds}
    assert {row.type for row in sent} == announcements.ANNOUNCEMENTS.keys() - others


def test_a_first_version_that_gold_shows_to_be_worse_is_rejected(world: World) -> None:
    world.launcher.models = {"v0": knows, "candidate": is_wrong}
    world.import_history(400, answer="APPROVED")
    world.tick()
    world.ask_for_run()
    world.settle()
    assert (champion(world), verdict(world, "v1.0")) == ("v0", "reject")


@pytest.mark.databases("sqlite", "postgresql")
def test_a_better_candidate_is_promoted_by_the_experts_answers_and_watched(served: World) -> None:
    sit_exam(served, knows)
    assert (champion(served), verdict(served, "v1.1")) == ("v1.1", "promote")
    with db.reading(served.engine) as connection:
        [exam] = exams.list_all(connection, AGENT, "exam")[1:]
        report = exam["report"]
        assert report["wins"] > report["losses"] == 0
        asked = reviews.of_exam(connection, exam["id"])
        assert 0 < len(asked) == report["asked"] <= served.agent.exam.max_asked
        run = runs.read(connection, registry.read(connection, AGENT, "v1.1")["run"])
    assert json.loads((Path(run["folder"]) / "exam.json").read_text())["outcome"] == "promote"
    watched = open_exam(served, "watch")
    assert (watched["candidate"], watched["champion"]) == ("v1.1", "v1.0")


def test_a_worse_candidate_is_rejected_and_the_next_run_does_not_begin_from_it(served: World) -> None:
    sit_exam(served, is_wrong)
    assert (champion(served), verdict(served, "v1.1")) == ("v1.0", "reject")
    served.ask_for_run()
    served.settle()
    with db.reading(served.engine) as connection:
        first = registry.read(connection, AGENT, "v1.0")
    assert served.launcher.started[-1].init_adapter_digest == first["adapter_digest"]


def test_the_next_candidate_supersedes_one_that_waits(served: World) -> None:
    served.launcher.models["candidate"] = knows
    for _ in range(2):
        served.ask_for_run()
        served.settle()
    assert [verdict(served, name) for name in ("v1.1", "v1.2")] == ["superseded", None]
    assert open_exam(served)["candidate"] == "v1.2"


def test_a_candidate_that_won_what_was_asked_is_promoted_at_its_last_look(served: World) -> None:
    served.launcher.models["candidate"] = served.launcher.models["v1.1"] = knows
    served.ask_for_run()
    served.settle()
    served.predict(120, model_version="v1.0")
    served.settle()
    assert served.answer_all(open_exam(served)["id"], limit=4) == 4
    served.settle()
    assert (verdict(served, "v1.1"), open_exam(served)["report"]["wins"]) == (None, 4)
    served.ask_for_run()
    served.settle()
    assert (verdict(served, "v1.1"), champion(served)) == ("promote", "v1.1")
    assert (open_exam(served)["candidate"], open_exam(served)["champion"]) == ("v1.2", "v1.1")
    assert open_exam(served)["report"]["pool"] > 0, "both have answered the same claims"


@pytest.mark.databases("sqlite", "postgresql")
def test_exam_reviews_are_blind_and_keep_within_the_budget(served: World) -> None:
    served.launcher.models["candidate"] = always("DENIED")
    served.ask_for_run()
    served.settle()
    before = count_reviews(served)
    for _ in range(5):
        served.predict(40, model_version="v1.0")
        served.settle()
    with db.reading(served.engine) as connection:
        asked = [reviews.read(connection, row["id"]) for row in reviews.of_exam(connection, open_exam(served)["id"])]
    assert asked
    assert all(row is not None and row["is_blind"] for row in asked)
    assert count_reviews(served) - before <= 0.5 * 200 + 10


def count_reviews(world: World) -> int:
    with db.reading(world.engine) as connection:
        return reviews.count_opened(connection, AGENT, world.now - timedelta(days=30))[0]


@pytest.mark.databases("sqlite", "postgresql")
def test_a_change_that_does_harm_is_rolled_back_by_the_watch(served: World) -> None:
    served.launcher.models["candidate"] = served.launcher.models["v1.1"] = is_wrong
    served.ask_for_run()
    served.settle()
    with db.writing(served.engine) as connection:
        deployments.promote(connection, AGENT, "v1.1", "ops", "I know better", served.now, force=True)
    assert champion(served) == "v1.1"
    for _ in range(4):
        served.predict(60, model_version="v1.1")
        served.settle()
        served.answer_all()
        served.settle()
    assert champion(served) == "v1.0"
    with db.reading(served.engine) as connection:
        last = registry.history(connection, AGENT)[-1]
        assert (last["kind"], last["actor"]) == ("rollback", "ratchet")
        assert "The predecessor is better now" in last["reason"]
        latest = registry.latest_candidate(connection, AGENT)
        assert latest is not None
        assert latest["name"] != "v1.1", "training does not go on from what did harm"
        assert ledger.verify(connection) == []


def test_enough_labels_start_a_training_and_say_so(served: World) -> None:
    served.settings = make_settings(served.settings.home, served.agent.base_model, triggers=Triggers(new_labels=20))
    served.restart()
    served.answer_all()
    served.settle()
    with db.reading(served.engine) as connection:
        last = runs.read_last(connection, AGENT, "train")
    assert last is not None
    assert (last["trigger"], last["actor"]) == ("labels", "ratchet")


def test_a_schedule_that_falls_due_starts_a_training(served: World) -> None:
    triggers = Triggers(new_labels=1000, cron="0 3 * * sun")
    served.settings = make_settings(served.settings.home, served.agent.base_model, triggers=triggers)
    served.restart()
    served.answer_all()
    served.settle()
    assert len(list_runs(served)) == 1
    served.tick(days=7)
    assert list_runs(served)[0]["trigger"] == "cron"


@pytest.mark.parametrize(
    ("named", "change"),
    [("threshold", {"threshold": 0.8}), ("must_review", {"must_review": ()}), ("exam.claims", {"exam": Exam(claims=9)})],
)
def test_a_changed_policy_starts_one_training_once_there_is_something_to_learn(served: World, named: str, change: dict[str, Any]) -> None:
    served.settings = make_settings(served.settings.home, served.agent.base_model, **change)
    served.restart()
    served.settle()
    assert len(list_runs(served)) == 1, "the same labels would make the same model"
    served.answer_all()
    served.settle()
    last, _ = list_runs(served)
    assert last["trigger"] == "policy"
    assert f"changed in {named}, with" in last["reason"]


def test_a_policy_that_an_older_ratchet_recorded_with_fewer_keys_has_not_changed(served: World) -> None:
    with db.writing(served.engine) as connection:
        body = {key: value for key, value in served.agent.policy.items() if key not in ("exam", "watch")}
        connection.execute(update(Policy).values(body=body, digest="sha256:older"))
    served.restart()
    served.answer_all()
    served.settle()
    with db.reading(served.engine) as connection:
        assert policies.current(connection, AGENT).version == 2
    assert len(list_runs(served)) == 1


def list_runs(world: World) -> list[Any]:
    with db.reading(world.engine) as connection:
        return [run for run in runs.list_all(connection, AGENT) if run["kind"] == "train"]


def test_another_prompt_is_another_major_version_that_begins_from_scratch(served: World) -> None:
    served.settings = make_settings(served.settings.home, served.agent.base_model, prompt=PromptFile(text="{{ input.treatment }}? "))
    served.restart()
    served.settle()
    assert list_runs(served)[0]["trigger"] == "policy"
    assert served.launcher.started[-1].init_adapter is None
    assert open_exam(served)["candidate"] == "v2.0"


@pytest.mark.parametrize("change", [{"lora.rank": 8}, {"lora.alpha": 16}])
def test_an_adapter_of_another_shape_begins_from_scratch(served: World, change: dict[str, int]) -> None:
    for overrides, begins_from_scratch in (({}, False), (change, True), (change, False)):
        served.ask_for_run(**overrides)
        served.settle()
        assert (served.launcher.started[-1].init_adapter is None) == begins_from_scratch


def test_what_all_weights_were_trained_for_is_a_new_base_and_the_next_run_goes_on_from_it(served: World) -> None:
    served.launcher.models["candidate"] = served.launcher.models["v2.0"] = knows
    run = served.ask_for_run(method="full")
    served.settle()
    with db.reading(served.engine) as connection:
        new, old = (registry.read(connection, AGENT, name) for name in ("v2.0", "v1.0"))
        assert runs.read(connection, run)["version"] == "v2.0"
    assert (new["adapter_path"], new["adapter_digest"]) == (None, None)
    place = Path(new["base_path"])
    assert place.parent == served.settings.storage.bases
    assert artifacts.digest_folder(place) == new["base_digest"] != old["base_digest"]
    assert not list(served.settings.storage.runs.glob("*/attempts/*/model")), "it lies among the bases alone"
    for method, begins_at in (("full", place), ("lora", served.agent.base_model)):
        served.ask_for_run(method=method)
        served.settle()
        asked = served.launcher.started[-1]
        assert (asked.base.path, asked.init_adapter) == (begins_at.resolve(), None)
        assert asked.options.epochs == {"full": 5, "lora": 4}[method]
    with db.reading(served.engine) as connection:
        names = [(one["name"], one["parent"]) for one in registry.list_all(connection, AGENT)]
    assert names == [("v0", None), ("v1.0", None), ("v2.0", None), ("v3.0", "v2.0"), ("v4.0", None)]


@pytest.mark.parametrize(("warm_start", "begins_at"), [("candidate", "v1.1"), ("champion", "v1.0"), ("never", None)])
def test_a_warm_start_goes_on_from_the_newest_candidate_or_from_the_champion(served: World, warm_start: str, begins_at: str | None) -> None:
    served.launcher.models["candidate"] = knows
    served.ask_for_run()
    served.settle()
    assert champion(served) == "v1.0", "the candidate waits for answers"
    served.ask_for_run(warm_start=warm_start)
    served.settle()
    with db.reading(served.engine) as connection:
        digest = registry.read(connection, AGENT, begins_at)["adapter_digest"] if begins_at else None
    assert served.launcher.started[-1].init_adapter_digest == digest


@pytest.mark.parametrize("policy", ["cumulative", "replay", "delta"])
def test_a_policy_says_whether_a_run_begins_warm_and_names_what_was_learned(served: World, policy: str) -> None:
    served.ask_for_run(policy=policy)
    served.settle()
    asked = served.launcher.started[-1]
    assert asked.options.policy == policy
    with db.reading(served.engine) as connection:
        first = registry.read(connection, AGENT, "v1.0")
        learned = datasets.read(connection, AGENT, first["dataset"])["folder"]
    begins = (Path(first["adapter_path"]), Path(learned)) if policy != "cumulative" else (None, None)
    assert (asked.init_adapter, asked.learned) == tuple(place and place.resolve() for place in begins)


def test_an_exams_report_tells_what_was_forgotten(served: World) -> None:
    served.launcher.text_loss = {"candidate": 2.5, "v1.0": 2.25, "base": 2.0}
    served.launcher.models["candidate"] = served.launcher.models["v1.1"] = is_wrong
    served.ask_for_run()
    served.settle()
    with db.reading(served.engine) as connection:
        report = next(one["report"] for one in exams.of_version(connection, AGENT, "v1.1"))
    assert report["text_loss"] == {"candidate": 2.5, "champion": 2.25, "base": 2.0}
    gold = report["gold"]
    flips = gold["negative_flips"] - gold["positive_flips"]
    assert flips == round((gold["accuracy_before"] - gold["accuracy_after"]) * gold["rows"]) > 0


def test_a_rollback_crosses_bases(served: World) -> None:
    served.launcher.models["candidate"] = served.launcher.models["v2.0"] = is_wrong
    served.ask_for_run(method="full")
    served.settle()
    with db.writing(served.engine) as connection:
        deployments.promote(connection, AGENT, "v2.0", "ops", "I know better", served.now, force=True)
    for _ in range(4):
        served.predict(60, model_version="v2.0")
        served.settle()
        served.answer_all()
        served.settle()
    assert champion(served) == "v1.0"


def test_a_refused_run_fails_at_once_with_its_reason_and_the_champion_stays(served: World) -> None:
    served.launcher.script = ["refused"]
    run = read_run(served, served.ask_for_run())
    served.settle()
    run = read_run(served, run["id"])
    assert (run["state"], run["error"]) == ("failed", "refused: it was refused")
    assert run["id"] in open_alarms(served)["run"]
    assert champion(served) == "v1.0"
    served.ask_for_run()
    served.settle()
    assert "run" not in open_alarms(served), "a run that went well clears the alarm"


def test_a_failing_run_is_tried_again_later_and_parked_after_three_attempts(served: World) -> None:
    served.launcher.script = ["failed", "dies", "failed"]
    run = served.ask_for_run()
    served.tick()
    assert read_run(served, run)["state"] == "queued"
    served.tick()
    assert read_run(served, run)["attempt"] == 1, "it waits"
    served.tick(minutes=1)
    served.tick(minutes=1)
    assert read_run(served, run)["attempt"] == 2, "it waits longer"
    served.tick(minutes=2)
    assert read_run(served, run)["state"] == "parked"
    assert "3 attempts" in open_alarms(served)["run"]


def test_an_attempt_that_came_further_does_not_count_against_the_run(served: World) -> None:
    served.launcher.script = ["dies"] * 5
    run = served.ask_for_run()
    for step in range(1, 6):
        served.tick()
        (Path(read_run(served, run)["folder"]) / "attempts" / str(step) / "checkpoints" / f"step-{step}").mkdir(parents=True)
        served.tick(hours=1)
    assert read_run(served, run)["state"] in ("queued", "done")
    served.settle()
    assert read_run(served, run)["state"] == "done"


def test_a_stopped_run_goes_on_at_once_with_the_same_question(served: World) -> None:
    served.launcher.script = ["stopped"]
    run = served.ask_for_run()
    served.settle()
    first, second = served.launcher.started[-2:]
    assert first == second
    assert (read_run(served, run)["state"], read_run(served, run)["failures"]) == ("done", 0)


def test_a_silent_trainer_is_taken_for_dead_and_what_it_publishes_later_is_not_read(served: World) -> None:
    served.launcher.script = ["hangs", "hangs"]
    run = served.ask_for_run()
    served.tick()
    served.tick(minutes=6)
    row = read_run(served, run)
    assert (row["state"], row["failures"]) == ("queued", 1)
    assert (Path(row["folder"]), 1, True) in served.launcher.stopped
    served.tick(minutes=2)
    served.launcher.finish(Path(row["folder"]), 1)
    served.tick()
    assert (read_run(served, run)["state"], read_run(served, run)["attempt"]) == ("running", 2)
    served.launcher.finish(Path(row["folder"]), 2)
    served.settle()
    assert read_run(served, run)["state"] == "done"


def test_a_result_with_an_old_fence_is_not_read(served: World) -> None:
    served.launcher.script = ["hangs"]
    run = served.ask_for_run()
    served.tick()
    folder = Path(read_run(served, run)["folder"])
    (launch.find_attempt(folder, 1) / "attempt.json").write_text('{"fence": 999}')
    served.launcher.finish(folder, 1)
    served.tick()
    assert read_run(served, run)["state"] == "queued"
    assert verdict_names(served) == ["v0", "v1.0"]


def verdict_names(world: World) -> list[str]:
    with db.reading(world.engine) as connection:
        return [row["name"] for row in registry.list_all(connection, AGENT)]


def test_signs_of_life_are_kept_and_keep_a_run_alive(served: World) -> None:
    served.launcher.script = ["hangs"]
    run = served.ask_for_run()
    served.tick()
    progress = launch.find_attempt(Path(read_run(served, run)["folder"]), 1) / "progress.jsonl"
    for step in range(1, 4):
        progress.write_text(json.dumps({"phase": "training", "step": step}) + '\n{"half a li')
        served.tick(seconds=59)
        assert read_run(served, run)["progress"] == {"phase": "training", "step": step}


def test_a_cancelled_run_is_stopped_and_frees_its_device(served: World) -> None:
    served.launcher.script = ["hangs"]
    run = served.ask_for_run()
    served.tick()
    with db.writing(served.engine) as connection:
        runs.cancel(connection, runs.read(connection, run), "ops", served.now)
    served.tick()
    assert (Path(read_run(served, run)["folder"]), 1, True) in served.launcher.stopped
    other = served.ask_for_run()
    served.settle()
    assert read_run(served, other)["state"] == "done"


def test_a_cancelled_run_that_can_not_be_stopped_holds_up_no_other(served: World, monkeypatch: pytest.MonkeyPatch) -> None:
    handled = []

    def stop(_machinery: object, run: dict[str, str]) -> None:
        if run["id"] == "stuck":
            raise PermissionError
        handled.append(run["id"])

    found = [{"id": name, "state": state} for name, state in (("stuck", "cancelled"), ("other", "cancelled"), ("live", "running"))]
    monkeypatch.setattr(runs, "read_on_device", lambda _: found)
    monkeypatch.setattr(dispatch, "_let_go", stop)
    monkeypatch.setattr(dispatch, "follow", lambda _machinery, run, _now: handled.append(run["id"]))
    with pytest.raises(PermissionError):
        dispatch.follow_all(served.pipeline.machinery, served.now)
    assert handled == ["live", "other"]


def test_a_cancelled_run_is_not_started_again_by_what_had_started_it(served: World) -> None:
    served.launcher.script = ["hangs"]
    served.settings = make_settings(served.settings.home, served.agent.base_model, prompt=PromptFile(text="{{ input.treatment }}? "))
    served.restart()
    served.tick()
    with db.writing(served.engine) as connection:
        [run] = runs.read_in_state(connection, *runs.LIVE)
        assert run["trigger"] == "policy"
        runs.cancel(connection, run, "ops", served.now)
    served.settle()
    with db.reading(served.engine) as connection:
        assert runs.read_in_state(connection, *runs.LIVE) == []


def test_a_run_whose_result_can_not_be_taken_over_is_tried_again_and_holds_up_nobody(served: World) -> None:
    served.launcher.script = ["hangs"]
    run = served.ask_for_run()
    served.tick()
    folder = Path(read_run(served, run)["folder"])
    served.launcher.finish(folder, 1)
    shutil.rmtree(launch.find_attempt(folder, 1) / "adapters")
    served.tick()
    row = read_run(served, run)
    assert (row["state"], row["failures"]) == ("queued", 1)
    assert "FileNotFoundError" in row["error"]
    assert folder not in served.launcher.cleaned
    served.tick(hours=1)
    served.settle()
    assert read_run(served, run)["state"] == "done"
    assert served.launcher.cleaned[-1] == folder
    assert open_alarms(served) == {}


def test_a_run_that_was_launched_but_not_noted_is_taken_over(served: World, monkeypatch: pytest.MonkeyPatch) -> None:
    served.launcher.script = ["hangs"]
    run = served.ask_for_run()
    monkeypatch.setattr(runs, "begin", kill)
    with pytest.raises(KilledError):
        served.tick()
    monkeypatch.undo()
    served.restart()
    served.tick()
    row = read_run(served, run)
    assert (row["state"], row["attempt"]) == ("running", 1)
    served.launcher.finish(Path(row["folder"]), 1)
    served.settle()
    assert read_run(served, run)["state"] == "done"


@pytest.mark.databases("sqlite", "postgresql")
def test_a_run_whose_device_was_taken_publishes_nothing(served: World) -> None:
    served.launcher.script = ["hangs"]
    run = served.ask_for_run()
    served.tick()
    folder = Path(read_run(served, run)["folder"])
    served.now += timedelta(hours=1)
    with db.writing(served.engine) as connection:
        assert leases.acquire(connection, "device:cpu", "another", served.now, timedelta(minutes=5))
    served.launcher.finish(folder, 1)
    served.tick()
    assert (read_run(served, run)["state"], verdict_names(served)) == ("queued", ["v0", "v1.0"])
    served.tick(minutes=6)
    assert (read_run(served, run)["state"], read_run(served, run)["attempt"]) == ("done", 2)


def test_a_waiting_candidate_is_examined_against_whoever_is_champion_now(served: World) -> None:
    served.import_history(400)
    sit_exam(served, knows)
    served.launcher.models["candidate"] = served.launcher.models["v1.2"] = is_stricter
    served.ask_for_run()
    served.settle()
    assert (open_exam(served)["candidate"], open_exam(served)["champion"]) == ("v1.2", "v1.1")
    with db.writing(served.engine) as connection:
        deployments.rollback(connection, AGENT, "ops", "to be sure", served.now)
    served.settle()
    exam = open_exam(served)
    assert (exam["candidate"], exam["champion"]) == ("v1.2", "v1.0")
    assert exam["report"]["pool"] > 0
    assert open_exam(served, "watch") is None


def test_a_candidate_on_a_new_base_and_the_champion_on_the_old_one_answer_in_one_run(served: World, tmp_path: Path) -> None:
    served.import_history(400)
    other = make_base(tmp_path / "other")
    (other / "config.json").write_text('{"other": true}')
    served.settings = make_settings(served.settings.home, other)
    served.restart()
    served.launcher.models["candidate"] = served.launcher.models["v2.0"] = knows
    served.settle()
    asked = served.launcher.started[-1]
    assert (asked.kind, [model.name for model in asked.others]) == ("train", ["v1.0"])
    assert asked.others[0].base is not None
    assert asked.base.digest != asked.others[0].base.digest
    report = open_exam(served)["report"]
    assert report["pool"] > 0
    assert report["gold"]["rows"] > 10


def test_a_base_that_was_overwritten_is_named_with_the_remedy_and_the_loop_goes_on(served: World, tmp_path: Path) -> None:
    config = served.agent.base_model / "config.json"
    old = config.read_bytes()
    config.write_text('{"other": true}')
    served.launcher.models["candidate"] = knows
    served.ask_for_run()
    served.settle()
    assert [one.kind for one in served.launcher.started] == ["train", "train"]
    assert served.launcher.started[1].others == (), "a run that asked for weights that are gone would be refused"
    alarm = open_alarms(served)["exam"]
    assert f"v2.0 and v1.0 can't be compared: {served.agent.base_model} does not hold v1.0's base any more" in alarm
    assert "ratchet promote v2.0 --force" in alarm
    other = make_base(tmp_path / "other")
    (other / "config.json").write_bytes(config.read_bytes())
    config.write_bytes(old)
    served.settings = make_settings(served.settings.home, other)
    served.restart()
    served.settle()
    assert (open_alarms(served), served.launcher.started[2].kind) == ({}, "score")
    assert open_exam(served)["report"]["pool"] > 0


def test_an_exam_whose_champion_fits_none_of_the_claims_says_so_until_one_comes(engine: Engine, now: Any, tmp_path: Path) -> None:
    old, new = (PromptFile(text=f"Claim for {{{{ input.{name}.upper() }}}}: ") for name in ("treatment", "plan"))
    base = make_base(tmp_path / "base")
    world = World(engine, make_settings(tmp_path, base, prompt=old), ScriptedLauncher(), now)
    world.import_history(60, input={"treatment": "t0", "plan": "p", "age": "4"})
    world.tick()
    world.ask_for_run()
    world.settle()
    world.settings = make_settings(tmp_path, base, prompt=new)
    world.restart()
    world.predict(60, input={"plan": "p"})
    world.settle()
    assert "v2.0 and v1.0 can't be compared: of the 60 newest claims none fits the prompts of both" in open_alarms(world)["exam"]
    assert champion(world) == "v1.0"
    world.predict(1, input={"plan": "p", "treatment": "t0"})
    world.settle()
    assert "exam" not in open_alarms(world)
    assert open_exam(world)["report"]["pool"] == 1


def test_a_claim_that_cannot_be_rendered_holds_up_no_exam_and_queues_no_runs(engine: Engine, now: Any, tmp_path: Path) -> None:
    prompt = PromptFile(text="Claim for {{ input.treatment.upper() }}: ")
    settings = make_settings(tmp_path, make_base(tmp_path / "base"), prompt=prompt)
    world = World(engine, settings, ScriptedLauncher(), now, truth=knows)
    world.import_history(60)
    world.tick()
    world.ask_for_run()
    world.settle()
    world.predict(60, model_version="v1.0")
    world.predict(1, model_version="v1.0", input={"age": "4"})
    world.launcher.models["candidate"] = knows
    world.ask_for_run()
    world.settle()
    world.predict(1, model_version="v1.0", input={"age": "4"})
    world.tick(hours=2)
    world.settle()
    assert open_exam(world)["report"]["pool"] == 60
    assert [one.kind for one in world.launcher.started] == ["train", "train"]
    world.predict(1, model_version="v1.0")
    world.tick(hours=2)
    world.settle()
    assert open_exam(world)["report"]["pool"] == 61
    assert [one.kind for one in world.launcher.started] == ["train", "train", "score"]


def test_a_version_whose_prompt_fits_no_gold_row_has_answered_none_and_is_not_asked_again(served: World) -> None:
    served.ask_for_run()
    served.settle()
    folder = served.launcher.started[-1].score_sets[0].path.parent
    result = run_folders.read_result(folder, 1)
    assert result is not None
    path = launch.find_attempt(folder, 1) / "scores.parquet"
    pq.write_table(pq.read_table(path, filters=[("model", "!=", "v1.0")]), path)
    answers = run_folders.read_scores(folder, 1, result)
    assert answers["gold", "v1.0"].decisions == {}
    examination.keep_gold(folder, answers)
    assert run_folders.read_answers(folder, "v1.0") == {}


def test_two_agents_share_one_device_in_turn(served: World) -> None:
    second = served.agent.model_copy(update={"name": "scribe"})
    agents = {AGENT: served.agent, "scribe": second}
    served.settings = served.settings.model_copy(update={"agents": agents})
    served.restart()
    served.launcher.script = ["hangs"]
    first = served.ask_for_run()
    served.tick()
    with db.writing(served.engine) as connection:
        other = runs.queue(connection, "scribe", "train", "manual", "a test", "ops", {"overrides": {}}, served.now)
    served.tick()
    assert [read_run(served, run)["state"] for run in (first, other)] == ["running", "queued"]
    served.launcher.finish(Path(read_run(served, first)["folder"]), 1)
    served.tick()
    assert read_run(served, other)["state"] == "failed", "it has no label to learn from, and says so"
    assert "no settled label" in read_run(served, other)["error"]


def test_overrides_reach_the_trainer_and_wrong_ones_are_refused(served: World) -> None:
    served.ask_for_run(**{"epochs": 1, "lora.rank": 4, "seed": 7, "warm_start": "never"})
    served.settle()
    asked = served.launcher.started[-1]
    assert (asked.options.epochs, asked.options.lora.rank, asked.seed, asked.init_adapter) == (1, 4, 7, None)
    for wrong in (
        {"method": "full", "load_in_4bit": True},
        {"method": "pretrain"},
        {"method": "more"},
        {"epoch": 1},
        {"epochs": -1},
        {"clip": float("inf")},
        {"new_weight": float("inf")},
        {"warm_start": "maybe"},
        {"seed": "x"},
        {"seed": True},
        {"seed": -1},
        {"seed": 20261126120000},
        {"lora.ranks": 1},
    ):
        with pytest.raises(training.OptionsRefusedError, match=next(iter(wrong)).split(".")[0]):
            served.ask_for_run(**wrong)


def test_an_exam_reads_the_base_as_the_agents_servers_hold_it_whatever_a_runs_method(served: World) -> None:
    served.ask_for_run(method="qlora")
    served.settle()
    asked = served.launcher.started[-1].options
    assert (asked.load_in_4bit, asked.serve_in_4bit) == (True, False)
    with pytest.raises(training.OptionsRefusedError, match=r"set agents\.adjudication\.training\.serve_in_4bit"):
        served.ask_for_run(serve_in_4bit=True)


def test_a_failing_stage_is_alarmed_and_holds_up_nothing_else(served: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(run_folders, "write_exam", fail)
    sit_exam(served, knows)
    assert champion(served) == "v1.0"
    assert "no space left" in open_alarms(served)["pipeline: judge_exam"]
    monkeypatch.undo()
    served.settle()
    assert champion(served) == "v1.1"
    assert "pipeline: judge_exam" not in open_alarms(served)


@pytest.mark.databases("sqlite", "postgresql")
def test_changed_inputs_raise_one_alarm_and_start_a_training(served: World) -> None:
    served.import_history(600)
    served.answer_all()
    served.ask_for_run()
    served.settle()
    served.launcher.models["candidate"] = knows
    for _ in range(3):
        served.predict(250, input={"diagnosis": "Z99", "treatment": "something new"}, confidence=None, model_version="v1.0")
        served.tick()
    found = open_alarms(served)
    assert "diagnosis" in found["drift"]
    assert "bring no confidence" in found["confidence"]


@contextmanager
def kill_at(monkeypatch: pytest.MonkeyPatch, number: int, *, is_committed: bool) -> Iterator[None]:
    """Die at the N-th transaction that changes anything, right before or right after its commit."""
    real, seen = db.writing, 0

    @contextmanager
    def writing(engine: Engine, **how: Any) -> Iterator[Connection]:
        nonlocal seen
        with real(engine, **how) as connection:
            driver: Any = connection.connection.driver_connection
            before = driver.total_changes
            yield connection
            seen += driver.total_changes > before
            is_last = seen == number and driver.total_changes > before
            if is_last and not is_committed:
                raise KilledError
        if is_last:
            raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(db, "writing", writing)
        try:
            yield
        except KilledError:
            return
    raise IndexError(f"there are only {seen} transactions")


def copy_home(world: World, kept: Path) -> None:
    with world.engine.connect() as connection:
        connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")
    world.engine.dispose()
    shutil.copytree(world.settings.home, kept)


def restore_home(world: World, kept: Path) -> None:
    world.engine.dispose()
    shutil.rmtree(world.settings.home)
    shutil.copytree(kept, world.settings.home)


@pytest.mark.parametrize("is_committed", [False, True])
def test_a_daemon_killed_at_any_transaction_goes_on_at_the_next_tick(
    served: World, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory, is_committed: bool
) -> None:
    kept = tmp_path_factory.mktemp("kept") / "home"
    served.launcher.models["candidate"] = served.launcher.models["v1.1"] = knows
    served.ask_for_run()
    copy_home(served, kept)
    began = served.now
    for number in range(1, 1000):
        served.now = began
        served.restart()
        try:
            with kill_at(monkeypatch, number, is_committed=is_committed):
                served.tick()
        except IndexError:
            assert number > 4
            return
        served.restart()
        for _ in range(3):
            served.tick(minutes=2)
        assert_whole(served)
        restore_home(served, kept)


def assert_whole(world: World) -> None:
    """The run that was asked for is done once, its candidate is examined, and no trace of the accident is left."""
    with db.reading(world.engine) as connection:
        [asked] = runs.list_all(connection, AGENT, limit=1)
        assert asked["state"] == "done", asked
        assert [row["name"] for row in registry.list_all(connection, AGENT)] == ["v0", "v1.0", "v1.1"]
        exam = exams.read_open(connection, AGENT, "exam")
        assert exam is not None
        assert (exam["candidate"], exam["champion"]) == ("v1.1", "v1.0")
        assert scores.count_common(connection, AGENT, "v1.1", "v1.0") > 0
        assert ledger.verify(connection) == []
        assert [alarm["kind"] for alarm in alarms.list_open(connection)] == []


@pytest.mark.parametrize("is_committed", [False, True])
def test_a_daemon_killed_during_a_verdict_promotes_once(
    served: World, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory, is_committed: bool
) -> None:
    served.launcher.models["candidate"] = served.launcher.models["v1.1"] = knows
    served.ask_for_run()
    served.settle()
    served.predict(60, model_version="v1.0")
    served.settle()
    served.answer_all()
    kept = tmp_path_factory.mktemp("kept") / "home"
    copy_home(served, kept)
    began = served.now
    for number in range(1, 1000):
        served.now = began
        served.restart()
        try:
            with kill_at(monkeypatch, number, is_committed=is_committed):
                served.tick()
        except IndexError:
            return
        served.restart()
        for _ in range(2):
            served.tick()
        assert (champion(served), verdict(served, "v1.1")) == ("v1.1", "promote")
        with db.reading(served.engine) as connection:
            assert [change["version"] for change in registry.history(connection, AGENT)] == ["v0", "v1.0", "v1.1"]
            assert ledger.verify(connection) == []
        watched = open_exam(served, "watch")
        assert (watched["candidate"], watched["champion"]) == ("v1.1", "v1.0")
        restore_home(served, kept)


def test_before_there_is_a_label_texts_make_a_base_that_training_goes_on_from(engine: Engine, now: Any, tmp_path: Path) -> None:
    base = model_fixtures.tiny_base(tmp_path / "base")
    (tmp_path / "texts.txt").write_text("The treatment was necessary. " * 40)
    settings = make_settings(tmp_path, base)
    agent = settings.agents[AGENT].model_copy(update={"texts": tmp_path / "texts.txt"})
    settings = settings.model_copy(update={"agents": {AGENT: agent}})
    with closing(workers.Workers(settings.training.python, waits=True)) as trainer:
        world = World(engine, settings, trainer, now, truth=knows)
        run = world.ask_for_run(method="pretrain")
        world.settle()
        row = read_run(world, run)
        assert (row["state"], row["error"], row["dataset"], row["version"]) == ("done", None, None, "v1.0")
        with db.reading(engine) as connection:
            made = registry.read(connection, AGENT, "v1.0")
            bare = registry.read(connection, AGENT, "v0")
        assert (made["adapter_path"], Path(made["base_path"]).parent) == (None, settings.storage.bases.resolve())
        assert made["base_digest"] != bare["base_digest"]
        assert champion(world) == "v0", "nothing shows that it answers better"
        world.import_history(30)
        world.ask_for_run(method="full", epochs=1)
        world.settle()
    with db.reading(engine) as connection:
        second = registry.read(connection, AGENT, "v2.0")
    assert (second["parent"], second["dataset"]) == ("v1.0", 1)


def test_the_real_trainer_takes_the_loop_from_history_to_a_verdict(engine: Engine, now: Any, tmp_path: Path) -> None:
    base = model_fixtures.tiny_base(tmp_path / "base")
    options = spec.Options(learning_rate=1e-2, epochs=2, batch_rows=16)
    settings = make_settings(tmp_path, base, training=options, exam=Exam(max_asked=40))
    with closing(workers.Workers(settings.training.python, waits=True)) as trainer:
        world = World(engine, settings, trainer, now, truth=knows)
        world.import_history(60)
        world.tick()
        world.ask_for_run()
        world.settle()
        assert champion(world) == "v1.0"
        world.predict(60, model_version="v1.0", confidence=0.5)
        world.answer_all()
        world.ask_for_run(seed=5, epochs=12)
        world.settle()
        for _ in range(2):
            world.predict(60, model_version="v1.0")
            world.settle()
            world.answer_all()
            world.settle()
    with db.reading(engine) as connection:
        second = registry.read(connection, AGENT, "v1.1")
        report = exams.of_version(connection, AGENT, "v1.1")[0]["report"]
        assert (second["parent"], second["dataset"]) == ("v1.0", 2)
        assert report["pool"] > 60
        assert report["wins"] + report["losses"] + report["neither"] == report["answered"] > 0
        assert ledger.verify(connection) == []
    assert not list(tmp_path.glob("runs/*/attempts/*/checkpoints")), "what is done needs no checkpoint"
