"""Files of decided cases: their rows one by one, each with its line; what can't be read is a row that says why."""

from __future__ import annotations

import contextlib
import csv
import gzip
import zlib
from collections.abc import Callable, Iterator
from io import TextIOWrapper
from pathlib import Path
from typing import Any, BinaryIO, cast

import orjson

from daemon.agents import Columns

MAX_LINE = 5_000_000
FORMATS = (".csv", ".jsonl", ".ndjson")


class FileRefusedError(ValueError):
    """The file as a whole can't be imported."""


class RowRefusedError(ValueError):
    """One row can't be imported; the message says why."""


@contextlib.contextmanager
def read_rows(path: Path, columns: Columns) -> Iterator[tuple[Iterator[tuple[int, Any]], Callable[[], int]]]:
    """The numbered rows of a file, and a function that says how many of its bytes on the disk are read.

    A row that can't be read is a `RowRefusedError` in its place. Raises `FileRefusedError`.
    """
    with _opened(path) as (stream, position):
        rows = _read_csv(stream, columns) if _kind(path) == ".csv" else _read_jsonl(stream)
        yield _stop_at_damage(rows, path), position


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
    wanted = {columns.claim_id, columns.occurred_at, columns.answer, *list_names(columns.input)}
    missing = sorted(wanted - set(header))
    if missing:
        raise FileRefusedError(f"the file has no column {', '.join(missing)}: it has {', '.join(header) or 'none'}; map them in `columns`")
    repeated = sorted({name for name in header if header.count(name) > 1})
    if repeated:
        raise FileRefusedError(f"the file has more than one column {', '.join(repeated)}: rename one")


def list_names(columns: str | tuple[str, ...]) -> tuple[str, ...]:
    """The columns that the input comes from: one, or several."""
    return (columns,) if isinstance(columns, str) else columns
