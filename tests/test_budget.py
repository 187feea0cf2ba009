"""A window knows the last claims, and a watch and an exam get their part of what the budget leaves."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from consumers import budget
from consumers.budget import Spent, Window
from consumers.rules import RoutingPolicy
from tests.routing_fixtures import beta_confidences, confidences, full_window


def test_a_watch_and_an_exam_ask_at_once_for_their_part_of_a_window_s_budget():
    policy = RoutingPolicy(budget_share=0.1)
    assert budget.count_places(policy, full_window().state()) == pytest.approx((0.4 * 20, 0.8 * 20))
    assert budget.count_places(policy, Window().state()) == pytest.approx((8, 16)), "also before the first window is full"
    assert budget.count_places(policy, full_window().state(Spent(watched=8))) == pytest.approx((0, 0.8 * 12))
    assert budget.count_places(policy, full_window().state(Spent(watched=8, examined=9))) == pytest.approx((0, 0.6))
    assert budget.count_places(policy, full_window().state(Spent(examined=16))) == pytest.approx((8, 0)), "an exam never bars a watch"
    assert budget.count_places(RoutingPolicy(), full_window().state()) == (math.inf, math.inf)
    assert budget.count_places(RoutingPolicy(exam_share=0), full_window().state()).exam == 0


@pytest.mark.parametrize(
    ("values", "health"),
    [
        ([0.85] * 50, "constant"),
        ([None] * 50, "missing"),
        ([1.0] * 47 + [0.4] * 3, "saturated"),
        (beta_confidences(50), "ok"),
        ([None] * 10 + beta_confidences(50), "ok"),
        ([None] * 3, "ok"),
    ],
)
def test_confidences_that_cannot_rank_are_noticed(values, health):
    assert budget.confidence_health(values) == health


@given(st.integers(1, 20), st.lists(st.tuples(confidences, st.booleans()), max_size=60))
def test_a_window_knows_the_last_claims_and_nothing_else(size, entries):
    window, fresh = Window(size), Window(size)
    for confidence, is_must_review in entries:
        window.add(confidence, is_must_review=is_must_review)
    for confidence, is_must_review in entries[-size:]:
        fresh.add(confidence, is_must_review=is_must_review)
    assert window.state() == fresh.state()
    assert window.health() == fresh.health()


@given(st.lists(st.tuples(confidences, st.booleans(), st.sampled_from([0.0, 0.25, 1.0])), max_size=30))
def test_a_window_is_filled_as_one_by_one(entries):
    filled, added = Window(30), Window(30)
    filled.fill(entries)
    for confidence, is_must_review, rarity in entries:
        added.add(confidence, is_must_review=is_must_review, rarity=rarity)
    assert filled.state() == added.state()
