"""The labelled claims that a run learns from: rows of a Parquet snapshot, tokenised once into a file, and read from there one by one."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from storage import snapshots
from trainers import encoding, forms, token_tables
from trainers.encoding import LeftOut, Tokenizer
from trainers.forms import Form
from trainers.spec import Options, Prompt, ScoreSet, SpecRefusedError
from trainers.views import View

MOST_LEFT_OUT = 0.1
"""When more than this share of the training rows can't be rendered, the template is to be mended first."""


@dataclass(frozen=True, slots=True)
class Example:
    """One sequence: the model reads `prompt` and is graded on `completion`, each token of it with `weight`."""

    prompt: Sequence[int] | np.ndarray
    completion: Sequence[int] | np.ndarray
    weight: float = 1.0

    @property
    def read(self) -> np.ndarray:
        """What the model reads: all but the last token, which is only predicted."""
        return np.concatenate([np.asarray(part, dtype=np.int64) for part in (self.prompt, self.completion[:-1])])

    @property
    def tokens(self) -> int:
        """How many tokens the model reads."""
        return len(self.prompt) + len(self.completion) - 1


@dataclass(frozen=True, slots=True)
class Case:
    """One labelled claim: its prompt as text and as tokens, and the index of its answer in the label set."""

    row_id: str
    prompt: str
    answer: int
    example: Example


@dataclass(frozen=True, slots=True)
class Lessons:
    """What a run learns from. `dev` steers early stopping and the temperature; gold rows are in neither."""

    train: Sequence[Case]
    dev: Sequence[Case]
    prompts_cut: int
    rationales_left_out: int
    left_out: tuple[LeftOut, ...] = ()


def read_lessons(
    dataset: Path,
    tokenizer: Tokenizer,
    prompt: Prompt,
    labels: Sequence[str],
    options: Options,
    *,
    limit: int,
    warm: bool,
    seed: int,
    learned: Path | None = None,
    beat: Callable[[], None] = lambda: None,
) -> Lessons:
    """The train and dev rows of a snapshot as tokens; a row of any other split is never even rendered.

    Weights: 1 for an imported row, `options.new_weight` for every other. A warm start takes rows by `choose_places`, from scratch all are
    used. A row that can't be rendered is left out; raises `SpecRefusedError` when more than `MOST_LEFT_OUT` of the train rows can't.
    `beat` is called after each block of rows that is tokenised.
    """
    table = tokenize_rows(dataset, tokenizer, prompt, labels, limit, beat)
    chosen = {split: table.find(split) for split in ("train", "dev")}
    if warm:
        chosen["train"] = choose_places(table, chosen["train"], options, learned, seed)
    left_out = [one for split, places in chosen.items() for one in find_left_out(table, split, places)]
    for one in left_out:
        if one.set == "train":
            encoding.check_left_out(one, len(chosen["train"]), MOST_LEFT_OUT)
    cut, shortened = (sum(sum(table.stream(column, some)) for some in chosen.values()) for column in ("is_cut", "is_rationale_left_out"))
    read = functools.partial(read_case, table, options.new_weight)
    train, dev = (View(read, drop_left_out(table, chosen[split])) for split in ("train", "dev"))
    return Lessons(train, dev, cut, shortened, tuple(left_out))


def tokenize_rows(
    dataset: Path, tokenizer: Tokenizer, prompt: Prompt, labels: Sequence[str], limit: int, beat: Callable[[], None]
) -> token_tables.TokenTable:
    """The rows of a snapshot as tokens, from the file beside it that an earlier run with the same tokenizer, prompt and labels made."""
    root = snapshots.read_manifest(dataset)["root"]
    asked = [token_tables.VERSION, root, digest_tokenizer(tokenizer), prompt.model_dump(), list(labels), limit]
    key = hashlib.sha256(json.dumps(asked, ensure_ascii=False).encode()).hexdigest()
    path = dataset.with_name(f".{dataset.name}.tokens") / f"{key}.arrow"
    if not path.is_file():
        token_tables.write(path, encode_rows(dataset, tokenizer, prompt, labels, limit), beat)
    return token_tables.TokenTable(path)


def digest_tokenizer(tokenizer: Tokenizer) -> str:
    """What decides how a tokenizer turns text into tokens, its chat template too."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend else json.dumps([type(tokenizer).__name__, tokenizer.get_vocab()], sort_keys=True)
    marks = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.all_special_tokens, tokenizer.chat_template]
    return hashlib.sha256(f"{rules}\0{json.dumps(marks)}".encode()).hexdigest()


def encode_rows(dataset: Path, tokenizer: Tokenizer, prompt: Prompt, labels: Sequence[str], limit: int) -> Iterator[list[dict[str, Any]]]:
    """The train and dev rows of a snapshot for `token_tables.write`, a block at a time."""
    columns = ("row_id", "row_digest", "split", "origin", "answered_at", "input", "answer", "rationale")
    rows = (row for row in snapshots.read(dataset, columns) if row["split"] in {"train", "dev"})
    while block := list(itertools.islice(rows, token_tables.ROWS_AT_ONCE)):
        yield encode_block(block, tokenizer, prompt, labels, limit)


def encode_block(
    rows: Sequence[Mapping[str, Any]], tokenizer: Tokenizer, prompt: Prompt, labels: Sequence[str], limit: int
) -> list[dict[str, Any]]:
    """Some rows as `token_tables.SCHEMA` has them."""
    form = forms.find(tokenizer, prompt.form)
    completions = [encode_answer(tokenizer, form, row, labels, limit) for row in rows]
    limits = [limit - len(completion) for completion, _ in completions]
    rendered = encoding.render_prompts(tokenizer, prompt, [json.loads(row["input"]) for row in rows], limits)
    read = dict(zip(rendered.texts, encoding.encode_prompts(tokenizer, list(rendered.texts.values())), strict=True))
    return [
        {
            "row_id": row["row_id"],
            "row_digest": row["row_digest"],
            "origin": row["origin"],
            "answered_at": row["answered_at"],
            "split": row["split"],
            "answer": labels.index(row["answer"]),
            "prompt": rendered.texts.get(index),
            "problem": rendered.problems.get(index),
            "read": read.get(index, []),
            "graded": completion,
            "is_cut": index in rendered.cut,
            "is_rationale_left_out": is_left_out,
        }
        for index, (row, (completion, is_left_out)) in enumerate(zip(rows, completions, strict=True))
    ]


def encode_answer(tokenizer: Tokenizer, form: Form, row: Mapping[str, Any], labels: Sequence[str], limit: int) -> tuple[list[int], bool]:
    """A row's completion, and whether its rationale was left out because the row would be mostly rationale.

    Raises `SpecRefusedError` for an answer that is not in the label set.
    """
    if row["answer"] not in labels:
        raise SpecRefusedError(f"row {row['row_id']} has answer {row['answer']!r}, not one of {', '.join(labels)}: build the dataset anew")
    completion = encoding.encode_completion(tokenizer, form, row["answer"], row["rationale"])
    if len(completion) <= limit // 2 or not row["rationale"]:
        return completion, False
    return encoding.encode_completion(tokenizer, form, row["answer"], None), True


def find_left_out(table: token_tables.TokenTable, split: str, places: np.ndarray) -> Iterator[LeftOut]:
    """The rows at these places that have no prompt, if there are any."""
    failed = places[~table.are("problem", None, places)]
    if len(failed):
        yield LeftOut(split, list(table.stream("row_id", failed)), next(table.stream("problem", failed)))


def drop_left_out(table: token_tables.TokenTable, places: np.ndarray) -> np.ndarray:
    """The places whose rows have a prompt."""
    kept: np.ndarray = places[table.are("problem", None, places)]
    return kept


def choose_places(table: token_tables.TokenTable, places: np.ndarray, options: Options, learned: Path | None, seed: int) -> np.ndarray:
    """Where the rows lie that a warm start is trained on: the new ones, and of those in the snapshot `learned` what the policy replays.

    Of the old ones a share, and then of the imported ones at most a number, see `drop`.
    """
    old = find_old(table, places, learned) if learned and options.needs_learned else places[:0]
    share = 0.0 if options.policy == "delta" else options.replay_share
    half_life = options.replay_half_life_days
    kept = np.setdiff1d(places, drop(table, old, round(share * len(old)), half_life, seed))
    imported = kept[table.are("origin", snapshots.IMPORTED, kept)]
    return np.setdiff1d(kept, drop(table, imported, options.replay_rows, half_life, seed))


def find_old(table: token_tables.TokenTable, places: np.ndarray, learned: Path) -> np.ndarray:
    """The places whose rows, with the same answer, are in the snapshot `learned`."""
    known = pack_digests(row["row_digest"] for row in snapshots.read(learned, ("row_digest",)))
    known.sort()
    asked = pack_digests(table.stream("row_digest", places))
    return places[np.searchsorted(known, asked, "left") < np.searchsorted(known, asked, "right")]


def pack_digests(digests: Iterable[str]) -> np.ndarray:
    """Hex SHA-256 digests as 32 bytes each, where strings take over a hundred."""
    return np.fromiter((bytes.fromhex(digest) for digest in digests), dtype=f"S{snapshots.DIGEST_BYTES}")


def drop(table: token_tables.TokenTable, places: np.ndarray, keep: int, half_life: float, seed: int) -> np.ndarray:
    """All places but `keep` of them: the same for the same seed, whatever else is in the set.

    A row that was answered `half_life` days before another is half as likely to be drawn first; with 0 all are alike. It is weighted
    sampling without replacement (Efraimidis and Spirakis 2006): in ascending order of log(-log(1 - u)) - log(weight).
    """
    if keep >= len(places):
        return places[:0]

    def rank(row_id: str, answered_at: str) -> float:
        digest = hashlib.sha256(f"{seed}\0{row_id}".encode()).digest()
        drawn = math.log(-math.log1p(-(int.from_bytes(digest[:6]) + 0.5) / 2**48))
        return drawn - math.log(2) * days_of(answered_at) / half_life if half_life else drawn

    ranks = np.fromiter(map(rank, *(table.stream(name, places) for name in ("row_id", "answered_at"))), dtype=np.float64)
    return places[np.argsort(ranks, kind="stable")[keep:]]


def days_of(time: str) -> float:
    """An ISO 8601 time in days since 1970."""
    return datetime.fromisoformat(time).timestamp() / 86_400


def read_case(table: token_tables.TokenTable, new_weight: float, place: int) -> Case:
    """One row as a case; one that was not imported weighs `new_weight`."""
    weight = 1.0 if table.get("origin", place) == snapshots.IMPORTED else new_weight
    example = Example(table.get_tokens("read", place), table.get_tokens("graded", place), weight)
    return Case(table.get("row_id", place), table.get("prompt", place), table.get("answer", place), example)


def list_examples(cases: Sequence[Case]) -> View[Example]:
    """What cases teach."""
    return View(lambda place: cases[place].example, range(len(cases)))


def read_score_set(score_set: ScoreSet) -> tuple[list[str], list[dict[str, Any]]]:
    """The row ids and the input fields of a score set."""
    table = pq.read_table(score_set.path, columns=["row_id", "input"])
    return table["row_id"].to_pylist(), [json.loads(text) for text in table["input"].to_pylist()]
