"""A loop whose daemon and trainers are killed at random moments loses nothing and does nothing twice."""

import pytest

from tests import chaos_fixtures

KILLS = 5


@pytest.mark.timeout(600)
def test_a_loop_that_is_killed_again_and_again_is_whole_in_the_end(tmp_path):
    loop = chaos_fixtures.Loop(tmp_path / "claims", seed=7)
    try:
        loop.run(KILLS)
    finally:
        loop.close()
    tally = chaos_fixtures.count(loop)
    assert chaos_fixtures.find_faults(loop) == []
    assert loop.kills["daemon"] > 0
    assert loop.kills["trainer"] > 0
    assert tally.acknowledged > 100
    assert tally.versions > 2, "v0 and v1.0, and the loop went on"
    assert tally.finished >= 0.95
    wrong = ("lost", "twice", "champions_astray", "ledger_breaks", "damaged", "parked_without_reason", "unfinished", "faults")
    assert {name: getattr(tally, name) for name in wrong} == dict.fromkeys(wrong, 0)
