"""How to learn from new answers: each way goes its own chain of rounds over the same data, measured on new, on gold and on plain text.

Real decisions (IMR, from 2001 on, 150 answers a round) and TREC questions (six classes; from `RATCHET_TEST_DATA`). A tiny base is made from
the history's prompts, a first adapter learns the history, then each way learns two rounds of new answers from where it was.
*New*: the cases that follow the last round. *Gold*: held-out history. *Text*: the loss on held-out prompts, against the untouched base.
Each (data set, seed) lies in a folder of its own and a run is skipped when it is done, so the benchmark goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import os
import random
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console

from benchmarks.figures import Figure, finish
from daemon import imr
from storage import artifacts, snapshots
from trainers import bases, score, tiny, train
from trainers.spec import Base, Model, Options, Prompt, ScoreSet, Spec, write_spec
from trainers.stopping import Stop

ROUNDS, GOLD, TEXTS = 2, 300, 200
WAYS: Mapping[str, Mapping[str, Any]] = {
    "cumulative": {"policy": "cumulative"},
    "cumulative, new x 1": {"policy": "cumulative", "new_weight": 1},
    "replay all": {"policy": "replay", "replay_share": 1.0},
    "replay all, new x 1": {"policy": "replay", "replay_share": 1.0, "new_weight": 1},
    "replay 30 %": {"policy": "replay", "replay_share": 0.3},
    "replay 30 %, new x 1": {"policy": "replay", "replay_share": 0.3, "new_weight": 1},
    "replay 10 %": {"policy": "replay", "replay_share": 0.1},
    "delta": {"policy": "delta"},
}
OPTIONS: Mapping[str, Any] = {"learning_rate": 2e-3, "epochs": 3, "new_weight": 5, "checkpoint_steps": 1000}
console = Console(stderr=True)
Case = dict[str, Any]


@dataclass(frozen=True)
class Field:
    """A data set: what is asked, the answers, the history and the stream after it."""

    name: str
    prompt: Prompt
    labels: tuple[str, ...]
    history: Sequence[Case]
    stream: Sequence[Case]
    round: int


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path("bench-out/incremental"))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--history", type=int, default=4000, help="cases of history, gold besides; with few the small model learns nothing")
    parser.add_argument("--data", nargs="+", choices=("imr", "trec"), default=["imr", "trec"])
    asked = parser.parse_args()
    found: dict[str, list[dict[str, dict[str, float]]]] = {name: [] for name in asked.data}
    for seed in asked.seeds:
        for name in asked.data:
            found[name].append(measure_seed(read_field(name, asked.history, seed), asked.out.absolute() / name / str(seed), seed))
    finish("incremental", [figure for name in asked.data for figure in summarise(name, found[name])])


def read_field(name: str, size: int, seed: int) -> Field:
    """The data of one seed."""
    if name == "imr":
        cases = list(imr.read_decisions(2001, 2008))
        begin = (seed - 1) * 400  # another stretch of the years for each seed
        text = "{% for name, value in input.items() %}{{ name }}: {{ value }}\n{% endfor %}decision:\n"
        labels, rows = ("APPROVED", "DENIED"), cases[begin:]
    else:
        rows = list(read_trec(Path(os.environ["RATCHET_TEST_DATA"]) / "textclf" / "trec_train.csv.gz"))
        random.Random(seed).shuffle(rows)
        text = "question: {{ input.text }}\nclass:\n"
        labels = tuple(sorted({row["answer"] for row in rows}))
    history, stream = rows[: size + GOLD + TEXTS], rows[size + GOLD + TEXTS :]
    return Field(name, Prompt(text=text), labels, history, stream[: 150 * ROUNDS + 500], 150)


def read_trec(path: Path) -> Iterator[Case]:
    with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
        for number, row in enumerate(csv.DictReader(file)):
            yield {
                "claim_id": f"trec-{number}",
                "input": {"text": row["text"]},
                "answer": row["label"],
                "occurred_at": "2026-01-01T00:00:00Z",
            }


def measure_seed(field: Field, folder: Path, seed: int) -> dict[str, dict[str, float]]:
    """The figures of every way with one seed."""
    folder.mkdir(parents=True, exist_ok=True)
    mixed = list(field.history)
    random.Random(seed).shuffle(mixed)
    gold, texts, history = mixed[:GOLD], mixed[GOLD : GOLD + TEXTS], mixed[GOLD + TEXTS :]
    write_texts(folder / "general.jsonl", field, texts)
    base = make_base(folder, field, history, seed)
    rounds = [field.stream[number * field.round : (number + 1) * field.round] for number in range(ROUNDS)]
    sets = (
        write_score_set(folder / "new.parquet", field.stream[ROUNDS * field.round :]),
        write_score_set(folder / "gold.parquet", gold),
    )
    truth = {case["claim_id"]: case["answer"] for case in (*field.stream, *gold)}
    shown = [
        write_snapshot(folder / f"set-{number}", history, [case for some in rounds[:number] for case in some])
        for number in range(ROUNDS + 1)
    ]
    held = bases.Bases()
    first = perform(held, folder / "first", field, base, shown[0], None, {"policy": "cumulative"}, sets, seed)
    before = read_figures(first, truth)
    found = {"most frequent": guess(truth, field, rounds, gold), "first": before}
    for way, options in WAYS.items():
        attempt, seconds, tokens = first, 0.0, 0
        for number in range(1, ROUNDS + 1):
            place = folder / f"{way}-{number}".replace(" ", "-").replace("%", "").replace(",", "")
            start = (attempt, shown[number - 1]) if options["policy"] != "cumulative" else None
            attempt = perform(held, place, field, base, shown[number], start, options, sets, seed)
            seconds += json.loads((attempt / "cpu.json").read_text())
            tokens += json.loads((attempt / "result.json").read_text())["training"]["tokens"]
        found[way] = {**read_figures(attempt, truth), "cpu_seconds": seconds, "tokens": tokens}
        console.print(f"{field.name} seed {seed} {way}: {found[way]}")
    return found


def guess(truth: Mapping[str, str], field: Field, rounds: Sequence[Sequence[Case]], gold: Sequence[Case]) -> dict[str, float]:
    """How often the most frequent answer is right: a way that gets no more has learned nothing."""
    new = field.stream[sum(map(len, rounds)) :]
    answers = {name: [truth[case["claim_id"]] for case in some] for name, some in (("new", new), ("gold", gold))}
    return {name: max(map(some.count, field.labels)) / len(some) for name, some in answers.items()}


def make_base(folder: Path, field: Field, history: Sequence[Case], seed: int) -> Base:
    """The tiny base, made of the history's prompts and the labels' names."""
    place = folder / "base"
    if not place.exists():
        write_texts(
            folder / "texts.jsonl", field, history, extra=[f"{label}\n" for label in field.labels for _ in range(len(history) // 50)]
        )
        tiny.make_tiny(folder / "texts.jsonl", place, tiny.OPTIONS, seed, "cpu", 1, Stop())
    return Base(path=place, digest=artifacts.digest_folder(place))


def write_texts(path: Path, field: Field, cases: Sequence[Case], extra: Sequence[str] = ()) -> None:
    texts = [*(field.prompt.render(case["input"]) for case in cases), *extra]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def write_score_set(path: Path, cases: Sequence[Case]) -> ScoreSet:
    table = {"row_id": [case["claim_id"] for case in cases], "input": [json.dumps(case["input"]) for case in cases]}
    pq.write_table(pa.table(table), path)
    return ScoreSet(name=path.stem, path=path)


def write_snapshot(folder: Path, history: Sequence[Case], labels: Sequence[Case]) -> Path:
    """A dataset version: the history as imported, the answers as reviews."""
    if not folder.exists():
        rows = [to_row(case, snapshots.IMPORTED) for case in history] + [to_row(case, "review") for case in labels]
        snapshots.write(folder, rows, {})
    return folder


def to_row(case: Case, origin: str) -> snapshots.Row:
    return snapshots.Row(
        row_id=case["claim_id"],
        group_digest=case["claim_id"],
        split="train",
        origin=origin,
        label_id=case["claim_id"],
        input=json.dumps(case["input"]),
        attributes="{}",
        answer=case["answer"],
        rationale=None,
        answered_at=case["occurred_at"],
    )


def perform(
    held: bases.Bases,
    run_dir: Path,
    field: Field,
    base: Base,
    dataset: Path,
    start: tuple[Path, Path] | None,
    options: Mapping[str, Any],
    sets: tuple[ScoreSet, ...],
    seed: int,
) -> Path:
    """Do a run unless it is done; returns its attempt's folder. `start`: the attempt that is gone on from and what it had learned."""
    attempt = run_dir / "attempts" / "1"
    if (attempt / "cpu.json").exists():
        return attempt
    adapter = json.loads((start[0] / "result.json").read_text())["adapter"] if start else None
    spec = Spec(
        run_id=run_dir.name,
        kind="train",
        agent=field.name,
        base=base,
        dataset=dataset,
        general_texts=run_dir.parent / "general.jsonl",
        init_adapter=start[0] / adapter["path"] if start and adapter else None,
        init_adapter_digest=adapter["digest"] if adapter else None,
        learned=start[1] if start else None,
        candidate=Model(name="candidate", prompt=field.prompt, labels=field.labels),
        score_sets=sets,
        options=Options(**{**OPTIONS, **options}),
        seed=seed,
        threads=1,
    )
    write_spec(run_dir, spec)
    began = time.process_time()
    status, sentence = train.run(run_dir, None, held, Stop())
    if status:
        raise SystemExit(sentence)
    artifacts.write_atomically(attempt / "cpu.json", json.dumps(time.process_time() - began).encode())
    return attempt


def read_figures(attempt: Path, truth: Mapping[str, str]) -> dict[str, float]:
    """Accuracy on new and on gold, and by how much plain text is likelier to the untouched base."""
    scores = score.read_scores(attempt / "scores.parquet")
    right = {name: [one.decision == truth[one.row_id] for one in scores if one.set == name] for name in ("new", "gold")}
    losses = json.loads((attempt / "result.json").read_text())["text_loss"]
    return {**{name: statistics.fmean(some) for name, some in right.items()}, "text": losses["candidate"] - losses["base"]}


def summarise(name: str, found: Sequence[dict[str, dict[str, float]]]) -> Iterator[Figure]:
    """The means over the seeds; each way is held against `cumulative`."""
    for way in ("most frequent", "first", *WAYS):
        means = {key: statistics.fmean(one[way][key] for one in found) for key in found[0][way]}
        reference = {key: statistics.fmean(one["cumulative"][key] for one in found) for key in found[0]["cumulative"]}
        for key, value in means.items():
            yield Figure(f"{name}, {way}: {NAMES[key]}", value, reference[key] if key in ("cpu_seconds", "tokens") else None)


NAMES = {
    "new": "accuracy on new",
    "gold": "accuracy on gold",
    "text": "loss on plain text over the untouched base's",
    "tokens": "tokens read in two rounds",
    "cpu_seconds": "CPU seconds of two rounds, scoring included",
}


if __name__ == "__main__":
    main()
