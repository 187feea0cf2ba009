"""Imported history: a file of cases decided before Ratchet watched becomes events, row by row and each one once."""

from __future__ import annotations

import contextlib
import csv
import gzip
import hashlib
import itertools
import zlib
import zoneinfo
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from io import TextIOWrapper
from pathlib import Path
from typing import Any, BinaryIO, cast

import orjson
from sqlalchemy import Connection, Engine

from consumers import delivery, handlers, schemas
from daemon.agents import Agent, Columns
from storage import artifacts, db, events, ledger, tokens

BATCH = 500
MAX_LINE = 5_000_000
FORMATS = (".csv", ".jsonl", ".ndjson")


class FileRefusedError(ValueError):
    """The file as a whole can't be imported."""


class RowRefusedError(ValueError):
    """One row can't be imported; the message says why."""


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
    handler: handlers.Agent
    principal: tokens.Principal
    clock: Callable[[], datetime]
    on_refused: Callable[[Refused], None]
    on_progress: Callable[[int], None]

    def import_file(self, path: Path) -> Summary:
        """Import every row, a batch in one transaction; doing so again adds nothing. Raises `FileRefusedError`."""
        summary = Summary()
        with _opened(path) as (stream, position):
            rows = _read_csv(stream, self.agent.columns) if _kind(path) == ".csv" else _read_jsonl(stream)
            rows = _stop_at_damage(rows, path)
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
        for line, row in batch:
            summary.rows += 1
            try:
                contents.append(to_event(row, self.agent.name, self.agent.columns))
                lines.append(line)
            except RowRefusedError as refusal:
                self._refuse(line, str(refusal), summary)
        items = schemas.parse(b"[" + b",".join(contents) + b"]", schemas.HISTORY)
        now = self.clock()
        with db.writing(self.engine) as connection:
            delivered = delivery.deliver(connection, items, {self.agent.name: self.agent.labels}, self.principal, now)
            imported, parked = self._handle(connection, {one.ulid for one in delivered if one.ulid is not None}, now)
        reasons = [one.refusal or parked.get(one.ulid or "") for one in delivered]
        for line, reason in zip(lines, reasons, strict=True):
            if reason is not None:
                self._refuse(line, str(reason), summary)
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

    def _refuse(self, line: int, reason: str, summary: Summary) -> None:
        summary.refused += 1
        self.on_refused(Refused(line, reason))


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
        names = ", ".join(_names(columns))
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


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[BinaryIO, Callable[[], int]]]:
    """The file's content, unpacked, and a function that says how many of its bytes on the disk are read."""
    if _kind(path) not in FORMATS:
        raise FileRefusedError(f"{path} isn't {', '.join(FORMATS)} or one of these with .gz: convert it, or give it the right name")
    with path.open("rb") as raw:
        if path.suffix != ".gz":
            yield raw, raw.tell
            return
        with gzip.open(raw) as stream:
            yield cast("BinaryIO", stream), raw.tell


def _kind(path: Path) -> str:
    """The last suffix of the name, but for .gz."""
    return Path(path.name.removesuffix(".gz")).suffix


def _stop_at_damage(rows: Iterator[tuple[int, Any]], path: Path) -> Iterator[tuple[int, Any]]:
    """The rows up to where a .gz is damaged, and what follows as one refused row."""
    line = 0
    try:
        for line, row in rows:
            yield line, row
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        remedy = "import a whole copy for the rest; the rows before it are imported"
        yield line + 1, RowRefusedError(f"{path} isn't a whole gzip file from here on ({error}): {remedy}")


def _read_jsonl(stream: BinaryIO) -> Iterator[tuple[int, Any]]:
    for number, line in _read_lines(stream):
        if len(line) > MAX_LINE:
            yield number, RowRefusedError(f"the line is longer than {MAX_LINE} bytes")
        elif line.strip():
            yield number, _parse_line(line)


def _read_lines(stream: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Numbered lines, each cut at `MAX_LINE` + 1 bytes, so that a file without line ends fills no memory."""
    number = 0
    while line := stream.readline(MAX_LINE + 1):
        number += 1
        rest = line
        while len(rest) > MAX_LINE and not rest.endswith(b"\n"):
            rest = stream.readline(MAX_LINE + 1)
        yield number, line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line


def _parse_line(line: bytes) -> Any:
    try:
        row = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        return RowRefusedError(f"the line isn't JSON: {error}")
    return row if isinstance(row, dict) else RowRefusedError(f"the line should be a JSON object, this is {type(row).__name__}")


def _read_csv(stream: BinaryIO, columns: Columns) -> Iterator[tuple[int, Any]]:
    # Bytes that aren't UTF-8 pass as surrogates and are refused with their row, where a strict reader would end the file.
    text = TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
    csv.field_size_limit(MAX_LINE)
    try:
        yield from _read_table(csv.reader(text, strict=True), columns)
    finally:
        text.detach()  # it would close the stream, whose end the caller still asks for


def _read_table(reader: Any, columns: Columns) -> Iterator[tuple[int, Any]]:
    try:
        header: list[str] = next(reader, [])
    except csv.Error as error:
        raise FileRefusedError(f"the header can't be read: {error}") from error
    _check_header(header, columns)
    while True:
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield reader.line_num, RowRefusedError(f"the row isn't CSV: {error}")
            continue
        if len(cells) == len(header):
            yield reader.line_num, dict(zip(header, cells, strict=True))
        elif cells:
            yield reader.line_num, RowRefusedError(f"the row has {len(cells)} cells, the header {len(header)}")


def _check_header(header: list[str], columns: Columns) -> None:
    """Every row would fail the same way, so that is said once."""
    wanted = {columns.claim_id, columns.occurred_at, columns.answer, *_names(columns.input)}
    missing = sorted(wanted - set(header))
    if missing:
        raise FileRefusedError(f"the file has no column {', '.join(missing)}: it has {', '.join(header) or 'none'}; map them in `columns`")
    repeated = sorted({name for name in header if header.count(name) > 1})
    if repeated:
        raise FileRefusedError(f"the file has more than one column {', '.join(repeated)}: rename one")


def _names(columns: str | tuple[str, ...]) -> Iterable[str]:
    return (columns,) if isinstance(columns, str) else columns


def _to_dict(summary: Summary) -> dict[str, int]:
    return {name: getattr(summary, name) for name in Summary.__dataclass_fields__}
