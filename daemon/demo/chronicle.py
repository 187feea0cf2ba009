"""What happened, from the rows that the daemon wrote: the closing table with its measured times, and the page with the curve."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Any

from sqlalchemy import Connection, RowMapping

from daemon import plots, report
from daemon.demo.home import AGENT
from daemon.demo.loop import Loop, Served
from storage import alarms, datasets, db, exams, registry, runs

WINDOW = 100
HELD_BACK = 0.5
"""A window of fewer claims than this share of a whole one is left out of the curve."""


def list_events(loop: Loop) -> list[tuple[str, str, str]]:
    """The table: what, how it ended, what was measured."""
    with db.reading(loop.engine) as connection:
        trained = [run for run in reversed(runs.list_all(connection, AGENT)) if run["kind"] == "train" and run["state"] == "done"]
        rows = [("an expert's answer, until stored", f"{len(loop.expert.seconds)} answers", f"{1000 * median(loop.expert.seconds):.0f} ms")]
        for run in trained:
            rows += _list_run(connection, run, loop.expert.answered_at)
        for change in registry.history(connection, AGENT):
            if change["version"] != registry.BARE:
                rows.append(_describe_change(change))
        rows += _list_rollbacks(connection, loop)
    return rows


def _list_run(connection: Connection, run: RowMapping, answered_at: Sequence[datetime]) -> list[tuple[str, str, str]]:
    """A training, from what started it to the verdict on what it made."""
    version = registry.read(connection, AGENT, run["version"])
    dataset = datasets.read(connection, AGENT, run["dataset"])
    name, rows = run["version"], []
    before = [at for at in answered_at if at <= run["created_at"]]
    if run["trigger"] == "labels" and before:
        rows.append((f"the last answer needed → {name}'s training queued", run["reason"], tell(before[-1], run["created_at"])))
    rows.append(
        (f"queued → dataset version {dataset['number']}", f"{dataset['rows']} rows", tell(run["created_at"], dataset["created_at"]))
    )
    rows.append((f"training {name}", f"asked for by {run['trigger']}", tell(run["started_at"], run["finished_at"])))
    if version["verdict_at"] is not None:
        rows.append((f"queued → verdict on {name}", str(version["verdict"]), tell(run["created_at"], version["verdict_at"])))
    return rows


def _describe_change(change: RowMapping) -> tuple[str, str, str]:
    kind = "forced promotion" if change["is_forced"] else change["kind"]
    what = f"{kind} {change['previous']} → {change['version']}, until the node confirmed it"
    return what, str(change["state"]), tell(change["requested_at"], change["confirmed_at"])


def _list_rollbacks(connection: Connection, loop: Loop) -> list[tuple[str, str, str]]:
    """How long harm lasted: from the promotion to the rollback, in time and in claims."""
    rows, before = [], None
    for change in registry.history(connection, AGENT):
        if change["kind"] == "rollback" and before is not None:
            harmed = sum(one.version == before["version"] for one in loop.served)
            what = f"{before['version']} in service → rolled back"
            rows.append((what, f"{harmed} claims", tell(before["requested_at"], change["requested_at"])))
        before = change
    return rows


def tell(began: datetime | None, ended: datetime | None) -> str:
    """Seconds between two times."""
    return "-" if began is None or ended is None else f"{(ended - began).total_seconds():.2f} s"


def compare_versions(served: Sequence[Served]) -> list[tuple[str, str, str, str]]:
    """For each version in service: claims, its accuracy, and what v1.0 would have had on the same claims."""
    rows = []
    for version in dict.fromkeys(one.version for one in served):
        mine = [one for one in served if one.version == version]
        ours, frozen = (sum(right) / len(mine) for right in zip(*((one.is_right, one.is_frozen_right) for one in mine), strict=True))
        rows.append((version, str(len(mine)), f"{ours:.3f}", f"{frozen:.3f}"))
    return rows


def write_report(loop: Loop, path: Path, seed: int, budget: float) -> None:
    """The page: accuracy by window as served and of v1.0, the verdicts, the alarms, and where the answers went."""
    stream = loop.stream[: len(loop.served)]
    with db.reading(loop.engine) as connection:
        found = {
            "title": f"The demo: {len(stream)} claims of {stream[0].occurred_at.year} and later, seed {seed}",
            "agent": AGENT,
            "claims": len(stream),
            "window": WINDOW,
            "began_at": stream[0].occurred_at.date().isoformat(),
            "ended_at": stream[-1].occurred_at.date().isoformat(),
            "budget": budget,
            "rule": "posterior",
            "seed": seed,
            "seconds": loop.screen.seconds,
            **_count(connection),
            **_measure(loop.served, seed),
            "labels_used": len(loop.expert.answered_at),
            "label_share": len(loop.expert.answered_at) / len(stream),
            "verdicts": _list_verdicts(connection),
            "marks": find_changes(loop.served),
            "alarms": _list_alarms(connection),
            "label_share_by_attribute": report.share_by_attribute(stream, set(loop.expert.claims)),
        }
    plots.write_page(path, found)


def _count(connection: Connection) -> dict[str, int]:
    verdicts = [row["verdict"] for row in registry.list_all(connection, AGENT)]
    changes = registry.history(connection, AGENT)
    return {
        "promotions": verdicts.count("promote"),
        "rejections": verdicts.count("reject"),
        "inconclusive": verdicts.count("superseded"),
        "rollbacks": sum(change["kind"] == "rollback" for change in changes),
    }


def _measure(served: Sequence[Served], seed: int) -> dict[str, Any]:
    ours = split_windows([one.is_right for one in served])
    frozen = split_windows([one.is_frozen_right for one in served])
    return {
        "accuracy": report.mean_of(ours),
        "accuracy_by_window": [report.mean_of([window]) for window in ours],
        "frozen_accuracy": report.mean_of(frozen),
        "frozen_by_window": [report.mean_of([window]) for window in frozen],
        "gain_over_frozen": report.bootstrap_gain(ours, frozen, seed).to_json(),
    }


def split_windows(right: Sequence[bool]) -> list[Sequence[bool]]:
    """Windows of `WINDOW` claims; a last one of less than half is left out."""
    windows = [right[start : start + WINDOW] for start in range(0, len(right), WINDOW)]
    return [window for window in windows if len(window) >= HELD_BACK * WINDOW or len(windows) == 1]


def find_changes(served: Sequence[Served]) -> list[dict[str, Any]]:
    """Where in the stream another version began to answer; one that had answered before came back."""
    marks: list[dict[str, Any]] = []
    known = {served[0].version} if served else set()
    for place in range(1, len(served)):
        version = served[place].version
        if version != served[place - 1].version:
            marks.append({"window": place / WINDOW, "version": version, "outcome": "back" if version in known else "begins"})
            known.add(version)
    return marks


def _list_verdicts(connection: Connection) -> list[dict[str, Any]]:
    """Every exam after the first version's."""
    found = []
    for row in exams.list_all(connection, AGENT, "exam")[1:]:
        numbers = {name: row["report"].get(name, 0) for name in ("asked", "wins", "losses")}
        shown = {"version": row["candidate"], "outcome": row["outcome"] or "open", "at": row["closed_at"]}
        found.append({**shown, **numbers, "reasons": row["report"].get("reasons", [])})
    return found


def _list_alarms(connection: Connection) -> list[dict[str, Any]]:
    since = registry.read(connection, AGENT, registry.BARE)["created_at"]
    return [
        {"kind": row["kind"], "occurred_at": row["raised_at"], "message": row["message"]}
        for row in alarms.list_since(connection, AGENT, since)
    ]
