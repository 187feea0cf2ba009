"""Labelled rows as tokens on the disk: made once, kept as an Arrow file, and read through a memory map, however many there are."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import compute

from storage import artifacts

VERSION = 2
"""Of how rows become tokens: raised with every change of that, so that a table made before is not read any more."""
ROWS_AT_ONCE = 1024
"""Rows that are tokenised and written together; every block of a file but the last has so many."""

# `read` and `graded` are tokens; a row of which no prompt can be made has a `problem` and no prompt.
SCHEMA = pa.schema(
    [
        pa.field("row_id", pa.string(), nullable=False),
        pa.field("row_digest", pa.string(), nullable=False),
        pa.field("origin", pa.string(), nullable=False),
        pa.field("answered_at", pa.string(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        pa.field("answer", pa.int32(), nullable=False),
        pa.field("prompt", pa.string()),
        pa.field("problem", pa.string()),
        pa.field("read", pa.list_(pa.int32()), nullable=False),
        pa.field("graded", pa.list_(pa.int32()), nullable=False),
        pa.field("is_cut", pa.bool_(), nullable=False),
        pa.field("is_rationale_left_out", pa.bool_(), nullable=False),
    ]
)


class TokenTable:
    """The rows of one file by their place. Nothing is read before it is asked for."""

    def __init__(self, path: Path) -> None:
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        self.blocks = [reader.get_batch(number) for number in range(reader.num_record_batches)]

    def find(self, split: str) -> np.ndarray:
        """The places of a split's rows, in their written order."""
        return self.are("split", split, np.arange(sum(map(len, self.blocks)))).nonzero()[0]

    def are(self, column: str, value: str | None, places: np.ndarray) -> np.ndarray:
        """Whether a column has the value at each of some places, which are in ascending order."""
        compare = compute.is_null if value is None else functools.partial(compute.equal, value)
        found = [compare(part).to_numpy(zero_copy_only=False) for part in self._take(column, places)]
        return np.concatenate([np.empty(0, dtype=bool), *found])

    def stream(self, column: str, places: np.ndarray) -> Iterator[Any]:
        """A column's values at some places, which are in ascending order; those of one block are in memory at a time."""
        for part in self._take(column, places):
            yield from part.to_pylist()

    def _take(self, column: str, places: np.ndarray) -> Iterator[Any]:
        """The same as arrays, one for each block."""
        cuts = np.searchsorted(places, np.arange(len(self.blocks) + 1) * ROWS_AT_ONCE)
        for number, block in enumerate(self.blocks):
            some = places[cuts[number] : cuts[number + 1]] - number * ROWS_AT_ONCE
            yield block[column].take(pa.array(some))

    def get(self, column: str, place: int) -> Any:
        """One value."""
        number, row = divmod(int(place), ROWS_AT_ONCE)
        return self.blocks[number][column][row].as_py()

    def get_tokens(self, column: str, place: int) -> np.ndarray:
        """One row's tokens, where they lie in the file."""
        number, row = divmod(int(place), ROWS_AT_ONCE)
        tokens: np.ndarray = self.blocks[number][column][row].values.to_numpy()
        return tokens


def write(path: Path, blocks: Iterable[list[dict[str, Any]]], beat: Callable[[], None] = lambda: None) -> None:
    """Write rows, in blocks of `ROWS_AT_ONCE`, as one file, whole or not at all, with `beat` after each block.

    A file that another run wrote meanwhile is the same.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = artifacts.name_partial(path.parent)
    try:
        with pa.OSFile(str(partial), "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as file:
            for block in blocks:
                file.write_batch(pa.RecordBatch.from_pylist(block, schema=SCHEMA))
                beat()
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
