"""The poll loop: a process that polls beside one that stores, of which either may die."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import orjson
import pytest
from kafka import KafkaConsumer
from kafka.errors import KafkaTimeoutError
from sqlalchemy.exc import OperationalError

from consumers import broker as brokers
from consumers import fetcher, poll, records, schemas
from storage import dead_letters
from tests import broker_fixtures, event_fixtures, process_fixtures

AGENT = event_fixtures.make_agent()


def make_inlet(engine, kafka):
    return records.Inlet(engine, {AGENT.name: AGENT}, kafka.topics.kinds(), lambda: datetime.now(UTC))


def make_job(kafka, size=100):
    return fetcher.Job(kafka.to_access(), kafka.group, dict(kafka.topics.kinds()), {AGENT.name: AGENT.labels}, size)


def produce(broker, kafka, count):
    at = datetime.now(UTC)
    broker_fixtures.produce(broker, kafka.topics.predictions, [orjson.dumps(event_fixtures.make_prediction(n, at)) for n in range(count)])


def find_fetchers(parent):
    """The processes that poll for a process."""
    return [number for number in process_fixtures.list_children(parent) if is_polling(number)]


def is_polling(process):
    command = Path(f"/proc/{process}/cmdline")
    return command.exists() and b"consumers.fetcher" in command.read_bytes()


def ignores(process, number):
    """Whether a process has begun to ignore a signal."""
    status = dict(line.split(":\t", 1) for line in Path(f"/proc/{process}/status").read_text().splitlines())
    return int(status["SigIgn"], 16) >> (number - 1) & 1


@pytest.fixture
def start_reading():
    """Read in a thread; gives the errors that it raised. All is over when the test ends."""
    stopping, threads = threading.Event(), []

    def start(kafka, inlet):
        raised = []

        def run():
            try:
                poll.run(kafka.to_access(), kafka.group, inlet, stopping)
            except Exception as error:  # noqa: BLE001  the test looks at it
                raised.append(error)

        threads.append(threading.Thread(target=run, daemon=True))
        threads[-1].start()
        return raised

    yield start
    stopping.set()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()


def test_where_reading_can_t_begin_the_reason_is_told_and_no_process_and_no_thread_is_left(engine, tmp_path):
    access = brokers.Access("127.0.0.1:1", tls=True, ca_file=tmp_path / "absent.pem")
    before = threading.active_count()
    with pytest.raises(brokers.AccessRefusedError, match=r"the files for TLS can't be used .* check .*absent\.pem"):
        poll.run(access, "refused", records.Inlet(engine, {}, {"t": "k"}, lambda: datetime.now(UTC)), threading.Event())
    assert threading.active_count() == before
    assert find_fetchers(os.getpid()) == []


def test_a_broker_that_goes_away_as_reading_begins_is_told_and_leaves_no_thread(broker, monkeypatch):
    kafka = broker_fixtures.make_topics(broker, "goes-away")
    before = threading.active_count()

    def fail(_consumer):
        raise KafkaTimeoutError

    monkeypatch.setattr(KafkaConsumer, "topics", fail)
    ours, theirs = multiprocessing.Pipe()
    with ours, theirs:
        failed = fetcher.work(make_job(kafka), theirs)
    assert failed is not None
    assert (failed.name, failed.why.partition(":")[0]) == ("BrokerError", "the group goes-away can't be read (KafkaTimeoutError)")
    assert threading.active_count() == before


def test_an_error_that_nobody_thought_of_is_told_without_its_text(broker, monkeypatch):
    kafka = broker_fixtures.make_topics(broker, "unthought")

    def fail(_consumer, **_options):
        raise ValueError("Mrs Miller has a carcinoma")

    monkeypatch.setattr(KafkaConsumer, "poll", fail)
    ours, theirs = multiprocessing.Pipe()
    with ours, theirs:
        failed = fetcher.work(make_job(kafka), theirs)
    assert failed is not None
    assert failed.why.startswith("ValueError in the process that polls (test_poll.py:")


def test_what_the_other_process_logs_is_logged_here(caplog):
    reading, writing = os.pipe()
    os.write(writing, b"WARNING\tfar.away\tno\tanswer\nTraceback (most recent call last):\n")
    os.close(writing)
    with caplog.at_level(logging.WARNING):
        poll._tell(os.fdopen(reading, "rb"))
    assert caplog.record_tuples == [
        ("far.away", logging.WARNING, "no\tanswer"),
        ("consumers.fetcher", logging.ERROR, "Traceback (most recent call last):"),
    ]


def test_the_next_batch_comes_while_one_is_committed_and_none_is_acknowledged_before_its_transaction(
    broker, engine, monkeypatch, start_reading
):
    kafka = broker_fixtures.make_topics(broker, "reads-on")
    inlet = make_inlet(engine, kafka)
    produce(broker, kafka, 30)
    gate, received = threading.Event(), []
    genuine_receive, genuine_store = poll.Fetcher.receive, records.Inlet.store

    def receive(source, seconds):
        found = genuine_receive(source, seconds)
        received.append(found)
        return found

    def store(inlet, batch, committing):
        def wait_for_the_disk():
            committing()
            assert gate.wait(30)

        genuine_store(inlet, batch, wait_for_the_disk)

    monkeypatch.setattr(poll, "BATCH", 10)
    monkeypatch.setattr(poll.Fetcher, "receive", receive)
    monkeypatch.setattr(records.Inlet, "store", store)
    raised = start_reading(kafka, inlet)
    broker_fixtures.wait_until(lambda: len([one for one in received if one is not None]) == 2)
    assert all(len(one.parts[0].records) <= 10 for one in received if one is not None)
    assert broker_fixtures.read_lag(kafka, kafka.topics.predictions) == 30
    gate.set()
    broker_fixtures.wait_until(lambda: broker_fixtures.read_lag(kafka, kafka.topics.predictions) == 0)
    assert inlet.counters.by_state == {"handled": 30}
    assert inlet.progress.acknowledged_at is not None
    assert raised == []


def test_after_a_batch_that_fails_none_is_stored_or_acknowledged(broker, engine, monkeypatch):
    kafka = broker_fixtures.make_topics(broker, "fails")
    inlet = make_inlet(engine, kafka)
    produce(broker, kafka, 30)
    genuine, tried = records.Inlet.store, []

    def store(inlet, batch, committing):
        tried.append(batch)
        if len(tried) == 2:
            time.sleep(0.5)  # the next one comes meanwhile
            raise OperationalError("", {}, Exception("gone"))
        genuine(inlet, batch, committing)

    monkeypatch.setattr(poll, "BATCH", 10)
    monkeypatch.setattr(records, "GIVE_UP_SECONDS", 0)
    monkeypatch.setattr(records.Inlet, "store", store)
    with pytest.raises(OperationalError):
        poll.run(kafka.to_access(), kafka.group, inlet, threading.Event())
    assert len(tried) == 2
    assert inlet.counters.by_state == {"handled": 10}
    assert broker_fixtures.read_lag(kafka, kafka.topics.predictions) == 20


def test_a_process_that_polls_and_is_killed_is_told_and_nothing_was_acknowledged_that_is_not_stored(
    broker, engine, monkeypatch, start_reading
):
    kafka = broker_fixtures.make_topics(broker, "killed")
    inlet = make_inlet(engine, kafka)
    produce(broker, kafka, 300)
    monkeypatch.setattr(poll, "BATCH", 10)
    raised = start_reading(kafka, inlet)
    broker_fixtures.wait_until(lambda: inlet.progress.records)
    os.kill(find_fetchers(os.getpid())[0], signal.SIGKILL)
    broker_fixtures.wait_until(lambda: raised)
    assert isinstance(raised[0], brokers.BrokerError), "whoever runs it begins anew"
    assert str(raised[0]) == "the process that polls ended with status -9: another one is begun"
    assert 300 - broker_fixtures.read_lag(kafka, kafka.topics.predictions) <= inlet.counters.by_state["handled"]


def test_a_process_that_ends_in_the_midst_of_a_message_is_told_as_any_other(engine):
    ours, theirs = multiprocessing.Pipe()
    process = subprocess.Popen(["true"])
    source = poll.Fetcher(process, ours, records.Inlet(engine, {}, {}, lambda: datetime.now(UTC)))
    os.write(theirs.fileno(), b"\0\0\x10\0half of it")
    theirs.close()
    with pytest.raises(brokers.BrokerError, match="the process that polls ended with status 0"):
        source.receive(1)
    source.end()
    assert ours.closed


def test_no_more_than_two_batches_are_with_the_daemon_at_once(broker):
    kafka = broker_fixtures.make_topics(broker, "owed")
    produce(broker, kafka, 50)
    ours, theirs = multiprocessing.Pipe()
    working = threading.Thread(target=fetcher.work, args=[make_job(kafka, size=10), theirs])
    working.start()
    received = [fetcher.decode_told(ours.recv_bytes()) for _ in range(2)]
    assert not ours.poll(1), "the third would wait here, and what comes meanwhile in a fourth"
    ours.send_bytes(fetcher.encode(received[0].places))
    assert fetcher.decode_told(ours.recv_bytes()) == fetcher.Committed(None)
    assert isinstance(fetcher.decode_told(ours.recv_bytes()), fetcher.Polled)
    ours.send_bytes(b"")
    working.join(30)
    assert not working.is_alive()
    ours.close()
    theirs.close()
    assert broker_fixtures.read_lag(kafka, kafka.topics.predictions) == 40


def test_a_process_that_polls_does_not_outlive_the_one_that_stores(broker):
    kafka = broker_fixtures.make_topics(broker, "orphaned")
    program = (
        "import sys, threading; from consumers import broker, poll, records; from storage import db; "
        "inlet = records.Inlet(db.open_engine('sqlite://'), {}, {sys.argv[2]: 'ratchet.prediction.made.v1'}, None); "
        "poll.run(broker.Access(sys.argv[1]), 'orphaned', inlet, threading.Event())"
    )
    process = subprocess.Popen([sys.executable, "-c", program, broker.bootstrap, kafka.topics.predictions])
    broker_fixtures.wait_until(lambda: find_fetchers(process.pid))
    (number,) = find_fetchers(process.pid)
    broker_fixtures.wait_until(lambda: ignores(number, signal.SIGTERM))
    os.kill(number, signal.SIGTERM)
    time.sleep(0.2)
    assert find_fetchers(process.pid) == [number], "it is told by the other one when to end"
    process.kill()
    process.wait()
    broker_fixtures.wait_until(lambda: not is_polling(number))


def test_a_process_that_waits_for_a_broker_does_not_outlive_it_either():
    program = (
        "import sys, threading, time; from multiprocessing.connection import Connection; from consumers import fetcher; "
        "fetcher.ORPHANED_SECONDS = 0.1; channel = Connection(int(sys.argv[1])); "
        "threading.Thread(target=fetcher._end_with, args=[channel], daemon=True).start(); channel.send_bytes(b'begun'); time.sleep(60)"
    )
    ours, theirs = multiprocessing.Pipe()
    with theirs:
        process = subprocess.Popen([sys.executable, "-c", program, str(theirs.fileno())], pass_fds=[theirs.fileno()])
    ours.recv_bytes()
    time.sleep(0.3)
    assert process.poll() is None
    ours.close()
    assert process.wait(10) == 1


def test_what_comes_from_the_other_process_is_what_would_be_read_here(engine):
    now = datetime.now(UTC)
    inlet = records.Inlet(engine, {AGENT.name: AGENT}, {"p": schemas.PREDICTION, "l": schemas.LABEL}, lambda: now)

    def send(some):
        parts = records.prepare(some, inlet.kinds, records.list_labels(inlet.agents), now)
        return fetcher.decode_told(fetcher.encode(fetcher.Polled(parts, []))).parts

    made = [event_fixtures.make_prediction(n, now - timedelta(hours=n), input={"note": "é ü", "n": 1.5}) for n in range(3)]
    good = [dead_letters.Record("p", 0, n, orjson.dumps(event)) for n, event in enumerate(made)]
    label = dead_letters.Record("l", 0, 0, orjson.dumps(event_fixtures.make_label(1, now)))
    (here,), (there,) = inlet.read(good).found, inlet.receive(send(good)).found
    assert (there.records, there.prepared.good, there.prepared.results) == (good, here.prepared.good, here.prepared.results)
    assert there.prepared.contents == [orjson.loads(orjson.dumps(one, option=orjson.OPT_UTC_Z)) for one in here.prepared.contents]
    assert [part.events is None for part in send([*good, label])] == [False, True], "the database knows whose a label is"
    poisoned = [*good, dead_letters.Record("p", 0, 3, b"{"), dead_letters.Record("p", 0, 4, None)]
    assert send(poisoned)[0].events is None
    assert inlet.receive(send(poisoned)).found == inlet.read(poisoned).found
    late = records.receive(send(good)[0], inlet.kinds, inlet.agents, now - timedelta(hours=1))
    assert late.prepared.results[0].refusal.field == "data.occurred_at", "the clock that counts is the one here"
