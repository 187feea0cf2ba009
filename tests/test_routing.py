"""Who goes to an expert: every claim has a chance, the budget holds, and the chance that is stored is the chance that was."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from consumers import budget, routing, rules
from consumers.budget import Spent, Window
from consumers.routing import route
from consumers.rules import Prediction, RoutingPolicy
from storage.sampling import bucket
from tests.routing_fixtures import beta_confidences, confidences, full_window

shares = st.floats(0, 1, allow_nan=False)
policies = st.builds(
    RoutingPolicy,
    threshold=shares,
    budget_share=st.none() | shares,
    budget_per_day=st.none() | st.integers(0, 50),
    audit_share=st.floats(0.001, 1),
    explore_share=shares,
    slice_by=st.sampled_from([(), ("region",)]),
)
predictions = st.builds(
    Prediction,
    agent=st.just("claims"),
    claim_id=st.text(min_size=1, max_size=8),
    decision=st.sampled_from(["APPROVED", "DENIED", "PENDING", None]),
    confidence=confidences,
    input=st.just({}),
    attributes=st.dictionaries(st.just("region"), st.sampled_from(["west", "east"])),
)


@st.composite
def states(draw):
    window = Window(draw(st.integers(1, 40)))
    for confidence, is_must_review in draw(st.lists(st.tuples(confidences, st.booleans()), max_size=50)):
        window.add(confidence, is_must_review=is_must_review, rarity=draw(st.sampled_from([0.0, 0.3, 1.0])))
    counts = st.integers(0, 60)
    return window.state(
        draw(st.builds(budget.Spent, opened_today=counts, watched=counts, examined=counts, is_examining=st.booleans())),
        draw(st.dictionaries(st.sampled_from(["region=west", "region=east"]), st.integers(0, 99))),
    )


def stream(values, policy, spent=budget.NOTHING_SPENT, *, agent="claims", must_every=0):
    """Route claims with these confidences one after another, as the handler does."""
    window, decisions = Window(policy.window), []
    for number, confidence in enumerate(values):
        word = "PENDING" if must_every and number % must_every == 0 else "DENIED"
        prediction = Prediction(agent, f"c{number}", word, confidence)
        decision = route(prediction, policy, window.state(spent))
        routing.add_routed(window, prediction, decision, policy, {})
        decisions.append(decision)
    return decisions


def share(decisions):
    return sum(decision.is_routed for decision in decisions) / len(decisions)


def mean_chance(decisions):
    return sum(decision.inclusion_probability for decision in decisions) / len(decisions)


@given(predictions, policies, states())
def test_every_claim_has_a_chance_to_be_seen_and_the_same_claim_is_decided_the_same(prediction, policy, state):
    decision = route(prediction, policy, state)
    assert policy.audit_share - 1e-12 <= decision.inclusion_probability <= 1
    assert 0 <= decision.effective_threshold <= 1
    assert decision == route(prediction, policy, state)
    if decision.inclusion_probability == 1:
        assert decision.is_routed


@given(predictions, policies, states(), shares)
def test_raising_the_fixed_threshold_never_unroutes_a_claim(prediction, policy, state, threshold):
    low, high = sorted((policy.threshold, threshold))
    before, after = (route(prediction, _replace(policy, threshold=value), state) for value in (low, high))
    assert set(before.reasons) <= set(after.reasons)
    assert before.inclusion_probability <= after.inclusion_probability + 1e-12


@given(predictions, policies, states(), shares, shares)
def test_raising_the_effective_threshold_by_a_bigger_budget_never_unroutes_a_claim(prediction, policy, state, one, other):
    low, high = sorted((one, other))
    before, after = (route(prediction, _replace(policy, budget_share=value), state) for value in (low, high))
    assert before.effective_threshold <= after.effective_threshold
    assert set(before.reasons) <= set(after.reasons)
    assert before.inclusion_probability <= after.inclusion_probability + 1e-9


@settings(max_examples=15, deadline=None)
@given(
    st.sampled_from([None, 0.05, 0.1, 0.5]),
    st.sampled_from([0.02, 0.2]),
    st.sampled_from([0.0, 0.3]),
    st.lists(confidences, min_size=1, max_size=5),
    st.integers(0, 10**6),
)
def test_the_stored_chance_matches_what_is_drawn_on_average(budget, audit, explore, values, salt):
    policy = RoutingPolicy(threshold=0.5, budget_share=budget, audit_share=audit, explore_share=explore, slice_by=("region",))
    pool = [*values, 0.2, 0.6, 0.85, 0.85]
    drawn = stream([pool[(salt + n * n) % len(pool)] for n in range(2000)], policy, agent=f"agent-{salt}")
    spread = sum(d.inclusion_probability * (1 - d.inclusion_probability) for d in drawn) ** 0.5 / len(drawn)
    assert abs(share(drawn) - mean_chance(drawn)) <= 5 * spread + 1e-9


def test_each_lane_is_drawn_as_often_as_it_says():
    policy = RoutingPolicy(budget_share=0.1)
    drawn = stream(beta_confidences(20_000), policy)
    audits = sum(routing.AUDIT in d.reasons for d in drawn) / len(drawn)
    assert audits == pytest.approx(0.02, abs=0.004)
    by_chance = {True: [], False: []}
    for decision in drawn:
        by_chance[decision.inclusion_probability == 1].append(decision.is_routed)
    assert all(by_chance[True])
    assert sum(by_chance[False]) / len(by_chance[False]) == pytest.approx(0.025, abs=0.01)


@pytest.mark.parametrize("values", [beta_confidences(5000), [0.85] * 5000, [None] * 5000, [1.0, 0.99] * 2500, [None, 0.3, 0.8, 0.8] * 1250])
@pytest.mark.parametrize("budget", [0.05, 0.1, 0.3])
def test_the_budget_holds_whatever_the_confidences_are_worth(values, budget):
    drawn = stream(values, RoutingPolicy(budget_share=budget))
    assert share(drawn) == pytest.approx(budget, abs=0.012)
    assert mean_chance(drawn) == pytest.approx(budget, abs=0.006)


def test_the_budget_holds_from_the_first_claims_on():
    opened = [share(stream(beta_confidences(30, seed), RoutingPolicy(budget_share=0.1), agent=f"a{seed}")) for seed in range(100)]
    assert sum(opened) / 100 == pytest.approx(0.1, abs=0.02)


def test_a_sudden_fall_of_all_confidences_costs_a_bounded_number_of_reviews():
    """At most window x rate x ln(1/rate) more, once: the n-th new value is among the lowest k with chance k/n."""
    drawn = stream([*beta_confidences(500), *(value / 10 for value in beta_confidences(500, 2))], RoutingPolicy(budget_share=0.1))
    assert sum(d.is_routed for d in drawn[500:]) < 0.1 * 500 + 75


def test_uncertain_claims_go_first():
    drawn = list(zip(values := beta_confidences(5000), stream(values, RoutingPolicy(budget_share=0.1)), strict=True))[250:]
    doubtful = [value for value, decision in drawn if routing.BELOW_THRESHOLD in decision.reasons]
    assert max(doubtful) < sorted(values)[len(values) // 5]
    by_doubt = sorted((d.priority, -value) for value, d in drawn if d.reasons == (routing.BELOW_THRESHOLD,))
    assert [value for _, value in by_doubt] == sorted(value for _, value in by_doubt)


@pytest.mark.parametrize(("confidence", "priority"), [(0.534, 0.47), (0.526, 0.47), (0.99876, 0.0012), (0.02, 0.98), (1.0, 0.0)])
def test_doubt_counts_to_two_digits_so_that_the_oldest_of_like_claims_comes_first(confidence, priority):
    prediction = rules.Prediction("adjudication", "c1", "DENIED", confidence)
    assert routing.route(prediction, RoutingPolicy(threshold=1.0, audit_share=1e-9), budget.State()).priority == priority


def test_must_review_and_audit_are_never_cut_and_take_their_share_first():
    drawn = stream(beta_confidences(4000), RoutingPolicy(budget_share=0.1), must_every=20)
    assert all(routing.MUST_REVIEW in d.reasons and d.inclusion_probability == 1 for d in drawn[::20])
    assert share(drawn[500:]) == pytest.approx(0.1, abs=0.012)
    flooded = stream(beta_confidences(4000), RoutingPolicy(budget_share=0.1), must_every=2)
    others = [d for n, d in enumerate(flooded) if n % 2 and n > 500]
    assert all(set(d.reasons) <= {routing.AUDIT} for d in others)
    assert share(others) == pytest.approx(0.02, abs=0.01)


def test_the_uncertain_claims_give_way_to_what_exam_and_watch_asked():
    policy = RoutingPolicy(budget_share=0.1)
    for examined, watched in ((16, 0), (0, 16), (4, 4), (20, 0)):
        drawn = stream(beta_confidences(5000), policy, Spent(examined=examined, watched=watched))
        left = max(0, 20 - examined - watched) / 250
        assert share(drawn) == pytest.approx(0.02 + left, abs=0.008)
        assert mean_chance(drawn) == pytest.approx(0.02 + left, abs=0.004)


def test_the_budget_holds_while_exams_ask_whenever_they_may():
    """Ask after every claim for all places there are, as a daemon that ticks often does."""
    policy, window, asked, routed = RoutingPolicy(budget_share=0.1), Window(), [], 0
    for number, confidence in enumerate(beta_confidences(5000)):
        spent = Spent(examined=sum(at > number - policy.window for at in asked))
        prediction = Prediction("claims", f"c{number}", "DENIED", confidence)
        decision = route(prediction, policy, window.state(spent))
        routing.add_routed(window, prediction, decision, policy, {})
        routed += decision.is_routed
        spent = Spent(examined=sum(at > number + 1 - policy.window for at in asked))
        asked += [number + 1] * round(budget.count_places(policy, window.state(spent)).exam)
    assert len(asked) == pytest.approx(0.8 * 0.08 * 5000, rel=0.06)
    assert (len(asked) + routed) / 5000 == pytest.approx(0.1, abs=0.006)


def test_the_day_s_budget_closes_the_lanes_but_not_audit_and_rules():
    policy = RoutingPolicy(budget_per_day=10)
    closed = full_window().state(Spent(opened_today=10))
    doubtful = [route(Prediction("claims", f"c{n}", "DENIED", 0.1), policy, closed) for n in range(2000)]
    assert {reason for d in doubtful for reason in d.reasons} == {routing.AUDIT}
    assert all(d.inclusion_probability == pytest.approx(0.02) for d in doubtful)
    assert route(Prediction("claims", "c", "PENDING", 0.1), policy, closed).is_routed
    assert (
        routing.BELOW_THRESHOLD
        in route(Prediction("claims", "c", "DENIED", 0.1), policy, full_window().state(Spent(opened_today=9))).reasons
    )


def test_a_waiting_exam_keeps_its_part_of_the_day():
    policy = RoutingPolicy(budget_per_day=10)
    own_part_used = full_window().state(Spent(opened_today=2, is_examining=True))
    assert not set(route(Prediction("claims", "c", "DENIED", 0.1), policy, own_part_used).reasons) & {routing.BELOW_THRESHOLD}
    assert budget.count_places(policy, own_part_used) == (4, 8)
    assert budget.count_places(policy, full_window().state(Spent(opened_today=10, examined_today=8, is_examining=True))) == (0, 0)
    assert budget.count_places(policy, full_window().state(Spent(opened_today=5, examined_today=3))) == (1, 5)


def test_without_a_budget_the_threshold_decides_and_a_missing_confidence_is_seen():
    policy, empty = RoutingPolicy(), Window().state()
    assert routing.BELOW_THRESHOLD in route(Prediction("claims", "c", "DENIED", 0.699), policy, empty).reasons
    assert routing.BELOW_THRESHOLD not in route(Prediction("claims", "c", "DENIED", 0.7), policy, empty).reasons
    missing = route(Prediction("claims", "c", "DENIED", None), policy, empty)
    assert routing.CONFIDENCE_MISSING in missing.reasons
    assert missing.inclusion_probability == 1


def test_a_decision_that_is_no_label_always_goes_to_an_expert():
    policy = rules.RoutingPolicy(must_review=(), labels=("APPROVED", "DENIED"))
    for decision, is_forced in (("APPROVED", False), ("approved", True), (None, True)):
        prediction = rules.Prediction("adjudication", "c1", decision, 0.99)
        decided = routing.route(prediction, policy, budget.State())
        assert (routing.MUST_REVIEW in decided.reasons) is is_forced
        assert (decided.inclusion_probability == 1.0) is is_forced


def test_exploration_asks_for_slices_that_are_hardly_labelled():
    policy = RoutingPolicy(budget_share=0.1, explore_share=0.3, slice_by=("kind",))
    labels = {"kind=old": 1000}
    window, drawn = Window(), {"old": [], "new": []}
    for number, confidence in enumerate(beta_confidences(6000)):
        kind = "new" if number % 10 == 0 else "old"
        prediction = Prediction("claims", f"c{number}", "DENIED", 0.999 if kind == "new" else confidence, {}, {"kind": kind})
        decision = route(prediction, policy, window.state(slice_labels=labels))
        routing.add_routed(window, prediction, decision, policy, labels)
        drawn[kind].append(decision)
    explored = sum(routing.EXPLORE in d.reasons for d in drawn["new"]) / len(drawn["new"])
    assert explored == pytest.approx(0.3, abs=0.06)
    assert share(drawn["old"] + drawn["new"]) == pytest.approx(0.1, abs=0.012)


def test_the_buckets_of_different_purposes_are_independent():
    purposes = ("audit", "explore", "split", "exam", "ab", "second_read", "tie")
    drawn = {purpose: [bucket(purpose, "claims", f"c{n}") for n in range(4000)] for purpose in purposes}
    for one, other in itertools.combinations(purposes, 2):
        quarters = sum(x < 0.5 and y < 0.5 for x, y in zip(drawn[one], drawn[other], strict=True))
        assert quarters / 4000 == pytest.approx(0.25, abs=0.035)


def _replace(policy, **changes):
    fields = {name: getattr(policy, name) for name in RoutingPolicy.__slots__}
    return RoutingPolicy(**{**fields, **changes})


@given(policies, st.lists(predictions, max_size=40), st.builds(budget.Spent, opened_today=st.integers(0, 30)))
def test_a_router_decides_as_if_the_budget_were_divided_for_each_claim(policy, claims, spent):
    one_by_one, window = Window(policy.window), Window(policy.window)
    labels = {"region=west": 7}
    router = routing.Router(policy, window, spent, labels)
    for claim in claims:
        expected = route(claim, policy, one_by_one.state(spent, labels))
        routing.add_routed(one_by_one, claim, expected, policy, labels)
        spent = spent._replace(opened_today=spent.opened_today + expected.is_routed)
        assert router.route(claim) == expected
    assert policy.budget_share is None or window.state() == one_by_one.state()
