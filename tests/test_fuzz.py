"""The daemon as a process against malformed requests of all kinds: no 5xx, nothing lost, and it lives on."""

import pytest

from tests import fuzz_fixtures
from tests.daemon_fixtures import Daemon, make_home

REQUESTS = 300


@pytest.mark.timeout(300)
def test_no_request_breaks_the_daemon_or_what_it_keeps(tmp_path):
    secrets = make_home(tmp_path / "claims")
    daemon = Daemon(tmp_path / "claims").start()
    try:
        target = fuzz_fixtures.Target(daemon, secrets)
        target.attack(REQUESTS)
        tally = fuzz_fixtures.count(target)
        assert target.complaints == []
        assert {400, 401, 403, 404, 422} <= set(target.statuses), "all kinds of refusals were provoked"
        assert tally.requests >= REQUESTS
        assert tally.acknowledged > 20
        assert (tally.lost, tally.ledger_breaks, tally.faults) == (0, 0, 0)
        assert daemon.stop() == 0
    finally:
        daemon.kill()
