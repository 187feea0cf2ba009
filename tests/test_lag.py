"""How far behind the stream is, who is told, and the end of a process that reads no more."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import re
import time
from datetime import UTC, datetime, timedelta

import pytest

from consumers import broker as brokers
from consumers import lag, records, stream, topics
from daemon import status
from daemon.cli import status as status_screen
from daemon.web import metrics
from storage import db, leases, streams
from tests import broker_fixtures, daemon_fixtures, event_fixtures, fault_fixtures

P, Q = ("predictions", 0), ("predictions", 1)
STALL = lag.STALL_SECONDS


def sample(at, ends, done):
    return lag.Sample(at, dict(zip((P, Q), ends, strict=True)), dict(zip((P, Q), done, strict=True)))


def test_the_oldest_record_that_waits_is_as_old_as_the_first_look_that_saw_it():
    samples = [sample(0, (10, 5), (10, 5)), sample(5, (20, 5), (10, 5)), sample(10, (30, 5), (15, 5))]
    assert lag.find_oldest(samples, 12) == 7
    assert lag.find_oldest([*samples, sample(15, (30, 5), (20, 5))], 16) == 6
    assert lag.find_oldest([*samples, sample(15, (30, 5), (30, 5))], 16) is None
    assert lag.find_oldest([], 16) is None


@pytest.mark.parametrize(
    ("first", "last", "acknowledged_at", "stalled"),
    [
        (sample(0, (20, 5), (10, 5)), sample(STALL, (30, 5), (10, 5)), None, [P]),
        (sample(0, (20, 5), (10, 5)), sample(STALL, (30, 5), (10, 5)), 0.0, [P]),
        (sample(0, (20, 5), (10, 5)), sample(STALL, (30, 5), (10, 5)), 1.0, []),  # we acknowledge others: they are not ours
        (sample(0, (20, 5), (10, 5)), sample(STALL, (30, 5), (11, 5)), None, []),  # it goes on, if slowly
        (sample(0, (20, 5), (10, 5)), sample(STALL, (20, 5), (10, 5)), None, []),  # a transaction's marker is never acknowledged
        (sample(0, (10, 5), (10, 5)), sample(STALL, (30, 5), (10, 5)), None, []),  # the lag is younger than that
        (sample(1, (20, 5), (10, 5)), sample(STALL, (30, 5), (10, 5)), None, []),  # we do not look for long enough yet
    ],
)
def test_reading_has_stalled_when_lag_grows_and_nothing_is_acknowledged(first, last, acknowledged_at, stalled):
    assert lag.find_stalled([first, last], acknowledged_at, STALL) == stalled


@pytest.mark.parametrize(
    ("before", "now", "ours", "looks", "skipped"),
    [
        ((10, 5), (10, 9), {P: 10, Q: 8}, 20, [P]),  # the tenth was passed over; what came behind it in its partition we had
        ((10, 5), (11, 9), {P: 10, Q: 8}, 20, []),
        ((10, 5), (10, 9), {P: 9, Q: 8}, 20, []),
        ((10, 5), (10, 9), {}, 20, []),  # the poll consumer commits what it has had
        ((10, 5), (10, 9), {P: 10, Q: 8}, 3, []),  # the broker is back a moment ago, after an outage
    ],
)
def test_a_record_that_faust_passed_over_is_found_by_what_it_does_not_commit(before, now, ours, looks, skipped):
    first = sample(0, (20, 20), before)._replace(ours=ours)
    assert lag.find_skipped([first, *(sample(STALL - look, (20, 20), now) for look in reversed(range(looks)))], STALL) == skipped
    assert lag.find_skipped([first], STALL - 1) == []


@pytest.fixture
def kafka(broker, request):
    return broker_fixtures.make_topics(broker, request.node.name)


@pytest.fixture
def source(kafka, engine):
    agent = event_fixtures.make_agent()
    inlet = records.Inlet(engine, {agent.name: agent}, kafka.topics.kinds(), lambda: datetime.now(UTC))
    lease = stream.Lease("here 12 ab cd", leases.acquire)
    return stream.Stream(kafka.to_access(), kafka.group, "poll", inlet, kafka.topics.outlets(), lease)


def test_lag_is_told_for_each_partition_to_status_and_prometheus(source, kafka, broker):
    broker_fixtures.produce(broker, kafka.topics.predictions, [b"1", b"2", b"3"])
    watch = lag.Watch(source)
    while watch._look():  # a broker that was never asked by a group makes room for it first
        time.sleep(0.1)
    watch._tell(None)
    watch._close()
    told = status.collect(source.inlet.engine, {}, datetime.now(UTC))["stream"]
    waiting = {f"{kafka.topics.predictions}/0": 2, f"{kafka.topics.predictions}/1": 1}
    assert told["lag"] == {f"{kafka.topics.labels}/0": 0, f"{kafka.topics.labels}/1": 0, **waiting}
    assert (told["problem"], list(told["daemons"])) == (None, ["here 12"])
    said = [line for line, _ in status_screen._compose_stream(told)]
    assert re.match(r"Kafka        3 to read, oldest \d+ s; 0 to send", said[0])
    assert said[1:3] == [f"  {place}: {count}" for place, count in waiting.items()]
    assert said[3] == "  here 12: poll, 0 read in 0 batches, last batch 0 in 0.000 s"
    rendered = metrics.Metrics(source.inlet.engine, {}, lambda: datetime.now(UTC)).render().decode()
    assert f'ratchet_kafka_lag{{partition="0",topic="{kafka.topics.predictions}"}} 2.0' in rendered
    assert 'ratchet_kafka_records_total{daemon="here 12"} 0.0' in rendered


def test_a_partition_that_ends_before_what_is_acknowledged_is_told_with_the_remedy(source, kafka, broker):
    broker_fixtures.produce(broker, kafka.topics.labels, [b"1", b"2", b"3"])
    broker_fixtures.acknowledge(kafka, kafka.topics.labels, 2)
    watch = lag.Watch(source)
    watch._tell(watch._look())
    watch._close()
    told = status.collect(source.inlet.engine, {}, datetime.now(UTC))["stream"]["problem"]
    assert told.startswith(f"{kafka.topics.labels}/1 ends at 1, and the group has acknowledged 2: the broker lost records. Stop")


def test_a_broker_that_is_away_is_told_and_old_news_are_not_shown(source, engine):
    away = lag.Watch(stream.Stream(brokers.Access("127.0.0.1:1"), "g", "faust", source.inlet, source.outlets, source.lease))
    away._tell(away._look())
    now = datetime.now(UTC)
    assert "no broker answers at 127.0.0.1:1" in status.collect(engine, {}, now)["stream"]["problem"]
    assert status.collect(engine, {}, now + timedelta(seconds=61))["stream"] is None
    with db.writing(engine) as connection:
        streams.tell(connection, "there 1", {}, now + timedelta(days=2))
        assert [row["holder"] for row in streams.read_fresh(connection, now - timedelta(days=1))] == ["there 1"]


HANGING = """
import threading
from consumers import lag, records, stream
lag.STALL_SECONDS, lag.PERIOD_SECONDS, stream.END_SECONDS = 10.0, 0.1, 0.5
records.Inlet.store_patiently = lambda *_: threading.Event().wait()
"""


@pytest.mark.parametrize("consumer", ["faust", "poll"])
def test_a_stream_that_hangs_ends_the_process_and_says_where_it_is(consumer, broker, tmp_path):
    kafka = broker_fixtures.make_topics(broker, f"hangs-{consumer}")
    daemon_fixtures.make_home(tmp_path)
    daemon = daemon_fixtures.Daemon(tmp_path, **fault_fixtures.to_settings(kafka, consumer)).start(patch=HANGING)

    def has_ended():
        broker_fixtures.produce(broker, kafka.topics.predictions, [b"1"])
        return daemon.process.poll() is not None

    broker_fixtures.wait_until(has_ended, seconds=60)
    (told,) = (line for line in daemon.lines() if line["event"] == "stream_stalled")
    assert told["threads"]["take"].startswith("threading.py")
    assert told["acknowledged_before"] is None
    assert daemon.process.returncode == 1
    (died,) = (line for line in daemon.lines() if line["event"] == "role_died")
    assert "of 1 partitions was acknowledged" in died["exception"]


def test_while_nobody_reads_nothing_has_stalled(source):
    """A topic is missing, for instance: that is waited for, and the review page goes on."""
    watch, now = lag.Watch(source), time.monotonic()
    watch._samples.extend([sample(now - STALL - 1, (20, 5), (10, 5)), sample(now, (30, 5), (10, 5))])
    watch._check()
    source.inlet.progress.began_at = now - 1
    watch._check()
    source.inlet.progress.began_at = now - STALL - 1
    with pytest.raises(lag.StalledError):
        watch._check()


def test_a_missing_topic_is_told_to_status_until_it_is_there(source, broker, engine, monkeypatch):
    for module, name, value in ((lag, "PERIOD_SECONDS", 0.1), (stream, "FIRST_WAIT_SECONDS", 0.1)):
        monkeypatch.setattr(module, name, value)
    late = broker_fixtures.name_topics(broker, "late-to-be-told")
    inlet = dataclasses.replace(source.inlet, kinds=late.topics.kinds())
    source = dataclasses.replace(source, group="late-to-be-told", inlet=inlet, outlets=late.topics.outlets())

    def find_problem():
        told = status.collect(engine, {}, datetime.now(UTC))["stream"]
        return told and told["problem"]

    def follow(stop):
        while "there is no topic late-to-be-told-dead-letters" not in (find_problem() or ""):
            time.sleep(0.05)
        topics.create(late.to_access(), late.topics.describe())
        while find_problem():
            time.sleep(0.05)
        stop()

    async def run():
        stop = asyncio.Event()
        following = asyncio.to_thread(follow, functools.partial(asyncio.get_running_loop().call_soon_threadsafe, stop.set))
        await asyncio.gather(stream.run(source, stop), following)

    asyncio.run(asyncio.wait_for(run(), 60))
