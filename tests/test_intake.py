"""Where a process consumes too, an event is handled in the transaction that stores it: all of both is on the disk, or nothing."""

import asyncio
import subprocess
import sys

import orjson
import pytest
from sqlalchemy import select

from consumers import embedded, prediction_handler
from storage import db, dead_letters, predictions
from storage.tables import Event, Label, Prediction, Review, ReviewStep
from tests.event_fixtures import make_agent, make_label, make_prediction, undo_all
from tests.web_fixtures import Clock, Site

pytestmark = pytest.mark.databases("sqlite", "postgresql")

BATCH = {"Content-Type": "application/cloudevents-batch+json"}
DIE_WHILE_HANDLING = """
import os, sys
from datetime import datetime
from pathlib import Path
from consumers import embedded, handlers
from storage import db, predictions
from tests.test_intake import post
from tests.web_fixtures import Clock, Site
insert_new = predictions.insert_new
def die(connection, rows):
    insert_new(connection, rows)
    os._exit(9)
predictions.insert_new = die
engine = db.open_engine(sys.argv[1])
site = Site(engine, Clock(datetime.fromisoformat(sys.argv[2])), Path(sys.argv[3]), embedded.Counters())
post(site, "/v1/predictions", content=sys.stdin.buffer.read(), headers={"Content-Type": "application/cloudevents-batch+json"})
"""


@pytest.fixture
def site(engine, now, tmp_path):
    """An application that handles what comes in, as in a process with both roles."""
    site = Site(engine, Clock(now), tmp_path, embedded.Counters())
    yield site
    site.app.state.site.intake.close()


def post(site, path, name="node", **options):
    async def call():
        async with site.client(name) as client:
            return await client.post(path, **options)

    return asyncio.run(call())


def post_all(site, events, path="/v1/predictions", name="node"):
    answer = post(site, path, name, content=orjson.dumps(events), headers=BATCH)
    assert answer.status_code == 202
    return [one["outcome"] for one in answer.json()["results"]]


def rows(engine, table, *columns):
    with db.reading(engine) as connection:
        return sorted(tuple(row) for row in connection.execute(select(*(getattr(table, name) for name in columns))))


def break_handling_of(claim, monkeypatch):
    real = prediction_handler._to_row

    def fail(event, data, *rest):
        if data["claim_id"] == claim:
            raise ZeroDivisionError
        return real(event, data, *rest)

    monkeypatch.setattr(prediction_handler, "_to_row", fail)


def test_an_event_is_handled_before_it_is_acknowledged(site):
    assert post_all(site, [make_prediction(1, site.clock(), confidence=0.5), make_prediction(2, site.clock())]) == ["stored", "stored"]
    assert rows(site.engine, Event, "event_id", "state", "handled_at") == [(f"p{n}", "handled", site.clock()) for n in (1, 2)]
    assert rows(site.engine, Review, "claim_id", "reasons") == [("c1", ["below_threshold"])]
    assert site.app.state.site.intake._counters.by_state == {"handled": 2}
    assert site.stored == [], "nobody has to be woken"
    assert site.handle() == {}


def test_the_same_event_twice_in_a_request_and_once_more_is_handled_once(site):
    event = make_prediction(1, site.clock(), confidence=0.5)
    assert post_all(site, [event, event]) == ["stored", "stored"]
    post_all(site, [event, make_prediction(2, site.clock())])
    assert rows(site.engine, Prediction, "prediction_id") == [("p1",), ("p2",)]
    assert rows(site.engine, ReviewStep, "action") == [("opened",)]


def test_a_conflict_among_good_events_is_refused_alone_and_changes_nothing(site):
    first, other = make_prediction(1, site.clock()), make_prediction(1, site.clock(), decision="DENIED")
    assert post_all(site, [first, other, make_prediction(2, site.clock())]) == ["stored", "conflict", "stored"]
    assert rows(site.engine, Prediction, "prediction_id", "decision") == [("p1", "APPROVED"), ("p2", "APPROVED")]


def test_a_label_that_comes_first_waits_at_the_door_too(site):
    post_all(site, [make_label(1, site.clock())], "/v1/labels", "ann")
    assert rows(site.engine, Event, "state") == [("waiting",)]
    post_all(site, [make_prediction(1, site.clock())])
    assert rows(site.engine, Event, "state") == [("handled",), ("handled",)]
    assert rows(site.engine, Label, "expert", "answer") == [("ann", "DENIED")]


def test_a_batch_whose_handling_fails_is_stored_and_left_to_the_consumer(site, monkeypatch):
    break_handling_of("c3", monkeypatch)
    assert post_all(site, [make_prediction(number, site.clock()) for number in range(5)]) == ["stored"] * 5
    assert rows(site.engine, Event, "state", "handled_at") == [("received", None)] * 5
    assert rows(site.engine, Prediction, "id") == []
    assert site.handle() == {"handled": 4, "dead": 1}
    with db.reading(site.engine) as connection:
        [parked] = dead_letters.list_parked(connection)
    assert "ZeroDivisionError" in parked["reason"]


@pytest.mark.databases("sqlite")
def test_what_a_failing_disk_has_undone_is_not_acknowledged_and_may_be_sent_again(site, monkeypatch):
    sent = [make_prediction(number, site.clock(), confidence=0.5) for number in range(3)]
    with monkeypatch.context() as disk:
        disk.setattr(predictions, "insert_new", undo_all)
        assert post(site, "/v1/predictions", content=orjson.dumps(sent), headers=BATCH).status_code == 503
    assert rows(site.engine, Event, "ulid") == []
    assert post_all(site, sent) == ["stored"] * 3
    assert rows(site.engine, Event, "state") == [("handled",)] * 3


@pytest.mark.databases("sqlite")
def test_what_was_undone_while_a_repetition_was_found_is_not_acknowledged(site, monkeypatch):
    def undo(connection, rows):
        connection.connection.dbapi_connection.rollback()
        return len(rows) - 1

    with monkeypatch.context() as disk:
        disk.setattr(predictions, "insert_new", undo)
        sent = [make_prediction(number, site.clock()) for number in range(2)]
        assert post(site, "/v1/predictions", content=orjson.dumps(sent), headers=BATCH).status_code == 503
    assert rows(site.engine, Event, "ulid") == rows(site.engine, Prediction, "id") == []


def test_a_process_that_is_killed_between_storing_and_committing_has_stored_nothing(engine, now, tmp_path):
    body = orjson.dumps([make_prediction(number, now, confidence=0.5) for number in range(3)])
    asked = [sys.executable, "-c", DIE_WHILE_HANDLING, str(engine.url), now.isoformat(), str(tmp_path)]
    assert subprocess.run(asked, input=body, check=False).returncode == 9
    assert rows(engine, Event, "ulid") == rows(engine, Prediction, "id") == []


def test_both_ways_end_in_the_same_state(engine, new_engine, now, tmp_path):
    other = new_engine()
    states = []
    for one, counters in ((engine, None), (other, embedded.Counters())):
        site = Site(one, Clock(now), tmp_path, counters, make_agent(budget_share=0.3, explore_share=0.2, slice_by=("region",)))
        for start in range(0, 400, 100):
            post_all(site, [make_prediction(number, now, confidence=number % 97 / 97) for number in range(start, start + 100)])
            site.handle()
            post_all(site, [make_label(number, now) for number in range(start, start + 5)], "/v1/labels", "ann")
            site.handle()
        site.app.state.site.intake.close()
        columns = [column.name for column in Prediction.__table__.columns if column.name not in ("input", "attributes")]
        states.append(
            (rows(one, Prediction, *columns), rows(one, Review, "claim_id", "state", "priority"), rows(one, Label, "id", "review"))
        )
    assert states[0] == states[1]
