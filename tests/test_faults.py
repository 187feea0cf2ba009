"""Things go wrong while events come by Kafka: each is stored or parked, applied once, and all is as if they had come in order."""

from __future__ import annotations

import pytest

from tests import fault_fixtures


@pytest.fixture(scope="module", params=["faust", "poll"])
def trial(broker, tmp_path_factory, request):
    """One daemon for all faults that it should outlive."""
    trial = fault_fixtures.Trial(tmp_path_factory.mktemp(request.param), broker, request.param, fault_fixtures.SHORT)
    trial.start()
    yield trial
    trial.close()


def test_a_broker_that_takes_connections_and_never_answers(trial):
    with trial.traffic.flowing():
        fault_fixtures.silence(trial)
    assert trial.settle().faults == {}
    assert trial.daemon.process.poll() is None


def test_workers_that_join_and_are_killed(trial):
    with trial.traffic.flowing():
        fault_fixtures.join_and_die(trial)
    assert trial.settle().faults == {}
    assert trial.daemon.stop() == 0
