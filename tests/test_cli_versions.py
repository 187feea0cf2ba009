"""The commands that look at versions, datasets, labels, the ledger, dead letters, tokens and alarms, and those that change the champion."""

import dataclasses
import json
import os
import re
import socket
import sqlite3
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from daemon import policies
from daemon.cli import context
from storage import alarms, datasets, exams, leases, registry, runs, snapshots
from tests.event_fixtures import ANN, BEN, PRODUCER, handle, make_history, make_label, make_prediction, send
from tests.version_fixtures import copying, drip, listening, make_made, register

pytest_plugins = ["tests.cli_fixtures"]

AGENT = "adjudication"
AT = datetime(2026, 1, 5, 9, tzinfo=UTC)


@pytest.fixture
def site(home, opened):
    """An installation whose server is `cp`, with v0 to v1.2 registered and v1.0 in service."""
    publisher = "\n".join(f"{key} = {json.dumps(value)}" for key, value in {"path": "serving/current.json", **copying(home)}.items())
    place = home / "ratchet.toml"
    text = place.read_text().replace(
        "[agents.adjudication.publisher]", f"[agents.adjudication.publisher]\n{publisher}\ntimeout_seconds = 1"
    )
    place.write_text(text.replace("[agents.adjudication.columns]", '[agents.adjudication.columns]\nzone = "UTC"'))
    with opened.writing() as connection:
        register(connection, home, 3, AT)
        registry.change_champion(connection, AGENT, "v1.0", "v0", "promote", "ratchet", "It is better.", AT)
    return opened


def deliver(opened, sent, now=AT, principal=PRODUCER):
    send(opened.engine, sent, now, principal)
    with opened.writing() as connection:
        agent = policies.record(connection, opened.settings.agents, now)[AGENT]
    handle(opened.engine, agent, now)


def champion(opened):
    with opened.reading() as connection:
        return registry.champion(connection, AGENT)


def test_a_rollback_publishes_at_once_and_says_how_long_it_took(site, run, home):
    status, out, _ = run("promote", "v1.1", "--agent", AGENT)
    assert (status, "v1.0 → v1.1, confirmed after" in out) == (0, True)
    status, out, _ = run("rollback", "--reason", "too many denials")
    assert status == 0
    assert re.match(r"adjudication: v1\.1 → v1\.0, confirmed after [\d.]+ s: the server reports sha256:", out)
    assert json.loads((home / "served.json").read_text())["version"] == champion(site) == "v1.0"


def test_a_version_says_what_it_was_examined_on_and_whether_that_is_served(site, ask, run, home):
    made = {}
    with site.writing() as connection:
        for method in ("lora", "qlora"):
            asked = runs.queue(connection, AGENT, "train", "manual", method, "ops", {}, AT + timedelta(seconds=len(method)))
            runs.lease(connection, runs.read(connection, asked), "cpu", 1, "/nowhere")
            runs.begin(connection, runs.read(connection, asked), AT)
            told = {"method": method, "examined_in_4bit": method == "qlora"}
            runs.finish(connection, runs.read(connection, asked), {"training": told}, AT)
            made[method] = registry.register(connection, AGENT, dataclasses.replace(make_made(home, len(method)), run=asked), AT)
    told = {method: ask("versions", "show", version) for method, version in made.items()}
    assert {method: one["method"] for method, one in told.items()} == {"lora": "lora", "qlora": "qlora"}
    assert told["lora"]["examined_on"] == "the whole base"
    assert "examined_on: the base in 4 bits: servers are told to use the whole base now" in run("versions", "show", made["qlora"])[1]


def test_a_rollback_goes_where_it_is_told(site, ask):
    ask("promote", "v1.1")
    done = ask("rollback", "--to", "v0", "--reason", "start anew")
    assert (done["version"], done["previous"], done["kind"], done["state"]) == ("v0", "v1.1", "rollback", "confirmed")
    assert done["seconds"] < 5
    assert [row["reason"] for row in ask("versions", "history")][-1] == "start anew"


def test_a_rollback_that_no_server_confirms_stays_and_fails_loudly(site, run, ask, home):
    ask("promote", "v1.1")
    text = (home / "ratchet.toml").read_text()
    (home / "ratchet.toml").write_text(text.replace(f"command = {json.dumps(copying(home)['command'])}", 'command = "false"'))
    status, out, err = run("rollback", "--reason", "harm")
    assert status == 1
    assert "unconfirmed after" in out
    assert err == "v1.0 is the champion all the same: `ratchet up` goes on trying, and an alarm is open.\n"
    assert champion(site) == "v1.0"
    assert [row["kind"] for row in ask("alarms", "list")] == ["rollback_unconfirmed"]


def test_a_rollback_while_another_process_speaks_to_the_server_says_so_and_claims_no_alarm(site, run, ask):
    ask("promote", "v1.1")
    with site.writing() as connection:
        alive = f"{socket.gethostname()} {os.getppid()} p n"
        leases.acquire(connection, f"deploy:{AGENT}", alive, context.read_clock(), timedelta(hours=1))
    status, out, err = run("rollback", "--reason", "harm")
    assert status == 1
    assert re.fullmatch(
        r"adjudication: v1\.1 → v1\.0, requested after [\d.]+ s: its server was not heard, "
        r"another process had the right to speak to it\.\n",
        out,
    )
    assert err == (
        "v1.0 is the champion all the same: `ratchet up` goes on trying, and `ratchet versions history` shows what comes of it.\n"
    )
    assert ask("alarms", "list") == []


def test_a_rollback_at_a_server_that_drips_ends_with_the_time(site, run, ask, home):
    ask("promote", "v1.1")
    with listening(drip()) as url:
        place = home / "ratchet.toml"
        place.write_text(
            place.read_text().replace("timeout_seconds = 1", f'timeout_seconds = 1\nurl = "{url}"').replace('"command"', '"url"')
        )
        began = time.monotonic()
        status, out, _ = run("rollback", "--reason", "harm")
        assert time.monotonic() - began < 4
    assert status == 1
    assert f"{url} does not answer within 1 s." in out


def test_a_promotion_that_no_server_confirms_is_taken_back(site, run, ask, home):
    text = (home / "ratchet.toml").read_text()
    (home / "ratchet.toml").write_text(text.replace(f"command = {json.dumps(copying(home)['command'])}", 'command = "false"'))
    status, out, _ = run("promote", "v1.1")
    assert (status, "reverted after" in out) == (1, True)
    assert champion(site) == "v1.0"


def test_what_is_refused_is_one_sentence_and_exit_1(site, run):
    for arguments, sentence in [
        (("promote", "v1.0"), "v1.0 is the champion of adjudication already"),
        (("promote", "v9.0"), "agent adjudication has no version 'v9.0': there are v0, v1.0, v1.1, v1.2"),
        (("rollback", "--reason", "x", "--to", "v1.2"), "v1.2 was never in service"),
        (("promote", "v0", "--force"), "v0 has no verdict yet: to promote it all the same give --force and --reason"),
        (("versions", "show", "v9.0"), "agent adjudication has no version 'v9.0'"),
        (("why", "nobody"), "no prediction and no imported case has the claim id 'nobody'"),
        (("datasets", "show", "4"), "agent adjudication has no dataset version 4"),
        (("alarms", "clear", "drift"), "adjudication has no open alarm 'drift'"),
        (("tokens", "revoke", "ann"), "there is no valid token named 'ann'"),
        (("dead-letters", "replay", "01X"), "there is no parked dead letter 01X"),
        (("labels", "resolve", "c1", "--answer", "DENIED", "--expert", "ops"), "'c1' has no open conflict"),
    ]:
        status, out, err = run(*arguments)
        assert (status, out) == (1, "")
        assert sentence in err
        assert len(err.splitlines()) == 1


LISTINGS = "versions list, versions history, datasets list, datasets verify, runs list, alarms list, labels conflicts, ledger show, why c1"


@pytest.mark.parametrize("command", LISTINGS.split(", "))
def test_a_listing_of_an_agent_that_is_not_there_is_refused(site, run, command):
    assert run(*command.split(), "--agent", "zz") == (1, "", f"ratchet: there is no agent 'zz': the configuration has {AGENT}\n")


def test_a_rollback_without_a_reason_is_called_wrongly(site, run):
    assert run("rollback")[0] == 2


def test_a_forced_promotion_is_marked_for_ever(site, ask, run):
    with site.writing() as connection:
        bad = registry.register(connection, AGENT, make_made(Path(site.settings.home), 9), AT)
        registry.give_verdict(connection, AGENT, bad, "reject", ["It denies what should be approved."], AT)
    assert run("promote", bad, "--reason", "please")[0] == 1
    assert run("promote", bad, "--force")[0] == 1
    ask("promote", bad, "--force", "--reason", "the board wants it")
    row = next(one for one in ask("versions", "list") if one["name"] == bad)
    assert (row["is_forced"], row["verdict"], row["is_champion"]) == (True, "reject", True)
    assert run("rollback", "--reason", "no")[0] == 0
    assert next(one for one in ask("versions", "list") if one["name"] == bad)["is_forced"]


def test_show_gives_every_number_of_the_exam(site, ask, run):
    report = {"wins": 12, "losses": 3, "limits": [{"name": "gold", "harm": 0.0123456}], "reasons": ["It is better."]}
    with site.writing() as connection:
        exam = exams.open_new(connection, AGENT, "exam", "v1.1", "v1.0", AT)
        exams.close(connection, exam, "promote", report, AT)
    shown = ask("versions", "show", "v1.1")
    assert shown["exams"][0]["report"] == report
    assert shown["serving_name"].startswith("adjudication-v1.1-")
    _, out, _ = run("versions", "show", "v1.1")
    assert "wins: 12" in out
    assert "harm: 0.01235" in out


def test_why_says_who_decided_a_claim_and_who_was_in_production(site, ask, run, home):
    deliver(site, [make_history(number, AT) for number in range(30)])
    with site.reading() as connection:
        assert registry.read(connection, AGENT, "v1.0")["dataset"] is None
    number = datasets.build(site.engine, AGENT, home / "snapshots", {}, AT)
    with site.writing() as connection:
        trained = registry.register(connection, AGENT, make_made(home, 11, dataset=number), AT)
        registry.give_verdict(connection, AGENT, trained, "promote", ["better"], AT)
        registry.change_champion(connection, AGENT, trained, "v1.0", "promote", "ann", "it is better", AT + timedelta(days=1))
    later = AT + timedelta(days=2)
    deliver(site, [make_prediction(1, later, model_version=trained, confidence=0.4)], later)
    deliver(site, [make_label(1, later)], later, ANN)
    (found,) = ask("why", "c1", "--agent", AGENT)["predictions"]
    assert found["version"]["name"] == trained
    assert found["version"]["trained_on"]["number"] == number
    assert (found["in_service_then"]["version"], found["in_service_then"]["actor"]) == (trained, "ann")
    assert found["routing"]["reasons"] == ["below_threshold"]
    assert found["routing"]["policy"]["threshold"] == 0.7
    assert found["routing"]["inclusion_probability"] == 1.0
    assert found["truth"] == {"answer": "DENIED", "kind": "review", "expert": "ann"}
    assert [step["action"] for step in found["reviews"][0]["steps"]] == ["opened", "answered"]
    assert found["labels"][0]["in_service_then"] == trained
    assert len(found["ledger_entries"]) == 1
    (imported,) = ask("why", "h3")["predictions"]
    assert (imported["origin"], imported["version"], imported["truth"]["kind"]) == ("import", None, "import")
    status, out, _ = run("why", "c1")
    assert status == 0
    assert "expert: ann" in out


def test_datasets_are_listed_shown_compared_and_proven_whole(site, ask, run, home):
    deliver(site, [make_history(number, AT) for number in range(30)])
    datasets.build(site.engine, AGENT, home / "snapshots", {}, AT)
    deliver(site, [make_history(number, AT) for number in range(30, 33)])
    datasets.build(site.engine, AGENT, home / "snapshots", {}, AT)
    assert [(row["number"], row["rows"], row["parent"]) for row in ask("datasets", "list")] == [(1, 30, None), (2, 33, 1)]
    shown = ask("datasets", "show", "2")
    assert shown["origins"] == {"import": 33}
    changes = ask("datasets", "diff", "1", "2")
    assert [len(rows) for rows in changes.values()] == [3, 0, 0]
    assert run("datasets", "diff", "1", "2")[1].startswith("3 added, 0 removed, 0 changed\n")
    assert ask("datasets", "verify") == [{"agent": AGENT, "number": number, "problems": []} for number in (1, 2)]

    shard = Path(shown["folder"]) / "shard-00000.parquet"
    rows = pq.read_table(shard).to_pylist()
    rows[4]["answer"] = "PENDING"
    pq.write_table(pa.Table.from_pylist(rows, schema=snapshots.SCHEMA), shard)
    status, out, _ = run("datasets", "verify")
    assert status == 1
    assert "adjudication 1: whole" in out
    assert "adjudication 2: DAMAGED" in out
    assert f"row {rows[4]['row_id']}" in out
    assert ask("datasets", "verify", "1")[0]["problems"] == []
    (Path(shown["folder"]) / "manifest.json").unlink()
    assert "restore the snapshot" in run("datasets", "verify", "2")[1]


def test_a_conflict_is_shown_and_settled_through_the_same_door(site, ask, run):
    run("tokens", "add", "ops", "--role", "operator")
    assert "Nobody disagrees." in run("labels", "conflicts")[1]
    deliver(site, [make_prediction(1, AT)])
    deliver(site, [make_label(1, AT)], principal=ANN)
    deliver(site, [make_label(1, AT, answer="APPROVED", kind="second_read")], principal=BEN)
    (conflict,) = ask("labels", "conflicts")
    assert conflict == {"agent": AGENT, "claim_id": "c1", "prediction_id": "p1", "answers": {"ann": "DENIED", "ben": "APPROVED"}}
    assert "unknown answer" in run("labels", "resolve", "c1", "--answer", "MAYBE", "--expert", "ops")[2]
    assert (
        "--expert is 'ann': a conflict is settled by one of ops"
        in run("labels", "resolve", "c1", "--answer", "DENIED", "--expert", "ann")[2]
    )
    status, out, _ = run("labels", "resolve", "c1", "--answer", "PENDING", "--expert", "ops", "--rationale", "see the letter")
    assert (status, out) == (0, "c1 is PENDING, says ops.\n")
    assert ask("labels", "conflicts") == []
    (found,) = ask("why", "c1")["predictions"]
    assert found["truth"] == {"answer": "PENDING", "kind": "adjudication", "expert": "ops"}


def test_of_several_conflicts_on_a_claim_one_is_named_by_its_prediction(site, run):
    run("tokens", "add", "ops", "--role", "operator")
    for number in (1, 2):
        deliver(site, [make_prediction(number, AT, claim_id="c", input={"treatment": f"the {number}. one"})])
        deliver(site, [make_label(number, AT, claim_id="c", prediction_id=f"p{number}")], principal=ANN)
        deliver(site, [make_label(number, AT, claim_id="c", prediction_id=f"p{number}", answer="APPROVED")], principal=BEN)
    status, _, err = run("labels", "resolve", "c", "--answer", "DENIED", "--expert", "ops")
    assert (status, "'c' has several conflicts: name a prediction, p" in err) == (1, True)
    assert run("labels", "resolve", "p2", "--answer", "DENIED", "--expert", "ops")[0] == 0


@pytest.mark.parametrize("command", [("rollback",), ("train",), ("dead-letters", "discard", "X"), ("runs", "cancel")])
def test_a_reason_that_says_nothing_is_refused(site, run, command):
    status, _, err = run(*command, "--reason", " ")
    assert (status, "the reason is empty" in err) == (2, True)


def test_the_ledger_is_shown_and_verified(site, ask, run, home):
    whole = ask("ledger", "verify")
    assert whole["problems"] == []
    newest = ask("ledger", "show", "--limit", "1")[0]
    assert (newest["seq"], newest["hash"], newest["kind"]) == (whole["entries"], whole["head"], "promote")
    assert run("ledger", "verify", "--head", whole["head"])[0] == 0
    status, out, err = run("ledger", "verify", "--head", "abc")
    assert (status, out, "'abc' is no hash: copy the 64 digits" in err) == (2, "", True), "a slip says nothing about the chain"
    with sqlite3.connect(home / "ratchet.db") as database:
        database.execute("DELETE FROM ledger WHERE seq = ?", (whole["entries"],))
    database.close()
    assert run("ledger", "verify")[0] == 0
    status, out, _ = run("ledger", "verify", "--head", whole["head"])
    assert (status, "the chain was cut or replaced" in out) == (1, True)
    with sqlite3.connect(home / "ratchet.db") as database:
        database.execute("UPDATE ledger SET body = '{}' WHERE seq = 2")
    database.close()
    damaged = ask("ledger", "verify", status=1)
    assert "entry 2" in damaged["problems"][0]


def park(site):
    """A dead letter: a label whose answer the agent does not know any more."""
    deliver(site, [make_prediction(1, AT)])
    send(site.engine, [make_label(1, AT)], AT, ANN)
    agent = site.pick_agent(None)
    with site.writing() as connection:
        narrow = agent.model_copy(update={"labels": ("APPROVED", "PENDING"), "approved": None, "denied": None})
        known = policies.record(connection, {AGENT: narrow}, AT)[AGENT]
    handle(site.engine, known, AT)


def test_a_dead_letter_is_replayed_once_its_cause_is_gone(site, ask, run):
    park(site)
    (letter,) = ask("dead-letters", "list")
    assert letter["reason"].startswith("its answer is none of")
    assert json.loads(ask("dead-letters", "show", letter["id"])["data"])["answer"] == "DENIED"
    shown = dict(line.split(maxsplit=1) for line in run("dead-letters", "show", letter["id"])[1].splitlines())
    assert json.loads(shown["data"])["answer"] == "DENIED"
    assert "payload" not in shown, "a letter of an event has no bytes of a record"
    with site.writing() as connection:  # as `ratchet up` does with the corrected configuration
        policies.record(connection, site.settings.agents, AT)
    status, out, _ = run("dead-letters", "replay", letter["id"])
    assert (status, out) == (0, f"The event {letter['event']} is handled.\n")
    assert ask("dead-letters", "list") == []
    assert ask("why", "c1")["predictions"][0]["truth"]["answer"] == "DENIED"


def test_a_dead_letter_that_fails_again_is_parked_again(site, ask, run):
    park(site)
    (letter,) = ask("dead-letters", "list")
    status, out, _ = run("dead-letters", "replay", letter["id"])
    assert (status, "is dead: its answer is none of" in out) == (1, True)
    assert [one["event"] for one in ask("dead-letters", "list")] == [letter["event"]]


def test_a_dead_letter_is_discarded_with_a_reason(site, ask, run):
    park(site)
    (letter,) = ask("dead-letters", "list")
    assert run("dead-letters", "discard", letter["id"])[0] == 2
    assert run("dead-letters", "discard", letter["id"], "--reason", "a test")[0] == 0
    assert ask("dead-letters", "list") == []
    assert ask("dead-letters", "show", letter["id"])["note"] == "a test"


def test_a_token_is_shown_once_and_can_be_revoked(home, run, ask):
    status, secret, err = run("tokens", "add", "ann", "--role", "reviewer")
    assert status == 0
    assert re.fullmatch(r"rat_[\w-]{43}\n", secret)
    assert "shown once" in err
    assert ask("tokens", "add", "node-1", "--role", "producer").keys() == {"name", "role", "token"}
    listed = run("tokens", "list", "--json")[1]
    assert [(row["name"], row["role"], row["revoked_at"]) for row in json.loads(listed)] == [
        ("ann", "reviewer", None),
        ("node-1", "producer", None),
    ]
    assert secret.strip() not in listed
    assert secret.strip().encode() not in b"".join(path.read_bytes() for path in home.glob("ratchet.db*"))
    assert run("tokens", "revoke", "ann")[0] == 0
    assert ask("tokens", "list")[0]["revoked_at"] is not None
    assert "names are never reused" in run("tokens", "add", "ann", "--role", "operator")[2]
    assert run("tokens", "add", "x", "--role", "king")[0] == 2


def test_alarms_are_listed_and_closed(site, ask, run):
    assert "No alarm is open." in run("alarms", "list")[1]
    with site.writing() as connection:
        alarms.raise_alarm(connection, AGENT, "drift", "the world has changed", {"field": "age"}, AT)
    assert ask("alarms", "list")[0]["detail"] == {"field": "age"}
    assert run("alarms", "clear", "drift", "--agent", AGENT)[0] == 0
    assert ask("alarms", "list") == []
    assert ask("ledger", "show", "-n", "1")[0]["kind"] == "alarm cleared"


def test_every_listing_is_json_and_a_table(site, run):
    commands = ["versions list", "versions history", "datasets list", "labels conflicts", "ledger show", "dead-letters list", "tokens list"]
    for command in [*commands, "alarms list"]:
        status, out, _ = run(*command.split(), "--json")
        assert status == 0
        assert isinstance(json.loads(out), list)
        assert run(*command.split())[0] == 0


def test_who_acts_is_named_in_a_container_without_names_too(monkeypatch):
    def fail():
        raise KeyError("uid not found")

    assert context.read_actor()
    monkeypatch.setattr(context.getpass, "getuser", fail)
    assert context.read_actor().startswith("uid-")


def test_a_claim_of_another_agent_is_another_claim(site, run):
    deliver(site, [make_prediction(1, AT)])
    assert run("why", "c1")[0] == 0
    assert run("why", "c1", "--agent", "scribe")[0] == 1
