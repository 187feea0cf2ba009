"""What becomes of records from Kafka: events that are stored and handled at once, or dead letters with bytes and place."""

from __future__ import annotations

import threading
from datetime import timedelta

import orjson
import pytest
from sqlalchemy import func, select
from sqlalchemy.exc import OperationalError

from consumers import records, schemas
from daemon import cli
from storage import db, dead_letters, events, tokens
from storage.dead_letters import Record
from storage.tables import DeadLetter, Event, Label, Prediction
from tests import event_fixtures
from tests.conftest import NOW

pytestmark = pytest.mark.databases("sqlite", "postgresql")
KINDS = {"predictions": schemas.PREDICTION, "expert-labels": schemas.LABEL}


@pytest.fixture
def inlet(engine, now):
    agent = event_fixtures.make_agent()
    with db.writing(engine) as connection:
        for name, role in (("ann", "reviewer"), ("ops", "operator")):
            tokens.add(connection, name, role, now)
    return records.Inlet(engine, {agent.name: agent}, KINDS, lambda: now + timedelta(minutes=1))


def to_records(topic, sent, first=0):
    return [
        Record(topic, 0, first + number, one if isinstance(one, bytes | None) else orjson.dumps(one)) for number, one in enumerate(sent)
    ]


def count(engine, table):
    with db.reading(engine) as connection:
        return connection.execute(select(func.count()).select_from(table)).scalar_one()


def states(engine):
    with db.reading(engine) as connection:
        return sorted(connection.execute(select(Event.state)).scalars())


def parked(engine):
    with db.reading(engine) as connection:
        return {row["origin"]: row["reason"] for row in dead_letters.list_parked(connection)}


def test_predictions_are_stored_and_handled_in_one_transaction(inlet, now):
    inlet.take(to_records("predictions", [event_fixtures.make_prediction(n, now) for n in range(20)]))
    assert states(inlet.engine) == ["handled"] * 20
    assert count(inlet.engine, Prediction) == 20
    assert inlet.counters.by_state["handled"] == 20
    assert (inlet.progress.batches, inlet.progress.records, inlet.progress.last_records) == (1, 20, 20)


def test_what_comes_twice_is_applied_once(inlet, now):
    sent = [event_fixtures.make_prediction(n, now) for n in range(5)]
    inlet.take(to_records("predictions", sent))
    inlet.take(to_records("predictions", [*sent, b"no JSON"]))
    inlet.take(to_records("predictions", [b"no JSON"], first=5))
    assert (count(inlet.engine, Prediction), count(inlet.engine, DeadLetter)) == (5, 1)


def test_a_label_names_an_expert_who_is_known_by_a_token(inlet, now):
    inlet.take(to_records("predictions", [event_fixtures.make_prediction(n, now) for n in range(4)]))
    labels = [event_fixtures.make_label(n, now, expert=expert) for n, expert in enumerate(("ann", "eve", "ops"))]
    nobody = event_fixtures.make_label(3, now)
    nobody["data"].pop("expert", None)
    inlet.take(to_records("expert-labels", [*labels, nobody]))
    with db.reading(inlet.engine) as connection:
        assert connection.execute(select(Label.expert)).scalars().all() == ["ann"]
    told = parked(inlet.engine)
    assert "no valid token has this name" in told["expert-labels/0/1"]
    assert "use a token with the role reviewer" in told["expert-labels/0/2"]
    assert "name the expert" in told["expert-labels/0/3"]


def test_late_truth_needs_no_expert(inlet, now):
    inlet.take(to_records("predictions", [event_fixtures.make_prediction(1, now)]))
    truth = event_fixtures.make_label(1, now, kind="late_truth")
    truth["data"].pop("expert", None)
    inlet.take(to_records("expert-labels", [truth]))
    assert count(inlet.engine, Label) == 1


POISON = {
    "an empty value": (None, "this is empty"),
    "no JSON": (b"\xff{", "not JSON"),
    "two events": (b"{},{}", "one event is wanted (got 2 events)"),
    "half an event": (b'{"specversion": "1.0"', "not JSON"),
    "a wrong envelope": (b'{"specversion": "0.3"}', "specversion: should be '1.0'"),
    "an unknown agent": (orjson.dumps(event_fixtures.make_prediction(9, NOW, agent="scribe")), "unknown agent"),
    "an infinity": (b'{"specversion": Infinity}', "JSON has no such number"),
    "nested too deep": (b"[" * 100_000 + b"]" * 100_000, "nests too deep"),
}


@pytest.mark.parametrize(("value", "reason"), POISON.values(), ids=POISON)
def test_poison_is_kept_with_its_bytes_and_place_and_costs_nobody_else(inlet, now, value, reason):
    good = [event_fixtures.make_prediction(n, now) for n in range(3)]
    inlet.take(to_records("predictions", [*good[:1], value, *good[1:]]))
    assert count(inlet.engine, Prediction) == 3
    with db.reading(inlet.engine) as connection:
        (letter,) = dead_letters.list_parked(connection)
        assert dead_letters.find_record(connection, letter["id"]) == Record("predictions", 0, 1, value)
    assert reason in letter["reason"]


def test_a_dead_letter_is_announced_by_id_and_reason_without_what_it_holds(inlet):
    inlet.take(to_records("predictions", [b'{"specversion": "secret diagnosis"}']))
    with db.reading(inlet.engine) as connection:
        (letter,) = dead_letters.list_parked(connection)
        (told,) = connection.execute(select(Event.data).where(Event.state == "unsent")).scalars()
    assert "secret diagnosis" not in told
    assert orjson.loads(told)["letter"] == letter["id"]


def test_records_that_are_json_only_together_are_not_taken_for_events(inlet, now):
    event = orjson.dumps(event_fixtures.make_prediction(1, now))
    inlet.take(to_records("predictions", [event[:40], event[40:], event + b"," + event]))
    assert count(inlet.engine, Prediction) == 0
    assert len(parked(inlet.engine)) == 3


def test_an_error_while_storing_parks_the_one_record_at_fault(inlet, now, monkeypatch):
    genuine = schemas.to_incoming

    def fail(event, principal):
        if event["data"]["claim_id"] == "c3":
            raise KeyError("a bug")
        return genuine(event, principal)

    monkeypatch.setattr(schemas, "to_incoming", fail)
    sent = [event_fixtures.make_prediction(n, now) for n in range(5)]
    inlet.take(to_records("predictions", sent))
    assert count(inlet.engine, Prediction) == 4
    assert parked(inlet.engine) == {"predictions/0/3": "KeyError when it was stored"}


def test_a_database_that_comes_back_gets_the_batch_it_missed(inlet, now, monkeypatch):
    monkeypatch.setattr(records, "FIRST_WAIT_SECONDS", 0.01)
    genuine, failures = events.append, [OperationalError("", {}, Exception("locked"))] * 3

    def fail(*arguments):
        if failures:
            raise failures.pop()
        return genuine(*arguments)

    monkeypatch.setattr(events, "append", fail)
    inlet.store_patiently(inlet.read(to_records("predictions", [event_fixtures.make_prediction(1, now)])), threading.Event())
    assert count(inlet.engine, Prediction) == 1
    assert not inlet.progress.is_waiting_for_database


def test_a_database_that_stays_away_ends_the_wait(inlet, now, monkeypatch):
    monkeypatch.setattr(records, "FIRST_WAIT_SECONDS", 0.01)
    monkeypatch.setattr(records, "GIVE_UP_SECONDS", 0.1)

    def fail(*_):
        raise OperationalError("", {}, Exception("gone"))

    monkeypatch.setattr(events, "append", fail)
    with pytest.raises(OperationalError):
        inlet.store_patiently(inlet.read(to_records("predictions", [event_fixtures.make_prediction(1, now)])), threading.Event())


def test_a_parked_record_is_replayed_when_what_it_lacked_is_there(tmp_path, monkeypatch, capsys, now):
    assert cli.main(["init", str(tmp_path)]) == 0
    monkeypatch.chdir(tmp_path)
    engine = db.open_engine("sqlite:///ratchet.db")
    with db.writing(engine) as connection:
        value = orjson.dumps(event_fixtures.make_label(1, now, expert="ann"))
        letter = dead_letters.park_record(connection, Record("expert-labels", 1, 7, value), "unknown", "unknown", now)
        other = dead_letters.park_record(connection, Record("elsewhere", 1, 7, value), "unknown", "unknown", now)
    assert cli.main(["dead-letters", "replay", letter]) == 1
    assert "It stays parked: data.expert: no valid token" in capsys.readouterr().out
    assert cli.main(["tokens", "add", "ann", "--role", "reviewer"]) == 0
    assert cli.main(["dead-letters", "replay", letter]) == 0
    assert cli.main(["dead-letters", "replay", letter]) == 1
    assert cli.main(["dead-letters", "replay", other]) == 1
    assert "it came from the topic elsewhere" in capsys.readouterr().err
    assert states(engine).count("waiting") == 1
    with db.writing(engine) as connection:
        value = value.replace(b"DENIED", b"APPROVED")  # under the same id
        letter = dead_letters.park_record(connection, Record("expert-labels", 1, 8, value), "unknown", "unknown", now)
    capsys.readouterr()
    assert cli.main(["dead-letters", "replay", letter]) == 1
    assert "parked anew" in capsys.readouterr().out
    with db.reading(engine) as connection:
        assert letter not in {row["id"] for row in dead_letters.list_parked(connection)}
        assert any("used for other content" in row["reason"] for row in dead_letters.list_parked(connection))
    engine.dispose()


def test_a_field_s_name_that_no_database_takes_is_parked_with_its_reason(inlet, now):
    inlet.take(
        to_records("predictions", [event_fixtures.make_prediction(1, now), event_fixtures.make_prediction(2, now, input={"\x00": 1})])
    )
    assert count(inlet.engine, Prediction) == 1
    (reason,) = parked(inlet.engine).values()
    assert reason.startswith('data.input."\\u0000"')


def test_a_text_that_postgresql_does_not_keep_is_parked_and_one_that_only_looks_like_it_is_read(inlet, now):
    inputs = {1: {"note": ["a\x00b"]}, 2: {"note": [r"a\u0000b"]}}
    inlet.take(to_records("predictions", [event_fixtures.make_prediction(number, now, input=held) for number, held in inputs.items()]))
    (reason,) = parked(inlet.engine).values()
    assert reason == 'data.input.note.0: a text holds the character NUL, which PostgreSQL does not keep: leave it out (got "a\\u0000b")'
    with db.reading(inlet.engine) as connection:
        (kept,) = connection.execute(select(Prediction.input)).scalars()
    assert kept == inputs[2]
