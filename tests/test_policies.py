"""daemon.policies: the daemon alone says which policy is in force; a command that has other variables goes by it."""

import json

import pytest
from sqlalchemy import text

from daemon import policies
from storage import dead_letters, events, ledger
from tests.conftest import NOW
from tests.event_fixtures import ANN, BEN, handle, make_history, make_label, make_prediction, send

pytest_plugins = ["tests.cli_fixtures"]


@pytest.fixture
def in_force(opened, monkeypatch):
    """An installation whose daemon has recorded its policy, and whose next command finds another threshold in its environment."""
    with opened.writing() as connection:
        before = policies.record(connection, opened.settings.agents, NOW)
    monkeypatch.setenv("RATCHET_AGENTS__ADJUDICATION__THRESHOLD", "0.01")
    monkeypatch.setenv("RATCHET_AGENTS__ADJUDICATION__MUST_REVIEW", "[]")
    return before


def count_versions(opened):
    """Policy versions in the ledger."""
    with opened.reading() as connection:
        return [row["kind"] for row in ledger.show(connection)].count("policy")


def test_an_import_leaves_the_policy_in_force(in_force, opened, home, ask):
    (home / "old.jsonl").write_text(json.dumps(make_history(1, NOW)["data"]) + "\n")
    assert ask("import", home / "old.jsonl")["imported"] == 1
    assert count_versions(opened) == 1


def test_a_replayed_prediction_is_routed_by_the_policy_in_force(in_force, opened, ask, run):
    sent = send(opened.engine, [make_prediction(1, NOW, confidence=0.5, decision="PENDING")], NOW)
    with opened.writing() as connection:
        dead_letters.park_event(connection, events.read_unhandled(connection, [sent[0].ulid])[0], "a test", NOW)
    (letter,) = ask("dead-letters", "list")
    assert run("dead-letters", "replay", letter["id"])[0] == 0
    with opened.reading() as connection:
        row = connection.execute(text("SELECT * FROM predictions")).mappings().one()
    assert row["policy_version"] == 1
    assert {"must_review", "below_threshold"} <= set(json.loads(row["reasons"]))
    assert count_versions(opened) == 1


def test_settling_a_conflict_leaves_the_policy_in_force(in_force, opened, run):
    send(opened.engine, [make_prediction(1, NOW)], NOW)
    for expert, answer in ((ANN, "DENIED"), (BEN, "APPROVED")):
        send(opened.engine, [make_label(1, NOW, answer=answer)], NOW, expert)
    handle(opened.engine, in_force["adjudication"], NOW)
    run("tokens", "add", "ops", "--role", "operator")
    assert run("labels", "resolve", "c1", "--answer", "DENIED", "--expert", "ops")[:2] == (0, "c1 is DENIED, says ops.\n")
    assert count_versions(opened) == 1


def test_the_first_command_of_an_installation_records_the_first_policy(opened, home, ask):
    (home / "old.jsonl").write_text(json.dumps(make_history(1, NOW)["data"]) + "\n")
    ask("import", home / "old.jsonl")
    assert count_versions(opened) == 1


def test_the_policy_in_force_is_read_back_as_it_was_recorded(opened):
    agent = opened.pick_agent(None)
    odd = {"must_review": [{"field": "input.x", "op": "in", "value": ["a", 5]}, {"field": "input.y", "op": "equals", "value": True}]}
    rich = agent.model_validate({**agent.model_dump(), **odd, "prompt": agent.prompt, "budget": {"share": 0.2}, "slices": ("plan",)})
    with opened.writing() as connection:
        recorded = policies.record(connection, {"adjudication": rich}, NOW)
        assert policies.read_in_force(connection, {"adjudication": rich}, NOW) == recorded
