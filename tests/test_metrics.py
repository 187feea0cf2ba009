import json

import numpy as np
import pytest

from trainers import metrics

LABELS = ("APPROVED", "DENIED", "PENDING")


def test_a_report_counts_what_can_be_counted_by_hand():
    answers = ["APPROVED", "APPROVED", "APPROVED", "DENIED", "DENIED", "PENDING"]
    decisions = ["APPROVED", "APPROVED", "DENIED", "DENIED", "APPROVED", "DENIED"]

    report = metrics.evaluate(answers, decisions, LABELS)

    assert report["rows"] == 6
    assert report["accuracy"] == 0.5
    assert report["confusion"] == [[2, 1, 0], [1, 1, 0], [0, 1, 0]]
    approved = report["by_label"]["APPROVED"]
    assert approved == {
        "precision": pytest.approx(2 / 3),
        "recall": pytest.approx(2 / 3),
        "f1": pytest.approx(2 / 3),
        "support": 3,
        "false_positive_rate": pytest.approx(1 / 3),
        "false_negative_rate": pytest.approx(1 / 3),
    }
    assert report["by_label"]["PENDING"]["precision"] is None
    assert report["by_label"]["PENDING"]["false_positive_rate"] == 0
    assert json.loads(json.dumps(report, allow_nan=False)) == report


def test_probabilities_are_read_in_label_order_and_not_alphabetically():
    labels = ("DENIED", "APPROVED")
    probabilities = np.array([[0.9, 0.1], [0.2, 0.8]])

    report = metrics.evaluate(["DENIED", "APPROVED"], ["DENIED", "APPROVED"], labels, probabilities)

    assert report["log_loss"] == pytest.approx(-(np.log(0.9) + np.log(0.8)) / 2)
    assert report["brier"] == pytest.approx((0.1**2 + 0.2**2) / 2)
    assert report["ece"] == pytest.approx(0.15)


def test_a_calibrated_model_has_no_calibration_error_and_a_boaster_has():
    random = np.random.default_rng(1)
    confidences = random.uniform(0.5, 1, 20_000)
    is_right = random.uniform(size=20_000) < confidences

    assert metrics.calibration_error(confidences, is_right) < 0.02
    assert metrics.calibration_error(np.ones(4), np.array([True, False, True, False])) == 0.5


@pytest.mark.parametrize("answers", [["PENDING"], ["DENIED", "DENIED"]])
def test_a_single_class_gives_a_report_without_warnings(answers):
    probabilities = np.full((len(answers), 3), 1 / 3)

    report = metrics.evaluate(answers, answers, LABELS, probabilities)

    assert report["accuracy"] == 1
    assert report["by_label"][answers[0]]["false_positive_rate"] is None
    assert report["by_label"]["APPROVED"]["recall"] is None
    json.dumps(report, allow_nan=False)


def test_no_rows_give_an_empty_report():
    assert metrics.evaluate([], [], LABELS, np.empty((0, 3))) == {"rows": 0, "labels": list(LABELS)}


def test_an_answer_outside_the_label_set_is_named():
    with pytest.raises(ValueError, match="'MAYBE' is not in the label set"):
        metrics.evaluate(["MAYBE"], ["DENIED"], LABELS)


def test_agreement_takes_chance_out():
    assert metrics.agreement(["APPROVED", "DENIED"], ["APPROVED", "DENIED"], LABELS) == {"rows": 2, "share": 1, "kappa": 1}
    assert metrics.agreement(["APPROVED", "DENIED"] * 2, ["APPROVED", "APPROVED", "DENIED", "DENIED"], LABELS)["kappa"] == 0
    assert metrics.agreement(["DENIED"], ["DENIED"], LABELS) == {"rows": 1, "share": 1, "kappa": None}
    assert metrics.agreement([], [], LABELS)["share"] is None
