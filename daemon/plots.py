"""The page with plots that a replay and the demo end with: one file that needs no network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

WIDTH, HEIGHT, MARGIN = 920, 320, 44
COLOURS = {"served": "#0b6e4f", "frozen": "#8d99ae", "ungated": "#c9a227", "random": "#7a5195"}


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
