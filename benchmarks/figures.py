"""How a benchmark ends: one line of JSON with its figures, each against a baseline that ran beside it."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Figure:
    """A measured value. `at_least` and `at_most` are goals for its ratio to the baseline, or for itself when there is none."""

    name: str
    value: float
    baseline: float | None = None
    at_least: float | None = None
    at_most: float | None = None

    @property
    def ratio(self) -> float | None:
        return None if self.baseline is None else self.value / self.baseline

    @property
    def holds(self) -> bool | None:
        judged = self.value if self.ratio is None else self.ratio
        if self.at_least is None and self.at_most is None:
            return None
        return (self.at_least is None or judged >= self.at_least) and (self.at_most is None or judged <= self.at_most)

    def to_json(self) -> dict[str, Any]:
        unit = "" if self.ratio is None else " ×"  # noqa: RUF001
        goals = [f"≥ {self.at_least:g}{unit}"] if self.at_least is not None else []
        goals += [f"≤ {self.at_most:g}{unit}"] if self.at_most is not None else []
        rounded = {"value": _round(self.value), "baseline": _round(self.baseline), "ratio": _round(self.ratio)}
        return {"name": self.name, **rounded, "goal": " and ".join(goals) or None, "holds": self.holds}


def finish(benchmark: str, figures: Sequence[Figure]) -> None:
    """Print the closing line."""
    print(json.dumps({"benchmark": benchmark, "machine": describe_machine(), "figures": [figure.to_json() for figure in figures]}))


def describe_machine() -> str:
    """The processor and how many cores the process may use."""
    model = next(
        (line.partition(":")[2].strip() for line in _read("/proc/cpuinfo").splitlines() if line.startswith("model name")),
        platform.machine(),
    )
    return f"{model}, {len(os.sched_getaffinity(0))} cores"


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _round(value: float | None) -> float | None:
    """Four digits of what was measured, all of what was counted."""
    return value if value is None or isinstance(value, int) else float(f"{value:.4g}")
