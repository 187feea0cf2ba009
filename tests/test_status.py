"""daemon.status, its page and command, health and metrics: how things stand, without a word of a claim."""

import asyncio
import json
from datetime import UTC, datetime, timedelta

import pytest
from fastapi import FastAPI
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import text

from daemon import cli, status
from daemon.cli import status as command
from daemon.web import app as web
from daemon.web import pages
from daemon.web.metrics import Metrics
from storage import alarms, db, exams, registry, runs, streams
from tests.event_fixtures import make_label, make_prediction, send
from tests.web_fixtures import HOUR, Site, site

pytestmark = pytest.mark.databases("sqlite", "postgresql")

__all__ = ["site"]


def make(adapter):
    return registry.Made("base", "sha256:" + "a" * 64, adapter, adapter, "t", "prompt", "p", ["A", "B"], "l", run=adapter)


@pytest.fixture
def busy(site: Site) -> Site:
    """A site at work: three cases wait, a run trains, an exam is open, an alarm too."""
    now = site.clock()
    send(site.engine, [make_prediction(n, now, confidence=0.4, input={"note": "SECRET"}) for n in range(3)], now)
    site.handle()
    send(site.engine, [make_label(1, now)], now, site.principal("ann"))
    site.handle()
    send(site.engine, [make_prediction(9, now - HOUR)], now - HOUR)
    with db.writing(site.engine) as connection:
        registry.register_bare(connection, "adjudication", make(None), now - 48 * HOUR)
        registry.register(connection, "adjudication", make("sha256:" + "b" * 64), now)
        exams.open_new(connection, "adjudication", "exam", "v1.0", "v0", now)
        alarms.raise_alarm(connection, "adjudication", "drift", "region looks different", {}, now - 2 * HOUR)
        runs.queue(connection, "adjudication", "train", "labels", "1000 new labels", "ratchet", {}, now)
        move(connection, lambda run: runs.lease(connection, run, "cpu", 1, "runs/1"))
        move(connection, lambda run: runs.begin(connection, run, now))
        move(connection, lambda run: runs.beat(connection, run, {"phase": "training", "step": 30, "steps": 120, "eta_seconds": 61}, now))
    return site


def move(connection, change):
    assert change(runs.list_all(connection)[0])


def get(app: FastAPI, site, path, name=None):
    async def ask():
        async with site.client(name) as client:
            client._transport.app = app
            return await client.get(path)

    return asyncio.run(ask())


def read_metrics(answer):
    found = {}
    for family in text_string_to_metric_families(answer.text):
        for sample in family.samples:
            found[sample.name, *sorted(sample.labels.items())] = sample.value
    return found


def test_everything_is_told_at_one_moment(busy):
    told = status.collect(busy.engine, busy.settings.agents, busy.clock())
    assert told["events"]["received"] == 1
    assert told["events"]["oldest_seconds"] == 3600
    agent = told["agents"]["adjudication"]
    assert agent["champion"]["version"] == "v0"
    assert agent["reviews"] == {"open": 2, "leased": 0}
    assert agent["labels"] == {"fresh": 1, "until_run": 999}
    assert (agent["run"]["share"], agent["run"]["device"]) == (0.25, "cpu")
    assert [(exam["kind"], exam["candidate"]) for exam in agent["exams"]] == [("exam", "v1.0")]
    assert [alarm["kind"] for alarm in agent["alarms"]] == ["drift"]
    assert "SECRET" not in str(told)


def test_a_run_that_was_parked_is_shown_until_a_newer_one(busy):
    with db.writing(busy.engine) as connection:
        move(connection, lambda run: runs.give_up(connection, run, "parked", "Traceback\nout of memory", busy.clock()))
    run = status.collect(busy.engine, busy.settings.agents, busy.clock())["agents"]["adjudication"]["run"]
    assert (run["state"], run["error"]) == ("parked", "Traceback\nout of memory")


def test_confidences_that_say_nothing_are_noticed(site):
    send(site.engine, [make_prediction(n, site.clock(), confidence=0.9) for n in range(120)], site.clock())
    site.handle()
    assert status.collect(site.engine, site.settings.agents, site.clock())["agents"]["adjudication"]["confidences"] == "constant"


def test_the_page_shows_it_to_every_token_and_renews_itself(busy):
    async def look(name):
        async with busy.client() as client:
            page = await client.get("/login")
            csrf = page.text.split('name="csrf" value="')[1].split('"')[0]
            await client.post("/login", data={"csrf": csrf, "token": busy.secrets[name]})
            return (await client.get("/status")).text

    for name in ("ann", "ops", "node"):
        page = asyncio.run(look(name))
        assert '<meta http-equiv="refresh" content="10">' in page
        assert "region looks different" in page
        assert "2 hours ago" in page
        assert 'value="0.25"' in page
        assert "SECRET" not in page


def test_the_page_of_an_empty_installation_is_a_page_too(site):
    told = status.collect(site.engine, site.settings.agents, site.clock())
    assert "none yet" in pages.render("status.html", told=told).body.decode()
    assert "No agent is configured" in pages.render("status.html", told={**told, "agents": {}}).body.decode()


def test_the_command_prints_one_screen_or_json(tmp_path, monkeypatch, capsys):
    assert cli.main(["init", str(tmp_path / "home")]) == 0
    monkeypatch.chdir(tmp_path / "home")
    capsys.readouterr()
    command.status()
    screen = capsys.readouterr().out
    assert "0 unhandled" in screen
    assert "to send" not in screen, "nobody waits for it where there is no Kafka"
    assert "Champion     none yet" in screen
    command.status(as_json=True)
    assert json.loads(capsys.readouterr().out)["agents"]["adjudication"]["labels"]["fresh"] == 0


def test_the_command_names_alarms_runs_and_exams(busy):
    lines = "\n".join(line for line, _ in command._compose(status.collect(busy.engine, busy.settings.agents, busy.clock())))
    for part in (
        "ALARM drift: region looks different",
        "Training     running 25%, 61 s left",
        "Exam         v1.0 against v0",
        "oldest 3600 s",
    ):
        assert part in lines


def test_health_and_metrics_are_on_both_ports_and_need_no_token(busy):
    metrics = Metrics(busy.engine, busy.settings.agents, busy.clock, {"handled": 4})
    for app in (busy.app, web.create_ops_app(busy.engine, metrics)):
        assert get(app, busy, "/healthz").json() == {"status": "ok"}
        assert get(app, busy, "/readyz").json() == {"status": "ok", "stream": None}
        assert get(app, busy, "/metrics").status_code == 200
    assert get(web.create_ops_app(busy.engine, metrics), busy, "/status").status_code == 404


@pytest.mark.databases("sqlite")
def test_readiness_is_the_database_s(site):
    with site.engine.begin() as connection:
        connection.execute(text("ALTER TABLE events RENAME TO elsewhere"))
    assert get(site.app, site, "/healthz").status_code == 200
    assert get(site.app, site, "/readyz").status_code == 503
    assert read_metrics(get(site.app, site, "/metrics"))[("ratchet_database_up",)] == 0


@pytest.mark.databases("sqlite")
def test_a_database_whose_file_was_deleted_is_told_with_the_remedy_and_not_made_anew(site):
    file = db.find_file(site.engine.url)
    file.unlink()
    answer = get(site.app, site, "/readyz")
    assert (answer.status_code, answer.json()["error"]["value"]) == (503, f"there is no {file}")
    assert "restore the database from a backup" in answer.json()["error"]["remedy"]
    assert get(site.app, site, "/v1/reviews/next", "ann").status_code == 503
    assert read_metrics(get(site.app, site, "/metrics"))[("ratchet_database_up",)] == 0
    assert not file.exists()


def test_metrics_count_requests_by_template_and_tell_how_things_stand(busy):
    metrics = Metrics(busy.engine, busy.settings.agents, busy.clock, {"handled": 4, "dead": 1})
    app = web.create_app(busy.engine, busy.settings, {"adjudication": busy.agent}, busy.clock, lambda: None, metrics)
    get(app, busy, "/v1/events/01KJPY44E0SJ0B0HPRJC1B9XZZ", "node")
    get(app, busy, "/SECRET")
    answer = get(app, busy, "/metrics")
    found = read_metrics(answer)
    app.state.site.intake.close()
    route = ("method", "GET"), ("route", "/v1/events/{ulid}"), ("status", "404")
    assert found["ratchet_http_requests_total", *route] == 1
    assert found["ratchet_events_handled_total", ("state", "handled")] == 4
    assert found["ratchet_events_pending", ("state", "received")] == 1
    assert found[("ratchet_oldest_unhandled_seconds",)] == 3600
    assert found["ratchet_reviews", ("agent", "adjudication"), ("state", "open")] == 2
    assert found["ratchet_champion", ("agent", "adjudication"), ("version", "v0")] == 1
    assert found["ratchet_alarm", ("agent", "adjudication"), ("kind", "drift")] == 1
    assert found["ratchet_training_progress", ("agent", "adjudication")] == 0.25
    assert ("process_resident_memory_bytes",) in found
    assert "SECRET" not in answer.text


@pytest.mark.parametrize(("seconds", "shown"), [(0.4, "0 s"), (59, "59 s"), (60, "1 minute"), (7300, "2 hours"), (200_000, "2 days")])
def test_a_length_of_time_is_told_in_its_largest_unit(seconds, shown):
    assert pages.show_seconds(seconds) == shown


def test_a_stream_that_nobody_reads_is_told(busy):
    told = status.collect(busy.engine, busy.settings.agents, busy.clock())
    assert any("no daemon has told of it" in line for line, _ in command._compose(told, has_kafka=True))
    assert not any("Kafka" in line for line, _ in command._compose(told))


def test_the_problem_of_one_daemon_is_not_hidden_by_another_one_s_news(busy):
    body = dict.fromkeys(("batches", "records", "batch_seconds", "last_records", "last_seconds", "sent", "oldest_seconds"), 0)
    body |= {"consumer": "poll", "is_relaying": False, "lag": {}}
    with db.writing(busy.engine) as connection:
        streams.tell(connection, "here 1", {**body, "problem": "there is no topic a"}, busy.clock())
        streams.tell(connection, "there 1", {**body, "problem": None}, busy.clock() + timedelta(seconds=1))
    assert status.collect(busy.engine, {}, busy.clock())["stream"]["problem"] == "there is no topic a"


def test_readiness_tells_how_far_behind_each_partition_is_and_how_batches_go(busy):
    numbers = {"batches": 2, "records": 7, "batch_seconds": 0.5, "last_records": 3, "last_seconds": 0.25, "sent": 1}
    body = {**numbers, "consumer": "poll", "is_relaying": True, "lag": {"a/0": 3, "a/1": 0}, "oldest_seconds": 1.5, "problem": None}
    with db.writing(busy.engine) as connection:
        streams.tell(connection, "here 1 ab", body, datetime.now(UTC))
    told = get(busy.app, busy, "/readyz").json()["stream"]
    assert (told["lag"], told["oldest_seconds"], told["problem"]) == ({"a/0": 3, "a/1": 0}, 1.5, None)
    assert told["daemons"] == {"here 1": {**numbers, "consumer": "poll", "is_relaying": True}}
