"""Run folders: what a trainer is given, and what it left behind.

RUN_DIR/  spec.json  recent.parquet  gold.parquet  truth.json  answers/MODEL.json  exam.json  attempts/N/
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
from sqlalchemy import RowMapping

from daemon.launch import find_attempt
from storage import artifacts, snapshots
from trainers import spec

CANDIDATE = "candidate"
RECENT, GOLD = "recent", "gold"
TRUTH, ANSWERS, EXAM = "truth.json", "answers", "exam.json"
TEXT_LOSS, UNTOUCHED = "text_loss.json", "base"
CONSTANT_ROWS = 20


@dataclass(frozen=True, slots=True)
class Result:
    """What an attempt published: `result.json`, with the fence that it ran under."""

    status: str
    fence: int | None
    reason: str
    content: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Answers:
    """One model's answers to a score set, by row."""

    decisions: Mapping[str, str]
    rows: Sequence[Mapping[str, Any]]

    @property
    def defect(self) -> str | None:
        """What is wrong with scores that are none; None when they can be judged."""
        if len(self.rows) < CONSTANT_ROWS:
            return None
        first = self.rows[0]["probabilities"]
        spread = max(abs(ours - theirs) for row in self.rows for ours, theirs in zip(row["probabilities"], first, strict=True))
        return None if spread > 1e-9 else f"the same probabilities on all {len(self.rows)} claims"  # noqa: PLR2004  rounding


def write_score_set(run_dir: Path, name: str, rows: Iterable[tuple[str, str]]) -> spec.ScoreSet:
    """Write rows of (row id, input as JSON text) for the models to answer."""
    ids, inputs = zip(*rows, strict=True)
    buffer = BytesIO()
    pq.write_table(pa.table({"row_id": pa.array(ids, pa.string()), "input": pa.array(inputs, pa.string())}), buffer)
    path = (run_dir / f"{name}.parquet").resolve()
    artifacts.write_atomically(path, buffer.getvalue())
    return spec.ScoreSet(name=name, path=path)


def write_recent(run_dir: Path, rows: Sequence[RowMapping]) -> list[spec.ScoreSet]:
    """Write stored claims as a score set; none when there are no claims."""
    return [write_score_set(run_dir, RECENT, ((row["id"], orjson.dumps(row["input"]).decode()) for row in rows))] if rows else []


def write_gold(run_dir: Path, snapshot: Path | None, labels: Sequence[str], slices: Sequence[str]) -> list[spec.ScoreSet]:
    """Write the snapshot's gold rows as a score set, if there are any, and what is true of them into a file that no trainer reads."""
    columns = ("row_id", "split", "input", "attributes", "answer")
    rows = [row for row in (snapshots.read(snapshot, columns) if snapshot else ()) if row["split"] == GOLD and row["answer"] in labels]
    truth = {row["row_id"]: {"answer": row["answer"], "slices": pick_slices(json.loads(row["attributes"]), slices)} for row in rows}
    artifacts.write_atomically(run_dir / TRUTH, orjson.dumps(truth))
    return [write_score_set(run_dir, GOLD, ((row["row_id"], row["input"]) for row in rows))] if rows else []


def pick_slices(attributes: Mapping[str, Any], names: Sequence[str]) -> dict[str, str]:
    """The attributes by which results are broken down."""
    return {name: str(attributes[name]) for name in names if attributes.get(name) is not None}


def describe_model(version: RowMapping, base: Path) -> spec.Model:
    """A registered version as a trainer asks it; `base` is where its base lies today."""
    return spec.Model(
        name=version["name"],
        base=spec.Base(path=base.resolve(), digest=version["base_digest"]),
        adapter=Path(version["adapter_path"]).resolve() if version["adapter_path"] else None,
        adapter_digest=version["adapter_digest"],
        prompt=spec.Prompt(text=version["prompt"], form=version["prompt_form"]),
        labels=tuple(version["labels"]),
        temperature=version["temperature"],
    )


def begin_attempt(run_dir: Path, attempt: int, fence: int) -> None:
    """Make an attempt's folder with the fence that it runs under; older attempts lose the right to publish by its being there."""
    folder = find_attempt(run_dir, attempt)
    folder.mkdir(parents=True, exist_ok=True)
    artifacts.write_atomically(folder / "attempt.json", orjson.dumps({"fence": fence}))


def read_result(run_dir: Path, attempt: int) -> Result | None:
    """What the attempt published; None when it published nothing."""
    try:
        content = orjson.loads((find_attempt(run_dir, attempt) / spec.RESULT).read_bytes())
    except FileNotFoundError:
        return None
    return Result(content["status"], content["fence"], str(content.get("reason", "")), content)


def read_progress(run_dir: Path, attempt: int) -> dict[str, Any] | None:
    """The last whole line of the attempt's progress."""
    try:
        with (find_attempt(run_dir, attempt) / spec.PROGRESS).open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - 4096))
            lines = file.read().split(b"\n")
    except FileNotFoundError:
        return None
    # What follows the last line break is a line that is being written.
    return orjson.loads(lines[-2]) if len(lines) > 1 else None


def newest_checkpoint(run_dir: Path) -> int:
    """The step of the furthest checkpoint of any attempt; 0 without one."""
    return max((int(path.name.removeprefix("step-")) for path in (run_dir / "attempts").glob(f"*/{spec.CHECKPOINTS}/step-*")), default=0)


def read_scores(run_dir: Path, attempt: int, result: Result) -> dict[tuple[str, str], Answers]:
    """The answers in `scores.parquet` by (score set, model); none of a model whose prompt no row of the set could be rendered with."""
    asked = spec.read_spec(run_dir)
    name = result.content.get("scores")
    path = find_attempt(run_dir, attempt) / str(name)
    columns = ["set", "row_id", "model", "decision", "confidence", "probabilities"]
    models = [*([asked.candidate] if asked.candidate else []), *asked.others]
    grouped: dict[tuple[str, str], list[dict[str, Any]]] = {(one.name, model.name): [] for one in asked.score_sets for model in models}
    for row in pq.read_table(path, columns=columns).to_pylist() if name else ():
        grouped.setdefault((row["set"], row["model"]), []).append(row)
    return {key: Answers({row["row_id"]: row["decision"] for row in rows}, rows) for key, rows in grouped.items()}


def keep_answers(run_dir: Path, model: str, decisions: Mapping[str, str]) -> None:
    """Keep a model's answers on the gold rows of the run that made the candidate."""
    (run_dir / ANSWERS).mkdir(exist_ok=True)
    artifacts.write_atomically(run_dir / ANSWERS / f"{model}.json", orjson.dumps(dict(decisions)))


def read_answers(run_dir: Path, model: str) -> dict[str, str] | None:
    """A model's answers on gold; none when there is no gold, None when it was not asked yet."""
    if not read_truth(run_dir):
        return {}
    try:
        decisions: dict[str, str] = orjson.loads((run_dir / ANSWERS / f"{model}.json").read_bytes())
    except FileNotFoundError:
        return None
    return decisions


def keep_text_losses(run_dir: Path, result: Result) -> None:
    """Keep how likely plain text is to the models of the run, where that was measured."""
    if "text_loss" in result.content:
        artifacts.write_atomically(run_dir / TEXT_LOSS, orjson.dumps(result.content["text_loss"]))


def read_text_losses(run_dir: Path, champion: str) -> dict[str, float | None] | None:
    """The loss on plain text of the candidate, the champion and the untouched base; None where there is no general text."""
    try:
        losses = orjson.loads((run_dir / TEXT_LOSS).read_bytes())
    except FileNotFoundError:
        return None
    return {role: losses.get(name) for role, name in (("candidate", CANDIDATE), ("champion", champion), ("base", UNTOUCHED))}


def read_truth(run_dir: Path) -> dict[str, dict[str, Any]]:
    """Answer and slices of each gold row."""
    truth: dict[str, dict[str, Any]] = orjson.loads((run_dir / TRUTH).read_bytes())
    return truth


def write_exam(run_dir: Path, report: Mapping[str, Any]) -> None:
    """Write `exam.json` beside the run that made the candidate."""
    artifacts.write_atomically(run_dir / EXAM, json.dumps(report, indent=2, ensure_ascii=False, default=str).encode())
