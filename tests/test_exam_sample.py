"""daemon.exam_sample: at random, the same whenever it is drawn again, and in preference where two models are far apart."""

import pytest

from daemon import exam_sample


def test_the_exam_s_sample_is_random_blind_to_order_and_its_own():
    differing = {f"c{n}": 0.1 for n in range(200)}
    chosen = exam_sample.choose_items(differing, "claims", "exam-1", 20)
    assert chosen == exam_sample.choose_items(dict(reversed(differing.items())), "claims", "exam-1", 20)
    assert len(set(chosen)) == 20
    rest = exam_sample.choose_items({claim: 0.1 for claim in differing if claim not in chosen}, "claims", "exam-1", 20)
    assert chosen + rest == exam_sample.choose_items(differing, "claims", "exam-1", 40)
    overlaps = [len(set(chosen) & set(exam_sample.choose_items(differing, "claims", f"exam-{n}", 20))) for n in range(2, 200)]
    assert sum(overlaps) / len(overlaps) == pytest.approx(2, abs=0.4)
    assert exam_sample.choose_items(differing, "claims", "exam-1", -3) == []


def test_answers_that_routing_asked_for_count_as_far_as_the_exam_s_order_has_reached():
    """A router sends half of the claims, the uncertain ones: of the evidence they are half as well, not more."""
    shares = []
    for salt in range(200):
        claims, exam_id = {f"c{n}": 0.1 for n in range(100)}, f"exam-{salt}"
        routed, others = dict(list(claims.items())[::2]), dict(list(claims.items())[1::2])
        asked = dict.fromkeys(exam_sample.choose_items(others, "claims", exam_id, 20), 0.1)
        evidence = exam_sample.count_in(routed | asked, asked, "claims", exam_id)
        assert asked.keys() <= set(evidence)
        shares.append(len(set(evidence) & set(routed)) / len(evidence))
    assert sum(shares) / len(shares) == pytest.approx(0.5, abs=0.02)
    assert exam_sample.count_in(claims, {}, "claims", exam_id) == [], "an exam that asked nothing yet has no evidence"


def test_an_exam_asks_in_preference_where_the_models_are_far_apart():
    near, far = {f"near-{n}": 0.1 for n in range(500)}, {f"far-{n}": 0.3 for n in range(500)}
    chosen = exam_sample.choose_items(near | far, "claims", "exam-1", 200)
    assert sum(claim in far for claim in chosen) == pytest.approx(145, abs=15)


@pytest.mark.parametrize(
    ("candidate", "champion", "distance"),
    [([0.9, 0.1], [0.2, 0.8], 0.7), ([0.5001, 0.4999], [0.4999, 0.5001], 0.01), ([0.6, 0.4], [0.2, 0.5, 0.3], 1)],
)
def test_the_distance_of_two_models_is_what_would_have_to_move(candidate, champion, distance):
    assert exam_sample.measure_distance(candidate, champion) == pytest.approx(distance)
