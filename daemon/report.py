"""What came of a replay in figures: accuracies, the gain with its interval, verdicts, alarms, and where the answers went."""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from sqlalchemy import Connection

from daemon.agents import Agent
from daemon.cases import Case
from storage import alarms, exams, labels, registry

WINDOW = 250
RESAMPLES = 10_000
CONFIDENCE = 0.95
BASELINES = ("frozen", "ungated", "random")


@dataclass(frozen=True, slots=True)
class Window:
    """What came of one window: for each model whether its answers were right, and how many answers were asked for."""

    right: dict[str, list[bool]]
    labels: int


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


def compose(
    connection: Connection, agent: Agent, stream: Sequence[Case], windows: Sequence[Window], seed: int, seconds: float
) -> dict[str, Any]:
    """The content of `report.json`."""
    served = [window.right["champion"] for window in windows]
    verdicts = _list_verdicts(connection, agent.name, stream)
    changes = registry.history(connection, agent.name)
    raised = alarms.list_since(connection, agent.name, stream[0].occurred_at)
    asked = labels.list_labelled(connection, agent.name)
    outcomes = Counter(verdict["outcome"] for verdict in verdicts)
    used = sum(window.labels for window in windows)
    return {
        "agent": agent.name,
        "claims": len(stream),
        "window": WINDOW,
        "began_at": stream[0].occurred_at.isoformat(),
        "ended_at": stream[-1].occurred_at.isoformat(),
        "budget": agent.budget.share,
        "rule": agent.exam.rule,
        "seed": seed,
        "accuracy": mean_of(served),
        "accuracy_by_window": [mean_of([window]) for window in served],
        "labels_used": used,
        "label_share": used / len(stream),
        "promotions": outcomes["promote"],
        "rejections": outcomes["reject"],
        "inconclusive": outcomes["superseded"] + outcomes["open"],
        "rollbacks": sum(change["kind"] == "rollback" for change in changes),
        "alarms": [{"kind": row["kind"], "occurred_at": row["raised_at"].isoformat(), "message": row["message"]} for row in raised],
        "label_share_by_attribute": share_by_attribute(stream, set(asked)),
        "verdicts": verdicts,
        **_compare(windows, seed),
        "seconds": seconds,
    }


def _compare(windows: Sequence[Window], seed: int) -> dict[str, Any]:
    """Accuracies of the baselines where there are any, and the gain over the frozen one."""
    right = {name: [window.right[name] for window in windows if name in window.right] for name in ("champion", *BASELINES)}
    if not right["frozen"]:
        return {}
    found: dict[str, Any] = {}
    for name in BASELINES:
        found[f"{name}_accuracy"] = mean_of(right[name])
        found[f"{name}_by_window"] = [mean_of([window]) for window in right[name]]
    return {**found, "gain_over_frozen": bootstrap_gain(right["champion"], right["frozen"], seed).to_json()}


def _list_verdicts(connection: Connection, agent: str, stream: Sequence[Case]) -> list[dict[str, Any]]:
    """Every exam after the first version's, with its numbers and the window that it ended in."""
    ends = [case.occurred_at for case in stream[WINDOW - 1 :: WINDOW]]
    found = []
    for row in exams.list_all(connection, agent, "exam"):
        numbers = row["report"].get("numbers", row["report"])
        at = row["closed_at"] or stream[-1].occurred_at
        if row["candidate"] == "v1.0":
            continue
        found.append(
            {
                "version": row["candidate"],
                "outcome": row["outcome"] or "open",
                "at": at.isoformat(),
                "window": bisect.bisect_left(ends, at),
                "differing": numbers.get("share_differing"),
                "asked": numbers.get("asked", 0),
                "wins": numbers.get("wins", 0),
                "losses": numbers.get("losses", 0),
                "reasons": list(row["report"].get("reasons", [])),
            }
        )
    return found


def mean_of(windows: Sequence[Sequence[bool]]) -> float:
    """The share of right answers."""
    return sum(map(sum, windows)) / sum(map(len, windows))


def share_by_attribute(stream: Sequence[Case], asked: set[str]) -> dict[str, list[dict[str, Any]]]:
    """For each attribute, its values' shares of the claims and of the expert answers."""
    names = sorted({name for case in stream for name in case.attributes})
    found = {}
    for name in names:
        claims = Counter(str(case.attributes.get(name)) for case in stream)
        answers = Counter(str(case.attributes.get(name)) for case in stream if case.claim_id in asked)
        found[name] = [
            {"value": value, "claims": count / len(stream), "labels": answers[value] / max(1, answers.total())}
            for value, count in claims.most_common()
        ]
    return found
