"""storage.snapshots: a dataset is written once and whole, and says itself which of its rows was changed."""

import dataclasses
import hashlib
import json
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from storage import snapshots


def make_row(number, **changes):
    row = snapshots.Row(
        row_id=f"row-{number:05d}",
        group_digest=f"g{number % 10}",
        split="gold" if number % 20 == 0 else "train",
        origin="import",
        label_id=f"label-{number}",
        input=json.dumps({"diagnosis": f"text {number}"}),
        attributes="{}",
        answer="APPROVED" if number % 2 else "DENIED",
        rationale=None if number % 3 else "as the guideline says",
        answered_at="2020-01-01T00:00:00+00:00",
    )
    return dataclasses.replace(row, **changes)


def rewrite(path, change, **schema):
    """Change a shard's rows by hand, as somebody would who wants to hide it."""
    rows = pq.read_table(path).to_pylist()
    change(rows)
    pq.write_table(pa.Table.from_pylist(rows, schema=schema.get("schema", snapshots.SCHEMA)), path)


@pytest.fixture
def snapshot(tmp_path, monkeypatch):
    monkeypatch.setattr(snapshots, "SHARD_ROWS", 40)
    snapshots.write(tmp_path / "set", (make_row(number) for number in range(100)), {"agent": "adjudication"})
    return tmp_path / "set"


def test_rows_come_back_as_they_were_written(snapshot):
    rows = list(snapshots.read(snapshot))
    assert [row["row_id"] for row in rows] == [f"row-{number:05d}" for number in range(100)]
    first = {name: value for name, value in rows[0].items() if name != "row_digest"}
    assert snapshots.Row(**first) == make_row(0)
    assert next(snapshots.read(snapshot, ["answer"])) == {"answer": "DENIED"}
    assert sorted(path.name for path in snapshot.iterdir()) == ["manifest.json", *(f"shard-{n:05d}.parquet" for n in range(3))]


def test_the_manifest_counts_and_names_what_is_there(snapshot):
    manifest = snapshots.read_manifest(snapshot)
    assert manifest["rows"] == 100
    assert manifest["splits"] == {"train": {"APPROVED": 50, "DENIED": 45}, "dev": {}, "gold": {"DENIED": 5}}
    assert manifest["origins"] == {"import": 100}
    assert manifest["agent"] == "adjudication"
    assert manifest["root"] == snapshots.root_digest(row["row_digest"] for row in snapshots.read(snapshot))


def test_shards_are_compressed_with_zstd(snapshot):
    assert pq.ParquetFile(snapshot / "shard-00000.parquet").metadata.row_group(0).column(0).compression == "ZSTD"


def test_the_root_is_the_same_whatever_the_order_and_the_shards(snapshot, tmp_path):
    other = snapshots.write(tmp_path / "other", (make_row(number) for number in reversed(range(100))), {})
    assert other["root"] == snapshots.read_manifest(snapshot)["root"]


def test_writing_the_same_again_keeps_what_is_there(snapshot):
    before = (snapshot / "manifest.json").stat().st_mtime_ns
    snapshots.write(snapshot, (make_row(number) for number in range(100)), {})
    assert (snapshot / "manifest.json").stat().st_mtime_ns == before
    assert [path.name for path in snapshot.parent.iterdir()] == ["set"]


def test_another_dataset_is_not_written_over_one(snapshot):
    with pytest.raises(snapshots.SnapshotDamagedError, match="holds another dataset"):
        snapshots.write(snapshot, [make_row(7)], {})
    assert snapshots.verify(snapshot) == []


def test_a_snapshot_that_is_cut_short_is_never_visible(tmp_path):
    def rows():
        yield make_row(1)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        snapshots.write(tmp_path / "set", rows(), {})
    assert not (tmp_path / "set").exists()


def test_a_whole_snapshot_has_no_problems(snapshot):
    assert snapshots.verify(snapshot) == []


def test_the_row_that_was_changed_is_named(snapshot):
    rewrite(snapshot / "shard-00001.parquet", lambda rows: rows[5].update(answer="APPROVED" if rows[5]["answer"] == "DENIED" else "DENIED"))
    problems = snapshots.verify(snapshot)
    assert "row row-00045 (label label-45) changed" in problems
    assert "shard shard-00001.parquet is not the file that was written" in problems
    assert any("the manifest says" in problem for problem in problems)
    assert not any("row-00044" in problem for problem in problems)


def test_a_row_changed_together_with_its_digest_shows_in_shard_and_root(snapshot):
    def forge(rows):
        forged = make_row(5, answer="PENDING")
        rows[5] = {**dataclasses.asdict(forged), "row_digest": forged.digest}

    rewrite(snapshot / "shard-00000.parquet", forge)
    problems = snapshots.verify(snapshot)
    assert len(problems) == 2
    assert "the rows give root" in problems[1]


def test_the_root_is_over_the_sorted_digests_and_takes_little_memory():
    digests = [hashlib.sha256(str(number).encode()).hexdigest() for number in range(40_000)]
    digests += ["00" * 32, "0a" + "00" * 31, "ff" * 32, digests[7]]
    tracemalloc.start()
    found = snapshots.root_digest(iter(digests))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found == "sha256:" + hashlib.sha256("\n".join(sorted(digests)).encode()).hexdigest()
    assert peak < 70 * len(digests)
    assert snapshots.root_digest([]) == "sha256:" + hashlib.sha256(b"").hexdigest()


@pytest.mark.parametrize("change", [lambda rows: rows.pop(), lambda rows: rows.append(rows[0])])
def test_rows_taken_out_or_put_in_twice_show_in_the_root(snapshot, change):
    rewrite(snapshot / "shard-00000.parquet", change)
    assert any("the rows give root" in problem for problem in snapshots.verify(snapshot))


def test_missing_foreign_and_torn_shards_are_named(snapshot):
    (snapshot / "shard-00000.parquet").unlink()
    (snapshot / "shard-00001.parquet").write_bytes(b"PAR1 torn")
    pq.write_table(pa.table({"x": [1]}), snapshot / "shard-00002.parquet")
    problems = snapshots.verify(snapshot)
    assert [f"shard shard-{n:05d}.parquet" in " ".join(problems) for n in range(3)] == [True, True, True]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"rows": 3}', "null"])
def test_a_manifest_that_is_none_is_said_with_the_remedy(snapshot, content):
    (snapshot / "manifest.json").write_text(content)
    with pytest.raises(snapshots.SnapshotDamagedError, match="restore the snapshot from a backup"):
        snapshots.verify(snapshot)


def test_the_difference_of_two_snapshots_is_by_row(snapshot, tmp_path):
    rows = [make_row(number) for number in range(1, 102)]
    rows[9] = make_row(10, answer="PENDING")
    snapshots.write(tmp_path / "new", rows, {})
    assert snapshots.diff(snapshot, tmp_path / "new") == {
        "added": ["row-00100", "row-00101"],
        "removed": ["row-00000"],
        "changed": ["row-00010"],
    }


def test_every_field_of_a_row_is_in_its_digest():
    digests = {make_row(1).digest} | {make_row(1, **{field.name: "other"}).digest for field in dataclasses.fields(snapshots.Row)}
    assert len(digests) == 1 + len(dataclasses.fields(snapshots.Row))


def test_memory_stays_that_of_a_shard(tmp_path, monkeypatch):
    monkeypatch.setattr(snapshots, "SHARD_ROWS", 50)
    rows = (make_row(number, input=json.dumps({"text": "x" * 20_000})) for number in range(1000))
    tracemalloc.start()
    snapshots.write(tmp_path / "set", rows, {})
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1000 * 20_000 / 2
