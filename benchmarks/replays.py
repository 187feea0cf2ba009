"""What the loop gains on years of real decisions: `ratchet simulate --baselines` on three streams, several seeds each.

Each replay lies in its own folder and is skipped when it is done, so that the script can be interrupted. Printed are the accuracies, the
share of the ungated gain that is kept (pooled over the streams, windows resampled), and a logistic regression on the same history.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from sklearn.feature_extraction import DictVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from benchmarks.figures import Figure, finish
from daemon import imr

STREAMS = {"2006-10": (2001, 2005, 2006, 2010), "2008-11": (2001, 2007, 2008, 2011), "2011-13": (2001, 2010, 2011, 2013)}
POOLED = ("2006-10", "2008-11")
console = Console(stderr=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path("bench-out/replays"))
    parser.add_argument("--streams", nargs="+", choices=STREAMS, default=list(STREAMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--rule", default="posterior")
    parser.add_argument("--set", dest="options", action="append", default=[], metavar="KEY=VALUE")
    asked = parser.parse_args()
    reports = {stream: [replay(asked.out, stream, seed, asked.rule, asked.options) for seed in asked.seeds] for stream in asked.streams}
    regressions = {stream: regress(stream) for stream in asked.streams}
    console.print(tabulate(reports, regressions))
    finish("replays", list(judge(reports, regressions)))


def replay(out: Path, stream: str, seed: int, rule: str, options: Sequence[str]) -> dict[str, Any]:
    """The report of one replay, which is made unless it is there."""
    folder = out / f"{stream}-{rule}-{'-'.join(options) or 'default'}-seed{seed}"
    if not (folder / "report.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        first, last, begin, end = STREAMS[stream]
        imr.write_jsonl(folder / "history.jsonl", first, last)
        imr.write_jsonl(folder / "stream.jsonl", begin, end)
        simulate(folder, "--rule", rule, "--seed", str(seed), *(part for option in options for part in ("--set", option)))
    return read_report(folder)


def simulate(folder: Path, *options: str) -> None:
    """Replay the history and the stream that lie in the folder, with all baselines, in a process of its own."""
    console.print(f"{folder.name}: replaying")
    command = [sys.executable, "-c", "from daemon import cli; raise SystemExit(cli.main())", "simulate", "--baselines"]
    files = ["--history", str(folder / "history.jsonl"), "--stream", str(folder / "stream.jsonl"), "--out", str(folder)]
    subprocess.run([*command, *files, *options], check=True, stdout=sys.stderr)


def read_report(folder: Path) -> dict[str, Any]:
    """What a replay found."""
    return dict(json.loads((folder / "report.json").read_text()))


def regress(stream: str) -> float:
    """Accuracy on the stream of a logistic regression that learned from the history once."""
    first, last, begin, end = STREAMS[stream]
    model = make_pipeline(DictVectorizer(), LogisticRegression(C=0.6, max_iter=2000))
    history, later = list(imr.read_decisions(first, last)), list(imr.read_decisions(begin, end))
    model.fit([case["input"] for case in history], [case["answer"] for case in history])
    return float(model.score([case["input"] for case in later], [case["answer"] for case in later]))


def keep_share(reports: Sequence[dict[str, Any]], seed: int = 0) -> tuple[float, float, float]:
    """The share of the ungated gain that the gate keeps, with its 95 % interval over resampled windows of each replay."""
    gains = [np.array([report["accuracy_by_window"], report["frozen_by_window"], report["ungated_by_window"]]).T for report in reports]
    generator = np.random.default_rng(seed)

    def share(windows: Sequence[np.ndarray]) -> float:
        served, frozen, ungated = np.concatenate(windows).sum(axis=0)
        return float((served - frozen) / (ungated - frozen))

    drawn = [share([part[generator.integers(0, len(part), len(part))] for part in gains]) for _ in range(2000)]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return share(gains), float(low), float(high)


def tabulate(reports: dict[str, list[dict[str, Any]]], regressions: dict[str, float]) -> Table:
    columns = ("stream", "served", "frozen", "ungated", "random", "regression", "asked", "promoted", "rejected", "seconds")
    table = Table(*columns)
    for stream, runs in reports.items():
        means = [fmean(run[f"{name}accuracy"] for run in runs) for name in ("", "frozen_", "ungated_", "random_")]
        counts = [fmean(run[name] for run in runs) for name in ("label_share", "promotions", "rejections", "seconds")]
        table.add_row(stream, *(f"{mean:.4f}" for mean in means), f"{regressions[stream]:.4f}", *(f"{count:.3g}" for count in counts))
    return table


def judge(reports: dict[str, list[dict[str, Any]]], regressions: dict[str, float]) -> Iterator[Figure]:
    for stream, runs in reports.items():
        served, frozen = (fmean(run[f"{name}accuracy"] for run in runs) for name in ("", "frozen_"))
        floor = 0.0 if stream in POOLED else -0.005
        yield Figure(f"{stream}: accuracy minus the frozen model's", served - frozen, at_least=floor)
        yield Figure(f"{stream}: frozen accuracy minus the logistic regression's", frozen - regressions[stream], at_least=-0.02)
        yield Figure(f"{stream}: share of the claims asked", max(run["label_share"] for run in runs), at_most=0.105)
    pooled = [run for stream in POOLED for run in reports.get(stream, [])]
    if pooled:
        share, low, high = keep_share(pooled)
        console.print(f"share of the ungated gain kept: {share:.2f} ({low:.2f} to {high:.2f})")
        yield Figure("share of the ungated gain kept, pooled", share, at_least=0.5)


if __name__ == "__main__":
    main()
