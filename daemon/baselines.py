"""What the loop is compared with in a replay: the same training on labels that were drawn at random, every candidate promoted."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from storage import snapshots
from trainers import spec


@dataclass(slots=True)
class RandomLabels:
    """A chain of adapters that learns from as many labels as the loop used, drawn evenly from each window.

    `perform` does a run folder and returns its attempt's folder; `newest` is the adapter that would be in service.
    """

    folder: Path
    seed: int
    perform: Callable[[Path], Path]
    newest: spec.Model | None = None
    learned: Path | None = None
    drawn: list[snapshots.Row] = field(default_factory=list)

    def draw(self, number: int, rows: Sequence[snapshots.Row], count: int) -> None:
        """Take `count` labels of window `number` at random."""
        self.drawn += random.Random(f"{self.seed}/{number}").sample(rows, min(count, len(rows)))

    def learn(self, version: str, run_dir: Path) -> None:
        """Train as the loop trained `version` in `run_dir`: the same history and options, our own labels and our own last adapter.

        The first training begins where the loop's does: with the version that both know.
        """
        theirs = spec.read_spec(run_dir)
        ours = self.folder / version
        if theirs.dataset is None or theirs.candidate is None:
            raise ValueError(f"{run_dir} is no training run")
        if not (ours / "spec.json").exists():
            manifest = snapshots.write(ours / "snapshot", self._rows(theirs.dataset), {})
            base = self.newest.base if self.newest and theirs.options.makes_base else None
            begin = self.newest if theirs.init_adapter else None
            update = {
                "base": base or theirs.base,
                "run_id": f"random-{version}",
                "dataset": ours / "snapshot",
                "dataset_digest": manifest["root"],
                "init_adapter": begin.adapter if begin else theirs.init_adapter,
                "init_adapter_digest": begin.adapter_digest if begin else theirs.init_adapter_digest,
                "learned": theirs.learned and (self.learned or theirs.learned),
                "others": (),
                "score_sets": (),
            }
            spec.write_spec(ours, theirs.model_copy(update=update))
        attempt = self.perform(ours)
        result = json.loads((attempt / spec.RESULT).read_text())
        trained = result.get("adapter") or result["model"]
        made: dict[str, Any] = {"adapter": attempt / trained["path"], "adapter_digest": trained["digest"]}
        if "model" in result:
            made = {"base": spec.Base(path=attempt / trained["path"], digest=trained["digest"])}
        self.learned = ours / "snapshot"
        self.newest = theirs.candidate.model_copy(update={**made, "temperature": result["temperature"]})

    def _rows(self, dataset: Path) -> Iterator[snapshots.Row]:
        yield from imported_rows(dataset)
        yield from self.drawn


def imported_rows(dataset: Path) -> Iterable[snapshots.Row]:
    """The rows of a snapshot that came with the history."""
    for row in snapshots.read(dataset):
        if row["origin"] == snapshots.IMPORTED:
            content: dict[str, Any] = {name: value for name, value in row.items() if name != "row_digest"}
            yield snapshots.Row(**content)
