"""storage.datasets: what is settled is in, a group never crosses splits, and the same labels are the same dataset."""

import tracemalloc
from datetime import timedelta
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage import datasets, db, labels, ledger, sampling, snapshots
from tests.event_fixtures import ANN, BEN, OPS, PRODUCER, handle, make_agent, make_history, make_label, make_prediction, send

pytestmark = pytest.mark.databases("sqlite", "postgresql")

AGENT = "adjudication"
ABOUT = {"template": "sha256:t", "labels": ["APPROVED", "DENIED", "PENDING"]}


def build(engine, tmp_path, now):
    return datasets.build(engine, AGENT, tmp_path / "snapshots", ABOUT, now)


def deliver(engine, sent, now, principal=PRODUCER):
    send(engine, sent, now, principal)
    handle(engine, make_agent(), now)


def read_rows(engine, number):
    with db.reading(engine) as connection:
        row = datasets.read(connection, AGENT, number)
    return {one["label_id"]: one for one in snapshots.read(folder_of(row))}


def folder_of(row):
    return Path(row["folder"])


def imported_id(engine, number):
    """The standing imported label on a claim."""
    with db.reading(engine) as connection:
        found = labels.of_claim(connection, f"h{number}", AGENT)
    return next(row["id"] for row in found if row["superseded_by"] is None)


@pytest.fixture
def history(engine, now):
    """60 imported cases of 60 groups."""
    deliver(engine, [make_history(number, now) for number in range(60)], now)


def test_a_dataset_holds_every_settled_label_with_its_origin(engine, tmp_path, now, history):
    deliver(engine, [make_prediction(number, now) for number in range(4)], now)
    deliver(engine, [make_label(1, now)], now, ANN)
    deliver(engine, [make_label(2, now, kind="late_truth", answer="APPROVED")], now)
    deliver(engine, [make_label(3, now)], now, ANN)
    deliver(engine, [make_label(3, now, answer="APPROVED", kind="second_read")], now, BEN)
    number = build(engine, tmp_path, now)
    rows = read_rows(engine, number).values()
    assert sorted(row["origin"] for row in rows) == ["import"] * 60 + ["late_truth", "review"]
    with db.reading(engine) as connection:
        row = datasets.read(connection, AGENT, number)
        assert (row["rows"], row["manifest"]["template"]) == (62, "sha256:t")
        assert labels.count_fresh(connection, AGENT) == 0
        assert [entry["kind"] for entry in ledger.show(connection, limit=1)] == ["dataset"]


def test_another_prompt_makes_another_version_of_the_same_rows(engine, tmp_path, now, history):
    first, manifests = build(engine, tmp_path, now), {}
    for template in ("sha256:t2", "sha256:t"):
        number = datasets.build(engine, AGENT, tmp_path / "snapshots", {**ABOUT, "template": template}, now)
        with db.reading(engine) as connection:
            row = datasets.read(connection, AGENT, number)
        manifests[number] = (row["manifest"]["template"], row["manifest"] == snapshots.read_manifest(folder_of(row)))
    assert manifests == {first + 1: ("sha256:t2", True), first + 2: ("sha256:t", True)}
    assert build(engine, tmp_path, now) == first + 2


def test_a_claim_that_was_predicted_twice_with_one_input_is_one_case(engine, tmp_path, now):
    again = {"claim_id": "c1", "group": "member-1"}
    deliver(engine, [make_prediction(1, now), make_prediction(2, now, **again)], now)
    deliver(engine, [make_label(1, now, prediction_id="p1")], now, ANN)
    deliver(engine, [make_label(1, now, prediction_id="p2", answer="APPROVED")], now, BEN)
    with db.reading(engine) as connection:
        [(_, answers)] = labels.list_conflicts(connection)
        assert {one.answer for one in answers} == {"APPROVED", "DENIED"}
        assert labels.read_settled(connection, AGENT) == []
    deliver(engine, [make_label(1, now + timedelta(hours=1), prediction_id="p2", answer="DENIED")], now + timedelta(hours=1), BEN)
    assert len(read_rows(engine, build(engine, tmp_path, now))) == 1


def test_an_answer_that_changes_no_truth_is_nothing_new_to_learn(engine, tmp_path, now):
    deliver(engine, [make_prediction(number, now) for number in range(3)], now)
    deliver(engine, [make_label(number, now) for number in range(3)], now, ANN)
    with db.reading(engine) as connection:
        assert labels.count_fresh(connection, AGENT) == 3
    deliver(engine, [make_label(0, now, kind="second_read")], now, BEN)
    deliver(engine, [make_label(1, now, kind="second_read", answer="APPROVED")], now, BEN)
    with db.reading(engine) as connection:
        assert labels.count_fresh(connection, AGENT) == 2, "one agrees, of one experts disagree"
    build(engine, tmp_path, now)
    deliver(engine, [make_label(2, now, kind="second_read")], now, BEN)
    with db.reading(engine) as connection:
        assert labels.count_fresh(connection, AGENT) == 0


def test_a_corrected_import_replaces_the_case_as_it_was_imported_before(engine, tmp_path, now, history):
    wrong = imported_id(engine, 8)
    deliver(engine, [{**make_history(8, now, answer="APPROVED"), "id": "corrected"}], now + timedelta(hours=1))
    rows = read_rows(engine, build(engine, tmp_path, now + timedelta(hours=2)))
    assert len(rows) == 60
    assert wrong not in rows
    assert rows[imported_id(engine, 8)]["answer"] == "APPROVED"


def test_of_a_claim_that_was_imported_and_read_only_what_was_read_is_in(engine, tmp_path, now, history):
    deliver(engine, [make_prediction(7, now, claim_id="h7")], now)
    deliver(engine, [make_label(7, now, claim_id="h7")], now, ANN)
    rows = read_rows(engine, build(engine, tmp_path, now)).values()
    assert sorted(row["origin"] for row in rows) == ["import"] * 59 + ["review"]


def test_building_a_dataset_keeps_no_claim_in_memory_however_many_there_are(engine, tmp_path, now, monkeypatch):
    monkeypatch.setattr(snapshots, "SHARD_ROWS", 20)
    monkeypatch.setattr(labels, "READ_ROWS", 20)
    peaks, length = [], 10_000
    for numbers in range(100), range(100, 400):
        deliver(engine, [make_history(number, now, input={"text": "x" * length}) for number in numbers], now)
        tracemalloc.start()
        number = build(engine, tmp_path, now)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert len(read_rows(engine, number)) == 400
    assert peaks[1] - peaks[0] < 300 * length / 2


def test_an_answer_that_is_no_label_any_more_is_left_out_and_counted(engine, tmp_path, now, history):
    about = {**ABOUT, "labels": ["DENIED", "PENDING"]}
    number = datasets.build(engine, AGENT, tmp_path / "snapshots", about, now)
    rows = read_rows(engine, number).values()
    assert {row["answer"] for row in rows} == {"DENIED"}
    with db.reading(engine) as connection:
        assert datasets.read(connection, AGENT, number)["manifest"]["cut"]["left_out"] == 60 - len(rows)


def test_without_settled_labels_there_is_no_dataset(engine, tmp_path, now):
    with pytest.raises(datasets.EmptyDatasetError, match="import history or answer reviews first"):
        build(engine, tmp_path, now)


def test_the_same_labels_are_the_same_dataset(engine, tmp_path, now, history):
    assert [build(engine, tmp_path, now) for _ in range(2)] == [1, 1]
    with db.reading(engine) as connection:
        assert len(datasets.list_all(connection)) == 1


def test_a_settled_conflict_enters_the_next_dataset_and_the_parent_stays_as_it_was(engine, tmp_path, now, history):
    deliver(engine, [make_prediction(1, now)], now)
    deliver(engine, [make_label(1, now)], now, ANN)
    deliver(engine, [make_label(1, now, answer="APPROVED", kind="second_read")], now, BEN)
    first = build(engine, tmp_path, now)
    deliver(engine, [make_label(1, now, answer="PENDING", kind="adjudication")], now, OPS)
    second = build(engine, tmp_path, now)
    with db.reading(engine) as connection:
        old, new = (datasets.read(connection, AGENT, number) for number in (first, second))
    assert (old["rows"], new["rows"], new["parent"], new["manifest"]["parent"]) == (60, 61, first, old["root"])
    changes = snapshots.diff(folder_of(old), folder_of(new))
    assert [len(rows) for rows in changes.values()] == [1, 0, 0]
    assert snapshots.verify(folder_of(old)) == []


def test_a_changed_answer_is_a_changed_row(engine, tmp_path, now, history):
    deliver(engine, [make_prediction(1, now)], now)
    deliver(engine, [make_label(1, now)], now, ANN)
    first = build(engine, tmp_path, now)
    deliver(engine, [make_label(1, now + timedelta(hours=1), answer="APPROVED")], now + timedelta(hours=1), ANN)
    second = build(engine, tmp_path, now)
    with db.reading(engine) as connection:
        folders = [folder_of(datasets.read(connection, AGENT, number)) for number in (first, second)]
    assert [len(rows) for rows in snapshots.diff(*folders).values()] == [0, 0, 1]


def test_a_dataset_holds_no_claim_id_and_no_group(engine, tmp_path, now, history):
    number = build(engine, tmp_path, now)
    text = str(read_rows(engine, number))
    assert "h1'" not in text
    assert "old-1" not in text


def test_an_unknown_number_is_said(engine):
    with db.reading(engine) as connection, pytest.raises(datasets.UnknownDatasetError, match="no dataset version 7"):
        datasets.read(connection, AGENT, 7)


def find_dev_group():
    share = datasets.GOLD_SHARE + datasets.DEV_SHARE
    return next(name for number in range(1000) if datasets.GOLD_SHARE <= sampling.bucket("split", AGENT, name := f"g{number}") < share)


def test_a_later_truth_moves_no_group_to_another_split(engine, tmp_path, now):
    group = find_dev_group()
    deliver(engine, [make_history(1, now, group=group), make_history(2, now, group=group)], now)
    before = {row["row_id"]: row["split"] for row in read_rows(engine, build(engine, tmp_path, now)).values()}
    later = now + timedelta(days=1)
    deliver(engine, [make_label(1, later, claim_id="h1", kind="late_truth", answer="PENDING")], later)
    deliver(engine, [make_label(2, later, claim_id="h2", kind="late_truth", answer="PENDING")], later)
    deliver(engine, [make_prediction(3, later, group=group)], later)
    deliver(engine, [make_label(3, later)], later, ANN)
    after = read_rows(engine, build(engine, tmp_path, later)).values()
    assert set(before.values()) == {row["split"] for row in after} == {"dev"}
    assert sorted(row["origin"] for row in after) == ["late_truth", "late_truth", "review"]


def test_a_group_that_began_in_production_is_trained_on_when_its_history_comes_later(engine, tmp_path, now):
    group = find_dev_group()
    deliver(engine, [make_prediction(1, now, group=group)], now)
    deliver(engine, [make_label(1, now)], now, ANN)
    deliver(engine, [make_history(1, now, group=group)], now + timedelta(days=1))
    assert {row["split"] for row in read_rows(engine, build(engine, tmp_path, now)).values()} == {"train"}


def test_splits_have_their_shares_and_no_group_is_in_two(engine, tmp_path, now):
    cases = [make_history(number, now, group=f"group-{number % 300}") for number in range(900)]
    deliver(engine, cases, now)
    rows = read_rows(engine, build(engine, tmp_path, now)).values()
    by_group = {}
    for row in rows:
        by_group.setdefault(row["group_digest"], set()).add(row["split"])
    assert len(by_group) == 300
    assert all(len(splits) == 1 for splits in by_group.values())
    counts = {split: sum(splits == {split} for splits in by_group.values()) for split in snapshots.SPLITS}
    assert 5 <= counts["gold"] <= 30
    assert 15 <= counts["dev"] <= 50


@settings(max_examples=200, deadline=None)
@given(agent=st.text(min_size=1, max_size=20), group=st.text(min_size=1, max_size=50))
def test_gold_is_gold_wherever_the_group_began(agent, group):
    splits = {datasets.choose_split(agent, group, began_as_history=began) for began in (True, False)}
    assert splits in ({"gold"}, {"dev", "train"}, {"train"})
