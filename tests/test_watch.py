"""The watch: harm against the predecessor rolls back, a changed world alarms, and quiet ends it."""

import json
import random

import pytest

from daemon import watch as watching
from daemon.gate import Pair
from daemon.watch import Accuracy, Audited, WatchEvidence, WatchPolicy, watch

POLICY = WatchPolicy()
FELL = Audited(Accuracy(140, 200), Accuracy(55, 120))
HELD = Audited(Accuracy(140, 200), Accuracy(84, 120))


def evidence(wins=0, losses=0, neither=0, **rest):
    pairs = (Pair("C", "D", "C"),) * wins + (Pair("C", "D", "D"),) * losses + (Pair("C", "D", "E"),) * neither
    return WatchEvidence(pairs=pairs, asked=len(pairs), **rest)


def test_losses_to_the_predecessor_roll_back_and_say_why():
    assert [watch(evidence(0, losses), POLICY).move for losses in (5, 6)] == ["continue", "rollback"]
    action = watch(evidence(2, 12), POLICY)
    assert action.move == "rollback"
    assert "won 2 and lost 12" in action.reasons[0]


def test_wins_never_roll_back_and_sixty_answers_or_thirty_days_end_the_watch():
    assert watch(evidence(40, 10), POLICY).move == "continue"
    assert watch(evidence(40, 10, 10), POLICY).move == "end"
    assert watch(evidence(3, 3, days=29.9), POLICY).move == "continue"
    assert watch(evidence(3, 3, days=30), POLICY).move == "end"


def test_both_below_their_own_past_means_a_changed_world_and_no_rollback():
    action = watch(evidence(3, 3, champion=FELL, predecessor=FELL), POLICY)
    assert action.move == "alarm_drift"
    assert "The world has changed" in action.reasons[0]
    assert watch(evidence(3, 3, champion=FELL, predecessor=HELD), POLICY).move == "continue"


def test_a_fall_is_not_believed_on_fewer_than_a_hundred_audits_or_without_a_past():
    few = Audited(Accuracy(140, 200), Accuracy(30, 99))
    newborn = Audited(Accuracy(0, 0), Accuracy(55, 120))
    for other in (few, newborn):
        assert watch(evidence(3, 3, champion=FELL, predecessor=other), POLICY).move == "continue"


def test_a_predecessor_that_is_better_now_is_returned_to_even_in_a_changed_world():
    action = watch(evidence(1, 12, champion=FELL, predecessor=FELL), POLICY)
    assert action.move == "rollback"
    assert action.numbers["is_world_changed"]


def test_the_report_fits_into_json_and_says_what_would_roll_back():
    action = watch(evidence(2, 4, champion=HELD), POLICY)
    assert json.loads(json.dumps(action.numbers, allow_nan=False)) == action.numbers
    more = action.numbers["more_losses_to_rollback"]
    assert watch(evidence(2, 4 + more), POLICY).move == "rollback"
    assert watch(evidence(2, 3 + more), POLICY).move == "continue"
    assert action.numbers["audits"]["champion"]["before"]["share"] == pytest.approx(0.7)


@pytest.mark.parametrize(("share_lost", "at_most", "at_least"), [(0.8, 1.0, 0.95), (0.5, 0.1, 0.0), (0.3, 0.01, 0.0)])
def test_a_bad_version_is_rolled_back_and_an_equal_or_better_one_seldom_is(share_lost, at_most, at_least):
    draw, rolled_back = random.Random(1), 0
    for _ in range(300):
        wins = losses = 0
        for _ in range(60):
            losses, wins = (losses + 1, wins) if draw.random() < share_lost else (losses, wins + 1)
            if watching.significance.mixture_evalue(losses, wins) >= 10:
                rolled_back += 1
                break
    assert at_least <= rolled_back / 300 <= at_most
