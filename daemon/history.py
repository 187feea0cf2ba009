"""Imported history: a file of cases decided before Ratchet watched becomes events, row by row and each one once."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import zoneinfo
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import orjson
from sqlalchemy import Connection, Engine

from consumers import delivery, handlers, rules, schemas
from daemon import rowfiles
from daemon.agents import Agent, Columns
from daemon.rowfiles import RowRefusedError
from storage import artifacts, db, events, ledger, tokens

BATCH = 500


@dataclass(frozen=True, slots=True)
class Refused:
    """A row that was left out."""

    line: int
    reason: str


@dataclass(slots=True)
class Summary:
    """What became of the rows of a file; `known` were imported before."""

    rows: int = 0
    imported: int = 0
    known: int = 0
    refused: int = 0


@dataclass(frozen=True, slots=True)
class Importer:
    """Who imports for which agent, and what it tells while it does: every refused row, and the bytes read so far."""

    engine: Engine
    agent: Agent
    handler: rules.Agent
    principal: tokens.Principal
    clock: Callable[[], datetime]
    on_refused: Callable[[Refused], None]
    on_progress: Callable[[int], None]

    def import_file(self, path: Path) -> Summary:
        """Import every row, a batch in one transaction; doing so again adds nothing. Raises `rowfiles.FileRefusedError`."""
        summary = Summary()
        with rowfiles.read_rows(path, self.agent.columns) as (rows, position):
            while batch := list(itertools.islice(rows, BATCH)):
                self._import_batch(batch, summary)
                self.on_progress(position())
        body = {"file": path.name, "sha256": artifacts.digest_file(path), "actor": self.principal.name, **_to_dict(summary)}
        with db.writing(self.engine) as connection:
            ledger.append(connection, "import", self.agent.name, body, self.clock())
        return summary

    def _import_batch(self, batch: list[tuple[int, Any]], summary: Summary) -> None:
        lines: list[int] = []
        contents: list[bytes] = []
        refused: list[Refused] = []
        for line, row in batch:
            summary.rows += 1
            try:
                contents.append(to_event(row, self.agent.name, self.agent.columns))
                lines.append(line)
            except RowRefusedError as refusal:
                refused.append(Refused(line, str(refusal)))
        items = schemas.parse(b"[" + b",".join(contents) + b"]", schemas.HISTORY)
        now = self.clock()
        with db.writing(self.engine) as connection:
            delivered = delivery.deliver(connection, items, {self.agent.name: self.agent.labels}, self.principal, now)
            imported, parked = self._handle(connection, {one.ulid for one in delivered if one.ulid is not None}, now)
        reasons = [one.refusal or parked.get(one.ulid or "") for one in delivered]
        refused += [Refused(line, str(reason)) for line, reason in zip(lines, reasons, strict=True) if reason is not None]
        for one in sorted(refused, key=lambda one: one.line):
            self.on_refused(one)
        summary.refused += len(refused)
        summary.imported += imported
        summary.known += reasons.count(None) - imported

    def _handle(self, connection: Connection, ulids: set[str], now: datetime) -> tuple[int, dict[str, str]]:
        """Handle those of the events that nobody has handled, in the transaction that stored them.

        Returns how many there were, and why others became dead letters.
        """
        fresh = events.read_unhandled(connection, ulids)
        outcome = handlers.handle_batch(connection, fresh, {self.agent.name: self.handler}, now)
        if not outcome["dead"]:
            return outcome["handled"], {}
        found = [events.read(connection, event.ulid) for event in fresh]
        return outcome["handled"], {
            event.ulid: f"parked as a dead letter: {event.reason}" for event in found if event and event.state == "dead"
        }


def to_event(row: Any, agent: str, columns: Columns) -> bytes:
    """The CloudEvent of one row. Its id is the digest of the case, so that the same case is the same event.

    Raises `RowRefusedError`.
    """
    if isinstance(row, RowRefusedError):
        raise row
    data: dict[str, Any] = {
        "agent": agent,
        "claim_id": _text(_require(row, columns.claim_id)),
        "input": _require_input(row, columns.input),
        "answer": _translate(_text(_require(row, columns.answer)), columns),
        "occurred_at": _time(_require(row, columns.occurred_at), columns),
    }
    for name, column in (("group", columns.group), ("rationale", columns.rationale)):
        if column is not None and row.get(column) not in (None, ""):
            data[name] = _text(row[column])
    if columns.attributes is not None and (attributes := _fields(row, columns.attributes)):
        data["attributes"] = {name: value for name, value in attributes.items() if value not in (None, "")}
    try:
        key = hashlib.sha256(orjson.dumps(data, option=orjson.OPT_SORT_KEYS)).hexdigest()
        return orjson.dumps({"specversion": "1.0", "type": schemas.HISTORY, "source": f"import:{agent}", "id": key, "data": data})
    except orjson.JSONEncodeError as error:
        raise RowRefusedError(f"the row isn't UTF-8 text or nests too deep ({error}): save the file as UTF-8") from error


def _require(row: Mapping[str, Any], column: str) -> Any:
    if column not in row:
        there = ", ".join(map(str, row)) or "none"
        raise RowRefusedError(f"column {column!r} is missing (there are {schemas.shorten(there)}): name the right one in `columns`")
    return row[column]


def _require_input(row: Mapping[str, Any], columns: str | tuple[str, ...]) -> dict[str, Any]:
    fields = _fields(row, columns)
    if not fields:
        names = ", ".join(rowfiles.list_names(columns))
        raise RowRefusedError(f"no input in column {names}: put an object there, or name the right columns in `columns.input`")
    return fields


def _text(value: Any) -> str:
    """An id or an answer; files often hold them as whole numbers."""
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise RowRefusedError(f"{schemas.shorten(value)} should be a text or a whole number")
    return str(value)


def _translate(answer: str, columns: Columns) -> str:
    return columns.answers.get(answer, answer)


def _time(value: Any, columns: Columns) -> str:
    try:
        at = datetime.fromisoformat(value)
    except (TypeError, ValueError) as error:
        raise RowRefusedError(f"{columns.occurred_at}: {schemas.shorten(value)} isn't ISO 8601 such as 2026-01-31T09:30:00Z") from error
    if at.tzinfo is None:
        if columns.zone is None:
            remedy = f"write {at.isoformat()}Z, or name the file's zone in `columns.zone`"
            raise RowRefusedError(f"{columns.occurred_at}: {schemas.shorten(value)} has no zone: {remedy}")
        at = at.replace(tzinfo=zoneinfo.ZoneInfo(columns.zone))
    return at.isoformat()


def _fields(row: Mapping[str, Any], columns: str | tuple[str, ...]) -> dict[str, Any]:
    """The object in one column (as JSON text in a CSV file), or one of several columns; empty where there is none."""
    if not isinstance(columns, str):
        return {name: row[name] for name in columns if name in row}
    value = given = row.get(columns)
    if isinstance(given, str) and given:
        with contextlib.suppress(orjson.JSONDecodeError):
            value = orjson.loads(given)
    if value in (None, ""):
        return {}
    if not isinstance(value, dict):
        raise RowRefusedError(f"{columns}: {schemas.shorten(given)} isn't a JSON object: list the columns that are the fields")
    return value


def _to_dict(summary: Summary) -> dict[str, int]:
    return {name: getattr(summary, name) for name in Summary.__dataclass_fields__}
