"""Drift: real change alarms once, a shuffled stream never does."""

import csv
import gzip
import json
import os
import random
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from daemon import drift

FIELDS = ("diagnosis_category", "diagnosis_subcategory", "treatment_category", "treatment_subcategory", "type", "age_range", "gender")


def columns(rows):
    return {name: [row[name] for row in rows] for name in FIELDS}


def alarms(reference, stream):
    previous, found = None, []
    for start in range(0, len(stream) - 249, 250):
        previous = drift.detect(reference, columns(stream[start : start + 250]), previous)
        found += [(start // 250, name) for name in previous.alarms]
    return found


@pytest.fixture(scope="module")
def decisions():
    """The real decisions in the order they were made."""
    path = Path(os.environ.get("RATCHET_TEST_DATA", "")) / "imr_ca" / "imr_ca_2001_2013.csv.gz"
    if not path.is_file():
        pytest.skip("RATCHET_TEST_DATA does not hold imr_ca: the real decisions are needed here")
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return sorted(csv.DictReader(lines), key=lambda row: (row["report_year"], int(re.findall(r"\d+", row["reference_id"])[-1])))


def split_years(rows, cut, last):
    return [row for row in rows if int(row["report_year"]) <= cut], [row for row in rows if cut < int(row["report_year"]) <= last]


@pytest.mark.parametrize(("cut", "last"), [(2005, 2010), (2007, 2011), (2010, 2013)])
def test_a_time_shuffled_stream_raises_no_alarm_and_the_real_one_does_once_per_field(decisions, cut, last):
    history, stream = split_years(decisions, cut, last)
    real = alarms(columns(history), stream)
    assert real[0][0] == 1
    assert len({name for _, name in real}) == len(real)
    mixed = history + stream
    for seed in range(2):
        random.Random(seed).shuffle(mixed)
        assert alarms(columns(mixed[: len(history)]), mixed[len(history) :]) == []


def draw(shares, count, seed):
    return random.Random(seed).choices(list(shares), list(shares.values()), k=count)


def test_two_suspicious_windows_in_a_row_make_one_alarm():
    reference = {"kind": draw({"a": 0.5, "b": 0.3, "c": 0.2}, 3000, 1)}
    changed = [{"kind": draw({"a": 0.2, "b": 0.3, "c": 0.2, "new": 0.3}, 250, seed)} for seed in range(4)]
    reports = [drift.detect(reference, changed[0], None)]
    for window in changed[1:]:
        reports.append(drift.detect(reference, window, reports[-1]))
    assert [report.alarms for report in reports] == [(), ("kind",), (), ()]
    assert reports[0].suspicious == {"kind"}
    assert reports[0].fields[0].never_seen == pytest.approx(0.3, abs=0.06)
    assert json.loads(json.dumps(reports[1].describe()))["alarms"] == ["kind"]


def test_a_single_odd_window_raises_no_alarm():
    shares = {"a": 0.5, "b": 0.5}
    reference = {"kind": draw(shares, 3000, 1)}
    previous = None
    for seed, now in enumerate([shares, {"a": 0.9, "b": 0.1}, shares, {"a": 0.9, "b": 0.1}]):
        previous = drift.detect(reference, {"kind": draw(now, 250, seed)}, previous)
        assert previous.alarms == ()


def test_numbers_are_compared_by_their_distribution_and_missing_ones_count():
    toss = random.Random(1)
    reference = {"amount": [toss.lognormvariate(5, 1) for _ in range(2000)]}
    same, shifted = ({"amount": [toss.lognormvariate(mean, 1) for _ in range(250)]} for mean in (5, 5.6))
    gone = {"amount": [None if n % 3 == 0 else value for n, value in enumerate(same["amount"])]}
    fields = [drift.detect(reference, window, None).fields[0] for window in (same, shifted, gone)]
    assert {one.test for one in fields} == {"Kolmogorov-Smirnov"}
    assert [one.is_suspicious for one in fields] == [False, True, True]


def test_identifiers_and_constant_fields_raise_no_alarm():
    reference = {"id": [f"r{n}" for n in range(2000)], "plan": ["x"] * 2000, "tags": [["a"]] * 2000}
    window = {"id": [f"w{n}" for n in range(250)], "plan": ["x"] * 250, "tags": [["a"]] * 250}
    report = drift.detect(reference, window, drift.detect(reference, window, None))
    assert report.alarms == ()
    assert {one.field: one.never_seen for one in report.fields} == {"id": 1.0, "plan": 0.0, "tags": 0.0}


def test_fields_that_one_side_lacks_are_left_out():
    assert drift.detect({"a": ["x"], "b": []}, {"b": ["y"], "c": ["z"]}, None) == drift.DriftReport()


values = st.none() | st.booleans() | st.integers(-5, 50) | st.floats(allow_nan=False, allow_infinity=False, width=32) | st.text(max_size=2)


@settings(max_examples=60, deadline=None)
@given(st.lists(values, min_size=1, max_size=60), st.lists(values, min_size=1, max_size=60))
def test_any_values_give_a_chance_between_zero_and_one(reference, window):
    (field,) = drift.detect({"f": reference}, {"f": window}, None).fields
    assert 0 <= field.p <= 1
    assert 0 <= field.never_seen <= 1
