"""Dataset snapshots on disk: Parquet shards and a manifest, written once, checked row by row.

Files only: the GPU programs read snapshots without a database.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from storage.artifacts import move_into_place, name_partial, write_atomically

MANIFEST = "manifest.json"
SHARD_ROWS, READ_ROWS = 50_000, 4096
DIGEST_BYTES = 32
SPLITS = ("train", "dev", "gold")
IMPORTED = "import"

# `input` and `attributes` are JSON texts, `input` with its fields in the sender's order; `answered_at` is an ISO 8601 UTC time.
SCHEMA = pa.schema(
    [
        pa.field("row_id", pa.string(), nullable=False),
        pa.field("row_digest", pa.string(), nullable=False),
        pa.field("group_digest", pa.string(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        pa.field("origin", pa.string(), nullable=False),
        pa.field("label_id", pa.string(), nullable=False),
        pa.field("input", pa.string(), nullable=False),
        pa.field("attributes", pa.string(), nullable=False),
        pa.field("answer", pa.string(), nullable=False),
        pa.field("rationale", pa.string()),
        pa.field("answered_at", pa.string(), nullable=False),
    ]
)


class SnapshotDamagedError(RuntimeError):
    """A snapshot's files are not the ones that its manifest describes."""


@dataclass(frozen=True, slots=True)
class Row:
    """One labelled case of a dataset version. `origin` is review, import, late_truth or corpus."""

    row_id: str
    group_digest: str
    split: str
    origin: str
    label_id: str
    input: str
    attributes: str
    answer: str
    rationale: str | None
    answered_at: str

    @property
    def digest(self) -> str:
        """The hex SHA-256 of the row's content as compact JSON with sorted keys."""
        content = json.dumps(asdict(self), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        return hashlib.sha256(content.encode()).hexdigest()


def root_digest(row_digests: Iterable[str]) -> str:
    """A dataset's identity: `sha256:` over its sorted row digests, a line each.

    They are kept as bytes, end to end, and sorted where they lie: 32 MB for a million rows, where strings take 200.
    """
    kept = bytearray()
    for digest in row_digests:
        kept += bytes.fromhex(digest)
    np.frombuffer(kept, dtype=f"S{DIGEST_BYTES}").sort()
    root, step = hashlib.sha256(), READ_ROWS * DIGEST_BYTES
    for start in range(0, len(kept), step):
        root.update((("\n" if start else "") + kept[start : start + step].hex("\n", DIGEST_BYTES)).encode())
    return f"sha256:{root.hexdigest()}"


def write(folder: Path, rows: Iterable[Row], about: dict[str, Any]) -> dict[str, Any]:
    """Stream `rows` into zstd Parquet shards with `manifest.json` beside them; returns the manifest.

    The folder appears whole or not at all; one that is there already is kept when it is the same dataset.
    """
    partial = name_partial(folder.parent)
    partial.mkdir(parents=True)
    digests: list[str] = []
    counts: Counter[tuple[str, str]] = Counter()
    origins: Counter[str] = Counter()
    shards: list[dict[str, Any]] = []
    batch: list[Row] = []

    def flush() -> None:
        name = f"shard-{len(shards):05d}.parquet"
        records = [{**asdict(row), "row_digest": row.digest} for row in batch]
        pq.write_table(pa.Table.from_pylist(records, schema=SCHEMA), partial / name, compression="zstd")
        with (partial / name).open("rb") as file:
            shards.append({"name": name, "rows": len(batch), "sha256": hashlib.file_digest(file, "sha256").hexdigest()})
        digests.extend(record["row_digest"] for record in records)
        batch.clear()

    for row in rows:
        counts[row.split, row.answer] += 1
        origins[row.origin] += 1
        batch.append(row)
        if len(batch) >= SHARD_ROWS:
            flush()
    if batch:
        flush()
    manifest = {
        "schema": 1,
        "root": root_digest(digests),
        "rows": len(digests),
        "splits": {split: {a: n for (s, a), n in sorted(counts.items()) if s == split} for split in SPLITS},
        "origins": dict(sorted(origins.items())),
        "shards": shards,
        **about,
    }
    write_atomically(partial / MANIFEST, json.dumps(manifest, indent=2, sort_keys=True).encode())
    if not move_into_place(partial, folder):
        shutil.rmtree(partial)
        if read_manifest(folder)["root"] != manifest["root"]:
            raise SnapshotDamagedError(f"{folder} holds another dataset than the one that was to be written there: move it away")
    return read_manifest(folder)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a snapshot. Raises `SnapshotDamagedError` when it is missing or not JSON."""
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
        _ = manifest["root"], manifest["shards"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        message = f"{folder / MANIFEST} can't be read ({error}): restore the snapshot from a backup or build a new version"
        raise SnapshotDamagedError(message) from error
    return manifest


def read(folder: Path, columns: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
    """The rows of a snapshot in their written order, a shard in memory at a time."""
    for shard in read_manifest(folder)["shards"]:
        with pq.ParquetFile(folder / shard["name"]) as file:
            for batch in file.iter_batches(batch_size=READ_ROWS, columns=list(columns) if columns else None):
                yield from batch.to_pylist()


def verify(folder: Path) -> list[str]:
    """Recompute every digest; returns one sentence for each thing that changed, none when the snapshot is whole.

    In memory are a few thousand rows, and the digest of every row.
    """
    manifest = read_manifest(folder)
    problems: list[str] = []
    root = root_digest(digest for shard in manifest["shards"] for digest in _check_shard(folder, shard, problems))
    if root != manifest["root"]:
        problems.append(f"the rows give root {root}, the manifest says {manifest['root']}")
    return problems


def _check_shard(folder: Path, shard: dict[str, Any], problems: list[str]) -> Iterator[str]:
    """The digests of a shard's rows as they are now; what is wrong with it is added to `problems`."""
    path = folder / shard["name"]
    try:
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != shard["sha256"]:
                problems.append(f"shard {shard['name']} is not the file that was written")
        with pq.ParquetFile(path) as rows:
            for batch in rows.iter_batches(batch_size=READ_ROWS):
                for record in batch.to_pylist():
                    claimed = record.pop("row_digest", None)
                    actual = Row(**record).digest
                    if actual != claimed:
                        problems.append(f"row {record['row_id']} (label {record['label_id']}) changed")
                    yield actual
    except (OSError, TypeError, pa.ArrowException) as error:  # TypeError: it has other columns than a row
        problems.append(f"shard {shard['name']} can't be read: {error}")


def diff(old: Path, new: Path) -> dict[str, list[str]]:
    """Row ids that were added, removed or changed between two snapshots."""
    columns = ("row_id", "row_digest")
    before = {row["row_id"]: row["row_digest"] for row in read(old, columns)}
    after = {row["row_id"]: row["row_digest"] for row in read(new, columns)}
    return {
        "added": sorted(after.keys() - before.keys()),
        "removed": sorted(before.keys() - after.keys()),
        "changed": sorted(key for key in after.keys() & before.keys() if after[key] != before[key]),
    }
