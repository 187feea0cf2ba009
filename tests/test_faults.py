"""Things go wrong while events come by Kafka: each is stored or parked, applied once, and all is as if they had come in order."""

from __future__ import annotations

import pytest

from tests import broker_fixtures, fault_fixtures

pytestmark = pytest.mark.timeout(600)
ALL = ("consume", "web", "schedule")


@pytest.fixture(scope="module", params=["faust", "poll"])
def trial(broker, tmp_path_factory, request):
    """One daemon for all faults that it should outlive."""
    disk = tmp_path_factory.mktemp("disk")
    with fault_fixtures.small_disk(disk, "96m") as is_mounted:
        folder = tmp_path_factory.mktemp(request.param)
        trial = fault_fixtures.Trial(folder, broker, request.param, fault_fixtures.SHORT, f"sqlite:///{disk}/ratchet.db")
        trial.is_on_small_disk = is_mounted
        trial.start(*ALL)
        yield trial
        trial.close()


@pytest.fixture
def outliving(trial):
    """The same, and it lives on."""
    yield trial
    assert trial.daemon.process.poll() is None


on_faust = pytest.mark.parametrize("trial", ["faust"], indirect=True)


def suffer(trial, fault, *arguments):
    """A fault while events come; returns what is not as it should be at its end."""
    with trial.traffic.flowing():
        fault(trial, *arguments)
    return trial.settle().faults


def test_a_broker_that_takes_connections_and_never_answers(outliving):
    assert suffer(outliving, fault_fixtures.silence) == {}


def test_a_broker_that_is_killed_and_away_for_longer_than_every_time_out(outliving):
    assert suffer(outliving, fault_fixtures.kill_broker) == {}
    outliving.wait_for(lambda: (outliving.read_ready()["stream"] or {"problem": "none told"})["problem"] is None)


@on_faust
def test_a_database_that_another_process_locks_for_longer_than_anybody_waits(outliving):
    assert suffer(outliving, fault_fixtures.lock) == {}


@on_faust
def test_a_full_disk(outliving):
    if not outliving.is_on_small_disk:
        pytest.skip("no small disk could be mounted: run as root")
    assert suffer(outliving, fault_fixtures.fill_disk) == {}


@on_faust
def test_a_clock_that_jumps_back_an_hour(outliving):
    assert suffer(outliving, fault_fixtures.turn_clock_back) == {}


@on_faust
def test_the_same_events_twice(outliving):
    assert suffer(outliving, fault_fixtures.repeat) == {}


@on_faust
def test_a_partition_of_which_every_record_is_malformed(outliving):
    try:
        assert suffer(outliving, fault_fixtures.poison) == {}
    finally:
        outliving.traffic.is_poisoning = False


@on_faust
def test_a_relay_that_is_killed_between_sending_and_marking_sends_again_under_the_same_ids(trial):
    def count_repeats():
        topic = trial.kafka.topics.queue
        told = [one.value for one in broker_fixtures.consume(trial.broker, topic, broker_fixtures.read_lag(trial.kafka, topic))]
        return len(told) - len(set(told))

    before = count_repeats()
    assert suffer(trial, fault_fixtures.kill_relay) == {}
    assert count_repeats() > before


@on_faust
def test_a_broker_that_is_killed_and_back_soon(outliving):
    assert suffer(outliving, fault_fixtures.interrupt_broker) == {}


@on_faust
def test_a_consumer_that_is_killed_in_the_middle_of_a_batch_and_before_its_acknowledgement(trial):
    assert suffer(trial, fault_fixtures.kill_consumer) == {}


def test_workers_and_schedulers_that_join_and_are_killed(trial):
    assert suffer(trial, fault_fixtures.join_and_die) == {}


def test_a_daemon_that_is_told_to_stop_while_the_broker_does_not_answer(trial):
    with trial.traffic.flowing():
        trial.read_more()
    with trial.proxy.silent():
        assert trial.daemon.stop(seconds=35) == 0


@pytest.mark.databases("postgresql")
def test_a_postgresql_server_that_crashes_and_one_without_a_connection_for_us(broker, engine, postgres, tmp_path):
    url = fault_fixtures.make_narrow(postgres, engine.url.database)
    trial = fault_fixtures.Trial(tmp_path, broker, "faust", fault_fixtures.SHORT, url)
    try:
        trial.start()
        for fault in (fault_fixtures.crash_server, fault_fixtures.refuse_connections):
            assert suffer(trial, fault, postgres) == {}
        assert trial.daemon.stop() == 0
    finally:
        trial.close()
