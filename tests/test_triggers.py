"""Why a training starts, and why not."""

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daemon.triggers import TriggerFacts, TriggerPolicy, should_retrain

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
BEFORE, AFTER = NOW - timedelta(hours=1), NOW + timedelta(hours=1)
POLICY = TriggerPolicy(labels=75)


@pytest.mark.parametrize(
    ("facts", "kind"),
    [
        (TriggerFacts(), None),
        (TriggerFacts(new_labels=74), None),
        (TriggerFacts(new_labels=75), "labels"),
        (TriggerFacts(manual_reason="new guideline"), "manual"),
        (TriggerFacts(question_digest="b", trained_question_digest="a"), "policy"),
        (TriggerFacts(question_digest="a", trained_question_digest="a"), None),
        (TriggerFacts(question_digest="a"), None),
        (TriggerFacts(policy_changes=("threshold",), new_labels=1), "policy"),
        (TriggerFacts(policy_changes=("threshold",), new_labels=0), None),
        (TriggerFacts(new_labels=5, last_trained_at=NOW, drift_alarm_at=AFTER), "drift"),
        (TriggerFacts(new_labels=5, last_trained_at=NOW, drift_alarm_at=BEFORE), None),
        (TriggerFacts(new_labels=0, last_trained_at=NOW, drift_alarm_at=AFTER), None),
        (TriggerFacts(new_labels=5, last_trained_at=NOW, last_cron_due_at=AFTER), "cron"),
        (TriggerFacts(new_labels=5, last_cron_due_at=BEFORE), "cron"),
        (TriggerFacts(new_labels=5, last_trained_at=NOW, last_cron_due_at=BEFORE), None),
        (TriggerFacts(new_labels=0, last_trained_at=NOW, last_cron_due_at=AFTER), None),
    ],
)
def test_each_cause_starts_a_training_once_and_only_with_something_to_learn(facts, kind):
    trigger = should_retrain(facts, POLICY)
    assert (trigger.kind if trigger else None) == kind


def test_the_reason_says_what_happened():
    assert should_retrain(TriggerFacts(new_labels=80), POLICY).reason == "80 new labels (a training starts at 75)."
    assert should_retrain(TriggerFacts(manual_reason="new guideline"), POLICY).reason == "new guideline"
    drift = TriggerFacts(new_labels=5, drift_alarm_at=NOW, drift_reason="Field type changed.")
    assert should_retrain(drift, POLICY).reason == "Drift alarm. Field type changed."
    policy = TriggerFacts(new_labels=5, policy_changes=("exam.rule", "threshold"))
    assert should_retrain(policy, POLICY).reason == "The policy changed in exam.rule, threshold, with 5 new labels."


def test_causes_can_be_switched_off():
    quiet = TriggerPolicy(on_drift=False, on_policy_change=False)
    assert should_retrain(TriggerFacts(new_labels=5, drift_alarm_at=NOW), quiet) is None
    assert should_retrain(TriggerFacts(question_digest="b", trained_question_digest="a"), quiet) is None
    assert should_retrain(TriggerFacts(policy_changes=("threshold",), new_labels=5), quiet) is None


@given(
    st.builds(
        TriggerFacts, new_labels=st.integers(0, 500), manual_reason=st.none() | st.text(), question_digest=st.sampled_from(["a", "b"])
    )
)
def test_nothing_starts_while_a_training_is_under_way(facts):
    running = TriggerFacts(new_labels=facts.new_labels, manual_reason=facts.manual_reason, is_training=True)
    assert should_retrain(running, POLICY) is None
