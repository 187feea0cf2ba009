"""A rule matches what it says, and what can't be meant is refused."""

import pytest

from consumers.rules import MustReview, Prediction, RoutingPolicy


@pytest.mark.parametrize(
    ("rule", "is_match"),
    [
        (MustReview("input.amount", "above", 1000), True),
        (MustReview("input.amount", "above", 1500), False),
        (MustReview("input.amount", "below", 2000), True),
        (MustReview("input.missing", "below", 2000), False),
        (MustReview("input.note", "above", 3), False),
        (MustReview("attributes.region", "in", ("west", "east")), True),
        (MustReview("attributes.region", "equals", "north"), False),
        (MustReview("decision", "equals", "DENIED"), True),
    ],
)
def test_a_must_review_rule_matches_what_it_says(rule, is_match):
    prediction = Prediction("claims", "c", "DENIED", 0.99, {"amount": "1500", "note": "n/a"}, {"region": "west"})
    assert rule.matches(prediction) is is_match


@pytest.mark.parametrize("wrong", [{"audit_share": 0}, {"budget_share": 1.2}, {"threshold": -0.1}, {"window": 0}, {"budget_per_day": -1}])
def test_a_policy_that_makes_no_sense_is_refused_with_its_name(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        RoutingPolicy(**wrong)


@pytest.mark.parametrize("wrong", [("amount", "above"), ("input.amount", "over")])
def test_a_rule_that_can_never_match_is_refused(wrong):
    with pytest.raises(ValueError, match="unknown"):
        MustReview(*wrong, 1)
