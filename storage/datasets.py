"""Dataset versions: which settled labels are in which immutable snapshot, and to which split a case belongs for ever."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson
from sqlalchemy import Connection, Engine, RowMapping, insert, select

from storage import db, labels, ledger, sampling, snapshots
from storage.tables import DatasetVersion

GOLD_SHARE = 0.05
DEV_SHARE = 0.10
ORIGINS = {"import": "import", "late_truth": "late_truth"}


class UnknownDatasetError(LookupError):
    """There is no dataset version of this number."""


class EmptyDatasetError(ValueError):
    """There is no settled label to make a dataset of."""


def choose_split(agent: str, group_key: str, *, began_as_history: bool) -> str:
    """The split of a group, the same for ever: gold is never trained on, dev is a part of the imported history."""
    place = sampling.bucket("split", agent, group_key)
    if place < GOLD_SHARE:
        return "gold"
    return "dev" if began_as_history and place < GOLD_SHARE + DEV_SHARE else "train"


def build(engine: Engine, agent: str, root: Path, about: dict[str, Any], now: datetime) -> int:
    """Write every settled label of an agent into a new dataset version; returns its number.

    When nothing changed since the last version, that one is returned. `about` goes into the manifest: template digest, labels. An answer
    that is none of these labels (any more) is left out, and counted there. Raises `EmptyDatasetError` when there is no settled label.
    """
    with db.reading(engine) as connection:
        truths = labels.read_settled(connection, agent)
        history = labels.groups_of_history(connection, agent)
        parent = latest(connection, agent)
        settled = [one for one in truths if one.truth.answer in about.get("labels", (one.truth.answer,))]
        if not settled:
            raise EmptyDatasetError(f"agent {agent} has no settled label: import history or answer reviews first")
        digest = snapshots.root_digest(row.digest for row in _rows(connection, agent, settled, history))
        if parent is not None and _is_same(parent, digest, about):
            return int(parent["number"])
        answered_until = settled[-1].answered_at.astimezone(UTC).isoformat()
        cut = {"labels": len(settled), "left_out": len(truths) - len(settled), "answered_until": answered_until}
        lineage = {"agent": agent, "parent": parent["root"] if parent else None, "query": "every settled label", "cut": cut, **about}
        folder = root / agent / hashlib.sha256(orjson.dumps([digest, lineage], option=orjson.OPT_SORT_KEYS)).hexdigest()[:32]
        manifest = snapshots.write(folder, _rows(connection, agent, settled, history), lineage)
    with db.writing(engine) as connection:
        newest = latest(connection, agent)
        if newest is not None and _is_same(newest, digest, about):
            return int(newest["number"])
        number = int(newest["number"]) + 1 if newest else 1
        row = {"agent": agent, "number": number, "root": digest, "folder": str(folder), "rows": len(settled), "manifest": manifest}
        parent_number = newest["number"] if newest else None
        connection.execute(insert(DatasetVersion).values(**row, parent=parent_number, created_at=now))
        labels.mark_in_dataset(connection, agent, [label for one in truths for label in one.labels], number)
        ledger.append(connection, "dataset", agent, {"number": number, "root": digest, "rows": len(settled)}, now)
    return number


def _is_same(version: RowMapping, root: str, about: dict[str, Any]) -> bool:
    """Whether a version holds these rows, and says of them what is to be said."""
    return bool(version["root"] == root and about.items() <= version["manifest"].items())


def _rows(connection: Connection, agent: str, settled: Sequence[labels.Settled], history: set[str]) -> Iterator[snapshots.Row]:
    for (truth, answered_at, _), case in labels.read_cases(connection, settled):
        yield snapshots.Row(
            row_id=hashlib.sha256(f"{agent}\0{case['claim_id']}\0{case['input_digest']}".encode()).hexdigest()[:32],
            group_digest=hashlib.sha256(f"{agent}\0group\0{case['group_key']}".encode()).hexdigest()[:32],
            split=choose_split(agent, case["group_key"], began_as_history=case["group_key"] in history),
            origin=ORIGINS.get(truth.kind, "review"),
            label_id=truth.label_id,
            input=orjson.dumps(case["input"]).decode(),
            attributes=orjson.dumps(case["attributes"], option=orjson.OPT_SORT_KEYS).decode(),
            answer=truth.answer,
            rationale=case["rationale"],
            answered_at=answered_at.astimezone(UTC).isoformat(),
        )


def latest(connection: Connection, agent: str) -> RowMapping | None:
    """The newest dataset version of an agent."""
    query = select(DatasetVersion.__table__).where(DatasetVersion.agent == agent).order_by(DatasetVersion.number.desc()).limit(1)
    return connection.execute(query).mappings().first()


def read(connection: Connection, agent: str, number: int) -> RowMapping:
    """One dataset version. Raises `UnknownDatasetError`."""
    query = select(DatasetVersion.__table__).where(DatasetVersion.agent == agent, DatasetVersion.number == number)
    row = connection.execute(query).mappings().first()
    if row is None:
        raise UnknownDatasetError(f"agent {agent} has no dataset version {number}: `ratchet datasets list` shows them")
    return row


def list_all(connection: Connection, agent: str | None = None) -> list[RowMapping]:
    """Every dataset version, oldest first."""
    query = select(DatasetVersion.__table__).order_by(DatasetVersion.agent, DatasetVersion.number)
    return list(connection.execute(query.where(DatasetVersion.agent == agent) if agent else query).mappings())
