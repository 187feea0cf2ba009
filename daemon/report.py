"""What a simulation found: accuracies, the gain with its interval, and a page with plots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

RESAMPLES = 10_000
CONFIDENCE = 0.95
WIDTH, HEIGHT, MARGIN = 920, 320, 44
COLOURS = {"served": "#0b6e4f", "frozen": "#8d99ae", "ungated": "#c9a227", "random": "#7a5195"}


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate with its 95 % interval."""

    estimate: float
    low: float
    high: float

    def to_json(self) -> dict[str, float]:
        """As in `report.json`."""
        return {"estimate": self.estimate, "low": self.low, "high": self.high}


def bootstrap_gain(ours: Sequence[Sequence[bool]], theirs: Sequence[Sequence[bool]], seed: int) -> Interval:
    """The difference of two accuracies on the same claims, windows resampled whole: claims near in time are not independent."""
    differences = np.array([sum(a) - sum(b) for a, b in zip(ours, theirs, strict=True)], dtype=float)
    sizes = np.array([len(window) for window in ours], dtype=float)
    drawn = np.random.default_rng(seed).integers(0, len(sizes), (RESAMPLES, len(sizes)))
    gains = differences[drawn].sum(axis=1) / sizes[drawn].sum(axis=1)
    low, high = np.quantile(gains, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(float(differences.sum() / sizes.sum()), float(low), float(high))


def write_page(path: Path, report: Mapping[str, Any]) -> None:
    """Write `report.html`: one file that needs no network."""
    folder = jinja2.FileSystemLoader(Path(__file__).with_name("templates"))
    page = jinja2.Environment(loader=folder, autoescape=True, trim_blocks=True, lstrip_blocks=True).get_template("report.html")
    names = {"served": "accuracy_by_window", **{name: f"{name}_by_window" for name in ("frozen", "ungated", "random")}}
    lines = {name: report[key] for name, key in names.items() if report.get(key)}
    plot = plot_accuracy(lines, report.get("marks", report["verdicts"]))
    path.write_text(page.render(report=report, plot=plot, colours=COLOURS, lines=lines), encoding="utf-8")


def plot_accuracy(lines: Mapping[str, Sequence[float]], verdicts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The points of each line and the verdicts' places, in the units of the drawing; the page draws them as SVG."""
    values = [value for line in lines.values() for value in line]
    low, high = (min(values) // 0.05) * 0.05, (max(values) // 0.05 + 1) * 0.05
    count = max(len(line) for line in lines.values())

    def across(window: float) -> float:
        return round(MARGIN + window / max(1, count - 1) * (WIDTH - 2 * MARGIN), 1)

    def down(value: float) -> float:
        return round(HEIGHT - MARGIN - (value - low) / (high - low) * (HEIGHT - 2 * MARGIN), 1)

    steps = round((high - low) / 0.05)
    return {
        "width": WIDTH,
        "height": HEIGHT,
        "margin": MARGIN,
        "grid": [{"y": down(low + step * 0.05), "label": f"{low + step * 0.05:.2f}"} for step in range(steps + 1)],
        "lines": {name: " ".join(f"{across(i)},{down(value)}" for i, value in enumerate(line)) for name, line in lines.items()},
        "marks": [{"x": across(one["window"]), **one} for one in verdicts],
    }
